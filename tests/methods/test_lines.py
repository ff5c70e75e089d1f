"""LiNeS against its closed form: the scale of each block, of what stands outside, alone and with an adapter."""

import pytest
import torch

from experiments.training.engine import final_weights
from methods.errors import UserError
from methods.lines import LiNeS
from methods.lora import LoRA
from methods.part import Run


def finished(part, model, *, dtype=torch.float64):
    base = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(3)
    tuned = {name: p.double() + torch.randn(p.shape, generator=draw, dtype=torch.float64) for name, p in base.items()}
    run = Run(model=model.to("meta"), weights={}, base=base, seed=0, device="cpu")
    return base, tuned, part.finish(run=run, state={}, final=tuned), part.report(run=run, state={})


STACK = {"llama-tied": "model.layers.", "llama-untied": "model.layers.", "gptj": "transformer.h."}


@pytest.mark.parametrize("kind", STACK)
@pytest.mark.parametrize(("alpha", "beta"), [(0.25, None), (0.5, 0.125), (0.0, None), (1.0, 0.5)])
def test_each_block_has_its_scale_and_the_rest_alpha(make, kind, alpha, beta):
    model = make(kind, num_hidden_layers=5) if kind != "gptj" else make(kind, n_layer=5)
    base, tuned, actual, report = finished(LiNeS(alpha=alpha, beta=beta), model)
    rise = 1 - alpha if beta is None else beta
    wanted, outside = [alpha + rise * layer / 4 for layer in range(5)], set()
    for name, tensor in actual.items():
        rest = name.removeprefix(STACK[kind])
        scale = alpha if rest == name else wanted[int(rest.split(".")[0])]
        outside |= {name} if rest == name else set()
        torch.testing.assert_close(tensor, base[name] + scale * (tuned[name] - base[name]), rtol=1e-13, atol=1e-15)
    assert len(outside) >= 2 and len(outside) < len(actual)  # embedding and final norm, the head where it is untied
    assert report == {"outside_blocks": alpha, "blocks": pytest.approx(wanted)}


def test_ten_blocks_are_told_from_one_and_a_single_block_is_the_last(make):
    base, tuned, actual, _ = finished(LiNeS(alpha=0.0), make("llama-tied", num_hidden_layers=12))
    for layer in (1, 10, 11):  # "layers.1" begins "layers.10" too
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        torch.testing.assert_close(actual[name], base[name] + layer / 11 * (tuned[name] - base[name]))
    base, tuned, actual, report = finished(LiNeS(alpha=0.25), make("llama-tied", num_hidden_layers=1))
    assert report["blocks"] == [1.0]
    assert torch.equal(actual["model.layers.0.mlp.up_proj.weight"], tuned["model.layers.0.mlp.up_proj.weight"])


def test_alpha_1_is_the_tuned_model_bit_for_bit_in_any_dtype(make):
    _, tuned, actual, _ = finished(LiNeS(alpha=1.0), make("llama-tied", torch.bfloat16), dtype=torch.bfloat16)
    assert all(actual[name] is tensor for name, tensor in tuned.items())


def test_adapters_are_merged_before(make, documents, train):
    base = {name: p.detach().clone() for name, p in make().named_parameters()}
    lora = LoRA(rank=2, targets=["q_proj", "up_proj"])
    tuned = final_weights(train(make(), (lora,), documents), (lora,))
    parts = (LiNeS(alpha=0.25), lora)
    actual = final_weights(train(make(), parts, documents), parts)
    assert actual.keys() == tuned.keys()
    for name, tensor in actual.items():
        scale = {"0": 0.25, "1": 1.0}[name.split(".")[2]]
        torch.testing.assert_close(tensor, base[name] + scale * (tuned[name] - base[name]), rtol=1e-12, atol=1e-14)


def test_bad_values_are_named():
    with pytest.raises(UserError, match=r"lines.alpha is 1.5: it must be a number in \[0, 1\]"):
        LiNeS(alpha=1.5)
