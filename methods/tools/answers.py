"""The answer of a training row: where it stands, and how one that is sampled in its place ends."""

from __future__ import annotations

import re
import string
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


def finished(run: Run, ids: list[int], *, end: int | None, stop: str) -> list[int]:
    """A sampled answer as it would be learned; nothing where it has not ended, or has no more than its end.

    end   the token that the domain's answers end with, which is learned; None: they have none
    stop  text that ends an answer where they have none, as an end of text does; neither is learned
    """
    if end is not None:
        return ids if len(ids) > 1 and ids[-1] == end else []
    ended = run.decode(ids[-1:]) == "" or (stop and stop in run.decode(ids))
    return ids[:-1] if ended else []


def row_of(prompt: list[int], answer: list[int], rest: Row | None = None) -> Row:
    """A row that teaches an answer, and behind it whatever `rest` teaches."""
    ids = torch.tensor(prompt + answer)
    labels = ids.clone()
    labels[: len(prompt)] = -100
    if rest is None:
        return {"input_ids": ids, "labels": labels}
    return {"input_ids": torch.cat([ids, rest["input_ids"]]), "labels": torch.cat([labels, rest["labels"]])}


def refuse_template(template: str, *, where: str) -> None:
    """Raises UserError for a template without {answer}, or with anything else in braces than that and {prompt}."""
    try:
        fields = [field for _, *field in string.Formatter().parse(template) if field[0] is not None]
    except ValueError as error:
        raise UserError(f"{where} is {template!r}: {error}; write a brace as two") from error
    plain = [["answer", "", None], ["prompt", "", None]]  # name, format and conversion
    if plain[0] not in fields or any(field not in plain for field in fields):
        raise UserError(f"{where} is {template!r}: name {{answer}}, {{prompt}} and nothing else in braces")


def filled(run: Run, template: str, *, prompt: list[int], answer: list[int], tokens: int) -> list[int]:
    """Token ids of the template with a row's own in it: the end of them that leaves room for `tokens` more.

    In front stands what begins every text, such as a beginning-of-text token, where the prompt has it, too.
    """
    begin = list(run.encode(""))
    begun = bool(begin) and prompt[: len(begin)] == begin
    fields = {"prompt": prompt[len(begin) * begun :], "answer": answer, None: []}
    ids = begin if begun else []
    for text, name, _, _ in string.Formatter().parse(template):
        ids = ids + list(run.encode(text))[len(begin) :] * bool(text) + fields[name]
    return fitting(run, ids, tokens=tokens)


def refuse_expression(expression: str, *, where: str) -> None:
    """Raises UserError for what is no regular expression."""
    try:
        re.compile(expression)
    except re.error as error:
        raise UserError(f"{where} is {expression!r}, which is no regular expression: {error}") from error


def extracted(text: str, expression: str) -> str:
    """The last match of a regular expression, or of its first group if it has any; empty where nothing matches.

    The whole text for an empty expression.
    """
    matches = list(re.finditer(expression, text)) if expression else []
    if not matches:
        return "" if expression else text
    return matches[-1][1 if matches[-1].re.groups else 0] or ""


def normalised(text: str) -> str:
    """A text without differences of case, of white space, of compatible characters and of the punctuation around it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" \"'`.,;:!?")


def contains(text: str, part: str) -> bool:
    """Whether a text has the part as whole words or a whole number in it."""
    return bool(part) and bool(re.search(rf"(?<![\w.-]){re.escape(part)}(?!\w|[.,]\d)", text))
