"""Settings of the training loop and the learning rate they give; imports nothing heavy."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from methods.settings import check, setting

NUMERICS = 3  # raise when trained weights change by more than rounding; the golden weights change with it


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of the loop; one block for the domain phase, reused by parts that train in `prepare`."""

    learning_rate: float = setting(5.0e-4, within="(0, inf)")  # peak
    schedule: Literal["linear", "cosine", "constant"] = setting("linear")  # after the warm-up
    warmup: float = setting(0.0, within="[0, 1)")  # share of the steps
    epochs: float = setting(1.0, within="(0, inf)")
    batch: int = setting(8, within="[1, inf)")  # examples an optimizer step
    micro_batch: int = setting(8, within="[1, inf)")  # examples a forward pass; the rest is accumulated
    length: int = setting(256, within="[2, inf)")  # tokens; longer examples lose their beginning
    weight_decay: float = setting(0.0, within="[0, inf)")
    beta1: float = setting(0.9, within="[0, 1)")
    beta2: float = setting(0.999, within="[0, 1)")
    eps: float = setting(1.0e-8, within="(0, inf)")
    clip: float = setting(1.0, within="[0, inf)")  # largest gradient norm, penalties included; 0 is no clipping
    # tokens of a row of several examples, a forward pass each, in place of padded micro-batches; 0: none
    pack: int = setting(0, within="[0, inf)")
    # Adam's m and v: float32, or bfloat16 with stochastic rounding, 4 bytes a weight less
    moments: Literal["float32", "bfloat16"] = setting("float32")
    checkpointing: bool = setting(False)  # recompute activations in backward: less memory, a third more time
    compile: bool = setting(False)  # torch.compile of each block: minutes at the start, faster steps on a GPU
    # between two checkpoints that an interrupted run goes on from; 0 after every step
    checkpoint_seconds: float = setting(900.0, within="[0, inf)")
    probes: int = setting(4, within="[0, inf)")  # times a run is probed while it trains

    def __post_init__(self) -> None:
        check(self, "train")

    def numeric(self) -> dict[str, Any]:
        """The settings that a run's weights can depend on."""
        return {name: value for name, value in vars(self).items() if name != "checkpoint_seconds"}


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
