"""A tensor of floats as its lossless difference from another one: bytes.

The ordinal of a float is its bits read as an integer that grows with the number. It differs little between a weight
and the same weight after fine-tuning. In a tensor

    z = zigzag(ordinal(tuned) − ordinal(base))      modulo 2^bits; NaN, infinities and −0.0 are numbers like any other

has about one scale for each exponent of the base, which the reader knows. The entries of a chunk are therefore ordered
by that exponent. Those of one exponent are written as digits of a radix that fits their scale, several digits to a
byte, and zstd's Huffman coding follows: its codes are of whole bits, which wastes little where a byte holds eight
entries of 0.2 bits. What exceeds a digit is written to the next stream; bits that are only noise are written to
streams of their own. The size is within 1.1 times the entropy of z given the base's exponent (python -m experiments
bench delta).
"""

import os
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 20  # entries coded at a time: 30 MB a thread
THREADS = 4
LEVEL = 1  # of zstd: higher ones look harder for repetitions, and noise has none
SMALLEST = 1 << 13  # entries of exponents rarer than this are coded with the next one's
ESCAPED = 0.35  # share of entries that may not fit a digit
SAMPLE = 1 << 12
RADICES = {2: 8, 3: 5, 4: 4, 6: 3, 16: 2, 256: 1}  # digits in a byte
LOW_BYTE = 0  # in place of a radix: the low byte of every entry
# the unsigned integer of each dtype, and the bits of its mantissa
FLOATS = {torch.bfloat16: (np.uint16, 7), torch.float16: (np.uint16, 10), torch.float32: (np.uint32, 23)}
_HEAD = struct.Struct("<HI")  # radix, bytes


def encode(base: Tensor, tuned: Tensor, *, threads: int | None = None) -> bytes:
    """`tuned`, of the same shape and dtype (bfloat16, float16 or float32), as bytes that `decode` reads beside `base`.

    threads   threads that work on chunks; None: one for each core, at most `THREADS`. The bytes do not depend on it.
    """
    a, b = _bits(base), _bits(tuned)
    mantissa = FLOATS[base.dtype][1]

    def one(at: int) -> bytes:
        return _encode_chunk(a[at : at + CHUNK], b[at : at + CHUNK], mantissa)

    with ThreadPoolExecutor(threads or _threads()) as pool:
        chunks = list(pool.map(one, range(0, len(a), CHUNK)))
    return np.array([len(chunk) for chunk in chunks], "<u4").tobytes() + b"".join(chunks)


def decode(base: Tensor, coded: np.ndarray | bytes, *, threads: int | None = None) -> Tensor:
    """The tensor that `encode` was given as `tuned`. Raises ValueError for bytes that are not of this tensor."""
    a, view = _bits(base), memoryview(coded)
    out = np.empty_like(a)
    mantissa, starts = FLOATS[base.dtype][1], range(0, len(a), CHUNK)
    sizes = np.frombuffer(view[: 4 * len(starts)], "<u4").astype(np.int64)
    ends = 4 * len(starts) + np.cumsum(sizes)
    if len(sizes) != len(starts) or (len(ends) and ends[-1] != len(view)):
        raise ValueError("another number of bytes")

    def one(number: int) -> None:
        at = slice(starts[number], starts[number] + CHUNK)
        _decode_chunk(a[at], view[ends[number] - sizes[number] : ends[number]], mantissa, out=out[at])

    with ThreadPoolExecutor(threads or _threads()) as pool:
        list(pool.map(one, range(len(starts))))
    return torch.from_numpy(out.view(f"i{out.itemsize}")).view(base.dtype).reshape(base.shape)


def _threads() -> int:
    return min(THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _bits(tensor: Tensor) -> np.ndarray:
    unsigned = FLOATS[tensor.dtype][0]
    signed = torch.int16 if unsigned is np.uint16 else torch.int32
    return tensor.detach().cpu().contiguous().reshape(-1).view(signed).numpy().view(unsigned)


def _ordinal(bits: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the numbers: the sign bit is inverted, for negative numbers all bits."""
    top = bits.dtype.type(8 * bits.itemsize - 1)
    return bits ^ ((bits.dtype.type(1) << top) | -(bits >> top))


def _bits_of(ordinal: np.ndarray) -> np.ndarray:
    top = ordinal.dtype.type(8 * ordinal.itemsize - 1)
    return ordinal ^ ((ordinal.dtype.type(1) << top) | ((ordinal >> top) - ordinal.dtype.type(1)))


def _groups(base: np.ndarray, mantissa: int) -> tuple[np.ndarray, list[slice]]:
    """The entries ordered by the base's exponent (a stable order), and its slices that are coded together."""
    exponents = 1 << (8 * base.itemsize - 1 - mantissa)
    keys = (base >> base.dtype.type(mantissa)).astype(np.uint32) & np.uint32(exponents - 1)
    keys *= np.uint32(CHUNK)
    # exponent and position in one number: its sort is stable, and several times faster than a stable sort of exponents
    keys |= np.arange(len(base), dtype=np.uint32)
    keys.sort()
    ends = np.searchsorted(keys, np.arange(1, exponents, dtype=np.uint32) * np.uint32(CHUNK)).tolist() + [len(base)]
    groups, start = [], 0
    for end in ends:
        if end - start >= SMALLEST or start < end == len(base):
            groups.append(slice(start, end))
            start = end
    keys &= np.uint32(CHUNK - 1)
    return keys.astype(np.intp), groups


def _encode_chunk(base: np.ndarray, tuned: np.ndarray, mantissa: int) -> bytes:
    import zstandard

    order, groups = _groups(base, mantissa)
    moved = (_ordinal(tuned) - _ordinal(base))[order]
    zigzag = (moved << moved.dtype.type(1)) ^ -(moved >> moved.dtype.type(8 * moved.itemsize - 1))
    compress = zstandard.ZstdCompressor(level=LEVEL).compress
    streams = []
    for group in groups:
        rest = zigzag[group]
        while len(rest):
            radix = _radix(rest)
            if radix == LOW_BYTE:
                packed, rest = rest.astype(np.uint8), rest >> rest.dtype.type(8)
            else:
                packed, most = _pack(rest, radix), rest.dtype.type(radix - 1)
                rest = rest[rest >= most] - most
            stream = compress(packed)
            streams += [_HEAD.pack(radix, len(stream)), stream]
    return b"".join(streams)


def _decode_chunk(base: np.ndarray, coded: memoryview, mantissa: int, *, out: np.ndarray) -> None:
    import zstandard

    order, groups = _groups(base, mantissa)
    decompressor = zstandard.ZstdDecompressor()
    zigzag = np.empty_like(base)
    try:
        for group in groups:
            levels, count = [], group.stop - group.start
            while count:
                radix, size = _HEAD.unpack_from(coded)
                stream, coded = coded[_HEAD.size : _HEAD.size + size], coded[_HEAD.size + size :]
                per_byte = 1 if radix == LOW_BYTE else RADICES[radix]
                if zstandard.frame_content_size(stream) != -(-count // per_byte):
                    raise ValueError("a stream of another length")
                digits = _unpack(np.frombuffer(decompressor.decompress(stream), np.uint8), radix, count)
                escaped = None if radix == LOW_BYTE else np.flatnonzero(digits == radix - 1)
                levels.append((digits, escaped))
                count = count if escaped is None else len(escaped)
            zigzag[group] = _joined(levels, base.dtype)
    except (zstandard.ZstdError, struct.error, KeyError) as error:
        raise ValueError(str(error)) from error
    if len(coded):
        raise ValueError("bytes after the last stream")
    one = base.dtype.type(1)
    moved = np.empty_like(base)
    moved[order] = (zigzag >> one) ^ -(zigzag & one)
    out[:] = _bits_of(moved + _ordinal(base))


def _radix(values: np.ndarray) -> int:
    """The smallest radix at which few entries of a sample are escaped; LOW_BYTE where there is none."""
    sample = np.sort(values[:: max(1, len(values) // SAMPLE)])
    most = sample[int((1 - ESCAPED) * len(sample))]  # all but the escaped share are at most this
    return next((radix for radix in RADICES if most < radix - 1), LOW_BYTE)


def _pack(values: np.ndarray, radix: int) -> np.ndarray:
    """Digits min(value, radix − 1), as many to a byte as fit: byte i holds those at i, i + bytes, i + 2·bytes, …"""
    digits = np.minimum(values, values.dtype.type(radix - 1)).astype(np.uint8)
    if radix == 2:
        return np.packbits(digits)
    per_byte = RADICES[radix]
    size = -(-len(digits) // per_byte)
    digits = np.pad(digits, (0, size * per_byte - len(digits))).reshape(per_byte, size)
    packed = digits[0]
    for row in digits[1:]:
        packed = packed * np.uint8(radix) + row if radix < 256 else row
    return packed


def _unpack(packed: np.ndarray, radix: int, count: int) -> np.ndarray:
    if radix == 2:
        return np.unpackbits(packed, count=count)
    if radix in (256, LOW_BYTE):
        return packed
    rows = []
    for _ in range(RADICES[radix]):
        packed, row = np.divmod(packed, np.uint8(radix))
        rows.append(row)
    return np.concatenate(rows[::-1])[:count]


def _joined(levels: list[tuple[np.ndarray, np.ndarray | None]], dtype: np.dtype) -> np.ndarray:
    """The entries put together from their digits, from the last stream to the first."""
    rest = np.empty(0, dtype)
    for digits, escaped in reversed(levels):
        if escaped is None:
            rest = rest << dtype.type(8) | digits
        else:
            above, rest = rest, digits.astype(dtype)
            rest[escaped] += above
    return rest
