"""Rows that the `data` stage wrote: {"text"}, {"messages"}, or {"context", "choices", "gold"} and what a task's metric
adds.
"""

from pathlib import Path

from methods.errors import MissingInput, UserError
from methods.tools import jsonl


def read_jsonl(path: Path) -> list[jsonl.Row]:
    """Every row of a file. Raises MissingInput where the stage has not run, and UserError naming a damaged line."""
    if not path.is_file():
        raise MissingInput(f"{path} is missing: run `dvc repro` to make it")
    rows = jsonl.read(path)
    for row in rows:
        choices, gold = row.get("choices"), row.get("gold")
        chosen = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
        answered = chosen and isinstance(gold, int) and 0 <= gold < len(choices)
        whole = isinstance(row.get("text"), str) or isinstance(row.get("messages"), list)
        if not whole and not (answered and isinstance(row.get("context"), str)):
            raise UserError(
                f"{row.at} is no row of the `data` stage: run `dvc repro --force data` to make the file again"
            )
    return rows
