"""A tuned model as a lossless difference from its base: delta.safetensors.

The file holds one uint8 tensor for each tensor that changed (coded by experiments/model/difference.py), and as
metadata the hashes, dtypes and shapes of the weights. A reader checks the base's hash and every size; a reader of all
tensors also checks the hash of the result (`verified`).
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from experiments.model.base import Lazy
from experiments.model.difference import FLOATS, decode, encode
from methods.errors import UserError

VERSION = "1"
AGAIN = "fetch it again (`dvc checkout --force`), or train the cell again"


def update(digest, name: str, tensor: Tensor) -> None:
    """Add a tensor (name, dtype, shape and bytes) to a hash of weights, which takes tensors by sorted name."""
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
    """Write the difference of `tuned` from `base` to `path`; returns the sha256 of `tuned`.

    Both have the same names, shapes and dtypes: UserError otherwise, and no file is left. One tensor of each is in
    memory at a time. A tensor of a dtype that is not coded is written as it is.
    """
    if odd := sorted(set(base) ^ set(tuned)):
        raise UserError(
            f"{odd[0]} is a tensor of the {'base' if odd[0] in base else 'tuned model'} alone, as are {len(odd) - 1} "
            "others: a difference needs the same tensors in both"
        )
    try:
        return _write(path, base=base, tuned=tuned, base_sha256=base_sha256)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _write(path: Path, *, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], base_sha256: str) -> str:
    digest, entries, about, at = hashlib.sha256(), {}, {}, 0
    shapes = {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in base.items()}
    # the header precedes the data whose lengths it lists: reserve room for the longest one and fill up with spaces
    room = -(-(len(json.dumps([shapes, json.dumps(shapes)])) + 100 * len(shapes) + 1000) // 8) * 8
    with path.open("wb") as file:
        file.seek(8 + room)
        for name in sorted(shapes):
            before, after = base[name], tuned[name]
            if (after.shape, after.dtype) != (before.shape, before.dtype):
                raise UserError(
                    f"{name} is {after.dtype} {list(after.shape)} in the tuned model, "
                    f"{before.dtype} {list(before.shape)} in the base"
                )
            update(digest, name, after)
            if same(before, after):
                continue
            coded = before.dtype in FLOATS
            data = encode(before, after) if coded else after.contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(data)
            entries[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
            about[name], at = shapes[name], at + len(data)
        metadata = {
            "format": "holdfast-delta",
            "version": VERSION,
            "base_sha256": base_sha256,
            "sha256": digest.hexdigest(),
            "tensors": json.dumps(about),
        }
        file.seek(0)
        file.write(struct.pack("<Q", room) + json.dumps({"__metadata__": metadata} | entries).encode().ljust(room))
    return digest.hexdigest()


class Delta(Lazy):
    """The tuned tensors that a file of `write` stands for beside `base`; a tensor is decoded when it is read.

    sha256    of all tensors; a reader of all of them compares it (`verified`)
    Raises UserError where the file is damaged, of another version, or of another base.
    """

    def __init__(self, path: Path, *, base: Mapping[str, Tensor], base_sha256: str):
        super().__init__(base, self._decoded)
        self._path, self._base = path, base
        try:
            metadata = safe_open(path, framework="numpy").metadata() or {}
            if metadata.get("format") != "holdfast-delta" or metadata["version"] != VERSION:
                raise UserError(
                    f"{path} is {metadata.get('format', 'no delta')} of version {metadata.get('version')}, this "
                    f"program reads holdfast-delta of version {VERSION}: train the cell again"
                )
            self.sha256, made_beside = metadata["sha256"], metadata["base_sha256"]
            self.changed = self._about = json.loads(metadata["tensors"])
        except FileNotFoundError:
            raise UserError(f"{path} is missing: train the cell again") from None
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): {AGAIN}") from error
        if made_beside != base_sha256:
            raise UserError(
                f"{path} is a delta of the base {made_beside[:12]}, this one is {base_sha256[:12]}: give the base it "
                "was made from"
            )

    def _decoded(self, name: str) -> Tensor:
        base = self._base[name]
        if name not in self._about:
            return base
        if self._about[name] != [str(base.dtype).removeprefix("torch."), list(base.shape)]:
            raise UserError(
                f"{self._path}: {name} is {self._about[name]}, the base's is {base.dtype} {list(base.shape)}: "
                "it is another base"
            )
        try:
            coded = safe_open(self._path, framework="numpy").get_tensor(name)
            if base.dtype in FLOATS:
                return decode(base, coded)
            return torch.from_numpy(coded).view(base.dtype).reshape(base.shape)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise UserError(f"{self._path}: {name} is damaged ({error}): {AGAIN}") from error


def verified(tensors: Mapping[str, Tensor], *, sha256: str, what: object) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by sorted name; after the last one, UserError naming `what` where their hash is not `sha256`.

    A tensor is hashed while the caller works on it, so it may not be changed in place; two are in memory at a time.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as pool:
        hashed = None
        for name in sorted(tensors):
            tensor = tensors[name]
            if hashed:
                hashed.result()
            hashed = pool.submit(update, digest, name, tensor)
            yield name, tensor
    if digest.hexdigest() != sha256:
        raise UserError(
            f"{what} gives weights {digest.hexdigest()[:12]}, not the {sha256[:12]} it was made from: {AGAIN}"
        )
