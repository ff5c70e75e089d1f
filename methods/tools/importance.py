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
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from methods.errors import UserError

if TYPE_CHECKING:
    from methods.part import Run
    from methods.tools.costs import Counts

OCTAVES = 40
CPU_PIECE = (
    1 << 20
)  # entries worked on at once: a few float32 copies of them fit in a shared cache; smaller ones wait more for threads
CUDA_PIECE = 1 << 24

_CODES = 255  # that are not 0
_PAIRED = 1 << 16  # entries of a tensor from which on its codes are decoded two at once
_SMALLEST = -126  # log2 of float32's smallest normal number


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """A non-negative tensor in 8-bit logarithmic code."""

    codes: Tensor  # uint8, in the tensor's shape; 0 is exactly 0
    low: float  # log2 of the value of code 1
    step: float  # log2 of the ratio of neighbouring codes' values

    def numel(self) -> int:
        return self.codes.numel()

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def cpu(self) -> Codes:
        return replace(self, codes=self.codes.cpu())

    def histogram(self) -> tuple[Tensor, Tensor]:
        """How many entries have each of the 256 codes, and what it stands for; (256,) each, float64, on the CPU."""
        counts = torch.zeros(_CODES + 1, dtype=torch.float64)
        for (piece,) in pieces(self.codes):
            counts += piece.bincount(minlength=_CODES + 1).cpu()
        return counts, _table(self.low, self.step, torch.float64, counts.device)


@torch.no_grad()
def encode(values: Tensor, *, name: str = "a tensor") -> Codes:
    """Code of a non-negative tensor of any floating-point type, read as float32; nearest in the logarithm.

    The same values give the same code, and a code's decoded values give that code again.
    Raises UserError calling the tensor `name` for a value that is negative, infinite or not a number in float32.
    """
    flat = values.detach().reshape(-1)
    low, step, nothing = _range(flat, largest(flat, name))
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    for code, piece in pieces(codes, flat):
        piece = piece.float()
        logarithm = piece.double().log2_()  # float32 is too coarse for a narrow range
        if step:
            logarithm.sub_(low).div_(step).add_(1).round_()
        code.copy_(logarithm.clamp_(1, _CODES).masked_fill_(piece < nothing, 0))
    return Codes(codes=codes.view(values.shape), low=low, step=step)


def largest(flat: Tensor, name: str) -> float:
    """The largest value, 0 of none. Raises UserError calling the tensor `name` for one that no importance can have."""
    highest = 0.0
    for (piece,) in pieces(flat):
        least, most = (bound.item() for bound in piece.float().aminmax())
        if not (least >= 0 and most < math.inf):  # also true of a NaN
            raise UserError(
                f"importance of {name} lies in {least:g} to {most:g}: it must be finite and not negative; "
                "prepare this method again in float32, or with other general text"
            )
        highest = max(highest, most)
    return highest


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
    flat = [tensor.view(-1) for tensor in tensors if tensor.numel()]
    if flat and len(flat[0]) <= size:  # splitting takes longer than working on a small one
        flat = [(tensor,) for tensor in flat]
    else:
        flat = [tensor.split(size) for tensor in flat]
    yield from zip(*flat, strict=True)


def placed(run: Run, values: Tensor | Codes) -> Tensor | Codes:
    """This process's rows of a whole importance, on the run's device."""
    if isinstance(values, Codes):
        return replace(values, codes=placed(run, values.codes))
    return run.shards.local(values).to(run.device)


def totals(values: Tensor | Codes) -> tuple[float, float]:
    """ΣF and ΣF², added up in float64."""
    if isinstance(values, Codes):
        counts, each = values.histogram()
        return (counts * each).sum().item(), (counts * each.square()).sum().item()
    total = square = 0.0
    for (piece,) in pieces(values):
        piece = piece.double()
        total, square = total + piece.sum().item(), square + torch.dot(piece, piece).item()
    return total, square


@torch.no_grad()
def penalise(
    *, weight: Tensor, anchor: Tensor | None, importance: Tensor | Codes, gradient: Tensor, scale: float
) -> Tensor:
    """gradient += scale·F·(θ − θ₀), in place; returns Σ F·(θ − θ₀)² on the weight's device.

    weight, anchor and gradient have one shape and are contiguous; so has the importance F, or it is one value for all
    (0-dim). The anchor θ₀ may be of another dtype; None is zero. Computed in float32, in float64 for float64 weights, and so
    is the sum, which is 0-dim. A gradient of a coarser dtype is rounded once, when F·(θ − θ₀) is added.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if isinstance(importance, Codes) and importance.codes.dim() == 0:
        importance = decode(importance.codes, low=importance.low, step=importance.step, dtype=wide)
    coded = isinstance(importance, Codes)
    factor = importance.codes if coded else importance
    single = factor.dim() == 0
    rows = [weight.detach(), gradient] + ([] if single else [factor]) + ([] if anchor is None else [anchor])
    if any(row.shape != weight.shape for row in rows):
        raise ValueError(f"shapes differ: {', '.join(str(tuple(row.shape)) for row in rows)}")
    table = _table(importance.low, importance.step, wide, weight.device) if coded else None
    pairs = _pairs(table) if coded and _in_pairs(factor, table) else None

    room = torch.empty(
        3, min(weight.numel(), CUDA_PIECE if weight.is_cuda else CPU_PIECE), dtype=wide, device=weight.device
    )
    sums = []
    for theta, out, *rest in pieces(*rows):
        moved, force, spare = room[
            :, : len(theta)
        ]  # one memory for all pieces: fresh pages cost more than the arithmetic
        if anchor is None:
            moved = theta.to(wide)
        else:
            torch.sub(theta.to(wide), _widened(rest[-1], into=moved), out=moved)
        if coded:
            _decode(rest[0], table, pairs, spare=spare, out=force).mul_(moved)
        else:
            torch.mul(_widened(factor if single else rest[0], into=force), moved, out=force)
        sums.append(torch.dot(force, moved))
        out.add_(force, alpha=scale)
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=wide, device=weight.device)


def _widened(values: Tensor, *, into: Tensor) -> Tensor:
    """`values`, for an operation with wider ones: a GPU widens on the way, the CPU would take new memory for it."""
    return (
        values
        if values.is_cuda or values.dim() == 0 or values.dtype.itemsize >= into.dtype.itemsize
        else into.copy_(values)
    )


def _in_pairs(codes: Tensor, table: Tensor) -> bool:
    """Whether looking two codes up at once pays for the table of their 65536 values."""
    return (
        codes.device.type == "cpu"
        and table.dtype == torch.float32
        and codes.numel() >= _PAIRED
        and sys.byteorder == "little"
    )


def _pairs(table: Tensor) -> Tensor:
    """By two neighbouring codes read as one uint16 their two float32, side by side in a float64: (65536,)."""
    first = table.view(torch.int32).long()  # none has a sign
    return torch.add(first, first[:, None], alpha=1 << 32).view(torch.float64).view(-1)


def _decode(codes: Tensor, table: Tensor, pairs: Tensor | None, *, spare: Tensor, out: Tensor) -> Tensor:
    """The values of uint8 `codes` (entries,), in `out`; both it and `spare` are (entries,) of the table's type."""
    index = spare.view(torch.int32)  # for float64 twice as long as needed
    if pairs is None or len(codes) % 2 or codes.storage_offset() % 2:
        torch.index_select(table, 0, index[: len(codes)].copy_(codes), out=out)
    else:
        torch.index_select(
            pairs, 0, index[: len(codes) // 2].copy_(codes.view(torch.uint16)), out=out.view(torch.float64)
        )
    return out


def memory_of_penalty(counts: Counts, *, bits: int) -> dict[str, int]:
    """Bytes of importance in `bits` a weight, and of what a penalty computes with it, as fields of `costs.Memory`."""
    piece = counts.piece(counts.share(counts.largest_regularised), cpu=CPU_PIECE, cuda=CUDA_PIECE)
    return {
        "importance": counts.share(counts.regularised * bits // 8),
        "update": 2 * counts.wide * counts.share(counts.largest_adapted) + 4 * counts.wide * piece,
    }
