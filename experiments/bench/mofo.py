"""MoFO's step against torch's fused AdamW and against the paper's code as it is published (a sorted topk for each
tensor), on tensors of LLaMA's shapes, and the same with other selections of torch; then the selection alone, on
heavy-tailed |m|, with many zeros, and with many equal entries that are not zero, which a quickselect is slow on.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from experiments.bench.race import Goal, Race, race
from methods.mofo import MoFO
from methods.tools.adam import AdamW
from methods.tools.selection import kth_by_histogram, kth_largest

TITLE = "MoFO's step and its selection"
ROUNDS = 15
FRACTION, LEARNING_RATE, DECAY, BETAS, EPS = 0.15, 1e-3, 0.1, (0.9, 0.999), 1e-8


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    rounds = rounds or ROUNDS
    yield from _steps(small, rounds)
    yield from _selections(small, rounds)


def _steps(small: bool, rounds: int) -> Iterator[Race]:
    width, ffn, layers, vocabulary = (32, 88, 1, 64) if small else (512, 1408, 6, 12_000)
    block = [(width,), *[(width, width)] * 4, (width,), (ffn, width), (ffn, width), (width, ffn)]
    shapes = [(vocabulary, width), *block * layers, (width,)]
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw).mul_(0.02) for shape in shapes]
    gradients = [_heavy_tailed(shape, draw) for shape in shapes]

    def weights() -> list[Tensor]:
        made = [weight.clone().requires_grad_() for weight in start]
        for weight, gradient in zip(made, gradients):
            weight.grad = gradient
        return made

    settings = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    tensors = {name: weights() for name in ("MoFO", "sorted topk", "unsorted topk", "kthvalue", "fused", "ours")}
    runners = {
        "torch AdamW, fused": torch.optim.AdamW(tensors["fused"], fused=True, **settings).step,
        "our AdamW": AdamW(tensors["ours"], **settings).step,
        "MoFO": (mofo := MoFO(tensors["MoFO"], fraction=FRACTION, decay_all=True, **settings)).step,
        "official: sorted topk": Published(tensors["sorted topk"], lambda size, k: torch.topk(size, k)[0].min()).step,
        "the same, unsorted topk": Published(
            tensors["unsorted topk"], lambda size, k: torch.topk(size, k, sorted=False)[0].min()
        ).step,
        "the same, kthvalue": Published(tensors["kthvalue"], lambda size, k: size.kthvalue(len(size) - k + 1)[0]).step,
    }
    entries = sum(weight.numel() for weight in start)
    timed = race(
        f"A step of {entries / 1e6:.3g} M weights in {len(shapes)} tensors, fraction {FRACTION}",
        runners,
        against="torch AdamW, fused",
        rounds=rounds,
        goals=[] if small else [Goal(runner="MoFO", limit=4)],
    )
    apart = max(
        ((p - q).abs().max() / (q - s).abs().max()).item()
        for p, q, s in zip(tensors["MoFO"], tensors["sorted topk"], start)
    )
    timed.facts.update(
        {
            "entries": entries,
            "threads": torch.get_num_threads(),
            "share that moved": mofo.realised_fraction()["mean"],
            # one entry with another mask would make it 1
            "weights apart from the official ones, of the largest movement": apart,
            "bytes of MoFO's scratch": sum(room.nbytes for room in mofo._scratch.values()),
        }
    )
    yield timed
    yield Race(
        title="The same step of MoFO, against the paper's code",
        against="official: sorted topk",
        seconds={name: times for name, times in timed.seconds.items() if "AdamW" not in name},
        goals=() if small else (Goal(runner="MoFO", limit=12, faster=True),),
    )


class Published:
    """The paper's own step (its AdamW_MoFO): whole-tensor temporaries, and a threshold from `select`."""

    def __init__(self, weights: list[Tensor], select: Callable[[Tensor, int], Tensor]):
        self.weights, self.select, self.steps = weights, select, 0
        self.moments = [tuple(torch.zeros_like(p, requires_grad=False) for _ in range(2)) for p in weights]

    def step(self) -> None:
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in BETAS)
        with torch.no_grad():
            for p, (m, v) in zip(self.weights, self.moments):
                p.mul_(1 - LEARNING_RATE * DECAY)
                m.lerp_(p.grad, 1 - BETAS[0])
                v.mul_(BETAS[1]).addcmul_(p.grad, p.grad, value=1 - BETAS[1])
                denominator = (v.sqrt() / second**0.5).add_(EPS)
                moving = m
                if p.dim() >= 2:
                    size = m.abs()
                    threshold = self.select(size.view(-1), int(size.numel() * FRACTION))
                    moving = torch.where(size >= threshold, m, 0)
                p.addcdiv_(moving, denominator, value=-LEARNING_RATE / first)


def _selections(small: bool, rounds: int) -> Iterator[Race]:
    entries = 4_000 if small else 2_000_000
    draw = torch.Generator().manual_seed(0)
    heavy, share = _heavy_tailed((entries,), draw).abs_(), torch.rand(entries, generator=draw)
    k = int(FRACTION * entries)
    cases = {
        "heavy-tailed |m|": heavy,
        "70 % zeros": heavy * (share >= 0.7),
        "95 % zeros": heavy * (share >= 0.95),
        "half equal, not zero": torch.where(share < 0.5, heavy.median(), heavy),
    }
    for what, size in cases.items():
        room = torch.empty_like(size)

        def on_a_copy(kth: Callable, size: Tensor = size, room: Tensor = room):
            return kth(room.copy_(size), k)

        runners = {
            "sorted topk": lambda: torch.topk(size, k)[0].min(),
            "unsorted topk": lambda: torch.topk(size, k, sorted=False)[0].min(),
            "kthvalue": lambda: size.kthvalue(entries - k + 1)[0],
            "partition of floats": lambda: on_a_copy(lambda copy, k: copy.numpy().partition(entries - k)),
            "histograms": lambda: kth_by_histogram(lambda: size.split(1 << 18), k, device=size.device),
            "kth_largest": lambda: on_a_copy(kth_largest),
        }
        selected = {float(runner()) for name, runner in runners.items() if name != "partition of floats"}
        assert len(selected) == 1, f"the selections differ on {what}"
        title = f"The k-th largest of {entries:,} entries, {what}"
        timed = race(title, runners, against="sorted topk", rounds=min(rounds, 5))
        for name, seconds in timed.seconds.items():
            timed.facts[f"ns an entry, {name}"] = round(1e9 * min(seconds) / entries, 2)
        yield timed


def _heavy_tailed(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=draw).exp_().mul_(torch.randn(shape, generator=draw)).mul_(1e-3)
