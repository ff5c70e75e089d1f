"""Check that commands run in the project's root, and not while DVC runs the same study."""

import json
import os
import time
from pathlib import Path

from experiments.study.paths import HERE
from methods.errors import UserError

LOCK = Path(".dvc", "tmp", "rwlock")  # from the root
PATIENCE = 1.0  # seconds in which `dvc` has written it whole


def at_root(*, here: Path = HERE) -> None:
    """Raise UserError unless the working directory is the project's root; paths in params.yaml are relative to it."""
    if Path.cwd().resolve() != here:
        raise UserError(
            f"{Path.cwd()} is not the project's root, to which the paths in params.yaml are relative: "
            f"run `cd {here}` first"
        )


def alone(study) -> None:
    """Raise UserError if a running `dvc` writes files of this study, according to its lock file.

    A lock file that was cut off when `dvc` was killed, or when the disk was full, is removed: DVC would stop at it.
    """
    _remove_cut_off(study.paths.root / LOCK)
    if (process := running(study)) is not None:
        raise UserError(
            f"process {process} (`dvc`) is running this study: wait until it ends, or stop it with Ctrl-C "
            f"where it was started; if it is not `dvc`, delete {LOCK}"
        )


def running(study) -> int | None:
    """The process of a `dvc` that writes files of this study, according to its lock file; None where there is none."""
    try:
        text = (study.paths.root / LOCK).read_text()
        held = {path: int(holder["pid"]) for path, holder in json.loads(text)["write"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # there is no lock, or DVC is just writing it
    writing = (process for path, process in held.items() if _study_of(Path(path), study.paths.root) == study.name)
    return next(filter(_runs, writing), None)


def _remove_cut_off(lock: Path) -> None:
    for _ in range(int(PATIENCE / 0.1)):
        try:
            json.loads(lock.read_text())
            return
        except FileNotFoundError:
            return
        except ValueError:  # a `dvc` may just be writing it
            time.sleep(0.1)
    lock.unlink(missing_ok=True)


def _study_of(path: Path, root: Path) -> str | None:
    """The study that a file belongs to; None if it is outside the project."""
    if not path.is_relative_to(root):
        return None
    pieces = path.relative_to(root).parts
    within = pieces[2:] if pieces[:2] == ("experiments", "studies") else pieces[1:]  # else results/NAME, work/NAME
    return within[0] if within and (root / "experiments" / "studies" / within[0]).is_dir() else ""


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        pass
    return True
