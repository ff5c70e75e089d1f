"""The base model as numbers: θ₀ by parameter name, in the checkpoint's own dtype, read when it is needed."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from methods.errors import UserError
from methods.tools import model_folder


class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each made by `get(name)` when it is read, and not held afterwards.

    changed   of tuned tensors, the names of those that may differ from the base's
    """

    def __init__(self, names: Collection[str], get: Callable[[str], Tensor], *, changed: Collection[str] = ()):
        self._names, self._get, self.changed = names, get, changed

    def __getitem__(self, name: str) -> Tensor:
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def load_tensors(folder: Path) -> Lazy:
    """The tensors, as stored, of a safetensors file or of a model's folder; each is mapped when it is read.

    The mapping ends with the tensor: one opened file would keep in memory every tensor that was ever read from it.
    Raises UserError where there is no file, or where one is damaged.
    """
    files = model_folder.weight_files(folder) if folder.is_dir() else [folder]
    if not files:
        raise UserError(f"no safetensors in {folder}: run `dvc repro` to make it")
    where = {name: file for file in files for name in _opened(file).keys()}  # noqa: SIM118 (no mapping)
    return Lazy(where, lambda name: _opened(where[name]).get_tensor(name))


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


def as_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A torch dtype from its name; "auto" stays."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    named = getattr(torch, str(dtype), None)
    if named not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise UserError(
            f"dtype {dtype!r} is no floating-point type of torch: use bfloat16, float16, float32 or float64"
        )
    return named
