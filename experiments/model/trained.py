"""Trained weights in full precision, kept in the local store so that cells that differ in `finish` alone train once.

A folder holds one training:

    out/weights.safetensors   final weights by base parameter name, before any part that acts in `finish` alone
    out/files/                what the parts saved beside them, such as adapter/
    out/record.json           its costs, its curve and the parts' reports
    manifest.json             what the training depends on, and the hash of out/; written last
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from experiments.model.base import load_tensors
from experiments.study import whole
from methods.errors import UserError
from methods.tools.files import folder_sha256, read_json, write_json, writing


def name(settings: dict) -> str:
    """The name of the training with these resolved settings, whatever the base and the data are."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def keep(store: Path, *, identity: dict, final: Mapping[str, Tensor], files: Path, record: dict) -> None:
    """Put a training into the folder `store`, whole or not at all; what was there before is replaced.

    identity  everything that the training depends on, as JSON
    files     the folder in which the parts saved what they keep beside the weights
    Where the disk does not take it, a line on stderr says so; the cell is finished, and other cells train again.
    """
    try:
        with whole.folder(store) as made:
            out = made / "out"
            shutil.copytree(files, out / "files")
            with writing(out / "weights.safetensors"):
                save_file({name: tensor.contiguous() for name, tensor in final.items()}, out / "weights.safetensors")
            write_json(out / "record.json", record)
            write_json(made / "manifest.json", {"identity": identity, "sha256": folder_sha256(out)})
    except OSError as error:
        if not is_kept(store, identity=identity):  # else another process has kept the same training meanwhile
            print(f"the training is not kept for other cells: {error}; they train again", file=sys.stderr, flush=True)


def is_kept(store: Path, *, identity: dict) -> bool:
    """Whether `store` holds a training of this identity, every byte as it was written."""
    try:
        manifest = read_json(store / "manifest.json", "identity", "sha256")
    except UserError:
        return False
    return manifest["identity"] == identity and manifest["sha256"] == folder_sha256(store / "out")


def load(store: Path, *, files: Path) -> tuple[Mapping[str, Tensor], dict]:
    """The weights and the record of a kept training; what the parts saved is copied into the folder `files`."""
    shutil.copytree(store / "out" / "files", files, dirs_exist_ok=True)
    return load_tensors(store / "out" / "weights.safetensors"), read_json(store / "out" / "record.json")


def prune(folder: Path, *, used: Collection[Path | None]) -> None:
    """Remove every training MODEL/DOMAIN/SEED/NAME below `folder` that is not among `used`."""
    for store in folder.glob("*/*/*/*"):
        named = store.name.lstrip(".").partition("-")[0]  # .NAME-1234.part is being written
        if store.with_name(named) not in used:
            shutil.rmtree(store, ignore_errors=True)
