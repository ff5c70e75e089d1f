"""What a cell's drift costs for a matrix, against the training that it describes, which may be ten times as long.

The training of a matrix is its three products (forward, and the gradients of inputs and of weights) for 65,536 tokens
in bf16, of which an eighth is timed; the optimizer and all that lies between matrices are left out. Drift is every
measure of the matrix, as a share of four that are measured side by side. Its effective rank is exact up to a width of
1,024 and estimated beyond, or read from the factors of an adapter; how far the estimate is from the exact value is
among the facts.
"""

from collections.abc import Iterator
from functools import partial
from time import perf_counter

import torch

from experiments.bench.race import Goal, Race, race
from experiments.model import drift
from experiments.model.effective_rank import effective_rank, estimated

TITLE = "Drift of a matrix against its training"
TOKENS, TIMED, AT_ONCE = 65_536, 8_192, 1024
NAMES = [f"matrix.{number}" for number in range(4)]
ROLES = dict.fromkeys(NAMES, ("block.0", "matrix"))


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    for width in (64,) if small else (576, 1024, 2048, 4096):
        draw = torch.Generator().manual_seed(0)
        base = torch.randn(width, width, generator=draw).bfloat16()
        moved = (base + 0.01 * torch.randn(width, width, generator=draw)).bfloat16()
        factors = {"a": torch.randn(8, width, generator=draw), "b": torch.randn(width, 8, generator=draw)}
        measured = partial(drift.measure, base=dict.fromkeys(NAMES, base), roles=ROLES)
        runners = {
            "training": partial(_training, base, tokens=AT_ONCE if small else TIMED),
            "drift": lambda measured=measured, moved=moved: _seconds(measured, tuned=[(n, moved) for n in NAMES]),
            "drift of an adapter": lambda measured=measured, moved=moved, factors=factors: _seconds(
                measured, tuned=[(n, moved) for n in NAMES], factors=dict.fromkeys(NAMES, factors)
            ),
        }
        facts = {"threads": torch.get_num_threads()}
        if width <= 2048:
            change = moved.float() - base.float()
            exact, about = effective_rank(change), estimated(change)
            facts |= {"exact": round(exact, 2), "estimated": about, "difference": round(about / exact - 1, 4)}
        goals = [Goal(runner=name, limit=0.1) for name in list(runners)[1:]]
        title = f"{width:,} × {width:,}"
        yield race(title, runners, against="training", rounds=rounds or 3, own_clock=True, goals=goals, facts=facts)


def _training(weight: torch.Tensor, *, tokens: int) -> float:
    """Seconds of `TOKENS` tokens through one matrix and back, from those of `tokens`."""
    inputs = torch.randn(AT_ONCE, weight.shape[1], dtype=weight.dtype)
    began = perf_counter()
    for _ in range(0, tokens, AT_ONCE):
        outputs = inputs @ weight.T
        _ = outputs @ weight, outputs.T @ inputs
    return (perf_counter() - began) * TOKENS / tokens


def _seconds(function, **given) -> float:
    began = perf_counter()
    function(**given)
    return (perf_counter() - began) / len(NAMES)
