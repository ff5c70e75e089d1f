"""MoFO against ten lines of its definition, and against AdamW where it must be AdamW."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from methods import mofo
from methods.mofo import MoFO, MomentumFilter
from methods.part import Run
from methods.tools.adam import MOMENTS, AdamW, Moments
from methods.tools.process_group import Shards

SHAPES = [(7, 5), (3,), (2, 3, 4), (1, 1), (40, 30), ()]


def tensors(dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in SHAPES]


def placed(ps, kind):
    kept = Moments(dtype=kind, seed=1)
    for i, p in enumerate(ps):
        kept.place(p, name=f"w{i}")
    return kept


def advance(ps, optimizer, seeds):
    for seed in seeds:
        for p, g in zip(ps, tensors(ps[0].dtype, seed)):
            p.grad = g
        optimizer.step()


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
    optimizer = MoFO(
        ps, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay, fraction=fraction, decay_all=decay_all
    )
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


@pytest.mark.parametrize("kind", MOMENTS)
def test_fraction_one_is_our_adamw_to_the_bit(kind):
    pair = []
    for optimizer in (lambda ps, **given: MoFO(ps, fraction=1.0, **given), AdamW):
        ps = [p.requires_grad_() for p in tensors(torch.float32)]
        kept = placed(ps, kind)
        pair.append((ps, optimizer(ps, lr=0.02, weight_decay=0.1, moments=kept)))
        advance(*pair[-1], range(1, 5))
    assert all(torch.equal(p, q) for p, q in zip(pair[0][0], pair[1][0]))


def test_bfloat16_moments_select_by_the_unrounded_momentum():
    """The masks are those of |m| in float64, computed from the stored m before the step, to a float32's rounding."""
    (p,) = ps = [torch.zeros(60, 50, requires_grad=True)]
    optimizer = MoFO(ps, lr=0.1, fraction=0.1, moments=placed(ps, "bfloat16"))
    for seed in range(1, 5):
        before, stored = p.detach().clone(), optimizer.state[p]["exp_avg"].double() if seed > 1 else 0.0
        p.grad = torch.randn(60, 50, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        m = 0.9 * stored + 0.1 * p.grad.double()
        largest = set(m.abs().flatten().topk(300).indices.tolist())
        assert set((p.detach() != before).flatten().nonzero().flatten().tolist()) == largest
        assert optimizer.realised_fraction()["last"] == 0.1  # 300 of 3000: rounded momenta would tie
        assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16


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


def gradient_of(kind, shape, seed):
    draw = torch.Generator().manual_seed(seed)
    gradient = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        .exp_()
        .mul_(torch.randn(shape, generator=draw, dtype=torch.float64))
    )
    if kind == "ties":
        return gradient.round().clamp(-2, 2)
    if kind == "constant":
        return torch.full_like(gradient, 0.25)
    if kind.endswith("zeros"):
        zero = torch.rand(shape[0], generator=torch.Generator().manual_seed(0)) < float(
            kind.split()[0]
        )  # rows, in every step
        gradient[zero] = 0.0
    return gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "ties", "constant", "0.7 zeros", "0.95 zeros"])
@pytest.mark.parametrize("shape", [(300, 400), (1, 1), (3, 2), (520, 513)])  # 520·513 is more than a piece
def test_masks_are_those_of_a_sorted_topk(kind, shape, dtype):
    """The official step's filter on the same m, bit for bit, and weights that are AdamW's where it is 1."""
    ours, free = (torch.ones(shape, dtype=dtype).requires_grad_() for _ in range(2))
    pair, k = (MoFO([ours], lr=0.1, fraction=0.15), AdamW([free], lr=0.1)), max(1, int(0.15 * ours.numel()))
    for seed in range(1, 5):
        before = ours.detach().clone()
        with torch.no_grad():
            free.copy_(ours)
        for p, optimizer in zip((ours, free), pair):
            p.grad = gradient_of(kind, shape, seed).to(dtype)
            optimizer.step()
        m = pair[0].state[ours]["exp_avg"]
        mask = m.abs() >= torch.topk(m.abs().flatten(), k)[0].min()
        assert torch.equal(ours, torch.where(mask, free, before))
        assert pair[0].realised_fraction()["last"] == mask.sum() / ours.numel()
        if kind == "constant":
            assert mask.all()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", MOMENTS)
def test_threads_change_no_bit(kind, threads, monkeypatch):
    monkeypatch.setattr(mofo, "SHARED", 1)
    shapes, runs = [(700, 640), (3, 4), (400, 300), (0, 5), (50,), (640, 333), (1, 1), (2, 100_003)], []
    for count in (1, 2, 3, 5):
        threads(count)
        ps = [
            torch.randn(shape, generator=torch.Generator().manual_seed(i)).requires_grad_()
            for i, shape in enumerate(shapes)
        ]
        optimizer = MoFO(ps, lr=0.1, weight_decay=0.1, fraction=0.2, moments=placed(ps, kind))
        for step in range(3):
            for i, p in enumerate(ps):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            optimizer.step()
        assert torch.get_num_threads() == count  # of this thread, and of one that begins now
        with ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(torch.get_num_threads).result() == count
        runs.append((ps, optimizer))
    for ps, optimizer in runs[1:]:
        assert all(torch.equal(p, q) for p, q in zip(ps, runs[0][0]))
        assert optimizer.realised_fraction() == runs[0][1].realised_fraction()
        for p, q in zip(ps, runs[0][0]):
            assert all(torch.equal(value, runs[0][1].state[q][name]) for name, value in optimizer.state[p].items())


def test_what_goes_wrong_in_a_thread_is_raised(threads, monkeypatch):
    monkeypatch.setattr(mofo, "SHARED", 1)
    threads(2)
    ps = [torch.zeros(3, 2, requires_grad=True) for _ in range(4)]
    for p in ps:
        p.grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match="unknown weight of shape"):
        MoFO(ps, moments=Moments(dtype="bfloat16")).step()


def test_scratch_is_of_the_largest_tensors(threads, monkeypatch):
    monkeypatch.setattr(mofo, "SHARED", 1)
    for count, wanted in ((1, 4 * 90_000), (2, 4 * (90_000 + 80_000)), (4, 4 * (90_000 + 80_000 + 70_000))):
        threads(count)
        ps = [torch.ones(shape, requires_grad=True) for shape in ((100, 700), (10, 10), (100, 900), (100, 800))]
        optimizer = MoFO(ps, lr=0.1)
        for _ in range(3):
            for p in ps:
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert sum(room.nbytes for (use, *_), room in optimizer._scratch.items() if use == "order") == wanted


def test_a_kernel_that_is_not_lerp_changes_no_mask(monkeypatch):
    """Other CPUs' fused kernel may round m differently: |m| is then computed twice and not read from its result."""
    runs = []
    for same in (True, False):
        monkeypatch.setattr(mofo, "kernel_is_lerp", lambda dtype, beta, same=same: same)
        p = torch.zeros(300, 400, requires_grad=True)
        optimizer = MoFO([p], lr=0.1)
        for seed in range(3):
            p.grad = gradient_of("plain", p.shape, seed).float()
            optimizer.step()
        runs.append(p)
    assert torch.equal(*runs)


def test_histograms_move_the_entries_that_a_partition_moves():
    """What other devices and several processes run, here in one process with as many tensors as it likes."""
    alone = SimpleNamespace(rank=0, world=2, sum=lambda tensor: tensor)
    runs = []
    for shards in (None, alone):
        ps = [torch.ones(shape, requires_grad=True) for shape in ((520, 513), (40, 30), (1, 1))]
        optimizer = MoFO(ps, lr=0.1, weight_decay=0.1, fraction=0.15, shards=shards)
        for seed in range(3):
            for p, kind in zip(ps, ("0.7 zeros", "ties", "plain")):
                p.grad = gradient_of(kind, p.shape, seed).float()
            optimizer.step()
        runs.append((ps, optimizer.realised_fraction()))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(p, q) for p, q in zip(runs[0][0], runs[1][0]))


def test_an_empty_tensor_is_left_alone():
    p = torch.zeros(0, 4, requires_grad=True)
    p.grad = torch.zeros(0, 4)
    optimizer = MoFO([p], lr=0.1)
    optimizer.step()
    assert optimizer.realised_fraction() == {"last": None, "mean": None}


def test_state_round_trips_in_mid_run():
    whole = [p.requires_grad_() for p in tensors(torch.float64)]
    first = MoFO(whole, lr=0.01, fraction=0.2, weight_decay=0.1)
    advance(whole, first, range(1, 4))
    resumed = [p.detach().clone().requires_grad_() for p in whole]
    second = MoFO(resumed, lr=0.5, fraction=0.9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    advance(whole, first, range(4, 7))
    advance(resumed, second, range(4, 7))
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed))


def test_strided_and_half_precision_tensors():
    start, gradient = (t.bfloat16().float() for t in torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)))
    plain, strided = start.clone().requires_grad_(), start.t().contiguous().t().requires_grad_()
    half = start.bfloat16().requires_grad_()
    for p in (plain, strided, half):
        p.grad = gradient.to(p.dtype)
        MoFO([p], lr=0.1, fraction=0.25).step()
    assert torch.equal(plain, strided)
    assert torch.equal(half != start, plain != start)
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


@pytest.mark.parametrize(
    "wrong",
    [
        {"fraction": 0.0},
        {"fraction": 1.01},
        {"fraction": -0.1},
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"eps": -1.0},
        {"weight_decay": -0.1},
    ],
)
def test_wrong_settings_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is .*must be in"):
        MoFO([torch.zeros(2, 2, requires_grad=True)], **({"lr": 0.1} | wrong))


def test_sizes_go_with_the_parameters():
    ps = [torch.zeros(2, 2, requires_grad=True) for _ in range(2)]
    with pytest.raises(ValueError, match="1 sizes for 2 parameters"):
        MoFO(ps, lr=0.1, sizes=[4])


# two processes: the rows of every tensor, from where the second process's begin
SHARDED = {
    "even": ((40, 30), 20),
    "uneven": ((7, 5), 5),
    "second empty": ((3, 4), 3),
    "first empty": ((2, 9), 0),
    "vector": ((5,), 3),
    "deep": ((5, 3, 4), 2),
    "ties": ((6, 6), 4),
    "zero": ((4, 6), 1),
    "no gradient": ((6, 5), 3),
    "large": ((90, 100), 31),
    "tiny": ((1, 2), 1),
}
SETTINGS = [("float32", 0.1, False), ("float32", 0.37, True), ("bfloat16", 0.1, True), ("bfloat16", 1.0, False)]


def sharded_gradient(name, shape, seed):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100 * len(name)))
    if name == "ties":
        gradient = gradient.round().clamp(-1, 1)
    if name == "zero" or (name == "no gradient" and seed == 2):
        gradient.zero_()
    return gradient


def train_on(shards, kind, fraction, decay_all):
    """{name: this process's rows after every step} and the realised fractions."""
    kept, weights = Moments(dtype=kind, seed=3), {}
    rows = {
        n: slice(0, None) if shards.world == 1 else (slice(0, cut), slice(cut, None))[shards.rank]
        for n, (_, cut) in SHARDED.items()
    }
    for name, (shape, _) in SHARDED.items():
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
        weights[name] = whole[rows[name]].clone().requires_grad_()
        kept.place(weights[name], name=name, offset=rows[name].start * whole[0].numel())
    optimizer = MoFO(
        weights.values(),
        lr=0.01,
        weight_decay=0.1,
        fraction=fraction,
        decay_all=decay_all,
        moments=kept,
        shards=shards,
        sizes=[torch.Size(shape).numel() for shape, _ in SHARDED.values()],
    )
    way = {name: [] for name in SHARDED}
    for step in range(1, 4):
        for name, weight in weights.items():
            weight.grad = sharded_gradient(name, SHARDED[name][0], step)[rows[name]].clone()
            if name == "no gradient" and step == 2 and shards.world > 1:
                weight.grad = None
        optimizer.step()
        for name, weight in weights.items():
            way[name].append(weight.detach().clone())
    return way, optimizer.realised_fraction()


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(
        [train_on(Shards(rank=rank, world=2, active=True), *settings) for settings in SETTINGS], f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


@pytest.mark.thorough
def test_two_processes_move_the_entries_that_one_moves(tmp_path):
    processes.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    pieces = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for settings, (first, realised), (second, realised_there) in zip(SETTINGS, *pieces, strict=True):
        wanted, fractions = train_on(Shards(), *settings)
        assert realised == realised_there == fractions
        for name, steps in wanted.items():
            assert any(len(piece[0]) == 0 for piece in (first[name], second[name])) == (
                "empty" in name or name == "tiny"
            )
            for step, a, b in zip(steps, first[name], second[name]):
                assert torch.equal(step, torch.cat([a, b])), (settings, name)  # weights, and so masks


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


def test_threads_are_as_many_as_have_work(threads):
    threads(8)
    assert mofo._workers([]) == mofo._workers([0, 0]) == mofo._workers([900]) == mofo._workers([1 << 24]) == 1
    assert mofo._workers([1 << 24, 1 << 23, 1 << 22]) == 2  # a third would end before the first
    assert mofo._workers([1 << 20] * 100) == 8 and mofo._workers([1 << 10] * 700) == 2


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))], ids=["deepcopy", "pickle"]
)
def test_a_copy_goes_on_as_the_original_does(copied, moments):
    def steps(optimizer, seed, count=3):
        draw = torch.Generator().manual_seed(seed)
        for _ in range(count):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn(p.shape, generator=draw)
            optimizer.step()
        return [p.detach().clone() for p in optimizer.param_groups[0]["params"]]

    start = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    weights = [start.clone().requires_grad_(), start[0].clone().requires_grad_()]
    for kind, more in ((MoFO, {"fraction": 0.2, "sizes": [42, 7]}), (AdamW, {})):
        kept = Moments(dtype=moments, seed=4)
        for index, weight in enumerate(weights):
            kept.place(weight, name=str(index))
        optimizer = kind(weights, lr=0.1, moments=kept, **more)
        steps(optimizer, 1)
        other = copied(optimizer)
        theirs = other.param_groups[0]["params"]
        assert len(theirs) == 2 and not any(a is b for a in theirs for b in weights)
        if kind is MoFO:
            assert other.realised_fraction() == optimizer.realised_fraction()
        wanted = steps(optimizer, 2)
        assert all(torch.equal(a, b) for a, b in zip(steps(other, 2), wanted, strict=True))
        if kind is MoFO:
            assert other.realised_fraction() == optimizer.realised_fraction()


def test_a_loaded_state_dict_goes_on_as_the_original_does():
    weights = [torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()]
    mine = MoFO(weights, lr=0.1, fraction=0.3)
    other = MoFO([weights[0].detach().clone().requires_grad_()], lr=0.5, fraction=0.9)
    for seed in range(6):
        for optimizer in (mine, other)[: 1 + seed // 3]:
            p = optimizer.param_groups[0]["params"][0]
            p.grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        if seed == 2:
            other.load_state_dict(copy.deepcopy(mine.state_dict()))
            with torch.no_grad():
                other.param_groups[0]["params"][0].copy_(weights[0])
    assert (
        torch.equal(weights[0], other.param_groups[0]["params"][0])
        and other.realised_fraction()["last"] == mine.realised_fraction()["last"]
    )
