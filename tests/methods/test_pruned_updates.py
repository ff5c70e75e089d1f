"""Parts that keep some entries of the update: FAPM, DARE and TIES against brute force."""

import numpy as np
import pytest
import torch

from methods.dare import DARE
from methods.fapm import FAPM
from methods.part import Run
from methods.tools.task_vector import largest


def finished(part, base, tuned, *, seed=0, state=None):
    run = Run(model=None, weights={}, base=base, seed=seed, device="cpu")
    return part.finish(run=run, state={} if state is None else state, final=tuned)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("values", ["different", "equal", "few"])
def test_the_largest_are_as_many_as_asked_and_the_first_of_equals(share, values):
    scores = drawn(13, 7)
    scores = {"different": scores, "equal": torch.zeros(13, 7), "few": scores.sign()}[values]
    order = sorted(range(91), key=lambda i: (-scores.flatten()[i].item(), i))
    wanted = np.zeros(91, bool)
    wanted[order[: int(share * 91)]] = True
    assert np.array_equal(largest(scores, share).flatten().numpy(), wanted)


# FAPM


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_fapm_keeps_the_entries_of_its_score(keep):
    base, tuned = drawn(11, 6).bfloat16(), drawn(11, 6, seed=1).float()
    base[2, 3] = base[4, 1] = 0
    tuned[4, 1] = 0  # nothing moved there: the published code divides 0 by 0 and keeps it first
    actual = finished(FAPM(fraction=keep), {"w": base}, {"w": tuned})["w"]
    before, after = base.double().numpy().ravel(), tuned.double().numpy().ravel()
    mean = np.abs(before).mean()
    scores = [-np.inf if b == 0 else abs(a - b) - mean * abs(a - b) / abs(b) for a, b in zip(after, before)]
    kept = sorted(range(66), key=lambda i: -scores[i])[: int(keep * 66)]
    for index, value in enumerate(actual.flatten().tolist()):  # bit for bit
        assert value == (after[index] if index in kept else before[index])
    assert actual.dtype == torch.float32 and not {15, 25} & set(kept)


def test_fapm_ends_are_the_two_models():
    base, tuned = {"w": drawn(5, 4)}, {"w": drawn(5, 4, seed=1)}
    assert finished(FAPM(fraction=1.0), base, tuned) is tuned
    assert torch.equal(finished(FAPM(fraction=0.0), base, tuned)["w"], base["w"])


# DARE


def test_dare_drops_as_many_as_asked_and_keeps_the_mean_of_the_update():
    base, tuned = {"w": drawn(40, 30).bfloat16()}, {"w": drawn(40, 30, seed=1).float()}
    total = torch.zeros(40, 30, dtype=torch.float64)
    for seed in range(60):
        actual = finished(DARE(drop=0.75), base, tuned, seed=seed)["w"]
        dropped = actual == base["w"].float()
        assert abs(dropped.double().mean() - 0.75) < 0.06
        update = tuned["w"].double() - base["w"].double()
        torch.testing.assert_close(
            actual.double(), torch.where(dropped, 0.0, 4 * update) + base["w"], rtol=0, atol=1e-5
        )
        total += actual.double() - base["w"].double()
    # of 60 draws the share that was kept has a standard deviation of √(0.25·0.75/60)
    kept = total / 60 / (4 * update)
    assert abs(kept.mean() - 0.25) < 0.01 and abs(kept - 0.25).max() < 5 * (0.25 * 0.75 / 60) ** 0.5


def test_dare_draws_from_seed_and_name_alone():
    base, tuned = drawn(8, 8), drawn(8, 8, seed=1)
    alone = finished(DARE(drop=0.5), {"w": base}, {"w": tuned})["w"]
    beside = finished(DARE(drop=0.5), {"v": base, "w": base}, {"v": tuned, "w": tuned})
    assert torch.equal(beside["w"], alone) and not torch.equal(beside["v"], alone)
    assert not torch.equal(finished(DARE(drop=0.5), {"w": base}, {"w": tuned}, seed=1)["w"], alone)


def test_dare_without_rescaling_keeps_tuned_entries_and_without_dropping_all():
    base, tuned = drawn(9, 9).bfloat16(), drawn(9, 9, seed=1).float()
    actual = finished(DARE(drop=0.5, rescale=False), {"w": base}, {"w": tuned})["w"]
    assert ((actual == base.float()) | (actual == tuned)).all() and 20 < (actual == tuned).sum() < 60
    final = {"w": tuned}
    assert finished(DARE(drop=0.0), {"w": base}, final) is final
