"""Folders of models and adapters that claim absurd sizes, need code, or name other models: each is refused by name."""

import json
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from experiments.audit import models
from experiments.model import claims, weights
from experiments.model.base import load_tensors
from experiments.model.random_models import build, byte_tokenizer
from experiments.study import config, files_of_parts
from experiments.study.schema import Model
from methods.errors import UserError
from methods.tools import model_folder, peft_adapter, stored
from tests.experiments.test_ahead import study


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("given") / "whole"
    build("llama", seed=0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture(scope="module")
def lora(whole, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    get_peft_model(weights.load_model(whole, dtype="float32"), LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def adapter(lora, tmp_path) -> Path:
    return Path(shutil.copytree(lora, tmp_path / "adapter"))


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def make(folder: Path, **block):
    return weights.materialise(
        name="own", block=Model(source=f"path:{folder}", **block), packages={}, out_dir=folder.parent / "made"
    )


def audited(folder: Path, *, work: Path, **how):
    return models.resolve(str(folder), study=config.load("demo"), work=work, **how)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 10**9}, "config.json states num_hidden_layers: 1000000000, and no model has more than"),
        ({"num_attention_heads": 10**9}, "states num_attention_heads"),
        ({"hidden_size": 10**12}, "states hidden_size"),
        ({"attn_implementation": "someone/kernel"}, "states attn_implementation: .*program code of the hub"),
        ({"text_config": {"_attn_implementation": "someone/kernel"}}, "states _attn_implementation: .*program code"),
        ({"attn_implementation": {"": "someone/kernel"}}, "states attn_implementation: .*program code of the hub"),
        ({"vocab_size": 10**8, "intermediate_size": 10**8}, "describes .* weights, and its files hold"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "num_groups": 10**9}}, "states num_groups"),
    ],
)
def test_a_config_with_absurd_sizes_is_refused_before_a_model_is_made(folder, tmp_path, settings, message):
    change(folder / "config.json", **settings)
    began = time.monotonic()
    for ask in (lambda: make(folder), lambda: audited(folder, work=tmp_path / "work")):
        with pytest.raises(UserError, match=message):
            ask()
    assert time.monotonic() - began < 30 and not (tmp_path / "made").exists()


def test_masks_of_gigabytes_are_refused(tmp_path):
    folder = tmp_path / "gptj"
    build("gptj", seed=0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    change(folder / "config.json", n_positions=10**9)
    with pytest.raises(UserError, match="asks for .* GiB of masks and tables"):
        make(folder)


def header(length: int, content: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + content


def tensors(**entries) -> bytes:
    text = json.dumps(entries).encode()
    return header(len(text), text)


ABSURD = {
    "a header of 2^63 bytes": header(2**63, b"{}"),
    "a header of a gigabyte": header(2**30, b"{}"),
    "a tensor of 2^62 entries": tensors(a={"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}),
    "a shape whose product overflows": tensors(a={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}),
    "data behind the file's end": tensors(a={"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}),
    "data before its beginning": tensors(a={"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}),
    "tensors on one another": tensors(
        a={"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, b={"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    )
    + bytes(4),
}


@pytest.mark.parametrize("case", ABSURD)
def test_a_header_that_claims_absurd_sizes_is_refused_wherever_tensors_are_read(folder, adapter, tmp_path, case):
    for file in (folder / "model.safetensors", adapter / "adapter_model.safetensors", tmp_path / "importance"):
        file.write_bytes(ABSURD[case])
    for ask in (
        lambda: make(folder),
        lambda: load_tensors(folder),
        lambda: audited(folder, work=tmp_path / "work"),
        lambda: peft_adapter.refuse_other_shapes(adapter, "given", {}, "the base"),
        lambda: stored.load_importance(tmp_path / "importance"),
        lambda: model_folder.headers([folder / "model.safetensors"], "given"),
    ):
        with pytest.raises(UserError, match="damaged|no safetensors file"):
            ask()


def test_a_pickle_that_runs_code_is_refused_though_its_hash_is_stated(folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'trap'}",)

    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save({"model.embed_tokens.weight": Payload()}, file)
    with pytest.raises(UserError, match="holds more than tensors, or is damaged, and is not read"):
        make(folder, bin_sha256=weights.files.sha256(file))
    torch.save({"model.embed_tokens.weight": torch.zeros(1).expand(2**20, 2**20)}, file)
    with pytest.raises(UserError, match="claims that model.embed_tokens.weight is larger than the file"):
        make(folder, bin_sha256=weights.files.sha256(file))
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_folder_is_never_run(folder, tmp_path, file):
    trap = f"open({str(tmp_path / 'trap')!r}, 'w')\n"
    (folder / "own.py").write_text(trap + "class Own:\n    pass\n")
    classes = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    change(folder / file, auto_map=classes)
    make(folder)  # of an architecture that transformers has, its own code is taken
    unknown = {"model_type": "own"} if file == "config.json" else {"tokenizer_class": "Own"}
    change(folder / file, **unknown)
    with pytest.raises(UserError, match="code of its own .auto_map in (tokenizer_)?config.json., which is never run"):
        make(folder)
    assert not (tmp_path / "trap").exists()
    assert not [path for path in (tmp_path / "made").iterdir() if path.suffix == ".py" or "auto_map" in _text(path)]


def _text(path: Path) -> str:
    return path.read_text() if path.suffix == ".json" else ""


def test_an_adapter_that_names_others_or_has_absurd_sizes_is_refused(whole, adapter, tmp_path):
    beside, honest = audited(whole, work=tmp_path / "work"), (adapter / "adapter_config.json").read_text()
    methods = {"theirs": {"given": {"path": str(adapter)}}}
    found = study(tmp_path / "root", ("methods", methods), ("grid/methods", ["theirs"]))
    for settings, message in (
        ({"peft_type": "XLORA", "adapters": {"0": "someone/else"}}, "peft loads further models .adapters in"),
        ({"peft_type": "SHADOW", "shadow_model": "someone/else"}, "peft loads further models .shadow_model in"),
        ({"r": 10**9}, "states r: 1000000000"),
        ({"rank_pattern": {"model.layers.0.q_proj": 10**9}}, "states rank_pattern: 1000000000"),
        ({"layer_replication": [[0, 10**9]]}, "states layer_replication"),
    ):
        (adapter / "adapter_config.json").write_text(honest)
        change(adapter / "adapter_config.json", **settings)
        with pytest.raises(UserError, match=message):
            audited(adapter, work=tmp_path / "work", beside=beside)
        with pytest.raises(UserError, match=f"methods.theirs.given.path: .*{message}"):
            files_of_parts.look(found, model="llama-tiny")


def test_adapters_that_import_or_load_what_they_name_do_not(whole, adapter, tmp_path):
    """A module that lies in a stranger's folder, and tensors pickled beside it."""
    change(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil")
    model = weights.load_model(whole, dtype="float32")
    with pytest.raises(UserError, match="cannot be merged into its base by peft: .*megatron_core"):
        peft_adapter.merged(model, adapter, "given")


def test_real_configs_pass(folder):
    claims.refuse_absurd(folder / "config.json", "own")
    large = {"vocab_size": 256_000, "num_hidden_layers": 126, "num_experts": 512, "max_position_embeddings": 10**7}
    change(folder / "config.json", **large, head_dim=512, intermediate_size=53248, eos_token_id=151_645)
    claims.refuse_absurd(folder / "config.json", "own")
