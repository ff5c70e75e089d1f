"""Refuse training and preparation on texts with more tokens than the model has positions."""

from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from evaluation.encode import encode_text
from evaluation.labelled import encode_row, template_in
from evaluation.rendered import read_jsonl
from experiments.model.shape import Shape
from methods.errors import UserError
from methods.tools.costs import Pass
from methods.tools.jsonl import Row

# tokens that a chat template writes around a conversation, such as a system turn of its own, and around a turn
FRAME, TURN = 512, 64
MARKS = 8  # tokens that a tokenizer may add to a text: at its beginning, at its end, a space


def refuse_long_documents(study, *, model: str, method: str, shape: Shape, longest: int | None = None) -> None:
    """Raises UserError naming the part that reads documents with more tokens than the model has positions.

    longest   tokens of the longest document of general text; None: not known, so that only a length that is written in
              the method's block is checked

    A model whose config names no limit (such as one with ALiBi) takes documents of any length.
    """
    limit = shape.positions
    if limit is None:
        return
    for part in study.methods[method].parts:
        block = study.methods[method].block.get(part.key) or {}
        for made in (*part.preparation(), *([part.added()] if part.added().length else [])):
            written = made.generated if isinstance(made, Pass) else 0
            if longest is None:
                reached = made.length + written if made.cut_by in block else None
            else:
                reached = min(made.length or longest, longest) + written
            if reached and reached > limit and made.cut_by:
                where = f"methods.{method}.{part.key}.{made.cut_by}"
                room = limit - (reached - written if written else 0)
                raise UserError(
                    f"{where} is {written or made.length}, and {model} has {limit} positions: "
                    f"write `{made.cut_by}: {room}` or less there"
                )
            if reached and reached > limit:
                raise UserError(
                    f"methods.{method}.{part.key} reads documents of {reached} tokens, and {model} has {limit} "
                    "positions: take shorter text under `general`"
                )


def refuse_long_rows(study, *, model: str, domain: str, method: str, shape: Shape, longest: int) -> None:
    """Raises UserError naming the `length` that applies where a training row is longer than the model's positions.

    longest   tokens of the domain's longest row, before it is cut
    """
    limit, length = shape.positions, study.settings(model=model, domain=domain, method=method).length
    if limit is not None and min(length, longest) > limit:
        where = study.written("length", model=model, domain=domain, method=method)
        if study.domains[domain].format == "text":
            raise UserError(
                f"{where}.length is {length}, {model} has {limit} positions, and the documents of {domain} are packed "
                f"into rows of `length` tokens: write `length: {limit}` or less there"
            )
        raise UserError(
            f"{where}.length is {length}, {model} has {limit} positions, and a training row of {domain} has {longest} "
            f"tokens: write `length: {limit}` or less there, so that longer rows lose their beginning, or take shorter "
            "rows"
        )


def refuse_documents_without_a_label(longest: int, *, name: str, count: int) -> None:
    """Raises UserError where each of the `count` documents of a set of general text is a single token."""
    if longest < 2:
        raise UserError(
            f"general: none of the {count} documents of `general.{name}` is longer than a token, so there is nothing "
            "to predict in them: name longer text under `general.rows`, or another column as `general.text`"
        )


def longest_row(file: Path, tokenizer: Any, limit: int) -> int:
    """Tokens of the longest row of a train.jsonl, as training encodes it; 0 where no row can have more than `limit`.

    Of documents, which training packs into blocks, all tokens together, or more than `limit`.
    """
    rows, template = read_jsonl(file), template_in(file.parent)
    if rows and "text" in rows[0]:
        if sum(map(_bytes, rows)) <= limit:
            return 0
        together = accumulate(len(encode_row(tokenizer, row)[0]) for row in rows)
        return next((tokens for tokens in together if tokens > limit), 0)
    longest = 0
    for row in rows:
        if _bytes(row) > limit:
            with suppress(UserError):  # left out of training, or refused there
                longest = max(longest, len(encode_row(tokenizer, row, template=template)[0]))
    return longest


def _bytes(row: Row) -> int:
    """More bytes than a row has tokens: a token is a byte at least."""
    if "messages" in row:
        return FRAME + sum(len(turn["content"].encode()) + TURN for turn in row["messages"])
    return MARKS + len((row["text"] if "text" in row else row["context"] + row["choices"][row["gold"]]).encode())


def longest_document(file: Path, tokenizer: Any) -> int:
    """Tokens of the longest document of general text."""
    return max((len(encode_text(tokenizer, row["text"])) for row in read_jsonl(file)), default=0)
