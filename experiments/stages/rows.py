"""Rows that an earlier stage wrote."""

from pathlib import Path

from experiments import jsonl
from experiments.errors import MissingInput


def read_jsonl(path: Path) -> list[jsonl.Row]:
    """Every row of a file. Raises MissingInput where the stage has not run, UserError for a line that cannot be read."""
    if not path.is_file():
        raise MissingInput(f"{path} is missing: run `dvc repro` to make it")
    return jsonl.read(path)
