"""SPIDER's mask against the formula in numpy, and what it does in a run."""

import numpy as np
import pytest
import torch

from methods import registry
from methods.errors import UserError
from methods.part import Run
from methods.spider import Spider


def rank(values):
    """½ where a tensor does not vary, as a norm of ones, and 0 where it is 0."""
    size = np.abs(values)
    if not size.any():
        return np.zeros_like(size)
    return np.full_like(size, 0.5) if np.ptp(size) == 0 else 1 / (1 + np.exp(-(size - size.mean()) / size.std()))


def mixed(base, moved, total):
    old, new = rank(base), rank(total)
    mask = np.where(new > old, new / (old + new), 0.0)
    if mask.any():
        mask = np.minimum(mask / mask[mask > 0].mean(), 1)
    return (1 - mask) * base + mask * moved, mask


def stepped(base, steps):
    """(weights, state) after steps of random movement and gradients, by the part and by the formula."""
    weights = {name: tensor.clone() for name, tensor in base.items()}
    run, state, part = Run(model=torch.nn.Module(), weights=weights, base=base, seed=0, device="cpu"), {}, Spider()
    part.begin(run=run, state=state, examples=())
    plain = {name: tensor.numpy().copy() for name, tensor in base.items()}
    totals, draw = dict.fromkeys(base, 0.0), torch.Generator().manual_seed(3)
    for step in range(steps):
        masks, gradients = {}, {}
        for name, weight in weights.items():
            gradients[name], moved = (torch.randn(weight.shape, generator=draw, dtype=weight.dtype) for _ in range(2))
            weight += 0.1 * moved
            totals[name] = totals[name] + gradients[name].numpy()
            plain[name], masks[name] = mixed(base[name].numpy(), plain[name] + 0.1 * moved.numpy(), totals[name])
        given = {name: gradient.clone() for name, gradient in gradients.items()}
        part.after_step(run=run, state=state, step=step, gradient=gradients)
        assert all(torch.equal(gradients[name], gradient) for name, gradient in given.items())  # other parts read it
    return run, state, plain, masks


@pytest.mark.parametrize("small_pieces", [False, True])
def test_weights_are_mixed_by_the_formula(small_pieces, monkeypatch):
    if small_pieces:  # several pieces a tensor, the last one shorter
        monkeypatch.setattr("methods.tools.importance.CPU_PIECE", 7)
        monkeypatch.setattr("methods.spider.CPU_PIECE", 7)
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(*shape, generator=draw).double() for name, shape in {"w": (9, 5), "b": (11,)}.items()}
    base["norm"] = torch.ones(13, dtype=torch.float64)
    run, state, plain, masks = stepped(base, steps=3)
    for name, weight in run.weights.items():
        np.testing.assert_allclose(weight.numpy(), plain[name], rtol=1e-9, atol=1e-12)
        still = torch.from_numpy(masks[name] == 0)
        assert 0.2 < still.float().mean() < 0.8
        assert torch.equal(weight[still], base[name][still])  # the base's own bits, not nearly
    share = np.concatenate([mask.ravel() > 0 for mask in masks.values()]).mean()
    assert Spider().report(run=run, state=state)["moving"].item() == pytest.approx(share)


def test_a_tensor_of_zeros_has_no_rank():
    """A bias that is 0 in the base trains freely; what the task has no gradient for is the base's."""
    base = {"bias": torch.zeros(6), "unused": torch.randn(6), "nothing": torch.zeros(6)}
    weights = {name: tensor + 1 for name, tensor in base.items()}
    run, state = Run(model=torch.nn.Module(), weights=weights, base=base, seed=0, device="cpu"), {}
    Spider().begin(run=run, state=state, examples=())
    gradient = {"bias": torch.randn(6), "unused": torch.zeros(6), "nothing": torch.zeros(6)}
    Spider().after_step(run=run, state=state, step=0, gradient=gradient)
    assert torch.equal(run.weights["bias"], torch.ones(6))
    assert all(torch.equal(run.weights[name], base[name]) for name in ("unused", "nothing"))
    assert state["moving"] == pytest.approx(6 / 18)


def test_a_bf16_base_is_kept_in_its_own_dtype():
    base = {"w": torch.randn(40, 3, generator=torch.Generator().manual_seed(1)).bfloat16()}
    weights = {"w": base["w"].float() + 0.1}
    run, state = Run(model=torch.nn.Module(), weights=weights, base=base, seed=0, device="cpu"), {}
    Spider().begin(run=run, state=state, examples=())
    gradient = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    Spider().after_step(run=run, state=state, step=0, gradient={"w": gradient.clone()})
    wanted, _ = mixed(base["w"].double().numpy(), base["w"].double().numpy() + 0.1, gradient.double().numpy())
    np.testing.assert_allclose(weights["w"].numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert state["anchor"]["w"].dtype == torch.bfloat16 and state["sum"]["w"].dtype == torch.float32


def test_nothing_that_varies_leaves_the_base():
    """Without variation both ranks are ½: the gradient's is not above the base's, and no mask is divided by zero."""
    base = {"w": torch.ones(4, 2)}
    run = Run(model=torch.nn.Module(), weights={"w": torch.full((4, 2), 1.5)}, base=base, seed=0, device="cpu")
    state = {}
    Spider().begin(run=run, state=state, examples=())
    Spider().after_step(run=run, state=state, step=0, gradient={"w": torch.full((4, 2), 0.1)})
    assert torch.equal(run.weights["w"], base["w"]) and state["moving"] == 0


def test_it_takes_the_tasks_gradient_in_a_run(make, documents, train):
    """The sum is that of the gradients before clipping; entries with M = 0 are the base's."""
    base = {n: p.detach().clone() for n, p in make().named_parameters()}
    plain = train(make(), (), documents[:2])
    result = train(make(), (Spider(),), documents[:2], clip=1e-3)
    assert result.steps == 1
    for name, total in result.states["spider"]["sum"].items():
        torch.testing.assert_close(total, plain.run.weights[name].grad)
        still = result.run.weights[name].detach() == base[name]
        assert still.any() and (not still.all() or total.abs().max() == 0)


def test_an_adapter_beside_it_is_refused():
    with pytest.raises(UserError, match="lora and spider cannot be combined: spider ranks the base's own weights"):
        registry.build({"spider": {}, "lora": {"rank": 2}})
