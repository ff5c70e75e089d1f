"""What a long pass of a part needs of the checkpoints it is given; the engine's own are experiments/training/resume.py."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, device


class Resume(Protocol):
    def load(self, into: Mapping[str, Tensor], device: device | str = "cpu") -> tuple[dict[str, Tensor], dict] | None:
        """The newest checkpoint as (tensors, position), the tensors of `into` read in place; None where there is none."""

    def due(self) -> bool:
        """Whether it is time for the next checkpoint; the same answer in every process."""

    def save(self, tensors: Mapping[str, Tensor], position: dict) -> None:
        """Write a checkpoint; every process calls it."""
