"""Importance of weights in 8 bits and the quadratic penalty on it, both without a temporary as large as a tensor.

The importances in a tensor range over many powers of two, and a penalty needs each only to a few per cent. So 255 codes
are spaced evenly on a logarithmic scale, separately for each tensor, and one more code means exactly 0:

    value(0) = 0        value(k) = 2^(low + (k − 1)·step),  k = 1 … 255

Codes 1 and 255 are the smallest and the largest value of the tensor. The range ends OCTAVES powers of two below the
largest value, or at float32's smallest normal number, 2^−126, if that is larger. A smaller value becomes code 1, or
code 0 if it is below half of value(1). Any other value differs from that of its code by a factor of at most
2^(step/2): 5.6 % where the whole range is used.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from methods.errors import UserError

if TYPE_CHECKING:
    from methods.part import Run
    from methods.tools.costs import Counts

OCTAVES = 40
# entries worked on at once: a few float32 copies of them fit in a shared cache; with fewer, threads wait more
CPU_PIECE = 1 << 20
CUDA_PIECE = 1 << 24

_CODES = 255  # codes other than 0
_PAIRED = 1 << 16  # tensors of at least so many entries are decoded two codes at a time
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
        """The number of entries with each of the 256 codes, and the codes' values; both (256,) float64 on the CPU."""
        counts = torch.zeros(_CODES + 1, dtype=torch.float64)
        for (piece,) in pieces(self.codes):
            counts += piece.bincount(minlength=_CODES + 1).cpu()
        return counts, _table(self.low, self.step, torch.float64, counts.device)


@torch.no_grad()
def encode(values: Tensor, *, name: str = "a tensor") -> Codes:
    """The code of a non-negative floating-point tensor, read as float32: for each value the nearest in the logarithm.

    Equal values have equal codes, and encoding the decoded values gives the same codes again.
    Raises UserError naming the tensor for a value that is negative, infinite or not a number in float32.
    """
    flat = values.detach().reshape(-1)
    low, step, nothing = _range(flat, largest(flat, name))
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    for code, piece in pieces(codes, flat):
        piece = piece.float()
        logarithm = piece.double().log2_()  # for a narrow range float32 is too coarse
        if step:
            logarithm.sub_(low).div_(step).add_(1).round_()
        code.copy_(logarithm.clamp_(1, _CODES).masked_fill_(piece < nothing, 0))
    return Codes(codes=codes.view(values.shape), low=low, step=step)


def compact(values: Tensor, *, bits: int, name: str) -> Tensor | Codes:
    """Importance as a part's setting `bits` wants it stored: 8-bit codes, or the values themselves on the CPU."""
    return encode(values, name=name) if bits == 8 else values.cpu()


def largest(flat: Tensor, name: str) -> float:
    """The largest value, 0 for an empty tensor. Raises UserError naming the tensor for an impossible importance."""
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
    """low, step, and the smallest value whose code is not 0."""
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
    """Round to 2^−36: finer than float32's precision, and coarser than the last bit, in which libraries differ."""
    return round(logarithm * 2.0**36) / 2.0**36


def decode(codes: Tensor, *, low: float, step: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of uint8 `codes` of any shape, in a new tensor on their device."""
    flat = codes.reshape(-1).int()
    return _table(low, step, dtype, codes.device).index_select(0, flat).view(codes.shape)


@functools.lru_cache(maxsize=4096)
def _table(low: float, step: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    values = [0.0] + [2.0 ** (low + k * step) for k in range(_CODES)]
    return torch.tensor(values, dtype=torch.float64).to(device, dtype)


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching flat pieces (views) of contiguous tensors of equal size and device."""
    size = CUDA_PIECE if tensors[0].is_cuda else CPU_PIECE
    flat = [tensor.view(-1) for tensor in tensors if tensor.numel()]
    if flat and len(flat[0]) <= size:  # for a small tensor splitting would take longer than the work
        flat = [(tensor,) for tensor in flat]
    else:
        flat = [tensor.split(size) for tensor in flat]
    yield from zip(*flat, strict=True)


def refuse_missing(importance: Mapping[str, Tensor | Codes], names: Iterable[str], *, part: str) -> None:
    """Raises UserError where weights that are trained have no prepared importance."""
    if missing := [name for name in names if name not in importance]:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(
            f"{part}: no importance was prepared for {missing[0]}{more}: "
            "prepare it again, `dvc repro --force --single-item prepare@MODEL-METHOD-SEED`"
        )


def placed(run: Run, values: Tensor | Codes) -> Tensor | Codes:
    """This process's rows of a whole importance, on the run's device."""
    if isinstance(values, Codes):
        return replace(values, codes=placed(run, values.codes))
    return run.shards.local(values).to(run.device)


def totals(values: Tensor | Codes) -> tuple[float, float]:
    """ΣF and ΣF², summed in float64."""
    if isinstance(values, Codes):
        counts, each = values.histogram()
        return (counts * each).sum().item(), (counts * each.square()).sum().item()
    total = square = 0.0
    for (piece,) in pieces(values.reshape(-1)):
        piece = piece.double()
        total, square = total + piece.sum().item(), square + torch.dot(piece, piece).item()
    return total, square


@torch.no_grad()
def penalise(
    *, weight: Tensor, anchor: Tensor | None, importance: Tensor | Codes, gradient: Tensor, scale: float
) -> Tensor:
    """gradient += scale·F·(θ − θ₀), in place; returns Σ F·(θ − θ₀)² on the weight's device.

    weight, anchor and gradient have one shape and are contiguous; so has the importance F, or it is one value for all
    (0-dim). The anchor θ₀ may be of another dtype; None is zero. Computed in float32, in float64 for float64 weights,
    and so is the sum, which is 0-dim. A gradient of a coarser dtype is rounded once, when F·(θ − θ₀) is added.
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
        # the same memory for all pieces: new memory costs more than the arithmetic
        moved, force, spare = room[:, : len(theta)]
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
    """`values` for an operation with wider ones: a GPU widens them on the way, the CPU would allocate memory."""
    if values.is_cuda or values.dim() == 0 or values.dtype.itemsize >= into.dtype.itemsize:
        return values
    return into.copy_(values)


def _in_pairs(codes: Tensor, table: Tensor) -> bool:
    """Whether decoding two codes at a time is worth a table of 65536 pairs."""
    return (
        codes.device.type == "cpu"
        and table.dtype == torch.float32
        and codes.numel() >= _PAIRED
        and sys.byteorder == "little"
    )


def _pairs(table: Tensor) -> Tensor:
    """Two float32 values in a float64 for every uint16 that two neighbouring codes make: (65536,)."""
    first = table.view(torch.int32).long()  # values have no sign bit
    return torch.add(first, first[:, None], alpha=1 << 32).view(torch.float64).view(-1)


def _decode(codes: Tensor, table: Tensor, pairs: Tensor | None, *, spare: Tensor, out: Tensor) -> Tensor:
    """The values of uint8 `codes` (entries,) in `out`; `out` and `spare` are (entries,) in the table's dtype."""
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
