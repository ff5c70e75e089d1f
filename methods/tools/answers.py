"""The answer of a training row: where it stands, and how one that is sampled in its place ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from methods.errors import UserError

if TYPE_CHECKING:
    from methods.part import Row, Run


def divided(row: Row) -> tuple[list[int], list[int]]:
    """Token ids of a row's prompt, which stand before its first label, and of its first answer, which has labels."""
    labelled = (row["labels"] != -100).tolist()
    first = labelled.index(True) if True in labelled else len(labelled)
    end = labelled.index(False, first) if False in labelled[first:] else len(labelled)
    ids = row["input_ids"].tolist()
    return ids[:first], ids[first:end]


def refuse(rows: Sequence[Row], *, part: str) -> None:
    """Raises UserError where the rows have no prompts, which answers could be sampled for."""
    if all(len(divided(row)[0]) <= 1 for row in rows):
        raise UserError(
            f"{part}: the domain's rows have no prompt before what is learned, so that no answer can be sampled: take "
            "a domain of questions or conversations"
        )


def has_end(run: Run, rows: Sequence[Row]) -> bool:
    """Whether the domain's answers end with a special token, which ends a text; else they are parts of a text."""
    return all(run.decode(divided(row)[1][-1:]) == "" for row in rows)
