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

    learning_rate: float = setting(5.0e-4, within="(0, inf)", help="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = setting("linear", help="learning rate after the warm-up")
    warmup: float = setting(0.0, within="[0, 1)", help="share of the steps over which the learning rate rises")
    epochs: float = setting(1.0, within="(0, inf)", help="passes over the training rows")
    batch: int = setting(8, within="[1, inf)", help="examples an optimizer step")
    micro_batch: int = setting(8, within="[1, inf)", help="examples a forward pass; gradients are accumulated")
    length: int = setting(256, within="[2, inf)", help="tokens of an example; longer ones lose their beginning")
    weight_decay: float = setting(0.0, within="[0, inf)", help="decoupled weight decay of AdamW")
    beta1: float = setting(0.9, within="[0, 1)", help="decay of Adam's first moment")
    beta2: float = setting(0.999, within="[0, 1)", help="decay of Adam's second moment")
    eps: float = setting(1.0e-8, within="(0, inf)", help="added to the denominator of Adam's step")
    clip: float = setting(1.0, within="[0, inf)", help="largest gradient norm, penalties included; 0: no clipping")
    pack: int = setting(
        0,
        within="[0, inf)",
        help="tokens of a row that holds several examples, one row a forward pass, instead of padded micro-batches; "
        "0: no packing",
    )
    moments: Literal["float32", "bfloat16"] = setting(
        "float32", help="data type of Adam's moments; bfloat16 rounds stochastically and saves 4 bytes a weight"
    )
    checkpointing: bool = setting(
        False, help="recompute activations in the backward pass: less memory, a third more time"
    )
    compile: bool = setting(False, help="torch.compile of each block: minutes at the start, then faster steps on a GPU")
    checkpoint_seconds: float = setting(
        900.0, within="[0, inf)", help="seconds between two checkpoints of a run; 0: after every step"
    )
    probes: Literal["doubling"] | int = setting(
        "doubling",
        within="[0, inf)",
        help="when a run is probed besides its last step: before its first one and after 1, 2, 4, 8, 16, … steps "
        "(doubling), or so many times at equal distances",
    )
    stop: dict[str, float] | None = setting(
        None,
        help="by how much a probe may change for the worse from step 0 before the run ends at a probe, by its name: "
        "{general_nll: +0.1} nats, {sciq: -0.05} of accuracy",
    )
    keep: Literal["last", "best"] = setting(
        "last",
        help="the weights that a run ends with: those of its last step, or of the probed step with the least nats of "
        "the domain's probe rows, among those within the limits of `stop`",
    )

    def __post_init__(self) -> None:
        check(self, "train")

    def numeric(self) -> dict[str, Any]:
        """The settings that a run's weights can depend on; a rule on probes only where there is one."""
        left_out = {
            "checkpoint_seconds",
            *(() if self.stop else ("stop",)),
            *(("keep",) if self.keep == "last" else ()),
        }
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def cut(self, processes: int | None) -> bool:
        """Whether a step may be cut into several micro-batches or shared by processes; packing depends on lengths."""
        return bool(self.pack) or self.batch > self.micro_batch or (processes or 1) > 1

    @property
    def acts_on_probes(self) -> bool:
        """Whether a rule on probes can end the run or choose its weights."""
        return bool(self.stop) or self.keep != "last"


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
