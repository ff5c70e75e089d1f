"""The base model as numbers: θ₀ by parameter name, in the checkpoint's own dtype, read from disk as it is asked for."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from experiments.errors import UserError


class Tensors(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files by name. Each look-up maps the file: nothing is held in between."""

    def __init__(self, folder: Path):
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"no safetensors in {folder}: run `dvc repro` to make it")
        self._open = [safe_open(file, framework="pt") for file in files]
        self._where = {name: number for number, file in enumerate(self._open) for name in file.keys()}  # noqa: SIM118 (no mapping)

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self._where[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where


def load_tensors(folder: Path) -> Tensors:
    """Every tensor of the folder's safetensors files, by name, as stored. Raises UserError where there is none."""
    return Tensors(folder)


def dtype_of(info: dict) -> torch.dtype:
    """The torch dtype that base.json names."""
    return getattr(torch, info["dtype"])
