"""Rows that were changed, cut off or lost after the stage `data` wrote them are refused, not read."""

from pathlib import Path

from methods.errors import UserError
from methods.tools.files import read_json, sha256


def refuse_damaged(data: Path, *parts: str) -> None:
    """Raise UserError unless these files and folders of `data` are as data.json says, if it is there: whole, unchanged.

    A file of rows that is cut off between two of them would otherwise be read as a shorter one.
    """
    if not (data / "data.json").is_file():  # a machine that was sent the folders of one stage alone
        return
    known = read_json(data / "data.json", "files")["files"]
    for part in parts:
        there = {path.relative_to(data).as_posix() for path in (data / part).rglob("*") if path.is_file()}
        there |= {part} if (data / part).is_file() else set()
        for name in sorted(there | {name for name in known if name == part or name.startswith(f"{part}/")}):
            if name not in there or known.get(name) != sha256(data / name):
                raise UserError(
                    f"{data / name} is not what the stage `data` wrote (it is cut off, changed or missing): run "
                    "`dvc repro --force --single-item data`"
                )
