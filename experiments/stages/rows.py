"""JSONL, the one format of rows."""

import json
from pathlib import Path

from experiments.errors import MissingInput, UserError


def read_jsonl(path: Path) -> list[dict]:
    """Every row of a file; a missing file or a line that is not JSON is named."""
    if not path.is_file():
        raise MissingInput(f"{path} is missing: run `dvc repro` to make it")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
    return rows
