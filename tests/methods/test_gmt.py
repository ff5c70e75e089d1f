"""GMT against a sorted list, and what AdamW makes of a masked gradient."""

import pytest
import torch

from methods.gmt import GradientMask, smallest_kept
from methods.tools.process_group import Shards


def largest(gradient, fraction):
    """True for the entries that a sorted list keeps."""
    size = gradient.double().abs()
    k = max(1, int(fraction * size.numel()))
    return (size >= sorted(size.flatten().tolist(), reverse=True)[k - 1]) & (size > 0)


def gradients(model, kind, dtype):
    draw = torch.Generator().manual_seed(3)
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=draw, dtype=torch.float64)
        if kind == "ties":
            gradient = gradient.round()
        if kind == "rows":  # of an embedding, most of which a batch does not have
            gradient[: len(gradient) * 9 // 10] = 0.0
        p.grad = gradient.to(dtype)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "ties", "rows"])
@pytest.mark.parametrize("mask", ["gradient", "update"])
def test_the_largest_gradients_of_each_tensor_are_kept(make, run_of, mask, kind, dtype):
    model = make("gptj", dtype=dtype)  # with biases
    run, state, part = run_of(model, {}), {}, GradientMask(fraction=0.3, mask=mask)
    part.begin(run=run, state=state, examples=[])
    given = gradients(model, kind, dtype)
    part.before_clip(run=run, state=state, step=0)
    kept = 0
    for name, weight in run.weights.items():
        wanted = largest(given[name], 0.3)
        kept += int(wanted.sum())
        if mask == "gradient":
            assert torch.equal(weight.grad, given[name] * wanted)
        else:
            assert torch.equal(weight.grad, given[name]) and torch.equal(state["frozen"][name], ~wanted)
    entries = sum(p.numel() for p in model.parameters())
    assert part.report(run=run, state=state) == {"realised_fraction": pytest.approx(kept / entries)}
    assert ("frozen" in state) == (mask == "update")


def test_several_processes_and_other_devices_select_the_same():
    gradient = torch.randn(90, 70, generator=torch.Generator().manual_seed(0))
    alone = smallest_kept(gradient, 1000)
    assert alone == gradient.abs().flatten().sort(descending=True).values[999]

    class Both(Shards):
        """Two processes with the same rows."""

        def sum(self, tensor):
            return tensor.mul_(2)

    assert smallest_kept(gradient[:45].repeat(2, 1), 1000) == smallest_kept(gradient[:45], 1000, shards=Both(world=2))


@pytest.mark.parametrize("mask", ["gradient", "update"])
def test_momentum_moves_what_is_not_kept_only_as_published(make, documents, train, mask):
    seen = []

    class Watched(GradientMask):
        key = "gmt"

        def before_clip(self, *, run, state, step):
            seen.append({name: w.detach().clone() for name, w in run.weights.items()})
            given = {name: w.grad.clone() for name, w in run.weights.items()}
            super().before_clip(run=run, state=state, step=step)
            seen[-1] |= {f"{name} kept": largest(gradient, 0.2) for name, gradient in given.items()}

    result = train(make(), (Watched(mask=mask),), documents, weight_decay=0.1)
    seen.append(result.run.weights)
    others = 0
    for step in range(3):
        for name in result.run.weights:
            kept = seen[step][f"{name} kept"]
            moved = seen[step + 1][name] != seen[step][name]
            assert moved[kept].all()
            others += int(moved[~kept].sum())
    assert (others > 0) == (mask == "gradient")


def test_the_mask_is_of_the_step_and_not_of_its_micro_batches(make, documents, train):
    runs = [train(make(), (GradientMask(),), documents, batch=6, micro_batch=size, epochs=3.0) for size in (6, 2)]
    for name, weight in runs[0].run.weights.items():
        torch.testing.assert_close(weight, runs[1].run.weights[name], rtol=1e-9, atol=1e-9)
