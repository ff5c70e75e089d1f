"""An earlier adapter, which a new one is compared with: read from a folder, or begun anew to be fitted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from methods.errors import UserError
from methods.tools import peft_adapter
from methods.tools.adapter import read_adapter
from methods.tools.effective import lora_layers


def read_a(path: str, *, where: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The factors A (rank × in) of a LoRA adapter's folder, float32, by base name of the weight.

    shapes  of the base's tensors by name; empty where they are not known
    Raises UserError, which begins with `where`, for what is no such adapter, or one of another model.
    """
    given, folder = f"{where}: {path}", Path(path)
    if not peft_adapter.is_adapter(folder):
        raise UserError(f"{given} is no folder of a peft adapter: name one with {peft_adapter.CONFIG}")
    if (kind := peft_adapter.read_config(folder, given)["peft_type"]) != "LORA":
        raise UserError(f"{given} is a {kind} adapter, which has no factor A: name a LoRA adapter's folder")
    if shapes:
        peft_adapter.refuse_other_shapes(folder, given, shapes, "the base")
    return {name: update["a"].float().contiguous() for name, update in read_adapter(folder)[0].items()}


@torch.no_grad()
def redraw(model: nn.Module, draw: Generator) -> None:
    """Draw the factor A of every adapter anew, as peft draws it."""
    for _, layer in lora_layers(model):
        for factor in layer.lora_A.values():
            start = torch.empty(factor.weight.shape)
            factor.weight.copy_(nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=draw))
