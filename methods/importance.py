"""Importance of weights in 8 bits, and the quadratic penalty on it, both without a temporary of a whole tensor.

Importances of one tensor spread over many powers of two, and a penalty needs each only to a few per cent. So 255 codes
are spread evenly over the logarithm, tensor by tensor, and a 256th means exactly 0:

    value(0) = 0        value(k) = 2^(low + (k − 1)·step),  k = 1 … 255

Codes 1 and 255 are the tensor's own smallest and largest value. Values reach at most OCTAVES powers of two below the
largest, and never below float32's smallest normal number, 2^−126. What is smaller becomes code 1 or code 0, whichever
value is nearer: 0 below half of value(1). Every other value is within a relative 2^(step/2) − 1 of its code's: at most
5.6 % where all of the range is used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiments.errors import UserError

if TYPE_CHECKING:
    from methods.part import Run

OCTAVES = 40
CPU_PIECE = 1 << 18  # entries worked on at once: a few float32 copies of them fit in a core's cache
CUDA_PIECE = 1 << 24

SCALE = "::scale"  # behind a tensor's name in a file: its low and step

_CODES = 255  # that are not 0
_SMALLEST = -126  # log2 of float32's smallest normal number


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """A non-negative tensor in 8-bit logarithmic code."""

    codes: Tensor  # uint8, in the tensor's shape; 0 is exactly 0
    low: float  # log2 of the value of code 1
    step: float  # log2 of the ratio of neighbouring codes' values

    def numel(self) -> int:
        return self.codes.numel()


@torch.no_grad()
def encode(values: Tensor, *, name: str = "a tensor") -> Codes:
    """Code of a non-negative tensor of any floating-point type, read as float32; nearest in the logarithm.

    The same values give the same code, and a code's decoded values give that code again.
    Raises UserError calling the tensor `name` for a value that is negative, infinite or not a number in float32.
    """
    flat = values.detach().reshape(-1)
    low, step, nothing = _range(flat, _largest(flat, name))
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    for code, piece in pieces(codes, flat):
        piece = piece.float()
        logarithm = piece.double().log2_()  # float32 is too coarse for a narrow range
        if step:
            logarithm.sub_(low).div_(step).add_(1).round_()
        code.copy_(logarithm.clamp_(1, _CODES).masked_fill_(piece < nothing, 0))
    return Codes(codes=codes.view(values.shape), low=low, step=step)


def _largest(flat: Tensor, name: str) -> float:
    """The largest value, 0 of none."""
    largest = 0.0
    for (piece,) in pieces(flat):
        least, most = (bound.item() for bound in piece.float().aminmax())
        if not (least >= 0 and most < math.inf):  # also true of a NaN
            raise UserError(f"importance of {name} lies in {least:g} to {most:g}: it must be finite and not negative; "
                            "prepare this method again in float32, or with other general text")  # fmt: skip
        largest = max(largest, most)
    return largest


def _range(flat: Tensor, largest: float) -> tuple[float, float, float]:
    """low, step, and what a value must reach not to become 0."""
    if not largest:
        return 0.0, 0.0, math.inf
    high = math.log2(largest)
    floor = max(high - OCTAVES, _SMALLEST)
    nothing = 2.0 ** (floor - 1)
    smallest = largest
    for (piece,) in pieces(flat):
        piece = piece.float()
        smallest = min(smallest, piece.masked_fill(piece < nothing, math.inf).min().item())
    low = max(math.log2(smallest), floor)
    return _round(low), _round(max(0.0, high - low) / (_CODES - 1)), nothing


def _round(logarithm: float) -> float:
    """To 2^−36: far finer than float32 can tell, and coarser than the last bit, in which mathematics libraries differ."""
    return round(logarithm * 2.0**36) / 2.0**36


def decode(codes: Tensor, *, low: float, step: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of uint8 `codes` of any shape, a whole tensor's or a part's; a new tensor on their device."""
    flat = codes.reshape(-1).int()
    return _table(low, step, dtype, codes.device).index_select(0, flat).view(codes.shape)


@functools.lru_cache(maxsize=4096)
def _table(low: float, step: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    values = [0.0] + [2.0 ** (low + k * step) for k in range(_CODES)]
    return torch.tensor(values, dtype=torch.float64).to(device, dtype)


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Contiguous tensors of one size and device, flat and cut alike into pieces that are views of them."""
    size = CUDA_PIECE if tensors[0].is_cuda else CPU_PIECE
    yield from zip(*(tensor.view(-1).split(size) for tensor in tensors if tensor.numel()), strict=True)


def to_file(importance: Mapping[str, Tensor | Codes]) -> dict[str, Tensor]:
    """What safetensors stores: codes by name, beside them `NAME::scale`, float64 (low, step); other tensors as they are.

    Raises UserError naming a tensor with a value that is negative, infinite or not a number.
    """
    stored = {}
    for name, values in importance.items():
        if isinstance(values, Codes):
            stored[name] = values.codes
            stored[name + SCALE] = torch.tensor([values.low, values.step], dtype=torch.float64)
        else:
            _largest(values.detach().reshape(-1), name)
            stored[name] = values
    return stored


def from_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Codes]:
    """Importance by name, out of what `to_file` made; floating-point tensors are passed on as they are.

    Raises UserError for codes without their scale.
    """
    importance: dict[str, Tensor | Codes] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            continue
        if tensor.dtype == torch.uint8:
            if name + SCALE not in tensors:
                raise UserError(f"importance of {name} is in 8 bits and its scale is missing: prepare this method again")
            low, step = tensors[name + SCALE].tolist()
            importance[name] = Codes(codes=tensor, low=low, step=step)
        else:
            importance[name] = tensor
    return importance


def placed(run: Run, values: Tensor | Codes) -> Tensor | Codes:
    """This process's rows of a whole importance, on the run's device."""
    if isinstance(values, Codes):
        return replace(values, codes=placed(run, values.codes))
    return run.shards.local(values).to(run.device)


def totals(values: Tensor | Codes) -> tuple[float, float]:
    """ΣF and ΣF², added up in float64."""
    if isinstance(values, Codes):
        counts = torch.zeros(_CODES + 1, dtype=torch.float64)
        for (piece,) in pieces(values.codes):
            counts += piece.bincount(minlength=_CODES + 1).cpu()
        each = _table(values.low, values.step, torch.float64, counts.device)
        return (counts * each).sum().item(), (counts * each.square()).sum().item()
    total = square = 0.0
    for (piece,) in pieces(values):
        piece = piece.double()
        total, square = total + piece.sum().item(), square + torch.dot(piece, piece).item()
    return total, square


@torch.no_grad()
def penalise(*, weight: Tensor, anchor: Tensor | None, importance: Tensor | Codes, gradient: Tensor, scale: float) -> Tensor:
    """gradient += scale·F·(θ − θ₀), in place; returns Σ F·(θ − θ₀)² on the weight's device.

    weight, anchor and gradient have one shape and are contiguous; so has the importance F, or it is one value for all
    (0-dim). The anchor θ₀ may be of another dtype; None is zero. Computed in float32, in float64 for float64 weights, and so
    is the sum, which is 0-dim. A gradient of a coarser dtype is rounded once, when F·(θ − θ₀) is added.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    coded = isinstance(importance, Codes)
    factor = importance.codes if coded else importance
    single = factor.dim() == 0
    rows = [weight.detach(), gradient] + ([] if single else [factor]) + ([] if anchor is None else [anchor])
    if any(row.shape != weight.shape for row in rows):
        raise ValueError(f"shapes differ: {', '.join(str(tuple(row.shape)) for row in rows)}")
    sums = []
    for theta, out, *rest in pieces(*rows):
        f = factor if single else rest[0]
        f = decode(f, low=importance.low, step=importance.step, dtype=wide) if coded else f.to(wide)
        moved = theta.to(wide)
        if anchor is not None:
            moved = torch.sub(moved, rest[-1]).to(wide)
        force = f * moved
        sums.append(torch.dot(force, moved))
        out.add_(force, alpha=scale)
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=wide, device=weight.device)
