"""Importance on disk: 8-bit codes and floats, compressed without loss.

A file is in safetensors; every tensor in it is a zstd frame of bytes, and the metadata describe the content:

    NAME           the codes of a tensor in order; for a float tensor its byte planes: all first bytes, then all
                   second ones
    NAME::bitmap   if more than half of the codes are 0: one bit for each entry, 1 for the codes in NAME; NAME then
                   has no other

Reading a file gives what was written, bit for bit, and equal importances have equal files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from methods.errors import UserError
from methods.tools.files import writing
from methods.tools.importance import Codes, largest

BITMAP = "::bitmap"
AGAIN = "prepare it again, `dvc repro --force --single-item prepare@MODEL-METHOD-SEED`"
LEVEL = 1  # codes do not repeat: higher levels of zstd take longer and save nothing

_FACTS = "importance"  # the metadata's only key: safetensors writes several in any order


def save_importance(importance: Mapping[str, Tensor | Codes], path: Path) -> None:
    """Write what a part prepared.

    Raises UserError naming a tensor with a value that is negative, infinite or not a number.
    """
    squeeze = _zstandard().ZstdCompressor(level=LEVEL).compress
    frames, facts = {}, {}
    for name, values in importance.items():
        if isinstance(values, Codes):
            codes = values.codes.detach().cpu().reshape(-1).numpy()
            facts[name] = {"shape": list(values.codes.shape), "low": values.low, "step": values.step}
            if 2 * np.count_nonzero(codes) < codes.size:
                there = codes > 0
                frames[name + BITMAP] = squeeze(np.packbits(there))
                codes = codes[there]
            frames[name] = squeeze(codes)
        else:
            flat = values.detach().cpu().reshape(-1)
            largest(flat, name)
            facts[name] = {"shape": list(values.shape), "dtype": str(values.dtype).removeprefix("torch.")}
            frames[name] = squeeze(flat.view(torch.uint8).view(-1, flat.itemsize).T.contiguous().numpy())
    with writing(path):
        save_file(
            {name: np.frombuffer(frame, np.uint8) for name, frame in frames.items()},
            path,
            metadata={_FACTS: json.dumps(facts, sort_keys=True)},
        )


def load_importance(path: Path) -> dict[str, Tensor | Codes]:
    """What `save_importance` wrote, on the CPU.

    Raises UserError for a file of another layout or with frames that are cut short.
    """
    try:
        return _load(path)
    except UserError:
        raise
    except (
        SafetensorError,
        _zstandard().ZstdError,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): {AGAIN}") from error


def _load(path: Path) -> dict[str, Tensor | Codes]:
    importance: dict[str, Tensor | Codes] = {}
    with safe_open(path, framework="numpy") as file:
        facts = (file.metadata() or {}).get(_FACTS)
        if facts is None:
            raise UserError(f"{path} holds no importance in this version's layout: {AGAIN}")
        names = set(file.keys())

        def bytes_of(name: str, size: int) -> np.ndarray:
            data = np.empty(size, np.uint8)
            with _zstandard().ZstdDecompressor().stream_reader(file.get_tensor(name)) as reader:
                if (got := reader.readinto(data)) != size:
                    raise UserError(f"{path}: {name} ends after {got:,} of {size:,} bytes: {AGAIN}")
            return data

        for name, fact in json.loads(facts).items():
            shape = fact["shape"]
            size = math.prod(shape)
            if "dtype" in fact:
                dtype = getattr(torch, fact["dtype"])
                planes = torch.from_numpy(bytes_of(name, size * dtype.itemsize)).view(dtype.itemsize, -1)
                importance[name] = planes.T.reshape(-1).view(dtype).view(shape)
                continue
            if name + BITMAP in names:
                there = np.unpackbits(bytes_of(name + BITMAP, -(-size // 8)), count=size).view(bool)
                codes = np.zeros(size, np.uint8)
                codes[there] = bytes_of(name, int(there.sum()))
            else:
                codes = bytes_of(name, size)
            importance[name] = Codes(codes=torch.from_numpy(codes).view(shape), low=fact["low"], step=fact["step"])
    return importance


def _zstandard():
    try:
        import zstandard  # here, so that parts work without it until a file is written or read
    except ImportError:
        raise UserError("importance files need the package zstandard: install requirements.lock") from None
    return zstandard
