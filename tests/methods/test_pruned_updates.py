"""Parts that keep some entries of the update: FAPM, DARE and TIES against brute force."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from methods import registry
from methods.dare import DARE
from methods.errors import UserError
from methods.fapm import FAPM
from methods.part import Run
from methods.ties import TIES, elected
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


# TIES


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_ties_of_one_update_trims_and_scales(trim):
    base = {"a": drawn(6, 5), "b": drawn(40, seed=1)}
    tuned = {"a": base["a"] + 10 * drawn(6, 5, seed=2), "b": base["b"] + drawn(40, seed=3)}
    state = {}
    actual = finished(TIES(fraction=0.3, scale=0.5, trim=trim), base, tuned, state=state)
    sizes = {name: (tuned[name] - base[name]).abs() for name in base}
    every = torch.cat([size.flatten() for size in sizes.values()]).sort(descending=True).values
    for name in base:
        own = sizes[name].flatten().sort(descending=True).values
        least = every[20] if trim == "model" else own[int(0.3 * len(own) - 1)]  # of 70 entries 21 are kept
        wanted = torch.where(sizes[name] >= least, base[name] + 0.5 * (tuned[name] - base[name]), base[name])
        torch.testing.assert_close(actual[name], wanted, rtol=1e-13, atol=1e-15)
        assert torch.equal((actual[name] == base[name]), sizes[name] < least)  # the rest is the base, bit for bit
    assert state["moved"] == 21 / 70


def test_ties_averages_what_agrees_with_the_elected_sign():
    updates = [drawn(50, seed=seed) * (drawn(50, seed=seed + 9) > 0) for seed in range(3)]
    updates[0][0], updates[1][0], updates[2][0] = 1.0, -1.0, 0.0  # they cancel: no sign
    actual = elected(updates).tolist()
    for index, values in enumerate(zip(*[update.tolist() for update in updates], strict=True)):
        total = values[0] + values[1] + values[2]
        agree = [value for value in values if value * total > 0]
        assert actual[index] == pytest.approx(sum(agree) / len(agree) if agree else 0.0, rel=1e-12)
    assert actual[0] == 0 and torch.equal(elected(updates[:1]), updates[0])


@pytest.fixture
def merging(make, tmp_path):
    """(base, model, folder of a checkpoint, folder of an adapter, its merged weights)."""
    model = make(dtype=torch.float32)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    make(dtype=torch.float32, seed=1).save_pretrained(tmp_path / "other")
    adapted = get_peft_model(
        make(dtype=torch.float32), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    merged = dict(adapted.merge_and_unload().named_parameters())
    return base, model, tmp_path / "other", tmp_path / "adapter", {n: merged[n].detach() for n in base}


def test_ties_merges_checkpoints_and_adapters_with_the_run(merging):
    base, model, other, adapter, merged = merging
    part = TIES(fraction=1.0, models=[str(other), str(adapter)])
    assert registry.paths(part, "train") == [str(other), str(adapter)] and registry.paths(TIES(), None) == []
    part.look(shapes={name: list(tensor.shape) for name, tensor in base.items()})
    tuned = {"model.norm.weight": base["model.norm.weight"] + drawn(32, seed=4, dtype=torch.float32)}
    run = Run(model=model, weights={}, base=base, seed=0, device="cpu")
    state = {}
    final = part.finish(run=run, state=state, final=tuned)
    theirs = load_file(other / "model.safetensors")
    for name, tensor in base.items():
        updates = [{**base, **tuned}[name] - tensor, theirs[name] - tensor, merged[name] - tensor]
        sign = sum(updates).sign()
        agree = torch.stack([torch.where(update.sign() == sign, update, torch.nan) for update in updates])
        wanted = tensor + torch.where(sign == 0, 0.0, agree.nanmean(0))
        torch.testing.assert_close(final.get(name, tensor), wanted, rtol=1e-5, atol=1e-6)
    assert part.report(run=run, state=state)["models"] == 3


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_tensors_that_another_model_did_not_change_are_no_part_of_its_count(merging, tmp_path, trim):
    """The whole checkpoint of a model tuned with an adapter is trimmed as the adapter itself."""
    base, model, _, adapter, merged = merging
    save_file(merged, tmp_path / "whole.safetensors")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole.safetensors").rename(tmp_path / "whole" / "model.safetensors")
    run = Run(model=model, weights={}, base=base, seed=0, device="cpu")
    name = "model.norm.weight"
    final = {}
    for folder in (adapter, tmp_path / "whole"):
        part = TIES(fraction=0.2, models=[str(folder)], trim=trim)
        final[folder] = part.finish(run=run, state={}, final={name: base[name] + 1})
    one, two = final.values()
    changed = {n for n, tensor in base.items() if not torch.equal(merged[n], tensor)}
    assert one.keys() == two.keys() == changed | {name}
    assert all(torch.equal(one[n], two[n]) for n in one)
    moved = sum(int((two[n] != base[n]).sum()) for n in changed)
    assert moved == pytest.approx(0.2 * sum(base[n].numel() for n in changed), abs=len(changed))


def test_a_folder_that_cannot_be_merged_is_named(merging, tmp_path):
    base, _, other, _, _ = merging
    shapes = {name: list(tensor.shape) for name, tensor in base.items()}
    with pytest.raises(UserError, match="ties.models is .*absent.*: no such folder"):
        TIES(models=[str(other), str(tmp_path / "absent")]).look(shapes=shapes)
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(33)}, other / "model.safetensors")
    with pytest.raises(UserError, match="ties.models: .*other: model.norm.weight has shape"):
        TIES(models=[str(other)]).look(shapes=shapes)


def test_ties_without_trimming_scaling_and_other_models_changes_nothing():
    base, tuned = {"w": drawn(5, 4)}, {"w": drawn(5, 4, seed=1)}
    assert finished(TIES(fraction=1.0), base, tuned) is tuned
    assert torch.equal(finished(TIES(fraction=0.0), base, tuned)["w"], base["w"])
