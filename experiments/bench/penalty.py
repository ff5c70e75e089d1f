"""gradient += scale·F⊙(θ − θ₀) and ΣF(θ − θ₀)², once an optimizer step, against the step of torch's fused AdamW on the
same tensors of LLaMA's shapes.

Beside ours, for importance F in float32, bfloat16 and 8 bits: the penalty in autograd, as it is mostly written, and its
closed form in plain torch.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from experiments.bench.race import Goal, Race, race
from methods.tools.importance import decode, encode, penalise

TITLE = "quadratic penalty beside AdamW"
ADAMW = "torch AdamW, fused"
SCALE = 1e-3


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    for anchor in ("float32", "bfloat16"):
        yield _anchored(anchor, small=small, rounds=rounds or 9)


def shapes(*, small: bool) -> list[tuple[int, ...]]:
    """Of a LLaMA's tensors: 25 M weights in 74."""
    vocabulary, width, inner, layers = (64, 16, 40, 1) if small else (4000, 512, 1376, 8)
    attention = [(width, width), (width // 2, width), (width // 2, width), (width, width)]
    block = [*attention, (inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(vocabulary, width), *block * layers, (width,)]


def adamw(start: list[Tensor], gradients: list[Tensor]) -> torch.optim.AdamW:
    """A fused AdamW over copies of the tensors."""
    weights = [values.clone().requires_grad_() for values in start]
    for weight, gradient in zip(weights, gradients):
        weight.grad = gradient.clone()
    return torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.1, fused=True)


def _anchored(dtype: str, *, small: bool, rounds: int) -> Race:
    draw = torch.Generator().manual_seed(0)
    anchors = [torch.randn(shape, generator=draw).mul_(0.02).to(getattr(torch, dtype)) for shape in shapes(small=small)]
    weights = [a.float() + 1e-4 * torch.randn(a.shape, generator=draw) for a in anchors]
    fisher = [torch.randn(a.shape, generator=draw).mul_(3).exp2_() for a in anchors]  # in octaves as wide as a Fisher's
    held = {"float32": fisher, "bfloat16": [f.bfloat16() for f in fisher], "8 bits": [encode(f) for f in fisher]}
    gradients = [torch.zeros_like(w) for w in weights]
    leaves = [w.clone().requires_grad_() for w in weights]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)

    def by_autograd() -> None:
        sum((f * (leaf - a).square()).sum() for f, leaf, a in zip(fisher, leaves, anchors)).mul(SCALE / 2).backward()

    @torch.no_grad()
    def in_closed_form() -> None:
        for f, w, a, g in zip(fisher, weights, anchors, gradients):
            moved = w - a
            force = f * moved
            g.add_(force, alpha=SCALE)
            (force * moved).sum()

    def ours(kind: str) -> Callable[[], list[Tensor]]:
        return lambda: [
            penalise(weight=w, anchor=a, importance=f, gradient=g, scale=SCALE)
            for w, a, f, g in zip(weights, anchors, held[kind], gradients)
        ]

    def error(kind: str) -> float:
        """Relative L2 of the gradient, against the values that `kind` stands for, in float64."""
        off = size = 0.0
        for w, a, f in zip(weights, anchors, held[kind]):
            added = torch.zeros_like(w)
            penalise(weight=w, anchor=a, importance=f, gradient=added, scale=SCALE)
            dense = decode(f.codes, low=f.low, step=f.step, dtype=torch.float64) if kind == "8 bits" else f.double()
            wanted = SCALE * dense * (w.double() - a.double())
            off, size = off + (added - wanted).square().sum().item(), size + wanted.square().sum().item()
        return float(f"{(off / size) ** 0.5:.2g}")

    facts = {
        "entries": sum(w.numel() for w in weights),
        "threads": torch.get_num_threads(),
        "gradient_error": {kind: error(kind) for kind in held},
    }
    runners = {ADAMW: adamw(weights, gradients).step, "autograd": by_autograd, "closed form": in_closed_form}
    runners |= {f"ours, {kind}": ours(kind) for kind in held}
    limits = {"float32": 1.2, "bfloat16": 1.2, "8 bits": 1.4}
    goals = [] if small else [Goal(runner=f"ours, {kind}", limit=limit) for kind, limit in limits.items()]
    return race(f"θ₀ in {dtype}", runners, against=ADAMW, rounds=rounds, goals=goals, facts=facts)
