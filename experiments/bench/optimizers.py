"""The step of each optimizer alone, on tensors in the shapes of a full-size model: seconds and bytes.

The goal is stated for one H200 (docs/gpu-check.md); a goal that is missed is a number and no failure.
"""

from collections.abc import Callable, Sequence
from statistics import median
from types import SimpleNamespace

import torch

from experiments.bench import running
from experiments.bench.full_size import STEPS, Size, goal_of, room_on
from experiments.bench.sizes import Skipped
from experiments.bench.stopwatch import Stopwatch
from methods.mofo import MoFO
from methods.tools.adam import AdamW, Moments

GOAL = 1.3  # times fused AdamW


def optimizers(size: Size, *, device: torch.device) -> dict:
    """A step of each optimizer alone, on float32 tensors of the model's shapes: all of them, or the first that fit."""
    shapes = [p.shape for p in size.shape.build().parameters()]
    chosen = _first_that_fit(shapes, room_on(device))
    if not chosen:
        raise Skipped("not even the first tensor fits, with its gradient and moments")
    draw = torch.Generator(device).manual_seed(0)
    weights = [torch.empty(shape, device=device).normal_(std=0.02, generator=draw).requires_grad_() for shape in chosen]
    for weight in weights:
        weight.grad = torch.empty_like(weight, requires_grad=False).normal_(std=1e-3, generator=draw)
    # the path of several processes, which this one plays alone
    alone = SimpleNamespace(rank=0, world=2, sum=lambda tensor: tensor)
    pieces = {"shards": alone, "sizes": [weight.numel() for weight in weights]}
    makers: dict[str, Callable[[Moments, Moments], torch.optim.Optimizer]] = {
        "adamw fused, float32 moments": lambda wide, half: torch.optim.AdamW(weights, lr=1e-6, fused=True),
        "adamw, bfloat16 moments": lambda wide, half: AdamW(weights, lr=1e-6, moments=half),
        "mofo, float32 moments": lambda wide, half: MoFO(weights, lr=1e-6, moments=wide),
        "mofo, bfloat16 moments": lambda wide, half: MoFO(weights, lr=1e-6, moments=half),
        "mofo by histogram, bfloat16 moments": lambda wide, half: MoFO(weights, lr=1e-6, moments=half, **pieces),
    }
    seconds, peaks = {}, {}
    for name, maker in makers.items():
        half = Moments(dtype="bfloat16")
        for index, weight in enumerate(weights):
            half.place(weight, name=str(index))
        peak = running.Peak(device)
        optimizer = maker(Moments(), half)
        seconds[name] = _seconds(optimizer.step, device)
        peaks[name] = peak.bytes()
        del optimizer
    fused = seconds["adamw fused, float32 moments"]
    times = {name: value / fused for name, value in seconds.items()}
    entries, all_entries = (sum(shape.numel() for shape in some) for some in (chosen, shapes))
    goals = [goal_of(f"{name} / adamw fused", times[name], "<=", GOAL) for name in times if name.startswith("mofo,")]
    return {
        "seconds_by_optimizer": seconds,
        "times_fused_adamw": times,
        "bytes_beside_weights": peaks,
        "tensors": len(chosen),
        "tensors_of": len(shapes),
        "entries": entries,
        "entries_of": all_entries,
        "goals": [] if size.tiny else goals,
    }


def _first_that_fit(shapes: Sequence[torch.Size], room: int | None) -> list[torch.Size]:
    """Tensors in the model's order: weight, gradient and both moments in float32, and MoFO's scratch on the largest."""
    chosen, held, largest = [], 0, 0
    for shape in shapes:
        held, largest = held + 16 * shape.numel(), max(largest, shape.numel())
        if room is not None and held + 16 * largest > room:
            break
        chosen.append(shape)
    return chosen


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """The median of some calls, by the device's own clock."""
    watch = Stopwatch(device)
    for _ in range(running.WARM + STEPS):
        watch.mark("begin")
        step()
        watch.end()
    return median(watch.between("begin", "end", skip=running.WARM))
