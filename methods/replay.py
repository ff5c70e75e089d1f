"""Replay: train on other text beside the domain's, so that what this text teaches is not forgotten.

Of a step with T tokens of the domain, `share` is the share of all its tokens that are replayed:

    swap   share·T tokens of domain rows are left out, and as many tokens are replayed: the step keeps its length
    add    share/(1 − share)·T tokens are replayed beside all domain rows: the step becomes longer

Both hold to within one row, and on average exactly. Under `swap` the domain gets fewer tokens than with other methods:
`tokens_trained` counts the domain's alone, and replayed tokens and their FLOPs are counted as added. The loss of a step
is the mean over all its labelled tokens: every token of a text has a label, and of a prompt and its completion the
completion has.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator

from methods.errors import UserError
from methods.part import Part, Row, Run, register, setting
from methods.tools import jsonl
from methods.tools.mixture import added, mixed


@register(
    title="Replay",
    paper="https://arxiv.org/abs/2502.06042",
    line="Train on general text or rows of your own beside the domain's.",
    phase="data",
    capabilities=frozenset({"general"}),
)
@dataclass(frozen=True, kw_only=True)
class Replay(Part):
    shares = ("methods.tools.jsonl", "methods.tools.mixture")
    scratch = ("rows",)
    neutral = {"share": 0.0}
    trial = {"share": 0.4}

    share: float = setting(0.1, within="[0, 1)", help="share of a step's tokens that are replayed")
    mode: Literal["swap", "add"] = setting("swap", help="replay in place of domain rows, or beside them")
    path: str = setting("", path=True, help="JSONL, rows of text or of prompt and completion; empty: general text")

    def look(self, *, shapes):
        if self.path:
            read(self.path)

    def added(self):
        return added(share=self.share, mode=self.mode)

    def begin(self, *, run, state, examples, general=()):
        if not self.share:
            return
        if not self.path and not general:
            raise UserError("replay: there is no general text: set `general.replay`, or name rows in replay.path")
        longest = state["longest"] = max(len(row["input_ids"]) for row in examples)  # no replayed row is longer
        rows = [_encoded(row, run) for row in read(self.path)] if self.path else general
        state["rows"] = [row for row in rows if _is_learnable(row, longest)]
        left_out, source = len(rows) - len(state["rows"]), self.path or "the general text"
        if not state["rows"]:
            raise UserError(f"replay: no row of {source} can be learned in {longest} tokens, the domain's longest row")
        if left_out and run.shards.first:
            print(
                f"replay: {left_out} of {len(rows)} rows of {source} cannot be learned in {longest} tokens", flush=True
            )

    def examples(self, *, run, state, rows, step):
        if not self.share:
            return rows
        drawn = functools.partial(self._drawn, run, state, step)
        return mixed(rows, drawn, share=self.share, mode=self.mode, draw=run.generator(self.key, step))

    def _drawn(self, run: Run, state: dict, step: int) -> Iterator[Row]:
        """Rows to replay in a step, without end."""
        for number in itertools.count():
            draw = run.generator(self.key, step, number)
            row = state["rows"][int(torch.randint(len(state["rows"]), (), generator=draw))]
            yield _cut(row, state["longest"], draw)


def read(path: str) -> list[jsonl.Row]:
    """The rows of a file, each a text or a prompt and its completion. Raises UserError naming file and line."""
    try:
        rows = jsonl.read(path)
    except UserError as error:
        raise UserError(f"replay.path: {error}") from error
    for row in rows:
        columns = {"text", "prompt", "completion"} & row.keys()
        if columns not in ({"text"}, {"prompt", "completion"}):
            raise UserError(f"replay.path: {row.at} must have either `text` or `prompt` and `completion`")
        for column in sorted(columns):
            if not isinstance(row[column], str) or not row[column].strip():
                raise UserError(f"replay.path: {row.at}: `{column}` must be text that is not empty")
    if not rows:
        raise UserError(f"replay.path: {path} has no rows: add some, or leave `path` out to replay general text")
    return rows


def _encoded(row: jsonl.Row, run: Run) -> Row:
    """Token ids and labels; the space between prompt and completion belongs to the completion, as in domain rows."""
    head = list(run.encode(row["prompt"].rstrip())) if "prompt" in row else []
    whole = list(run.encode(row["prompt"] + row["completion"] if "prompt" in row else row["text"]))
    ids = torch.tensor(head + whole[len(head) :])
    labels = ids.clone()
    labels[: len(head)] = -100
    return {"input_ids": ids, "labels": labels}


def _is_learnable(row: Row, longest: int) -> bool:
    """Whether a row has a label that another token precedes, also after it is cut; a completion is never cut."""
    labelled = row["labels"] != -100
    return bool(labelled[1:].any()) and (bool(labelled[0]) or int(labelled.sum()) < longest)


def _cut(row: Row, longest: int, draw: Generator) -> Row:
    """A row of at most `longest` tokens: any part of a text, and the end of a prompt with its completion."""
    excess = len(row["input_ids"]) - longest
    if excess <= 0:
        return row
    start = excess if row["labels"][0] == -100 else int(torch.randint(excess + 1, (), generator=draw))
    return {name: tensor[start : start + longest] for name, tensor in row.items()}
