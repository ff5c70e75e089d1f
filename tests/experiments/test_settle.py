"""A settled model: trained until a gate holds, committed as an adapter, and merged to the same bits everywhere."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats

from analysis.load import Loaded, load_cells
from analysis.sections import start as begun
from evaluation.retention import nats_per_token
from experiments.commands import settle
from experiments.data import mix
from experiments.data.reader import write_rows
from experiments.model import settled, weights
from experiments.stages import data, evaluate, resolve
from experiments.stages import model as stage
from experiments.study import config, pipeline, settled_models
from experiments.study.params_text import read_yaml
from experiments.study.paths import HERE, Paths
from experiments.training import improvable, settling
from methods.errors import UserError
from methods.tools.files import read_json, sha256, write_json

GATE = {"learning_rate": 1.0e-3, "steps": 3, "every": 10, "most": 20, "nats": 0.12}
BLOCK = {
    "from": "llama-tiny",
    "mix": {"general": 1.0},
    "lora": {"rank": 4},
    "train": {"learning_rate": 5.0e-3, "length": 64, "batch": 4},
    "gate": GATE,
}


def study(root, **changes):
    """The demo with a settled model, whose block has these changes."""
    raw = json.loads(json.dumps(read_yaml(HERE / "experiments/studies/demo/params.yaml")))
    raw["models"]["calm"] = {"settle": BLOCK | changes}
    raw["grid"]["models"] = ["calm"]
    raw["general"] |= {"settle": 40, "probe": 16}
    return config.build(raw, paths=Paths(root=root))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project in which the model was settled, and the hashes that params.yaml states then."""
    root = tmp_path_factory.mktemp("made")
    settle.main(study(root), model="calm")
    record = read_json(root / "results/settled/calm/settle.json")
    return root, {name: record[name] for name in ("adapter_sha256", "sha256")}, record


def test_a_model_is_settled_until_plain_fine_tuning_gains_too_little(made):
    _, _, record = made
    assert [gate["steps"] for gate in record["gates"]] == list(range(10, record["steps"] + 1, 10))
    assert [gate["high"] < 0.12 for gate in record["gates"]] == [gate["holds"] for gate in record["gates"]]
    assert record["settled"] is True
    assert [gate["holds"] for gate in record["gates"][:-1]] == [False] * (len(record["gates"]) - 1)
    assert record["gates"][-1]["nats"] < record["nats"] - 1  # of texts that settling never read


def test_the_gates_interval_is_students_over_texts():
    before, after, tokens = (np.array(x, float) for x in ([30, 50, 41, 80], [28, 49, 42, 71], [10, 20, 15, 30]))
    found = settling.improvement((before, tokens), (after, tokens))
    ratio = (before - after).sum() / tokens.sum()
    spread = np.std(before - after - ratio * tokens, ddof=1) / np.sqrt(4) / tokens.mean()
    assert found.value == pytest.approx(ratio)
    assert found.high == pytest.approx(ratio + stats.t.ppf(0.975, 3) * spread)


def test_a_clone_with_an_empty_cache_gives_the_same_model(made, tmp_path):
    root, hashes, _ = made
    shutil.copytree(root / "results", tmp_path / "results")  # what git has
    clone = study(tmp_path, **hashes)
    stage.main(clone, model="calm")
    folder = clone.paths.model("calm")
    assert weights.tensor_sha256(folder) == hashes["sha256"] == read_json(folder / "base.json")["sha256"]
    stage.make(clone, "llama-tiny", tmp_path / "tiny")
    base, tensors = load_file(tmp_path / "tiny/model.safetensors"), load_file(folder / "model.safetensors")
    factors, about = load_file(clone.paths.adapter("calm")), 32.0 / 4
    moved = [name for name in base if not torch.equal(base[name], tensors[name])]
    assert sorted(moved) == sorted({name.rpartition(".")[0] for name in factors})
    for name in moved:
        exact = base[name].double() + about * factors[f"{name}.b"].double() @ factors[f"{name}.a"].double()
        assert torch.allclose(tensors[name].double(), exact, rtol=1e-6, atol=1e-7)
    files = {path.name for path in (tmp_path / "tiny").iterdir()} - {"base.json", "model.safetensors"}
    assert files and all((tmp_path / "tiny" / name).read_bytes() == (folder / name).read_bytes() for name in files)
    weights.load_model(folder, dtype="auto")


def test_merging_does_not_depend_on_the_number_of_threads(made, tmp_path):
    root, hashes, _ = made
    stage.make(study(root), "llama-tiny", tmp_path / "tiny")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            tensors = settled.candidate(tmp_path / "tiny", Paths(root=root).adapter("calm"))
            assert weights.sha256_of(tensors) == hashes["sha256"]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "stated", "message"),
    [
        (
            "remove",
            {},
            r"adapter.safetensors is missing: restore it with git, or run `python -m experiments settle calm`",
        ),
        ("alter", {}, r"adapter.safetensors has the sha256 \w{64}, and settle.adapter_sha256 is \w{64}"),
        (
            "keep",
            {"adapter_sha256": None},
            r"settle.adapter_sha256 is missing: write this one if calm was just settled",
        ),
        ("keep", {"sha256": "0" * 64}, r"merged weights have the sha256 \w{64}, and settle.sha256 is 0{64}"),
        ("cut", {}, r"adapter.safetensors is damaged or no adapter of a settled model"),
        ("other", {}, r"adapter.safetensors belongs to the weights \w{12}, and those of .* are \w{12}"),
    ],
)
def test_what_is_not_the_committed_adapter_is_refused(made, tmp_path, change, stated, message):
    root, hashes, _ = made
    shutil.copytree(root / "results", tmp_path / "results")
    path = Paths(root=tmp_path).adapter("calm")
    if change == "remove":
        path.unlink()
    elif change == "alter":
        factors = load_file(path)
        save_file({name: 2 * factor for name, factor in factors.items()}, path)
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif change == "other":
        layer = {"model.layers.0.mlp.up_proj.weight": {"a": torch.ones(1, 2), "b": torch.ones(2, 1)}}
        settled.save_adapter(path, updates=layer, scale=1.0, transposed=False, base_sha256="f" * 64)
    named = hashes if change in ("remove", "alter", "keep") else hashes | {"adapter_sha256": sha256(path)}
    changes = {key: value for key, value in (named | stated).items() if value}
    with pytest.raises(UserError, match=message):
        stage.main(study(tmp_path, **changes), model="calm")
    assert not Paths(root=tmp_path).model("calm").exists()


def test_an_adapter_too_large_to_commit_is_refused(tmp_path):
    large = {"w": {"a": torch.ones(16, 200_000), "b": torch.ones(120_000, 16)}}
    with pytest.raises(UserError, match=r"the adapter has 10.2 MB, and 10 MB may be committed: lower settle.lora.rank"):
        settled.save_adapter(tmp_path / "a", updates=large, scale=1.0, transposed=False, base_sha256="0")


def test_settling_that_was_interrupted_ends_with_the_same_adapter(made, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    real, calls = settling.fit, []

    def stopping(**arguments):
        calls.append(arguments["name"])
        if len(calls) in (2, 4):
            raise Stopped
        return real(**arguments)

    monkeypatch.setattr(settling, "fit", stopping)
    for _ in range(2):
        with pytest.raises(Stopped):
            settle.main(study(tmp_path), model="calm")
    settle.main(study(tmp_path), model="calm")
    assert calls[:4] == [
        "settle, steps 1 to 10",
        "gate after 10 steps",
        "gate after 10 steps",
        "settle, steps 11 to 20",
    ]
    assert sha256(Paths(root=tmp_path).adapter("calm")) == made[1]["adapter_sha256"]
    assert read_json(tmp_path / "results/settled/calm/settle.json")["gates"] == made[2]["gates"]
    assert not list((tmp_path / "work/local/resume").rglob("save-*"))


def test_another_gate_is_passed_by_the_adapter_that_is_there_or_it_is_trained_on(made, tmp_path, monkeypatch):
    root, hashes, record = made
    shutil.copytree(root / "results", tmp_path / "results")
    path, calls, real = tmp_path / "results/settled/calm/settle.json", [], settling.fit
    monkeypatch.setattr(settling, "fit", lambda **given: (calls.append(given["name"]), real(**given))[1])
    settle.main(study(tmp_path, gate=GATE | {"nats": 1.0}), model="calm")
    again, steps = read_json(path), record["steps"]
    assert calls == [f"gate after {steps} steps"] and again["settled"]
    assert {key: again[key] for key in hashes} == hashes
    assert again["gates"] == [*record["gates"], record["gates"][-1] | {"nats_allowed": 1.0}]
    settle.main(study(tmp_path, gate=GATE | {"nats": 1e-6, "most": steps + 5}), model="calm")
    stricter = read_json(path)
    assert calls[2:] == [f"settle, steps {steps + 1} to {steps + 5}", f"gate after {steps + 5} steps"]
    assert not stricter["settled"] and stricter["steps"] == steps + 5
    first, ended = record["nats"], record["gates"][-1]["nats"]
    assert stricter["gates"][-1]["nats"] < (first + ended) / 2  # it went on from where the other had ended


def test_a_gate_that_never_holds_is_recorded(tmp_path, capsys):
    settle.main(study(tmp_path, gate=GATE | {"nats": 1e-6, "most": 5}), model="calm")
    record = read_json(tmp_path / "results/settled/calm/settle.json")
    assert record["settled"] is False
    assert [gate["steps"] for gate in record["gates"]] == [5]
    assert "calm is not settled after 5 steps" in capsys.readouterr().out


def test_the_model_depends_on_the_adapter_and_on_the_model_it_is_made_of(made, tmp_path):
    root, hashes, _ = made
    shutil.copytree(root / "results", tmp_path / "results")
    now = study(tmp_path, **hashes)
    first = resolve.model(now, "calm")
    assert first["source"] == "random:llama"
    assert first["settle"] == {"from": "llama-tiny", "file": hashes["adapter_sha256"]} | hashes
    assert "results/settled/calm/adapter.safetensors" in pipeline.local_inputs(now)
    assert resolve.model(study(tmp_path, **hashes, mix={"general": 2.0}), "calm") == first  # the bytes are the same
    start = now.models["llama-tiny"]
    other = now.model_copy(update={"models": now.models | {"llama-tiny": start.model_copy(update={"seed": 1})}})
    other.models["llama-tiny"]._written = start.as_written | {"seed": 1}
    assert resolve.model(other, "calm") != first
    now.paths.adapter("calm").write_bytes(b"")
    assert resolve.model(now, "calm") != first


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"settle": BLOCK | {"from": "llama-tin"}},
            "unknown model 'llama-tin' in models.calm.settle.from: did you mean",
        ),
        ({"settle": BLOCK | {"from": "calm"}}, "models.calm.settle.from names 'calm', which is settled itself"),
        ({"settle": BLOCK, "source": "random:llama"}, "models.calm needs one of `source` and `settle`"),
        ({"note": "n"}, "models.calm needs one of `source` and `settle`"),
        ({"settle": BLOCK, "dtype": "float32"}, "models.calm has `dtype`, which is that of models.llama-tiny"),
    ],
)
def test_a_block_that_does_not_fit_is_refused(tmp_path, block, message):
    raw = json.loads(json.dumps(read_yaml(HERE / "experiments/studies/demo/params.yaml")))
    raw["models"]["calm"] = block
    with pytest.raises(UserError, match=message):
        config.build(raw, paths=Paths(root=tmp_path))


def test_a_mix_has_each_source_by_its_weight_from_the_first_row_on():
    sources, shares = {"a": ["a1", "a2", "a3", "a4", "a5"], "b": ["b1", "b2", "b3"]}, {"a": 2.0, "b": 1.0}
    assert mix.interleaved(sources, shares, 9) == ["a1", "b1", "a2", "a3", "b2", "a4", "a5", "b3", "a1"]
    fresh, rest = mix.reserved(sources, shares, 3)
    assert fresh == ["a1", "b1", "a2"]
    assert rest == {"a": ["a3", "a4", "a5"], "b": ["b2", "b3"]}
    with pytest.raises(UserError, match=r"settle.mix.b: 3 rows are there, and twice the 2 of the gate are needed"):
        mix.reserved(sources, {"a": 1.0, "b": 1.0}, 4)


def test_every_linear_layer_but_the_head_is_adapted(tmp_path):
    stage.make(study(tmp_path), "llama-tiny", tmp_path / "tiny")
    model = weights.load_model(tmp_path / "tiny", dtype="auto")
    targets = settling.adapter(model, rank=2, alpha=4.0).targets
    assert sorted(targets) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_base_scores_the_unsettled_model_beside_the_settled_one(made, tmp_path):
    root, hashes, record = made
    shutil.copytree(root / "results", tmp_path / "results")
    own = study(tmp_path, **hashes)
    data.main(own)
    stage.main(own, model="calm")
    evaluate.base(own, model="calm")
    start, scores = (read_json(own.paths.base("calm") / f"{name}.json") for name in ("start", "scores"))
    before = start["unsettled"]["scores"]
    assert (start["unsettled"]["model"], start["improvable"]) == ("llama-tiny", None)
    assert before["weights_sha256"] == record["from_sha256"] and before["scoring"] == scores["scoring"]
    assert before["general"]["kl"] > 0 == scores["general"]["kl"]  # KL from the settled model
    lost = {"general_nll_lost": 0.5, "gold_nll_lost": 2.0, "forgetting": 0.1, "margin_lost": None}
    of = {"model": "calm", "domain": "sums", "domain_nll_gained": 1.0}
    cell = pd.Series(of | {"forgetting_by_task": {"colours": 0.1}, "at_chance": []} | lost)
    loaded = load_cells(own.paths.results, ["calm/sums/full/seed0"])
    against = begun.against_unsettled(loaded, cell)
    nats = {name: found["general"]["nats_per_token"] for name, found in (("now", scores), ("then", before))}
    assert against["general_nll_lost"] == pytest.approx(0.5 + nats["now"] - nats["then"])
    gold = [found["tasks"]["colours"]["gold_nll"] for found in (scores, before)]
    assert against["gold_nll_lost"] == pytest.approx(2.0 + gold[0] - gold[1])
    right = [found["tasks"]["colours"]["value"] for found in (scores, before)]
    assert against["forgetting"] == pytest.approx(0.1 + right[1] - right[0])
    then, now = (nats_per_token(found["tasks"]["sums"]) for found in (before, scores))
    assert against["domain_nll_gained"] == pytest.approx(1.0 + then - now)
    assert against.keys() == {"general_nll_lost", "gold_nll_lost", "forgetting", "domain_nll_gained"}
    assert begun.is_settled(loaded, "calm") is True
    assert "calm is llama-tiny after" in begun.sentences(loaded, "calm")[0]
    assert "the base counts as settled" in begun.sentences(loaded, "calm")[0]


def test_training_on_general_text_improves_a_random_model(tmp_path):
    own = study(tmp_path)
    data.main(own)
    stage.make(own, "llama-tiny", tmp_path / "tiny")
    texts = [{"text": f"Text {number}: the cat sat on mat {number % 7}."} for number in range(120)]
    for name, rows in (("settle", texts), ("importance", texts[:3])):
        write_rows(tmp_path / "general" / f"{name}.jsonl", rows)
    found = improvable.improvable(
        tmp_path / "tiny", tmp_path / "general", steps=6, dtype=torch.float32, device=torch.device("cpu")
    )
    assert found["low"] > 0 and found["steps"] == 6 and found["texts"] == 64
    loaded = Loaded(
        **dict.fromkeys(("cells", "curves", "items", "failures"), pd.DataFrame()),
        base={"random": {"start": {"improvable": found}}, "fine": {"start": {"improvable": found | {"low": -0.1}}}},
    )
    assert begun.is_settled(loaded, "random") is False and begun.is_settled(loaded, "fine") is True
    assert begun.sentences(loaded, "random")[0].startswith("Warning: the base is not settled. 6 steps on general text")
    assert "does not improve it" in begun.sentences(loaded, "fine")[0]
    assert begun.is_settled(loaded, "unknown") is None and begun.sentences(loaded, "unknown") == []


def test_the_test_is_made_of_models_that_are_neither_settled_nor_random():
    root = config.load()
    assert improvable.settings(root, "smollm2-135m")["steps"] == 30
    assert improvable.settings(root, "smollm2-135m-settled") == {}
    off = root.model_copy(update={"evaluate": root.evaluate.model_copy(update={"improve": 0})})
    assert improvable.settings(off, "smollm2-135m") == {}
    assert improvable.settings(config.load("demo"), "llama-tiny") == {}
    assert resolve.base(off, "smollm2-135m") != resolve.base(root, "smollm2-135m")
    assert resolve.evaluate(off, "smollm2-135m") == resolve.evaluate(root, "smollm2-135m")  # no cell is scored again


def test_what_a_settled_model_showed_is_said_before_a_study_runs(made, tmp_path):
    root, hashes, record = made
    shutil.copytree(root / "results", tmp_path / "results")
    assert settled_models.look(study(tmp_path, **hashes), model="calm") == []  # plain fine-tuning has 1e-3 there
    assert settled_models.look(study(tmp_path), model="llama-tiny") == []
    (line,) = settled_models.look(study(tmp_path, mix={"general": 2.0}), model="calm")
    assert "models.calm.settle is not what the adapter was made with (results/settled/calm/settle.json)" in line
    block = {"block": BLOCK | {"gate": GATE | {"learning_rate": 0.1}}}
    write_json(tmp_path / "results/settled/calm/settle.json", record | block | {"settled": False, "gates": []})
    rate, gate = settled_models.look(study(tmp_path, gate=GATE | {"learning_rate": 0.1}), model="calm")
    assert "gate.learning_rate is 0.1, and plain fine-tuning in this study has 0.001" in rate
    assert f"calm is not settled after {record['steps']} steps" in gate
    failed = [{"learning_rate": rate, "holds": rate == 0.1} for rate in (0.001, 0.1)]
    write_json(tmp_path / "results/settled/calm/settle.json", record | {"gates": failed})
    (line,) = settled_models.look(study(tmp_path, **hashes), model="calm")
    assert "calm is not settled at a rate of 0.001, with which this study trains" in line


def test_committed_adapters_are_those_that_params_names_and_their_gates_hold():
    root = config.load()
    names = [name for name, block in root.models.items() if block.settle]
    assert names
    for name in names:
        adapter, record = root.paths.adapter(name), read_json(root.paths.adapter(name).with_name("settle.json"))
        stated = {key: getattr(root.models[name].settle, key) for key in ("adapter_sha256", "sha256")}
        assert stated == {key: record[key] for key in stated} and stated["adapter_sha256"] == sha256(adapter)
        assert adapter.stat().st_size < 10e6 and record["settled"] and record["gates"][-1]["holds"]
        assert settled_models.look(root, model=name) == []
    (line,) = settled_models.look(config.load("track"), model="smollm2-135m-settled")
    assert "smollm2-135m-settled is not settled at a rate of 7.5e-05" in line
