"""Settings of the training loop and the learning rate they give; imports nothing heavy."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments.errors import UserError

NUMERICS = 3  # raise when trained weights change by more than rounding; the golden weights change with it


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of the loop; one block for the domain phase, reused by parts that train in `prepare`."""

    learning_rate: float = 5.0e-4  # peak
    schedule: str = "linear"  # linear | cosine | constant, after the warm-up
    warmup: float = 0.0  # share of the steps
    epochs: float = 1.0
    batch: int = 8  # examples an optimizer step
    micro_batch: int = 8  # examples a forward pass; the rest is accumulated
    length: int = 256  # tokens; longer examples lose their beginning
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1.0e-8
    clip: float = 1.0  # largest gradient norm, penalties included; 0 is no clipping
    pack: int = 0  # tokens of a row of several examples, a forward pass each, in place of padded micro-batches; 0: none
    moments: str = "float32"  # Adam's m and v: float32, or bfloat16 with stochastic rounding, 4 bytes a weight less
    checkpointing: bool = False  # recompute activations in backward: less memory, a third more time
    compile: bool = False  # torch.compile of each block: minutes at the start, faster steps on a GPU
    checkpoint_seconds: float = 900.0  # between two checkpoints that an interrupted run goes on from; 0 after every step
    probes: int = 4  # times a run is probed while it trains

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "batch", "micro_batch", "length", "eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"train.{name} is {getattr(self, name)}: it must be above 0")
        for name in ("beta1", "beta2", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}: it must be in [0, 1)")
        for name in ("weight_decay", "clip", "probes", "pack", "checkpoint_seconds"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} is {getattr(self, name)}: it must not be negative")
        for name, known in (("schedule", SCHEDULES), ("moments", MOMENTS)):
            if getattr(self, name) not in known:
                raise UserError(f"train.{name} is {getattr(self, name)!r}: it must be one of {', '.join(known)}")


    def numeric(self) -> dict[str, Any]:
        """The settings that a run's weights can depend on."""
        return {name: value for name, value in vars(self).items() if name != "checkpoint_seconds"}


MOMENTS = ("float32", "bfloat16")
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """Rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then the schedule towards 0."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    return settings.learning_rate * SCHEDULES[settings.schedule]((step - warm) / max(1, steps - warm))
