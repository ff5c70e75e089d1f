"""What a tuned model takes beside its base, and the seconds to write and to read that: the lossless difference of
experiments/model/difference.py against zstd of the tensor as it is, and against zstd of the byte planes of its XOR with
the base (as ZipLLM does, arXiv 2505.06252).

Simulated bf16 weights of N(0, 0.02²) moved by noise of a share of that, and where a cell of the default study is here,
its own weights. The limit is the entropy of the ordinals' difference given the base's exponent, counted over all pairs
of both. One thread each.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import zstandard
from torch import Tensor

from experiments.bench.race import Race, race
from experiments.model import delta, difference, tuned
from experiments.model.base import load_tensors
from experiments.study.paths import Paths
from methods.errors import UserError

TITLE = "Tuned weights as a lossless difference from the base"
CHANGES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    compress, decompress = zstandard.ZstdCompressor(level=3).compress, zstandard.ZstdDecompressor().decompress
    for what, base, changed in _pairs(1 << 16 if small else 1 << 23, changes=CHANGES[::4] if small else CHANGES):
        encoders = {
            "difference": partial(difference.encode, base, changed, threads=1),
            "XOR planes + zstd": lambda base=base, changed=changed: compress(_planes(_bits(base) ^ _bits(changed))),
            "zstd": lambda changed=changed: compress(_bits(changed)),
        }
        coded = {name: encode() for name, encode in encoders.items()}
        decoders = {
            "difference": partial(difference.decode, base, coded["difference"], threads=1),
            "XOR planes + zstd": lambda base=base, coded=coded: (
                _bits(base) ^ _joined(decompress(coded["XOR planes + zstd"]))
            ),
            "zstd": lambda coded=coded: np.frombuffer(decompress(coded["zstd"]), np.uint16),
        }
        assert delta.same(decoders["difference"](), changed)
        assert all((decoders[name]() == _bits(changed)).all() for name in ("XOR planes + zstd", "zstd"))
        limit = entropy(base, changed)
        bits = {name: round(8 * len(data) / len(base), 3) for name, data in coded.items()}
        facts = {
            "entries": len(base),
            "changed": round(float((_bits(base) != _bits(changed)).mean()), 4),
            "bits a weight": bits,
            "entropy": round(limit, 3),
            "difference over entropy": round(bits["difference"] / limit, 3),
        }
        yield race(f"write, {what}", encoders, against="zstd", rounds=rounds or 7, facts=facts)
        yield race(f"read, {what}", decoders, against="zstd", rounds=rounds or 7)


def entropy(base: Tensor, changed: Tensor) -> float:
    """H(ordinal(changed) − ordinal(base) | exponent of base) in bits a bf16 weight, by the counts of what occurs."""

    def ordinal(tensor: Tensor) -> Tensor:
        bits = tensor.view(torch.int16).long()
        return torch.where(bits >= 0, bits, -1 - (bits & 0x7FFF))

    exponent = (base.view(torch.int16).long() >> 7) & 0xFF
    pairs = (exponent << 32) + ordinal(changed) - ordinal(base)
    together, alone = (np.unique(of.numpy(), return_counts=True)[1] for of in (pairs, exponent))
    return float(alone @ np.log2(alone) - together @ np.log2(together)) / len(base)


def _pairs(count: int, *, changes: tuple[float, ...]) -> Iterator[tuple[str, Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(count, generator=draw)
    for change in changes:
        noise = 0.02 * change * torch.randn(count, generator=draw)
        yield f"moved by {change:.2%}", base.bfloat16(), (base.bfloat16() + noise).bfloat16()
    yield from _cells(count)


def _cells(count: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The first `count` weights of blocks for each kind of difference that cells of the default study keep here."""
    paths, seen = Paths(), set()
    for out in sorted((paths.work / "cells").glob("*/*/*/*/weights")):
        model, _, method, _ = out.relative_to(paths.work / "cells").parts[:4]
        if method in seen or not (out / "delta.safetensors").is_file():
            continue
        try:
            after, _ = tuned.tensors(out, folder=paths.model(model))
        except UserError:
            continue  # of another base than the one that is here
        before, names, entries = load_tensors(paths.model(model)), [], 0
        for name in sorted(n for n in after if ".layers." in n or ".h." in n):
            if entries < count and before[name].dtype == torch.bfloat16:
                names.append(name)
                entries += before[name].numel()
        if names:
            seen.add(method)
            before, after = (torch.cat([side[n].flatten() for n in names])[:count] for side in (before, after))
            yield f"{model} {method}", before, after


def _bits(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


def _planes(bits: np.ndarray) -> np.ndarray:
    """The low bytes of all, then the high ones."""
    return np.ascontiguousarray(bits.view(np.uint8).reshape(-1, 2).T)


def _joined(planes: bytes) -> np.ndarray:
    return np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(2, -1).T).view(np.uint16)[:, 0]
