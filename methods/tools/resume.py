"""The checkpoints that a long pass of a part may use; experiments/training/resume.py implements them."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, device


class Resume(Protocol):
    def load(self, into: Mapping[str, Tensor], device: device | str = "cpu") -> tuple[dict[str, Tensor], dict] | None:
        """The newest checkpoint as (tensors, position), or None; the tensors of `into` are read in place."""

    def due(self) -> bool:
        """Whether it is time for the next checkpoint; the same answer in every process."""

    def save(self, tensors: Mapping[str, Tensor], position: dict) -> None:
        """Write a checkpoint of tensors and a position, which is JSON; every process calls it."""
