"""The exact k-th largest of many non-negative floats.

The bits of non-negative floats, read as integers, have the order of the floats. Both functions compare integers:

    kth_largest       numpy's vectorised partition on the CPU, in place, three times as fast on integers as on floats
    kth_by_histogram  for any device and any number of processes, without a temporary of the tensor's size; the host
                      never waits
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

SAMPLE = 256
HEAVY = SAMPLE // 8  # a value that occurs so often in the sample is shared by many entries
RAMP = 1 << 16
COUNTED = 1 << 24  # entries counted at once, which bounds the temporaries
LANES = (
    64  # copies of a histogram for neighbouring entries: atomic additions to the same cell would wait for each other
)
TRASH = 1024  # cells in each copy for entries that must not be counted; many of them for the same reason
HISTOGRAM = (12 * LANES + 8) * ((1 << 16) + TRASH)  # bytes for counting, without the pieces


def kth_largest(size: Tensor, k: int) -> Tensor:
    """The exact k-th largest entry, 0-dim; on the CPU `size` (contiguous float32 or float64) is overwritten."""
    if not size.is_cpu:
        return kth_by_histogram(lambda: size.view(-1).split(COUNTED), k, device=size.device)
    bits = size.view(-1).view(torch.int64 if size.dtype == torch.float64 else torch.int32)
    values = bits.numpy()
    for _ in range(SAMPLE // HEAVY):
        # Quickselect makes no progress through equal entries: when half of them are zero (rows without a gradient) it
        # is forty times slower.
        heavy = _heavy(values)
        if heavy is None:
            break
        above = np.count_nonzero(values > heavy)
        if above < k <= np.count_nonzero(values >= heavy):
            return torch.tensor(heavy, dtype=bits.dtype).view(size.dtype)
        _spread(bits, heavy, below=above >= k)
    place = values.size - k
    values.partition(place)
    return bits[place].clone().view(size.dtype)


def _heavy(values: np.ndarray) -> int | None:
    """A value shared by about an eighth of the entries or more, if there is one."""
    if values.size < SAMPLE:
        return None
    sample = np.sort(values[_places(values.size)])
    same = sample[HEAVY:] == sample[:-HEAVY]
    return int(sample[HEAVY:][same][0]) if same.any() else None


@lru_cache(256)
def _places(entries: int) -> np.ndarray:
    """Positions of the sample, at (i·golden ratio mod 1) of the entries: evenly spread, with no period of any row."""
    return (np.arange(SAMPLE) * 0.6180339887498949 % 1 * entries).astype(np.intp)


def _spread(bits: Tensor, heavy: int, *, below: bool) -> None:
    """Make the entries up to `heavy` (`below`) or from it on distinct; none moves past an entry on the other side."""
    ramp = torch.arange(min(RAMP, len(bits)), dtype=bits.dtype)
    for piece in bits.split(RAMP):
        moved = piece.clone()
        (moved.le_ if below else moved.ge_)(heavy)
        piece.add_(moved.mul_(ramp[: len(piece)]), alpha=-1 if below else 1)


def kth_by_histogram(
    pieces: Callable[[], Iterable[Tensor]],
    k: int,
    *,
    device: torch.device,
    shards: Any = None,
    lanes: int | None = None,
) -> Tensor:
    """The exact k-th largest of the non-negative float32 entries of all processes, 0-dim on `device`.

    Every process must call it.

    pieces   gives this process's entries as flat tensors of at most COUNTED, possibly none; it is called twice
    shards   the processes: `sum(tensor)`, an in-place all-reduce; None: there is only this one
    lanes    copies of a histogram, a power of two; by default LANES, and 1 on the CPU

    A histogram of the upper 16 bits gives the bin of the k-th largest, and a second one of the lower 16 bits of the
    entries in that bin gives the value. An entry of a piece takes at most 24 bytes more, and a histogram
    (12·lanes+8)·(2¹⁶+TRASH) bytes: 403 and 52 MB, whatever the size of the tensor.
    """
    lanes = lanes or (1 if device.type == "cpu" else LANES)
    upper, k = _bin_of_kth(
        _histogram((piece.view(torch.int32) >> 16 for piece in pieces()), 1 << 15, lanes, device), k, shards
    )

    def lower() -> Iterable[Tensor]:
        for piece in pieces():
            bits = piece.view(torch.int32)
            outside = torch.arange(len(bits), dtype=torch.int32, device=device)
            outside.bitwise_right_shift_(lanes.bit_length() - 1).bitwise_and_(TRASH - 1)
            yield torch.where(bits >> 16 == upper, bits & 0xFFFF, outside.add_(1 << 16))

    low, _ = _bin_of_kth(_histogram(lower(), (1 << 16) + TRASH, lanes, device)[: 1 << 16], k, shards)
    return (upper << 16 | low).int().view(torch.float32)


def _histogram(digits: Iterable[Tensor], bins: int, lanes: int, device: torch.device) -> Tensor:
    """Counts of 0, 1, …, bins − 1 in flat tensors: (bins,), int64. Unlike torch.bincount it does not wait for a GPU."""
    counts = torch.zeros(bins, lanes, dtype=torch.int32, device=device)
    one = torch.ones((), dtype=torch.int32, device=device)
    for digit in digits:
        index, whole = digit.long(), len(digit) // lanes * lanes
        for rows in (index[:whole].view(-1, lanes), index[whole:].view(1, -1)):
            counts.scatter_add_(0, rows, one.expand_as(rows))
    return counts.sum(1)


def _bin_of_kth(counts: Tensor, k: int | Tensor, shards: Any) -> tuple[Tensor, Tensor]:
    """The bin of the k-th largest entry of all processes, and its rank among the entries in that bin; both 0-dim."""
    from_above = (counts if shards is None else shards.sum(counts)).flip(0).cumsum(0)
    before = from_above < k
    return len(counts) - 1 - before.sum(), k - (from_above * before).max()
