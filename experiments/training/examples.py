"""From the rows of a train.jsonl to training examples of at most `length` tokens.

    a prompt and its answer   too long: the prompt loses its beginning
    a conversation            too long: cut behind the last answer that fits whole
    documents                 packed: one behind the other, an end of text between them, cut into blocks

Rows that cannot be used are left out, counted and named; too many stop the run (experiments/data/left_out.py).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from evaluation import chat
from evaluation.chance import WARNING
from evaluation.labelled import encode_row, shortened, template_in
from evaluation.rendered import read_jsonl
from experiments.data.left_out import LeftOut
from experiments.training import processes
from experiments.training.batches import Example
from methods.errors import UserError
from methods.tools.jsonl import Row, place

IGNORED = -100  # the label of a token that is not learned
BAR = 5_000  # conversations from which on a progress bar is shown


def encoded(path: Path, tokenizer: Any, length: int, *, where: str = "train") -> list[Example]:
    """Training examples of the rows of a file, which the `data` stage wrote.

    where   the block that states `length`

    Raises UserError where more than a few rows cannot be used, which means that `length`, the rows or the chat template
    is wrong, and for an answer without a token.
    """
    rows, template = read_jsonl(path), template_in(path.parent)
    return examples_of(rows, tokenizer, length, domain=path.parent.name, where=where, template=template)


def examples_of(
    rows: Sequence[Row], tokenizer: Any, length: int, *, domain: str, where: str = "train", template: str | None = None
) -> list[Example]:
    """Training examples of rows of one format; see `encoded`."""
    about = f"domain {domain}"
    if rows and "text" in rows[0]:
        return packed((encode_row(tokenizer, row)[:2] for row in rows), length)
    if rows and "messages" in rows[0]:
        return _conversations(rows, tokenizer, length, domain=about, where=where, template=template)
    return _answers(rows, tokenizer, length, domain=about, where=where)


def packed(documents: Iterable[tuple[list[int], list[bool]]], length: int) -> list[Example]:
    """The documents one behind the other, in blocks of `length` tokens, the last one shorter.

    A block begins with the last token of the one before, so that every labelled token is learned exactly once. Where
    documents begin with the token that ends them (EOS for want of a BOS), it stands between them once.
    """
    ids: list[int] = []
    labels: list[bool] = []
    for own, labelled in documents:
        again = bool(ids) and own[:1] == ids[-1:]
        ids += own[again:]
        labels += labelled[again:]
    starts = range(0, max(1, len(ids) - 1), length - 1)
    return [_example(ids[start : start + length], labels[start : start + length]) for start in starts]


def _conversations(
    rows: Sequence[Row], tokenizer: Any, length: int, *, domain: str, where: str, template: str | None
) -> list[Example]:
    examples, left_out, unended = [], LeftOut(), 0
    chat.template_of(tokenizer, template)  # refuses a tokenizer without one
    shown_from = BAR if processes.first() else len(rows)
    for number, row in enumerate(tqdm(rows, desc=f"{domain}: encode", disable=len(rows) <= shown_from), 1):
        try:
            ids, labels, _ = encode_row(tokenizer, row, template=template)
        except UserError as error:
            left_out.add(str(error), place(row, number))
            continue
        unended += not chat.learns_to_stop(tokenizer, ids, labels)
        if (fitting := shortened(ids, labels, length)) is None:
            left_out.add(f"no answer ends within {where}.length ({length} tokens)", place(row, number))
            continue
        if sum(fitting[1]) < sum(labels):
            what = f"turns behind {where}.length ({length} tokens) are cut off"
            left_out.change(what, place(row, number))
        examples.append(_example(*fitting))
    remedy = f"name another `chat_template`, correct the rows, or raise `{where}.length`"
    left_out.settle(where=domain, of=len(rows), remedy=remedy, quiet=not processes.first())
    if unended and processes.first():
        print(
            f"{WARNING}{domain}: in {unended} of {len(rows)} conversations the template's {{% generation %}} ends "
            "before the token that ends the turn, so that the model does not learn to stop: let it end behind it",
            flush=True,
        )
    return examples


def _answers(rows: Sequence[Row], tokenizer: Any, length: int, *, domain: str, where: str) -> list[Example]:
    """A row whose answer leaves no room for a token of its prompt is left out, because it would teach the rest of an
    answer to no question.
    """
    examples, longest, left_out = [], 0, LeftOut()
    room = f"{where}.length ({length} tokens)"
    for number, row in enumerate(rows, 1):
        try:
            ids, labels, _ = encode_row(tokenizer, row)
        except UserError as error:
            if not row.get("end"):  # of a task with choices: its delimiter is wrong for all rows
                raise UserError(f"{domain}, a training row: {error}") from error
            left_out.add(str(error), place(row, number))
            continue
        if sum(labels) >= length:
            longest = max(longest, sum(labels))
            left_out.add(f"the answer leaves no room for its prompt in {room}", place(row, number))
            continue
        if len(ids) > length:
            left_out.change(f"the prompt loses its beginning, to fit into {room},", place(row, number))
        examples.append(_example(ids[-length:], labels[-length:]))
    remedy = "correct the rows, or choose a model with another tokenizer"
    if longest:
        remedy = f"set `{where}.length` to {longest + 1} or more, or train on shorter rows"
    left_out.settle(where=domain, of=len(rows), remedy=remedy, quiet=not processes.first())
    return examples


def _example(ids: list[int], labels: list[bool]) -> Example:
    learned = [token if labelled else IGNORED for token, labelled in zip(ids, labels)]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(learned)}
