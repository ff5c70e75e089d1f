"""Budget: bisection against every scale it could have chosen, on real measures and on ones that are not monotone."""

import math
from dataclasses import replace

import pytest
import torch

from experiments.laws.trial import Trial
from experiments.model import tuned
from experiments.model.shape import Shape
from experiments.training import hooks
from experiments.training.engine import finish
from methods.budget import Budget
from methods.dare import DARE
from methods.errors import UserError
from methods.fapm import FAPM
from methods.fisher_merge import FisherMerge
from methods.lines import LiNeS
from methods.lora import LoRA
from methods.part import Run, in_order
from methods.ties import TIES
from methods.tools.process_group import Shards
from methods.wise_ft import WiSEFT


def search(part, cost, *, seen=None):
    """(weights, report) of a model of one weight, 0 in the base and 1 after training, with this cost of s."""
    run = Run(model=None, weights={}, base={"w": torch.zeros(1)}, seed=0, device="cpu")
    state = {}

    def measure(weights):
        scale = weights["w"].item() if weights else 0.0
        (seen if seen is not None else []).append(scale)
        return {"nll": 5 + cost(scale), "kl": cost(scale)}

    final = part.finish(run=run, state=state, final={"w": torch.ones(1)}, measure=measure)
    return final, part.report(run=run, state=state)


@pytest.mark.parametrize("measure", ["nll", "kl"])
@pytest.mark.parametrize(("nats", "steps", "floor"), [(0.3, 7, 0.0), (0.3, 3, 0.0), (0.5, 6, 0.1), (0.0, 5, 0.0)])
def test_it_is_the_largest_scale_of_its_grid_within_the_budget(nats, steps, floor, measure):
    grid = [floor + (1 - floor) * i / 2**steps for i in range(2**steps + 1)]
    wanted = max(scale for scale in grid if scale**2 <= nats)
    seen = []
    part = Budget(nats=nats, steps=steps, floor=floor, measure=measure)
    final, report = search(part, lambda s: s**2, seen=seen)
    assert report["scale"] == pytest.approx(wanted, abs=1e-6) and final.get(
        "w", torch.zeros(1)
    ).item() == pytest.approx(wanted)
    assert report["cost"] == pytest.approx(wanted**2, abs=1e-6) and report["cost_of_all"] == pytest.approx(1.0)
    assert report["measured"] == len(seen) == 1 + (floor > 0) + steps + (measure == "nll")
    assert report["floor_fits"] is True


def test_what_fits_whole_is_kept_whole_after_one_look():
    seen = []
    final, report = search(Budget(nats=1.0, measure="kl"), lambda s: s, seen=seen)
    assert final == {"w": torch.ones(1)} and seen == [1.0]
    assert report == {
        "nats": 1.0, "measure": "kl", "scale": 1.0, "cost": 1.0, "cost_of_all": 1.0, "floor_fits": True, "measured": 1,
    }  # fmt: skip


@pytest.mark.parametrize("floor", [0.25, 1.0])
def test_where_even_the_floor_costs_too_much_the_base_or_the_floor_is_kept(floor):
    final, report = search(Budget(nats=0.1, floor=floor), lambda s: s)
    assert final == {} and (report["scale"], report["cost"], report["floor_fits"]) == (0.0, 0.0, False)
    if floor == 1:  # then nothing is left to choose, and nothing is measured
        assert search(Budget(floor=1.0, otherwise="floor"), lambda s: math.nan)[0] == {"w": torch.ones(1)}
        return
    final, report = search(Budget(nats=0.1, floor=floor, otherwise="floor"), lambda s: s)
    assert final["w"].item() == report["scale"] == floor
    assert report["cost"] == pytest.approx(floor) and report["floor_fits"] is False


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_was_measured_to_fit_whatever_the_measure_does(seed):
    costs = torch.rand(129, generator=torch.Generator().manual_seed(seed)).tolist()
    seen = {}

    def cost(scale):
        seen[scale] = costs[round(scale * 128)]
        return seen[scale]

    final, report = search(Budget(nats=0.2, measure="kl"), cost)
    assert report["scale"] == 0 or seen[final["w"].item()] <= 0.2
    # a measure that is not a number fits nothing
    assert search(Budget(nats=0.2), lambda s: math.nan if s else 0.0)[1]["scale"] == 0


@pytest.fixture
def trial(tmp_path):
    made = Trial(kind=Budget, architecture="llama", folder=tmp_path)
    return replace(made, training=replace(made.training, learning_rate=3e-2))


def test_the_update_of_an_adapter_is_scaled_once_and_not_twice(trial):
    """The published code scales A and B both, and so the update by s²."""
    lora = LoRA(rank=2)
    whole = trial.train((lora,)).final
    cost = trial.measure(whole)["kl"]
    own = trial.train((lora, Budget(nats=cost / 4, measure="kl")))
    report = own.reports["budget"]
    scale, base = report["scale"], trial.base
    assert 0.2 < scale < 0.8 and scale * 128 == int(scale * 128)
    for name, tensor in own.final.items():
        update = whole[name] - base[name]  # s_lora·B·A
        assert update.abs().max() > 0
        assert torch.equal(tensor, torch.lerp(base[name], whole[name], scale))
        torch.testing.assert_close(tensor - base[name], scale * update, rtol=0, atol=2e-7)
        assert not torch.allclose(tensor - base[name], scale**2 * update, rtol=0, atol=1e-4)
    # what is kept is within the budget when it is measured again, and a step of the bisection further is not
    assert trial.measure(own.final)["kl"] == report["cost"] <= cost / 4
    further = {name: torch.lerp(base[name], tensor, scale + 1 / 128) for name, tensor in whole.items()}
    assert trial.measure(further)["kl"] > cost / 4


def test_parts_after_training_follow_each_other_and_what_is_measured_is_charged(trial):
    """WiSE-FT and LiNeS scale first; the budget then shortens what they leave."""
    known = {"base": trial.base, "seed": 0, "device": "cpu", "shards": Shards()}
    known |= {"shape": Shape(config=trial.model().config), "measure": trial.measure}
    whole = trial.train(()).final
    left, _, _ = finish((LiNeS(alpha=0.5),), final=whole, **known)
    left = {name: torch.lerp(trial.base[name], tensor, 0.75) for name, tensor in left.items()}
    tokens = []
    cost = trial.measure(left, charge=lambda **costs: tokens.append(costs["tokens"]))["kl"]
    parts = in_order((Budget(nats=cost / 2, measure="kl", steps=4), WiSEFT(alpha=0.75), LiNeS(alpha=0.5)))
    assert [part.key for part in parts] == ["lines", "wise_ft", "budget"]
    final, reports, added = finish(parts, final=whole, **known)
    report = reports["budget"]
    assert 0 < report["scale"] < 1 and report["cost_of_all"] == pytest.approx(cost, rel=1e-5)
    for name, tensor in final.items():
        wanted = torch.lerp(trial.base[name], left[name], report["scale"])
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)
    assert report["measured"] == 5
    assert added["budget"]["tokens"] == 5 * tokens[0] / 2  # the first measurement of all also reads it with the base
    assert added["budget"]["flops"] > 0 and added["lines"]["tokens"] == added["wise_ft"]["tokens"] == 0


def test_all_that_act_in_finish_alone_share_one_training():
    lora, merge = LoRA(rank=2), FisherMerge()
    alone = (DARE(), FAPM(), TIES(), LiNeS(), WiSEFT(), Budget())
    assert hooks.finishers(in_order((lora, *alone))) == list(alone)
    # Fisher merging keeps rows of the training, so what comes before it belongs to the training, too
    assert hooks.finishers(in_order((lora, merge, *alone))) == list(alone[2:])


def test_it_measures_weights_as_they_will_be_kept(tmp_path):
    trial = Trial(kind=Budget, architecture="llama", folder=tmp_path, dtype=torch.bfloat16)
    trial = replace(trial, training=replace(trial.training, learning_rate=1e-2))
    whole = trial.train(()).final
    own = trial.train((Budget(nats=trial.measure(whole)["nll"] / 100, steps=3),))
    kept = dict(tuned.rounded(trial.base, own.final).items())
    assert any(tensor.dtype == torch.bfloat16 for tensor in kept.values())
    rise = trial.measure(kept)["nll"] - trial.measure({})["nll"]
    assert rise == own.reports["budget"]["cost"]


def test_outside_a_cell_there_is_nothing_to_measure_with():
    run = Run(model=None, weights={}, base={}, seed=0, device="cpu")
    with pytest.raises(UserError, match="budget: weights are measured in a cell of a study"):
        Budget().finish(run=run, state={}, final={})
