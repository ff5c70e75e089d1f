"""A file that a stage reads back and that was cut off or changed on the disk is named in a UserError."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from evaluation import harness
from evaluation.kept import KeptTokens
from evaluation.probe import load_probes
from experiments.model import delta, packages, tuned, weights
from experiments.model.base import load_tensors
from experiments.model.random_models import build, byte_tokenizer
from experiments.study import lock, params_text
from experiments.study.paths import HERE
from experiments.study.schema import Model
from experiments.training.prepared import load_states
from methods import registry
from methods.errors import UserError
from methods.part import Run
from methods.tools import checkpoint
from methods.tools.files import read_json, write_json
from methods.tools.importance import Codes
from methods.tools.stored import load_importance, save_importance


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "llama"
    weights.materialise(name="m", block=Model(source="random:llama"), packages={}, out_dir=folder)
    return folder


def whole(base, out):
    """Every tensor of a cell's weights, compared with the hash it is kept with."""
    tensors, digest = tuned.tensors(out, folder=base)
    return dict(delta.verified(tensors, sha256=digest, what=out))


def a_model(base, tmp):
    shutil.copytree(base, tmp / "m")
    for file in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
    ):
        yield (
            tmp / "m" / file,
            lambda: weights.materialise(
                name="m", block=Model(source=f"path:{tmp / 'm'}"), packages={}, out_dir=tmp / "out"
            ),
        )
    yield tmp / "m/model.safetensors", lambda: [tensor.sum() for tensor in load_tensors(tmp / "m").values()]


def a_given_folder(base, tmp):
    build("llama", seed=1).save_pretrained(tmp / "given", max_shard_size="50KB")
    run = Run(model=build("llama", seed=0), weights={}, base=dict(load_tensors(base)), seed=0, device="cpu")
    for file in ("model.safetensors.index.json", "config.json", sorted((tmp / "given").glob("*.safetensors"))[0].name):
        yield tmp / "given" / file, lambda: checkpoint.read(str(tmp / "given"), run, where="given.path")
    made = {"modules_to_save": ["norm"], "trainable_token_indices": [3], "init_lora_weights": False}
    get_peft_model(build("llama", seed=0), LoraConfig(r=2, task_type="CAUSAL_LM", **made)).save_pretrained(tmp / "peft")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        yield tmp / "peft" / file, lambda: checkpoint.read(str(tmp / "peft"), run, where="given.path")


def a_delta(base, tmp):
    moved = {name: tensor + 1e-3 for name, tensor in load_tensors(base).items()}
    tuned.keep(tmp / "delta", folder=base, base=load_tensors(base), final=moved)
    for file in ("delta.safetensors", "weights.json"):
        yield tmp / "delta" / file, lambda: whole(base, tmp / "delta")


def an_adapter(base, tmp):
    (part,) = registry.build({"lora": {"rank": 2}})
    model = part.adapt(build("llama", seed=0), seed=0)
    trained = {name: p.data.add_(0.1) for name, p in model.named_parameters() if p.requires_grad}
    run = Run(model=model, weights=trained, base=load_tensors(base), seed=0, device="cpu")
    part.save(run=run, state={}, folder=tmp / "adapted")
    tuned.keep(tmp / "adapted", folder=base, base=load_tensors(base), final=part.finish(run=run, state={}, final={}))
    assert not (tmp / "adapted/delta.safetensors").exists()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        yield tmp / "adapted/adapter" / file, lambda: whole(base, tmp / "adapted")


def what_was_prepared(base, tmp):
    codes = torch.arange(96, dtype=torch.uint8).reshape(8, 12) % 5
    save_importance(
        {
            "a": Codes(codes=codes, low=-3.0, step=0.1),
            "b": torch.rand(7),
            "c": Codes(codes=codes * (codes > 3), low=0.0, step=1.0),
        },
        tmp / "ewc.importance.safetensors",
    )
    save_file({"a": torch.rand(4, 4)}, tmp / "ewc.start.safetensors")
    write_json(tmp / "prepared.json", {"ewc": {"n": 1}})
    yield tmp / "ewc.importance.safetensors", lambda: load_importance(tmp / "ewc.importance.safetensors")
    for file in ("ewc.start.safetensors", "prepared.json"):
        yield tmp / file, lambda: load_states(tmp, [SimpleNamespace(key="ewc")])


def token_ids(base, tmp):
    kept, texts, ids = (
        KeptTokens(tmp / "tokens", byte_tokenizer(), {}),
        [("a", "b"), ("cd", "e")],
        [([97], [98]), ([99, 100], [101])],
    )
    kept.save(texts, ids)
    (file,) = (tmp / "tokens").iterdir()

    def read():
        assert kept.load(texts) in (None, ids)

    yield file, read


def tables(base, tmp):
    write_json(
        tmp / "tasks.json",
        [{"name": "a", "role": "domain", "task": "sciq", "metric": "acc", "chance": 0.25, "file": "a.jsonl"}],
    )
    yield tmp / "tasks.json", lambda: harness.entries(tmp)
    write_json(tmp / "train.json", {"cell": "a", "weights_sha256": "b"})
    yield tmp / "train.json", lambda: read_json(tmp / "train.json", "weights_sha256")
    (tmp / "set.jsonl").write_text(
        "".join(json.dumps({"context": f"é {i}", "choices": [" a", " b"], "gold": 0}) + "\n" for i in range(5))
    )
    yield tmp / "set.jsonl", lambda: load_probes(tmp, byte_tokenizer())
    shutil.copy(HERE / "dvc.lock", tmp / "dvc.lock")
    yield tmp / "dvc.lock", lambda: lock.stages(tmp / "dvc.lock")
    shutil.copy(HERE / "experiments/studies/demo/params.yaml", tmp / "params.yaml")
    yield tmp / "params.yaml", lambda: params_text.read_yaml(tmp / "params.yaml")


def damages(content, number):
    """`number` of the content cut off, with bytes changed, or with a piece of text put in."""
    chance = random.Random(0)
    for _ in range(number):
        at = chance.randrange(min(len(content), 4000))  # of tensors mostly the header
        yield content[:at]
        yield content[:at] + bytes([content[at] ^ chance.randrange(1, 256)]) + content[at + 1 :]
        yield (
            content[:at]
            + chance.choice([b"0", b"9", b'"', b"null", b"[", b"{}", b"\xff", b"\n<<<<<<< HEAD\n"])
            + content[at + 1 :]
        )


KINDS = [a_model, a_given_folder, a_delta, an_adapter, what_was_prepared, token_ids, tables]


def told(base, tmp_path, kind, number):
    refused = 0
    for file, read in kind(base, tmp_path):
        content = file.read_bytes()
        read()  # undamaged
        for damaged in (
            b"",
            b"[]",
            b"{}",
            b"\x80\x02}q\x00.",
            b"version https://git-lfs.github.com/spec/v1\n",
            *damages(content, number),
        ):
            file.unlink()  # another file may be mapped in the old one's place
            file.write_bytes(damaged)
            try:
                read()
            except UserError as error:
                assert any(
                    str(named) in str(error) for named in (file.name, *file.parents[:2], "model 'm': its tokenizer")
                ), (file, str(error))
                assert "Traceback" not in str(error)
                refused += 1
        file.unlink()
        file.write_bytes(content)
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_told_by_name(base, tmp_path, kind):
    refused = told(base, tmp_path, kind, number=4)
    assert refused == 0 if kind is token_ids else refused > 20


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_told_by_name_in_many_ways(base, tmp_path, kind):
    assert told(base, tmp_path, kind, number=60) > 200 or kind is token_ids


def test_a_wheel_that_is_none(tmp_path):
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"PK\x03\x04 and no more")
    for read in (lambda wheel: packages.read(wheel, "a"), lambda wheel: packages.members(wheel, "a")):
        with pytest.raises(UserError, match="a-1-py3-none-any.whl is not a readable wheel"):
            read(tmp_path / "a-1-py3-none-any.whl")
