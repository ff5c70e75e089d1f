"""MoFO's step against torch's fused AdamW and against the paper's code as it is published (a sorted topk for each
tensor), on tensors of LLaMA's shapes, and the same with other selections of torch; then the selection alone, on
heavy-tailed |m|, with many zeros, and with many equal entries that are not zero, which a quickselect is slow on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from experiments.bench.race import Goal, Race, race

TITLE = "MoFO's step and its selection"
ROUNDS = 15
FRACTION, LEARNING_RATE, DECAY, BETAS, EPS = 0.15, 1e-3, 0.1, (0.9, 0.999), 1e-8


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    rounds = rounds or ROUNDS
    yield from _steps(small, rounds)
    yield from _selections(small, rounds)


def _steps(small: bool, rounds: int) -> Iterator[Race]:
    import torch

    from methods.mofo import MoFO
    from methods.tools.adam import AdamW

    width, ffn, layers, vocabulary = (32, 88, 1, 64) if small else (512, 1408, 6, 12_000)
    block = [(width,), *[(width, width)] * 4, (width,), (ffn, width), (ffn, width), (width, ffn)]
    shapes = [(vocabulary, width), *block * layers, (width,)]
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw).mul_(0.02) for shape in shapes]
    gradients = [_heavy_tailed(shape, draw) for shape in shapes]

    def weights() -> list:
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
    found = race(
        f"A step of {entries / 1e6:.3g} M weights in {len(shapes)} tensors, fraction {FRACTION}",
        runners,
        against="torch AdamW, fused",
        rounds=rounds,
        goals=[] if small else [Goal(runner="MoFO", limit=4)],
    )
    apart = [
        ((p - q).abs().max() / (q - s).abs().max()).item()
        for p, q, s in zip(tensors["MoFO"], tensors["sorted topk"], start)
    ]
    found.facts.update(
        {
            "entries": entries,
            "threads": torch.get_num_threads(),
            "share that moved": mofo.realised_fraction()["mean"],
            "weights apart from the official ones, of the largest movement": max(
                apart
            ),  # one entry with another mask would make it 1
            "bytes of MoFO's scratch": sum(room.nbytes for room in mofo._scratch.values()),
        }
    )
    yield found
    others = {name: times for name, times in found.seconds.items() if "AdamW" not in name}
    yield Race(
        title="The same step of MoFO, against the paper's code",
        against="official: sorted topk",
        seconds=others,
        goals=() if small else (Goal(runner="MoFO", limit=12, faster=True),),
    )


class Published:
    """The paper's own step (its AdamW_MoFO), operation by operation: whole-tensor temporaries, and a threshold from
    `select`.
    """

    def __init__(self, weights: list, select: Callable[[Any, int], Any]):
        import torch

        self.weights, self.select, self.steps = weights, select, 0
        self.moments = [
            (torch.zeros_like(p, requires_grad=False), torch.zeros_like(p, requires_grad=False)) for p in weights
        ]

    def step(self) -> None:
        import torch

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
    import torch

    from methods.tools.selection import kth_by_histogram, kth_largest

    entries = 4_000 if small else 2_000_000
    draw = torch.Generator().manual_seed(0)
    heavy, share, k = (
        _heavy_tailed((entries,), draw).abs_(),
        torch.rand(entries, generator=draw),
        int(FRACTION * entries),
    )
    cases = {
        "heavy-tailed |m|": heavy,
        "70 % zeros": heavy * (share >= 0.7),
        "95 % zeros": heavy * (share >= 0.95),
        "half equal, not zero": torch.where(share < 0.5, heavy.median(), heavy),
    }
    for what, size in cases.items():
        room = torch.empty_like(size)

        def partition(kth: Callable = kth_largest, size: Any = size, room: Any = room) -> Any:
            return kth(room.copy_(size), k)

        runners = {
            "sorted topk": lambda: torch.topk(size, k)[0].min(),
            "unsorted topk": lambda: torch.topk(size, k, sorted=False)[0].min(),
            "kthvalue": lambda: size.kthvalue(entries - k + 1)[0],
            "partition of floats": lambda: partition(lambda copy, k: copy.numpy().partition(entries - k)),
            "histograms": lambda: kth_by_histogram(lambda: size.split(1 << 18), k, device=size.device),
            "kth_largest": partition,
        }
        if any(
            float(runners[name]()) != float(runners["kthvalue"]())
            for name in ("sorted topk", "unsorted topk", "histograms", "kth_largest")
        ):
            raise AssertionError(f"the selections differ on {what}")
        found = race(
            f"The k-th largest of {entries:,} entries, {what}", runners, against="sorted topk", rounds=min(rounds, 5)
        )
        found.facts.update(
            {f"ns an entry, {name}": round(1e9 * min(seconds) / entries, 2) for name, seconds in found.seconds.items()}
        )
        yield found


def _heavy_tailed(shape: tuple[int, ...], draw: Any) -> Any:
    import torch

    return torch.randn(shape, generator=draw).exp_().mul_(torch.randn(shape, generator=draw)).mul_(1e-3)
