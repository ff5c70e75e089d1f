"""What a run says of its steps, read from the device as seldom as the device would wait for it."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from experiments.training.flops import mfu
from methods.errors import UserError

WINDOW = 10  # steps between two looks at a GPU's numbers; the CPU, which computes as it is asked, is read at every step


class TrainingFailed(UserError):
    """The loss stopped being a number."""


class Log:
    """The curve of a run: one row a step, completed when `flush` reads the losses of the steps since the last time.

    A window's seconds are shared equally by its steps; what happens in a `pause` counts for none.
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
        self.added = {} if added is None else added  # by part, what it has cost so far
        self.seconds = 0.0
        self.tokens = 0
        self.flops: float | None = 0.0  # None: not known of this architecture
        self._name, self._steps, self._rate, self._device, self._peak, self._bar = (
            name,
            steps,
            learning_rate,
            device,
            peak,
            bar,
        )
        self._window = 1 if device.type == "cpu" else WINDOW
        self._open: list[tuple[dict, dict, int, float | None]] = []
        self._began = time.perf_counter()

    def step(self, row: dict, *, tokens: int, flops: float | None, read: dict) -> None:
        """A step is under way: `row` is known, `read` will be (0-dim tensors on the device, or numbers)."""
        self.tokens += tokens
        self.flops = None if flops is None or self.flops is None else self.flops + flops
        self._open.append((row | {"tokens": self.tokens}, read, tokens, flops))
        if len(self._open) >= self._window:
            self.flush()

    def flush(self) -> None:
        """Wait for the steps under way and write them down. Raises TrainingFailed where a loss is not finite."""
        if not self._open:
            return
        keys = list(self._open[0][1])
        values = torch.stack(
            [
                torch.as_tensor(read[key], dtype=torch.float64, device=self._device)
                for _, read, _, _ in self._open
                for key in keys
            ]
        ).tolist()
        seconds = (time.perf_counter() - self._began) / len(self._open)
        for i, (row, _, tokens, flops) in enumerate(self._open):
            self.seconds += seconds
            row |= dict(zip(keys, values[i * len(keys) :], strict=False))
            used = mfu(flops, seconds, self._peak)
            self.curve.append(row | {"seconds": self.seconds, "tokens_per_second": tokens / seconds, "mfu": used})
            if not math.isfinite(row["loss"]):
                raise TrainingFailed(
                    f"{self._name}: the loss is {row['loss']} at step {row['step']} of {self._steps}; "
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
        """Something that is not training."""
        self.flush()
        yield
        self._began = time.perf_counter()
