"""A copy of dvc.lock, because `dvc` writes into the file: a kill or a full disk then leaves a part of it.

DVC would run again all cells that the part does not have.
"""

import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from experiments.study import lock, whole
from methods.errors import UserError

MINUTE = 60.0


def keep(study) -> None:
    """Copy dvc.lock, at most once a minute."""
    path, copy = _places(study)
    if path.is_file() and not (copy.is_file() and abs(time.time() - copy.stat().st_mtime) < MINUTE):
        with whole.file(copy) as made:
            shutil.copyfile(path, made)


def mend(study) -> str:
    """Put the copy in the place of a dvc.lock that was cut off; a line about it, or ''.

    A lock counts as cut off if it cannot be read, or holds only the first of the copy's stages and is not the one that
    git has. The copy makes no stage finished: DVC compares what it says with the files.
    """
    path, copy = _places(study)
    known, there = _names(copy), _names(path)
    if not path.is_file() or not known or (there is not None and (there == known or known[: len(there)] != there)):
        return ""
    if there is not None and _committed(study.paths.root, path):
        return ""
    with whole.file(path) as made:
        shutil.copyfile(copy, made)
    return f"{path.relative_to(study.paths.root)} was cut off: the stages that ran since its last copy run again"


def _committed(root: Path, path: Path) -> bool:
    """Whether the file is as git has it, as after `git checkout OLDER -- dvc.lock`."""
    there = subprocess.run(["git", "show", f"HEAD:./{path.relative_to(root)}"], cwd=root, capture_output=True)
    return there.returncode == 0 and there.stdout == path.read_bytes()


def _places(study) -> tuple[Path, Path]:
    return study.paths.folder / "dvc.lock", study.paths.local / "locks" / f"{study.name or 'default'}.lock"


def _names(path: Path) -> list[str] | None:
    """The names of the stages in order; none without the file; None where it cannot be read."""
    with suppress(UserError):
        return list(lock.stages(path))
    return None
