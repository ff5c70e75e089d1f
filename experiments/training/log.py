"""The log of a run's steps: losses are read from the device only now and then, because each read makes it wait."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from experiments.training.hardware import mfu
from methods.errors import UserError

WINDOW = 10  # steps between two reads from a GPU; on the CPU, where a read costs nothing, every step is read


class TrainingFailed(UserError):
    """The loss is no longer a finite number."""


class Log:
    """The curve of a run, one row for each step; `flush` reads the losses of the steps since the last read.

    The seconds between two reads are shared equally by the steps; seconds in a `pause` are not counted.
    """

    def __init__(
        self,
        *,
        name: str,
        steps: int,
        learning_rate: float,
        device: torch.device,
        peak: float | None,
        bar,
        added: dict[str, dict] | None = None,
    ):
        self.curve: list[dict] = []
        self.added = {} if added is None else added  # {part: costs so far}
        self.seconds = 0.0
        self.tokens = 0
        self.flops: float | None = 0.0  # None: not known for this architecture
        self._name, self._steps, self._rate = name, steps, learning_rate
        self._device, self._peak, self._bar = device, peak, bar
        self._window = 1 if device.type == "cpu" else WINDOW
        self._open: list[tuple[dict, dict, int, float | None]] = []
        self._began = time.perf_counter()

    def step(self, row: dict, *, tokens: int, flops: float | None, read: dict) -> None:
        """Add a step: `row` is known, `read` is still being computed (0-dim tensors on the device, or numbers)."""
        self.tokens += tokens
        self.flops = None if flops is None or self.flops is None else self.flops + flops
        self._open.append((row | {"tokens": self.tokens}, read, tokens, flops))
        if len(self._open) >= self._window:
            self.flush()

    def flush(self) -> None:
        """Wait for the steps that are being computed and add them to the curve.

        Raises TrainingFailed where a loss is not finite.
        """
        if not self._open:
            return
        keys = list(self._open[0][1])
        wide = {"dtype": torch.float64, "device": self._device}
        values = torch.stack([torch.as_tensor(read[key], **wide) for _, read, _, _ in self._open for key in keys])
        values = values.tolist()  # one read for all
        seconds = (time.perf_counter() - self._began) / len(self._open)
        for i, (row, _, tokens, flops) in enumerate(self._open):
            self.seconds += seconds
            row |= dict(zip(keys, values[i * len(keys) :], strict=False))
            used = mfu(flops, seconds, self._peak)
            self.curve.append(row | {"seconds": self.seconds, "tokens_per_second": tokens / seconds, "mfu": used})
            broken = "loss" if not math.isfinite(row["loss"]) else "gradient's norm"
            if broken == "loss" or math.isnan(row.get("grad_norm", 0.0)):  # before the weights are in a checkpoint
                value = row["loss" if broken == "loss" else "grad_norm"]
                raise TrainingFailed(
                    f"{self._name}: the {broken} is {value} at step {row['step']} of {self._steps}; "
                    f"lower train.learning_rate ({self._rate}) or a part's strength"
                )
        self._bar.set_postfix(
            loss=f"{row['loss']:.3f}", tok_s=f"{tokens / seconds:.0f}", mfu=f"{used:.0%}" if used else "-"
        )
        self._bar.update(len(self._open))
        self._open.clear()
        self._began = time.perf_counter()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A time whose seconds are not counted as training."""
        self.flush()
        yield
        self._began = time.perf_counter()
