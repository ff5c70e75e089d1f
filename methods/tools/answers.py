"""The answer of a training row: where it stands, and how one that is sampled in its place ends."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from methods.errors import UserError
from methods.tools.architecture import plain

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


def fitting(run: Run, prompt: list[int], *, tokens: int) -> list[int]:
    """The end of a prompt that leaves room for `tokens` tokens in the model's positions, as in scoring."""
    config = plain(run.model).config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None) or len(prompt) + tokens
    return prompt[-max(1, positions - tokens) :]


def has_end(run: Run, rows: Sequence[Row]) -> bool:
    """Whether the domain's answers end with a special token, which ends a text; else they are parts of a text."""
    return all(run.decode(divided(row)[1][-1:]) == "" for row in rows)


def row_of(prompt: list[int], answer: list[int], rest: Row | None = None) -> Row:
    """A row that teaches an answer, and behind it whatever `rest` teaches."""
    ids = torch.tensor(prompt + answer)
    labels = ids.clone()
    labels[: len(prompt)] = -100
    if rest is None:
        return {"input_ids": ids, "labels": labels}
    return {"input_ids": torch.cat([ids, rest["input_ids"]]), "labels": torch.cat([labels, rest["labels"]])}


def normalised(text: str) -> str:
    """A text without differences of case, of white space, of compatible characters and of the punctuation around it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" \"'`.,;:!?")


def contains(text: str, part: str) -> bool:
    """Whether a text has the part as whole words or a whole number in it."""
    return bool(part) and bool(re.search(rf"(?<![\w.-]){re.escape(part)}(?!\w|[.,]\d)", text))
