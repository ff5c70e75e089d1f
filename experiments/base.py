"""The base model as numbers: θ₀ by parameter name, in the checkpoint's own dtype."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from experiments.errors import UserError


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files, by name, as stored. Raises UserError where there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"no safetensors in {folder}: run `dvc repro` to make it")
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def dtype_of(info: dict) -> torch.dtype:
    """The torch dtype that base.json names."""
    return getattr(torch, info["dtype"])
