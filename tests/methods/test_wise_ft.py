"""WiSE-FT against its closed form, alone and with an adapter, whatever the part is called."""

import numpy as np
import pytest
import torch

from experiments.training.engine import final_weights
from methods.lora import LoRA
from methods.part import Run
from methods.wise_ft import WiSEFT


def finished(part, base, tuned):
    run = Run(model=None, weights={}, base=base, seed=0, device="cpu")
    return part.finish(run=run, state={}, final=tuned, measure=None)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5, 0.7])
def test_it_is_the_weighted_mean(alpha):
    draw = torch.Generator().manual_seed(0)
    base, tuned = (torch.randn(7, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    actual = finished(WiSEFT(alpha=alpha), {"w": base, "frozen": base}, {"w": tuned})
    assert actual.keys() == {"w"}  # what was not trained stays the base's
    np.testing.assert_allclose(actual["w"].numpy(), (1 - alpha) * base.numpy() + alpha * tuned.numpy(), rtol=1e-13)
    actual = finished(WiSEFT(alpha=alpha), {"w": base.bfloat16()}, {"w": tuned.float()})["w"]
    wanted = (1 - alpha) * base.bfloat16().double() + alpha * tuned.float().double()
    assert actual.dtype == torch.float32  # not rounded to the checkpoint's dtype, which happens once, afterwards
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-6, atol=1e-7)


def test_the_ends_are_the_two_models_bit_for_bit():
    base, tuned = {"w": torch.tensor([-0.0, 1.0, 3.0e38])}, {"w": torch.tensor([2.0, -0.0, -3.0e38])}
    assert finished(WiSEFT(alpha=0.0), base, tuned) == {}
    assert finished(WiSEFT(alpha=1.0), base, tuned) is tuned


@pytest.mark.parametrize("key", ["wise_ft", "a_share_of_the_way"])
def test_adapters_are_merged_before_whatever_the_part_is_called(make, documents, train, key, monkeypatch):
    monkeypatch.setattr(WiSEFT, "key", key)
    base = {name: p.detach().clone() for name, p in make().named_parameters()}
    lora = LoRA(rank=2)
    tuned = final_weights(train(make(), (lora,), documents), (lora,))
    parts = (WiSEFT(alpha=0.25), lora)
    actual = final_weights(train(make(), parts, documents), parts)
    assert actual.keys() == tuned.keys()
    for name, tensor in actual.items():
        moved = tuned[name] - base[name]  # s·B·A
        assert moved.abs().max() > 0
        torch.testing.assert_close(tensor, base[name] + 0.25 * moved, rtol=1e-12, atol=1e-14)
