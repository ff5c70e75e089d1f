"""MoFO against ten lines of its definition, and against AdamW where it must be AdamW."""

import copy

import pytest
import torch

from methods.mofo import MoFO, MomentumFilter, kth_largest
from methods.part import Run

SHAPES = [(7, 5), (3,), (2, 3, 4), (1, 1), (40, 30), ()]


def tensors(dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in SHAPES]


def reference(ps, gradients, lr, b1, b2, eps, decay, fraction, decay_all):
    """Algorithm 1 in float64, with a sorted list for the threshold."""
    ps = [p.double().clone() for p in ps]
    ms, vs = [torch.zeros_like(p) for p in ps], [torch.zeros_like(p) for p in ps]
    for t, step in enumerate(gradients, start=1):
        for p, m, v, g in zip(ps, ms, vs, step):
            m.copy_(b1 * m + (1 - b1) * g.double())
            v.copy_(b2 * v + (1 - b2) * g.double() ** 2)
            k = max(1, int(fraction * p.numel()))
            limit = sorted(m.abs().flatten().tolist(), reverse=True)[k - 1]
            keep = (m.abs() >= limit).double() if p.dim() >= 2 else torch.ones_like(p)
            shrink = torch.ones_like(p) if decay_all else keep
            p.copy_(p - lr * decay * shrink * p - lr * keep * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps))
    return ps


@pytest.mark.parametrize("dtype, near", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("decay, decay_all", [(0.0, False), (0.1, False), (0.1, True)])
def test_equals_its_definition(dtype, near, fraction, decay, decay_all):
    start, gradients = tensors(dtype), [tensors(dtype, seed) for seed in range(1, 7)]
    ps = [p.clone().requires_grad_() for p in start]
    optimizer = MoFO(ps, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay, fraction=fraction, decay_all=decay_all)
    for step in gradients:
        for p, g in zip(ps, step):
            p.grad = g.clone()
        optimizer.step()
    for p, wanted in zip(ps, reference(start, gradients, 0.01, 0.8, 0.95, 1e-6, decay, fraction, decay_all)):
        assert p.dtype == dtype
        torch.testing.assert_close(p.detach().double(), wanted, rtol=near, atol=near)


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_fraction_one_is_adamw(dtype, near):
    ours, theirs = ([p.clone().requires_grad_() for p in tensors(dtype)] for _ in range(2))
    pair = [MoFO(ours, lr=0.02, weight_decay=0.1, fraction=1.0), torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.1)]
    for seed in range(1, 9):
        for ps, optimizer in zip((ours, theirs), pair):
            for p, g in zip(ps, tensors(dtype, seed)):
                p.grad = g
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=near, atol=near)


def test_only_the_largest_momenta_move_and_all_momenta_advance():
    p = torch.zeros(10, 10, requires_grad=True)
    optimizer = MoFO([p], lr=0.1, fraction=0.15)
    p.grad = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    chosen = p.grad.abs().flatten().topk(15).indices.sort().values
    assert torch.equal(p.detach().flatten().nonzero().flatten(), chosen)
    assert (optimizer.state[p]["exp_avg"] != 0).all() and (optimizer.state[p]["exp_avg_sq"] != 0).all()
    assert optimizer.realised_fraction() == {"last": 0.15, "mean": 0.15}


def test_ties_are_kept_and_a_zero_threshold_keeps_all():
    ties = torch.ones(4, 5, requires_grad=True)
    ties.grad = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5]).repeat(4, 1)
    few = torch.ones(4, 5, requires_grad=True)
    few.grad = torch.zeros(4, 5)
    few.grad[0, 0] = 1.0
    optimizer = MoFO([ties, few], lr=0.1, weight_decay=0.5, fraction=0.25)
    optimizer.step()
    assert torch.equal(ties.detach() != 1, ties.grad == 1.0)  # k = 5, eight entries tie
    assert (few.detach() != 1).all()  # k = 5, one entry is not zero: all are kept, so all decay
    assert optimizer.realised_fraction()["last"] == pytest.approx((8 + 20) / 40)


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kth_largest_is_exact(zeros, dtype):
    draw = torch.Generator().manual_seed(1)
    size = torch.rand(997, generator=draw).to(dtype) * (torch.rand(997, generator=draw) >= zeros)
    for k in (1, 2, 50, 99, 500, 996, 997):
        wanted = size.sort(descending=True).values[k - 1]
        assert float(kth_largest(size.clone(), k)) == float(wanted)


def test_state_round_trips_in_mid_run():
    def advance(ps, optimizer, seeds):
        for seed in seeds:
            for p, g in zip(ps, tensors(torch.float64, seed)):
                p.grad = g
            optimizer.step()

    whole = [p.requires_grad_() for p in tensors(torch.float64)]
    first = MoFO(whole, lr=0.01, fraction=0.2, weight_decay=0.1)
    advance(whole, first, range(1, 4))
    resumed = [p.detach().clone().requires_grad_() for p in whole]
    second = MoFO(resumed, lr=0.5, fraction=0.9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    advance(whole, first, range(4, 7))
    advance(resumed, second, range(4, 7))
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed))


def test_a_tied_tensor_is_one_partition():
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    once = start.clone().requires_grad_()
    twice = start.clone().requires_grad_()
    view = torch.nn.Parameter(twice.data)  # another leaf over the same storage
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    alone, tied = MoFO([once], lr=0.1, fraction=0.25), MoFO([twice, twice, view], lr=0.1, fraction=0.25)
    assert len(tied.param_groups[0]["params"]) == 1
    for _ in range(3):
        once.grad = gradient.clone()
        twice.grad, view.grad = 0.25 * gradient, 0.75 * gradient
        alone.step(), tied.step()
        tied.zero_grad()
        assert twice.grad is None and view.grad is None
    torch.testing.assert_close(once, twice)
    assert torch.equal(view, twice)


def test_strided_and_half_precision_tensors():
    start, gradient = torch.randn(5, 8), torch.randn(5, 8)
    plain, strided = start.clone().requires_grad_(), start.t().contiguous().t().requires_grad_()
    half = start.bfloat16().requires_grad_()
    for p in (plain, strided, half):
        p.grad = gradient.to(p.dtype)
        MoFO([p], lr=0.1, fraction=0.25).step()
    assert torch.equal(plain, strided)
    torch.testing.assert_close(half.float(), plain, rtol=2e-2, atol=2e-2)


def test_groups_closures_and_parameters_without_gradient():
    a, b = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    optimizer = MoFO([{"params": [a], "fraction": 1.0}, {"params": [b]}], lr=0.1, fraction=0.25)

    def closure():
        optimizer.zero_grad()
        loss = (a * torch.arange(1.0, 17).view(4, 4)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 136
    assert (a != 1).all() and (b == 1).all()
    assert MoFO([("a", a)], lr=0.1).param_groups[0]["param_names"] == ["a"]


@pytest.mark.parametrize("wrong", [{"fraction": 0.0}, {"fraction": 1.01}, {"fraction": -0.1}, {"lr": -1.0},
                                   {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -0.1}])  # fmt: skip
def test_wrong_settings_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is .*must be in"):
        MoFO([torch.zeros(2, 2, requires_grad=True)], **({"lr": 0.1} | wrong))


def test_the_part_trains_a_model_and_reports(make, documents, train):
    model = make("gptj", torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    part = MomentumFilter(fraction=0.2)
    result = train(model, (part,), documents[:2])
    moved = {n: (p.detach() != before[n]) for n, p in model.named_parameters()}
    assert isinstance(result.run, Run) and result.steps == 1
    for name, changed in moved.items():
        if changed.dim() >= 2 and "wte" not in name:
            assert changed.float().mean() <= 0.2, name
    assert any(changed.all() for name, changed in moved.items() if changed.dim() == 1)
    report = part.report(run=result.run, state=result.states["mofo"])
    assert report["fraction"] == 0.2 and 0.15 < report["realised_fraction"] < 0.6
