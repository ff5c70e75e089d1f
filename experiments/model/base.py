"""The base model as numbers: θ₀ by parameter name, in the checkpoint's own dtype, read from disk as it is asked for."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from methods.errors import UserError


class Tensors(Mapping[str, Tensor]):
    """The tensors by name of one safetensors file, or of all those in a folder.

    A tensor is mapped from its file when it is asked for, and is not held afterwards.
    """

    def __init__(self, folder: Path):
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
        if not files:
            raise UserError(f"no safetensors in {folder}: run `dvc repro` to make it")
        self._open = [_opened(file) for file in files]
        # noqa: SIM118 (no mapping)
        self._where = {name: number for number, file in enumerate(self._open) for name in file.keys()}

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self._where[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where


def load_tensors(folder: Path) -> Tensors:
    """Every tensor by name, as stored, of a safetensors file or of a folder of them.

    Raises UserError where there is no file, or where one is damaged.
    """
    return Tensors(folder)


def _opened(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is no safetensors file, or damaged or cut off ({error}): delete it and run the stage that "
            "makes it again"
        ) from error


def dtype_of(info: dict) -> torch.dtype:
    """The torch dtype that base.json names."""
    dtype = getattr(torch, str(info["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(
            f"base.json names the dtype {info['dtype']!r}, which torch does not have: delete it and run "
            "the `model` stage again"
        )
    return dtype
