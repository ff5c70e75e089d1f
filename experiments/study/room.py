"""The room on the disk that a study needs, before anything is written: models, preparations and cells.

Each is there once: DVC's cache has hard links to them, or shares their blocks, where the disk can do that. What is
fetched from the hub lies in the hub's own cache beside them, and is not counted.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.stages.model import made_before
from methods.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes by what they are for, and how many are free where they are written."""

    needed: Mapping[str, int]
    free: int

    @property
    def total(self) -> int:
        return sum(self.needed.values())

    def refuse(self) -> None:
        """Raises UserError where there is too little."""
        if self.total > self.free:
            kinds = ", ".join(f"{name} {_gib(size)}" for name, size in self.needed.items() if size)
            raise UserError(
                f"too little disk: {_gib(self.total)} would be written ({kinds}), and {_gib(self.free)} are free. Free "
                "some, plan fewer cells or models (`plan` takes names of cells), or put `work/` on a larger disk"
            )


def of(study, *, models: Mapping[str, int], prepared: int, cells: int) -> Room:
    """The room for what is not here yet.

    models     bytes of each model's weights
    prepared   bytes of preparations that are not here
    cells      bytes of the cells that are still to run
    """
    free = shutil.disk_usage(_there(study.paths.work)).free
    absent = [name for name in models if not (study.paths.model(name) / "base.json").is_file()]
    if sum(models[name] for name in absent) + prepared + cells > free:  # looking for it reads whole models
        absent = [name for name in absent if made_before(study, name) is None]
    return Room(
        needed={"models": sum(models[name] for name in absent), "preparations": prepared, "cells": cells}, free=free
    )


def _there(folder: Path) -> Path:
    """The folder, or the first one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
