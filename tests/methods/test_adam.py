"""Adam's moments against torch's AdamW and against what stochastic rounding promises."""

import io
import math

import pytest
import torch

from methods.tools import adam as moments
from methods.tools.adam import MOMENTS, AdamW, Moments, random_bits, round_stochastically

SHAPES = [(7, 5), (3,), (2, 3, 4), (1, 1), (40, 30), (), (0, 4)]
BETAS, EPS = (0.9, 0.999), 1e-8


def tensors(dtype=torch.float32, seed=0, shapes=SHAPES):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def made(start, *, kind, seed=0, optimizer=AdamW, **settings):
    """Weights that begin at `start`, and an optimizer over them that knows their names."""
    weights = [p.clone().requires_grad_() for p in start]
    kept = Moments(dtype=kind, seed=seed)
    for i, weight in enumerate(weights):
        kept.place(weight, name=f"w{i}")
    return weights, optimizer(
        weights, moments=kept, **({"lr": 0.01, "betas": BETAS, "eps": EPS, "weight_decay": 0.1} | settings)
    )


def advance(weights, optimizer, seeds):
    for seed in seeds:
        for p, g in zip(weights, tensors(weights[0].dtype, seed, [p.shape for p in weights])):
            p.grad = g
        optimizer.step()


def contents(weights, optimizer):
    return [
        t.detach() for p in weights for t in (p, *(optimizer.state[p][n] for n in ("step", "exp_avg", "exp_avg_sq")))
    ]


def same(these, those):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(these, those, strict=True))


def finalised(x):
    """lowbias32 on Python's integers."""
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def undone(x):
    """The integer that `finalised` maps to x."""
    x = (x ^ (x >> 16)) * pow(0x846CA68B, -1, 2**32) % 2**32
    x = (x ^ (x >> 15) ^ (x >> 30)) * pow(0x7FEB352D, -1, 2**32) % 2**32
    return x ^ (x >> 16)


def bits_to_floats(*bits):
    return torch.tensor([b - 2**32 if b >= 2**31 else b for b in bits], dtype=torch.int32).view(torch.float32)


def test_bits_are_the_finaliser_of_the_keyed_index():
    bits = [b % 2**32 for b in random_bits(seed=3, step=7, name="h.0.w", start=0, entries=1000).tolist()]
    key = undone(bits[0])
    assert bits == [finalised(i ^ key) for i in range(1000)]
    last = random_bits(seed=3, step=7, name="h.0.w", start=2**31 - 3, entries=3).tolist()
    assert [b % 2**32 for b in last] == [finalised(i ^ key) for i in range(2**31 - 3, 2**31)]
    beyond = random_bits(seed=3, step=7, name="h.0.w", start=2**31, entries=1).item() % 2**32
    assert undone(beyond) != key  # the upper part of an index enters the key


@pytest.mark.parametrize("start", [0, 5, 2**31 - 40, 2**32 - 40, 5 * 2**32 - 40])
def test_bits_belong_to_the_global_index(start):
    whole = random_bits(seed=1, step=2, name="w", start=start, entries=100)
    for cut in (1, 33, 40, 99):
        pieces = [
            random_bits(seed=1, step=2, name="w", start=start + a, entries=b - a) for a, b in ((0, cut), (cut, 100))
        ]
        assert torch.equal(whole, torch.cat(pieces))
    assert len(random_bits(seed=1, step=2, name="w", start=start, entries=0)) == 0


def test_seed_step_and_name_each_change_the_bits():
    given = {"seed": 1, "step": 2, "name": "w"}
    bits = random_bits(**given, start=0, entries=10_000)
    for other in ({"seed": 2}, {"step": 3}, {"name": "v"}, {"seed": -1}):
        others = random_bits(**(given | other), start=0, entries=10_000)
        assert (bits == others).float().mean() < 1e-3
        alike = 32 - sum(((bits ^ others) >> i & 1).float().mean().item() for i in range(32))
        assert alike == pytest.approx(16, abs=0.2)  # each of 320,000 pairs of bits agrees half the time


@pytest.mark.parametrize("value", [1.001, -1.001, 3.3e-5, -7.7e12, 1.0 + 2**-8, 1.0 + 2**-16, 2.0 - 2**-20, 3e-39])
def test_rounding_takes_the_two_neighbours_and_keeps_the_mean(value):
    seeds, entries = 200, 256
    exact = torch.tensor(value)
    bits = exact.view(torch.int32).item() & ~0xFFFF
    low, high = (torch.tensor(b, dtype=torch.int32).view(torch.float32).double() for b in (bits, bits + 0x10000))
    share = float((exact.double() - low) / (high - low))
    for shift in (0, 16):  # the bits that m takes, and those of v
        rounded = torch.empty(seeds, entries, dtype=torch.bfloat16)
        for seed in range(seeds):
            drawn = random_bits(seed=seed, step=1, name="w", start=0, entries=entries) >> shift & 0xFFFF
            round_stochastically(exact.repeat(entries), drawn, out=rounded[seed])
        assert {float(x) for x in rounded.double().unique()} <= {float(low), float(high)}
        up = (rounded.double() == high).double().mean().item()
        assert abs(up - share) <= 4 * math.sqrt(share * (1 - share) / (seeds * entries)) + 1e-12


def test_what_needs_no_rounding_stays():
    values = bits_to_floats(
        0, 0x80000000, 0x7F800000, 0xFF800000, 0x3FC00000, 0xBE800000, 0x00010000, 0x7F7F0000
    )  # ±0, ±inf, …
    for drawn in (0, 1, 0x8000, 0xFFFF):
        out = torch.empty(8, dtype=torch.bfloat16)
        round_stochastically(values.clone(), torch.full((8,), drawn, dtype=torch.int32), out=out)
        assert torch.equal(out.float().view(torch.int32), values.view(torch.int32))
        unknown = bits_to_floats(0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000)  # the first is CUDA's own NaN
        round_stochastically(unknown, torch.full((4,), drawn, dtype=torch.int32), out=out[:4])
        assert out[:4].isnan().all()


def test_moments_are_unbiased_and_m_and_v_round_independently():
    gradient, seeds, entries = 0.77, 100, 512
    ups = []
    for seed in range(seeds):
        kept, weight = Moments(dtype="bfloat16", seed=seed), torch.zeros(entries)
        kept.place(weight, name="w")
        optimizer = AdamW([weight], lr=0.01, betas=(0.9, 0.95), eps=EPS, moments=kept)
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        state = optimizer.state[weight]
        ups.append(torch.stack([state["exp_avg"], state["exp_avg_sq"]]).double())
    ups = torch.stack(ups, dim=1).view(2, -1)
    for actual, wanted in zip(ups, (0.1 * gradient, 0.05 * gradient**2)):
        assert len(actual.unique()) == 2
        assert abs(actual.mean() - wanted) <= 4 * actual.std() / math.sqrt(actual.numel())
    assert abs(torch.corrcoef(ups)[0, 1]) < 4 / math.sqrt(ups.shape[1])


# one step, whatever the pieces


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("chunk", [7, 64, 100])
def test_chunks_change_no_bit(kind, chunk, monkeypatch):
    def run():
        weights, optimizer = made(tensors(), kind=kind)
        advance(weights, optimizer, range(1, 6))
        return contents(weights, optimizer)

    whole = run()
    monkeypatch.setattr(moments, "CPU_CHUNK", chunk)
    assert same(whole, run())


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("cuts", [(0, 400, 1200), (0, 37, 1200), (0, 0, 1001, 1200)])
def test_pieces_of_a_tensor_change_no_bit(kind, cuts):
    start, gradients = torch.randn(1200, generator=torch.Generator().manual_seed(0)), tensors(shapes=[(1200,)] * 5)

    def run(cuts):
        kept, weights = Moments(dtype=kind, seed=4), []
        for a, b in zip(cuts, cuts[1:]):
            weights.append(start[a:b].clone().requires_grad_())
            kept.place(weights[-1], name="w", offset=a + 2**33)
        optimizer = AdamW(weights, lr=0.01, betas=BETAS, eps=EPS, weight_decay=0.1, moments=kept)
        for gradient in gradients:
            for weight, a, b in zip(weights, cuts, cuts[1:]):
                weight.grad = gradient[a:b].clone()
            optimizer.step()
        return [
            torch.cat([f(w) for w in weights])
            for f in (
                lambda w: w.detach(),
                lambda w: optimizer.state[w]["exp_avg"],
                lambda w: optimizer.state[w]["exp_avg_sq"],
            )
        ]

    assert same(run((0, 1200)), run(cuts))


# AdamW


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_float32_moments_are_adamw(dtype, near, decay):
    ours, optimizer = made(tensors(dtype), kind="float32", weight_decay=decay)
    theirs = [p.clone().requires_grad_() for p in tensors(dtype)]
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=BETAS, eps=EPS, weight_decay=decay)
    advance(ours, optimizer, range(1, 21))
    advance(theirs, reference, range(1, 21))
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=near, atol=near)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[p][name], reference.state[q][name], rtol=near, atol=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bfloat16_moments_of_every_dtype(dtype):
    weights, optimizer = made(tensors(dtype), kind="bfloat16", weight_decay=0.0)
    wide, reference = made(tensors(torch.float32), kind="float32", weight_decay=0.0)
    advance(weights, optimizer, [1])
    advance(wide, reference, [1])
    for p, q in zip(weights, wide):
        state = optimizer.state[p]
        assert p.dtype == dtype and state["step"].dtype == torch.float32 and state["step"].shape == ()
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape
        near = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(p.float(), q, rtol=near, atol=near)  # the first update comes from unrounded moments


def descent(kind, steps, seed=0):
    """√(mean error²) over the way to the minimum of ½·Σ cᵢ(xᵢ − 1)², and the end's v."""
    curvature = torch.logspace(-1, 1, 2000)
    (x,), optimizer = made([torch.zeros(2000)], kind=kind, seed=seed, lr=0.02, weight_decay=0.0)
    way = []
    for _ in range(steps):
        x.grad = curvature * (x.detach() - 1)
        optimizer.step()
        way.append((x.detach() - 1).square().mean().sqrt().item())
    return way, optimizer.state[x]["exp_avg_sq"].double()


def test_bfloat16_descends_as_float32_and_nearest_rounding_of_v_does_not(monkeypatch):
    exact, exact_v = descent("float32", 200)
    for seed in (0, 1):
        actual, v = descent("bfloat16", 200, seed)
        assert max(abs(a - b) for a, b in zip(exact, actual)) < 2e-3  # of a way of length 1
        assert abs((v / exact_v).mean() - 1) < 2e-3
    monkeypatch.setattr(moments, "round_stochastically", lambda value, bits, *, out: out.copy_(value))
    _, stuck = descent("bfloat16", 200)
    assert (
        abs((stuck / exact_v).mean() - 1) > 2e-2
    )  # v should fall as the gradient vanishes, by less than half a neighbour


def test_strided_weights():
    plain, strided = (p.requires_grad_() for p in (torch.ones(5, 8), torch.ones(8, 5).t()))
    for p in (plain, strided):
        p.grad = tensors(shapes=[(5, 8)])[0]
        AdamW([p], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(plain, strided) and (plain != 1).all()


def test_groups_closures_and_weights_without_gradient():
    a, b, c = (torch.ones(4, 4, requires_grad=True) for _ in range(3))
    optimizer = AdamW([{"params": [a], "lr": 0.2}, {"params": [b, c]}], lr=0.1, eps=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (a + b).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 32
    torch.testing.assert_close(
        (a, b, c), (torch.full((4, 4), 0.8), torch.full((4, 4), 0.9), torch.ones(4, 4)), check_stride=False
    )
    assert c not in optimizer.state


@pytest.mark.parametrize("kind", MOMENTS)
def test_the_watcher_sees_every_movement_and_changes_none(kind, monkeypatch):
    monkeypatch.setattr(moments, "CPU_CHUNK", 100)
    weights, optimizer = made(tensors(), kind=kind)
    blind, other = made(tensors(), kind=kind)
    seen = {id(p): [] for p in weights}
    before = {}

    def watch(weight, piece, movement):
        seen[id(weight)].append(piece)
        entries = weight.detach().flatten()[piece]
        assert torch.equal(entries, before[id(weight)].flatten()[piece])  # just before it is added
        before[id(weight)].view(-1)[piece] += movement

    optimizer.watch = watch
    for seed in (1, 2, 3):
        before |= {id(p): p.detach().clone() for p in weights}
        advance(weights, optimizer, [seed])
        assert all(torch.equal(before[id(p)], p) for p in weights)
    advance(blind, other, (1, 2, 3))
    assert same(contents(weights, optimizer), contents(blind, other))
    for p in weights:
        wanted = [(a, min(a + 100, p.numel())) for a in range(0, p.numel(), 100)]
        assert [(piece.start, piece.stop) for piece in seen[id(p)]] == 3 * wanted


# state


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_round_trips_in_mid_run(kind, dtype):
    weights, first = made(tensors(dtype), kind=kind)
    advance(weights, first, range(1, 4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for state in loaded["state"].values() for value in state.values())
    resumed, second = made([p.detach() for p in weights], kind=kind, lr=0.5)
    second.load_state_dict(loaded)
    advance(weights, first, range(4, 7))
    advance(resumed, second, range(4, 7))
    assert same(contents(weights, first), contents(resumed, second))


def test_a_state_written_in_place_is_continued():
    weights, optimizer = made(tensors(), kind="bfloat16")
    advance(weights, optimizer, range(1, 4))
    kept = [t.clone() for t in contents(weights, optimizer)]
    advance(weights, optimizer, range(4, 7))
    wanted = [t.clone() for t in contents(weights, optimizer)]
    with torch.no_grad():
        for now, then in zip(contents(weights, optimizer), kept):
            now.copy_(then)
    advance(weights, optimizer, range(4, 7))
    assert same(contents(weights, optimizer), wanted)


def test_wrong_uses_are_named():
    with pytest.raises(ValueError, match="moments are 'float16'.*float32, bfloat16"):
        Moments(dtype="float16")
    weight = torch.zeros(3, 2, requires_grad=True)
    weight.grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"unknown weight of shape \(3, 2\).*place"):
        AdamW([weight], lr=0.1, moments=Moments(dtype="bfloat16")).step()
    weight.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(ValueError, match="sparse=False"):
        AdamW([weight], lr=0.1).step()
