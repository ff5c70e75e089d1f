"""A tuned model as a lossless difference from its base: delta.safetensors.

A float's bits, read as an integer that grows with the number (its ordinal), differ little between a weight and the same weight
fine-tuned. In a tensor

    z = zigzag(ordinal(tuned) − ordinal(base))      modulo 2^bits, so that NaN, infinities and −0.0 are numbers like any other

has about one scale for each exponent of the base, which the reader knows. So the entries of a chunk are ordered by that exponent,
and those of one exponent are written as digits of a radix that fits their scale, several to a byte, with zstd's Huffman
coding behind: a code of whole bits for a byte wastes little where the byte holds eight entries of 0.2 bits. What does not fit
a digit goes on in the next stream, and bits that are noise anyway in streams of their own. That is within 1.1 times of the
entropy of z given the base's exponent (python -m experiments bench delta).

The file holds a uint8 tensor for each tensor that changed, with the weights' hashes, dtypes and shapes as metadata. What is read
is checked: against the base, in its sizes, and by who reads all of it against the hash of the result (`verified`).
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from experiments.errors import UserError

VERSION = "1"
CHUNK = 1 << 20  # entries coded at a time: 30 MB a thread
THREADS = 4
LEVEL = 1  # of zstd: higher ones look harder for repetitions, and noise has none
SMALLEST = 1 << 13  # entries of exponents rarer than this are coded with the next one's
ESCAPED = 0.35  # share of entries that may not fit a digit
SAMPLE = 1 << 12
RADICES = {2: 8, 3: 5, 4: 4, 6: 3, 16: 2, 256: 1}  # digits in a byte
LOW_BYTE = 0  # in place of a radix: the low byte of every entry
AGAIN = "fetch it again (`dvc checkout --force`), or train the cell again"
_FLOATS = {torch.bfloat16: (np.uint16, 7), torch.float16: (np.uint16, 10), torch.float32: (np.uint32, 23)}  # bits of the mantissa
_HEAD = struct.Struct("<HI")  # radix, bytes


def encode(base: Tensor, tuned: Tensor, *, threads: int | None = None) -> bytes:
    """`tuned`, of the same shape and dtype (bfloat16, float16 or float32), as bytes that `decode` reads beside `base`.

    threads   at work on chunks; None: one a core, at most `THREADS`. The bytes do not depend on it.
    """
    a, b = _bits(base), _bits(tuned)
    mantissa = _FLOATS[base.dtype][1]
    with ThreadPoolExecutor(threads or _threads()) as pool:
        chunks = list(pool.map(lambda at: _encode_chunk(a[at : at + CHUNK], b[at : at + CHUNK], mantissa), range(0, len(a), CHUNK)))
    return np.array([len(chunk) for chunk in chunks], "<u4").tobytes() + b"".join(chunks)


def decode(base: Tensor, coded: np.ndarray | bytes, *, threads: int | None = None) -> Tensor:
    """What `encode` was given as `tuned`. Raises ValueError for bytes that are not of this tensor."""
    a, view = _bits(base), memoryview(coded)
    out = np.empty_like(a)
    mantissa, starts = _FLOATS[base.dtype][1], range(0, len(a), CHUNK)
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
    unsigned = _FLOATS[tensor.dtype][0]
    signed = torch.int16 if unsigned is np.uint16 else torch.int32
    return tensor.detach().cpu().contiguous().reshape(-1).view(signed).numpy().view(unsigned)


def _ordinal(bits: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the numbers: the sign bit turned over, below zero all others too."""
    top = bits.dtype.type(8 * bits.itemsize - 1)
    return bits ^ ((bits.dtype.type(1) << top) | -(bits >> top))


def _bits_of(ordinal: np.ndarray) -> np.ndarray:
    top = ordinal.dtype.type(8 * ordinal.itemsize - 1)
    return ordinal ^ ((ordinal.dtype.type(1) << top) | ((ordinal >> top) - ordinal.dtype.type(1)))


def _groups(base: np.ndarray, mantissa: int) -> tuple[np.ndarray, list[slice]]:
    """The order of the entries by the base's exponent, equal ones as they stand, and the slices of it that are coded together."""
    exponents = 1 << (8 * base.itemsize - 1 - mantissa)
    keys = (base >> base.dtype.type(mantissa)).astype(np.uint32) & np.uint32(exponents - 1)
    keys *= np.uint32(CHUNK)
    keys |= np.arange(len(base), dtype=np.uint32)  # exponent and place in one number: sorting it is stable, and several times faster
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
        raise ValueError("bytes behind the last stream")
    one = base.dtype.type(1)
    moved = np.empty_like(base)
    moved[order] = (zigzag >> one) ^ -(zigzag & one)
    out[:] = _bits_of(moved + _ordinal(base))


def _radix(values: np.ndarray) -> int:
    """The smallest radix at which few entries are escaped, by a sample of them; LOW_BYTE where none is."""
    sample = np.sort(values[:: max(1, len(values) // SAMPLE)])
    most = sample[int((1 - ESCAPED) * len(sample))]  # so many are at most this
    return next((radix for radix in RADICES if most < radix - 1), LOW_BYTE)


def _pack(values: np.ndarray, radix: int) -> np.ndarray:
    """Digits min(value, radix − 1), as many to a byte as it holds: of byte i those at i, i + bytes, i + 2·bytes, …"""
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
    """The entries from their digits, from the last stream back to the first."""
    rest = np.empty(0, dtype)
    for digits, escaped in reversed(levels):
        if escaped is None:
            rest = rest << dtype.type(8) | digits
        else:
            above, rest = rest, digits.astype(dtype)
            rest[escaped] += above
    return rest


def update(digest, name: str, tensor: Tensor) -> None:
    """Enter a tensor, name, dtype, shape and bytes, into a hash of weights; they come by sorted name (`weights.tensor_sha256`)."""
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 of weights, the same as `weights.tensor_sha256` gives for a folder of them."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        update(digest, name, tensors[name])
    return digest.hexdigest()


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal bit for bit, NaN and −0.0 included."""
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def write(path: Path, *, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], base_sha256: str) -> str:
    """Write what differs of `tuned` from `base` (the same names, shapes and dtypes) to `path`; returns the sha256 of `tuned`.

    One tensor of each is asked for at a time, and what is coded goes to the disk at once. A tensor of a dtype that is not coded
    is written as it is.
    """
    digest, entries, about, at = hashlib.sha256(), {}, {}, 0
    shapes = {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in base.items()}
    # the lengths stand in the header, which stands in front: it gets room for the longest, and spaces for the rest
    room = -(-(len(json.dumps([shapes, json.dumps(shapes)])) + 100 * len(shapes) + 1000) // 8) * 8
    with path.open("wb") as file:
        file.seek(8 + room)
        for name in sorted(shapes):
            before, after = base[name], tuned[name]
            update(digest, name, after)
            if same(before, after):
                continue
            data = encode(before, after) if before.dtype in _FLOATS else after.contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(data)
            entries[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
            about[name], at = shapes[name], at + len(data)
        metadata = {"format": "holdfast-delta", "version": VERSION, "base_sha256": base_sha256, "sha256": digest.hexdigest(),
                    "tensors": json.dumps(about)}  # fmt: skip
        file.seek(0)
        file.write(struct.pack("<Q", room) + json.dumps({"__metadata__": metadata} | entries).encode().ljust(room))
    return digest.hexdigest()


class Delta(Mapping[str, Tensor]):
    """The tuned tensors that a file of `write` holds beside `base`; each look-up decodes one, or reads it from the base.

    sha256    of the whole result; who reads all of it compares (`verified`)
    Raises UserError where the file is damaged, of another version, or of another base.
    """

    def __init__(self, path: Path, *, base: Mapping[str, Tensor], base_sha256: str):
        self._path, self._base = path, base
        try:
            self._file = safe_open(path, framework="numpy")
            metadata = self._file.metadata() or {}
            if metadata.get("format") != "holdfast-delta" or metadata["version"] != VERSION:
                raise UserError(f"{path} is {metadata.get('format', 'no delta')} of version {metadata.get('version')}, this program reads "
                                f"holdfast-delta of version {VERSION}: train the cell again")  # fmt: skip
            self.sha256, found, self._about = metadata["sha256"], metadata["base_sha256"], json.loads(metadata["tensors"])
        except FileNotFoundError:
            raise UserError(f"{path} is missing: train the cell again") from None
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): {AGAIN}") from error
        if found != base_sha256:
            raise UserError(f"{path} is a delta of the base {found[:12]}, this one is {base_sha256[:12]}: give the base it was made from")

    def __getitem__(self, name: str) -> Tensor:
        base = self._base[name]
        if name not in self._about:
            return base
        if self._about[name] != [str(base.dtype).removeprefix("torch."), list(base.shape)]:
            raise UserError(f"{self._path}: {name} is {self._about[name]}, the base's is {base.dtype} {list(base.shape)}: it is another base")
        try:
            coded = self._file.get_tensor(name)
            return decode(base, coded) if base.dtype in _FLOATS else torch.from_numpy(coded).view(base.dtype).reshape(base.shape)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise UserError(f"{self._path}: {name} is damaged ({error}): {AGAIN}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def verified(tensors: Mapping[str, Tensor], *, sha256: str, what: object) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by sorted name, and at the end UserError naming `what` if together they are not those of `sha256`."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        update(digest, name, tensor)
        yield name, tensor
    if digest.hexdigest() != sha256:
        raise UserError(f"{what} gives weights {digest.hexdigest()[:12]}, not the {sha256[:12]} it was made from: {AGAIN}")
