"""Where and with what the command line is run: from the project's root, in its environment, beside no other run of the same study."""

import json
import os
from pathlib import Path

from experiments.study.paths import HERE
from methods.errors import UserError


def at_root(*, here: Path = HERE) -> None:
    """Raises UserError anywhere but in the project's root, from which the paths of params.yaml are written."""
    if Path.cwd().resolve() != here:
        raise UserError(
            f"{Path.cwd()} is not the project's root, from which the paths in params.yaml go: run `cd {here}` first"
        )


def alone(study) -> None:
    """Raises UserError where a `dvc` that is at work, by its own lock file, writes files of this study."""
    lock = study.paths.root / ".dvc" / "tmp" / "rwlock"
    try:
        held = {path: int(holder["pid"]) for path, holder in json.loads(lock.read_text())["write"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return  # there is none, or DVC is just writing it
    for path, process in held.items():
        if _study_of(Path(path), study.paths.root) == study.name and _runs(process):
            raise UserError(
                f"process {process} (`dvc`) is at work on this study: wait until it has ended, or stop it with Ctrl-C where it was started; "
                f"if it is no `dvc`, delete {lock.relative_to(study.paths.root)}"
            )


def _study_of(path: Path, root: Path) -> str | None:
    """The study that a file belongs to; None where it is outside the project."""
    if not path.is_relative_to(root):
        return None
    pieces = path.relative_to(root).parts
    name = (
        pieces[2]
        if pieces[:2] == ("experiments", "studies") and len(pieces) > 2
        else pieces[1]
        if len(pieces) > 1
        else ""
    )
    return name if (root / "experiments" / "studies" / name).is_dir() and name else ""


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
