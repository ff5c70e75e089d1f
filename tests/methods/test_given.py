"""A checkpoint made elsewhere: its weights come out whole, and what does not fit is refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from methods.errors import UserError
from methods.given import Given


@pytest.fixture
def base(make):
    return {n: p.detach().clone() for n, p in make("llama-tied", torch.bfloat16).named_parameters()}


@pytest.fixture
def saved(make, tmp_path):
    make("llama-tied", torch.bfloat16, seed=1).save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_its_weights_come_out_whole(make, base, saved, run_of):
    part = Given(path=str(saved))
    run = run_of(make("llama-tied", torch.bfloat16), base)
    part.begin(run=run, state={}, examples=[])
    final = part.finish(run=run, state={}, final={"model.norm.weight": torch.zeros(1)})
    tuned = dict(make("llama-tied", torch.bfloat16, seed=1).named_parameters())
    assert final.keys() == base.keys()
    assert all(t.dtype == torch.float32 and torch.equal(t.bfloat16(), tuned[n]) for n, t in final.items())
    assert part.report(run=run, state={}) == {"path": str(saved)}


def test_the_engine_trains_nothing_for_it(make, saved, documents, train):
    from experiments.training.engine import final_weights

    part = Given(path=str(saved))
    result = train(make("llama-tied", torch.bfloat16), (part,), documents)
    tuned = dict(make("llama-tied", torch.bfloat16, seed=1).named_parameters())
    assert result.steps == result.tokens == 0
    assert all(torch.equal(t.bfloat16(), tuned[n]) for n, t in final_weights(result, (part,)).items())


def test_shards_a_repeated_tied_head_and_old_buffers_fit(base, make, tmp_path):
    tensors = {n: p.detach() for n, p in make("llama-tied", torch.bfloat16, seed=1).named_parameters()}
    tensors |= {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, tmp_path / file)
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    part = Given(path=str(tmp_path))
    final = part.finish(run=type("Run", (), {"base": base})(), state={}, final={})
    assert all(torch.equal(final[n], tensors[n].float()) for n in base)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match="lacks b.safetensors, which its index names"):
        part.begin(run=None, state={}, examples=[])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight: it is not a checkpoint of this base"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(33)}),
            r"model.norm.weight in .* has shape \[33\], the base's is \[32\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(31, 32)}),
            "has tensors that the base does not have: lm_head.weight",
        ),
        (lambda t: t.update(x=torch.ones(1), y=torch.ones(1)), "has tensors that the base does not have: x and 1 more"),
    ],
)
def test_what_does_not_fit_is_named(base, tmp_path, change, message):
    tensors = dict(base)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        Given(path=str(tmp_path)).finish(run=type("Run", (), {"base": base})(), state={}, final={})


def test_folders_without_safetensors_are_named(base, tmp_path):
    with pytest.raises(UserError, match="given.path is missing"):
        Given()
    with pytest.raises(UserError, match="no such folder"):
        Given(path=str(tmp_path / "absent")).begin(run=None, state={}, examples=[])
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="no model.safetensors; nothing else is read"):
        Given(path=str(tmp_path)).begin(run=None, state={}, examples=[])
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(UserError, match="is an adapter; merge it"):
        Given(path=str(tmp_path)).begin(run=None, state={}, examples=[])
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match="is no safetensors file, or damaged"):
        Given(path=str(tmp_path)).finish(run=type("Run", (), {"base": base})(), state={}, final={})
