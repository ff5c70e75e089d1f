"""Times and bytes inside a step, read through the engine's own hooks: two parts, called before and after all others.

    begin → forward → backward → penalty → clip → update begins → update ends → end

On a GPU the times are those of its own clock (CUDA events), recorded as the work is queued, without waiting for it.
"""

from dataclasses import dataclass, field
from time import perf_counter

import torch

from methods.part import Part


class Stopwatch:
    """Marks of every step, in order; `parts` go into a fit beside the method's own."""

    def __init__(self, device: torch.device):
        self._device = device
        self._rows: list[dict] = []
        self._now: dict = {}
        self.bytes_held = self.bytes_forward = 0  # the most allocated when a step begins and after a forward pass
        self.parts = (_Before(watch=self), _After(watch=self))

    def mark(self, name: str) -> None:
        if self._device.type == "cuda":
            self._now[name] = torch.cuda.Event(enable_timing=True)
            self._now[name].record()
        else:
            self._now[name] = perf_counter()

    def begin(self) -> None:
        if not self._now:  # the first micro-batch of a step
            self.mark("begin")
            self.bytes_held = max(self.bytes_held, self._allocated())

    def forward(self) -> None:
        self.mark("forward")
        self.bytes_forward = max(self.bytes_forward, self._allocated())

    def end(self) -> None:
        self.mark("end")
        self._rows.append(self._now)
        self._now = {}

    def between(self, first: str, second: str, *, skip: int) -> list[float]:
        """Seconds from one mark to another in each step after the first `skip`; waits for the device."""
        return [self._seconds(row[first], row[second]) for row in self._rows[skip:]]

    def steps(self, *, skip: int) -> list[float]:
        """Seconds from the end of one step to the end of the next, after the first `skip` (one at least)."""
        rows = self._rows[skip - 1 :]
        return [self._seconds(before["end"], after["end"]) for before, after in zip(rows, rows[1:])]

    def _seconds(self, first, second) -> float:
        if self._device.type != "cuda":
            return second - first
        second.synchronize()
        return first.elapsed_time(second) / 1e3

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0


@dataclass(frozen=True, kw_only=True)
class _Before(Part):
    key, phase = " before all", "adapt"

    watch: Stopwatch = field(repr=False)

    def optimizer_ready(self, *, run, state, optimizer):
        optimizer.register_step_pre_hook(lambda *_: self.watch.mark("update begins"))
        optimizer.register_step_post_hook(lambda *_: self.watch.mark("update ends"))

    def batch(self, *, run, state, batch):
        self.watch.begin()
        return batch

    def before_clip(self, *, run, state, step):
        self.watch.mark("backward")


@dataclass(frozen=True, kw_only=True)
class _After(Part):
    key, phase = "~ after all", "budget"

    watch: Stopwatch = field(repr=False)

    def loss(self, *, run, state, batch, hidden):
        self.watch.forward()

    def before_clip(self, *, run, state, step):
        self.watch.mark("penalty")

    def after_step(self, *, run, state, step, gradient):
        self.watch.end()
