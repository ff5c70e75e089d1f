"""Small fixed sets that are scored during training and to choose settings, without lm-eval and without side effects.

A set is a file <name>.jsonl of work/data/train/<domain>/probe: rows as `evaluation.task.render` writes, {"context",
"choices", "gold"} and what the metric needs, or {"text"} for general text; of a domain of another format the rows that
`evaluation.labelled` encodes. Probe rows are disjoint from scored rows.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evaluation import encode, shared_prefix
from evaluation.chance import WARNING
from evaluation.labelled import encode_row, template_in
from evaluation.preserve import preserved
from evaluation.rendered import read_jsonl
from methods.errors import UserError
from methods.tools.jsonl import Row

GENERAL = "general"  # the set of general text


@dataclass(frozen=True, kw_only=True)
class Item:
    """One row, encoded: a request for each choice, one for a whole text after the prefix token, or one for each answer
    of a conversation.

    norm     characters or bytes of each choice, where accuracy is per character or byte
    less     the choices without a context, where accuracy is by what the context adds
    greedy   an answer is right if the model would write the gold choice
    written  the one choice is a whole solution: its log-likelihood counts, because accuracy would need generation
    """

    requests: tuple[shared_prefix.Request, ...]
    gold: int | None  # None for a text and for a conversation
    norm: tuple[int, ...] | None = None
    less: tuple[shared_prefix.Request, ...] = ()
    greedy: bool = False
    written: bool = False

    def windows(self, max_length: int) -> list[shared_prefix.Request]:
        """The requests as a model of `max_length` can take them: a long text in pieces, a long solution cut off."""
        if self.written:
            return [(context, solution[:max_length]) for context, solution in self.requests]
        if self.gold is not None:
            return [*self.requests, *self.less]
        pieces = []
        for context, ids in self.requests:
            if len(context) == 1:
                pieces += encode.windows(ids, prefix=context[0], max_length=max_length)
            else:
                pieces.append((context, ids[:max_length]))
        return pieces


Sets = dict[str, list[Item]]


def load_probes(folder: Path, tokenizer: Any) -> Sets:
    """Every set of a probe folder by its file's name, in alphabetical order, encoded once."""
    files = sorted(Path(folder).glob("*.jsonl"))
    if not files:
        raise UserError(f"no probe sets (*.jsonl) in {folder}: run the `data` stage first")
    template, sets = template_in(Path(folder).parent), {}
    for file in files:
        rows, refused = _rows(file), []
        if file.stem != GENERAL and rows[0].keys() & {"text", "messages"}:
            sets[file.stem] = labelled(rows, tokenizer, template=template, refused=refused)
        else:
            sets[file.stem] = encoded(rows, tokenizer, refused=refused)
        if refused:
            problem = f"{file.stem}: {len(refused)} of {len(rows)} probe rows cannot be encoded ({refused[0]})"
            if len(refused) == len(rows):
                raise UserError(f"{problem}: correct the rows, or write `probe: 0` under `split`")
            print(f"{WARNING}{problem}. They are left out", flush=True)
    if empty := [name for name, items in sets.items() if not items]:
        raise UserError(
            f"probe set {empty[0]}: its texts have no token to score, because this tokenizer adds no token before "
            "them: give longer texts"
        )
    return sets


def labelled(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, *, template: str | None, refused: list[UserError]
) -> list[Item]:
    """Documents and conversations: a request for each run of labelled tokens, after all that precedes it.

    A conversation that the chat template does not take is left out, as it is in training; `refused` gets the reason.
    """
    items = []
    for row in rows:
        try:
            ids, labels, _ = encode_row(tokenizer, row, template=template)
        except UserError as error:
            refused.append(error)
            continue
        starts = [i for i in range(1, len(ids)) if labels[i] and (i == 1 or not labels[i - 1])]
        ends = [next((j for j in range(i, len(ids)) if not labels[j]), len(ids)) for i in starts]
        if starts:
            items.append(Item(requests=tuple((ids[:i], ids[i:j]) for i, j in zip(starts, ends)), gold=None))
    return items


def encoded(rows: Iterable[Mapping[str, Any]], tokenizer: Any, *, refused: list[UserError] | None = None) -> list[Item]:
    """Rows as HFLM would encode them. `refused` gets the reasons of written answers that are left out, as in training;
    UserError without it, and for a row with choices.
    """
    items = []
    for row in rows:
        if "text" in row:
            text = encode.encode_rolling(tokenizer, row["text"])
            if text[1]:  # without a prefix a text of one token has nothing to score
                items.append(Item(requests=(text,), gold=None))
            continue
        written, less = row.get("end", False), ()
        try:
            requests = _requests(tokenizer, row["context"], row["choices"], end=written)
        except UserError as error:
            if not written or refused is None:
                raise UserError(f"a probe row: {error}") from error
            refused.append(error)
            continue
        if row.get("less"):
            less = _requests(tokenizer, "", row["choices"])
        norm = tuple(row["norm"]) if row.get("norm") else None
        about = {"gold": row["gold"], "norm": norm, "written": written, "greedy": row.get("greedy", False)}
        items.append(Item(requests=requests, less=less, **about))
    return items


def _requests(
    tokenizer: Any, context: str, choices: Iterable[str], *, end: bool = False
) -> tuple[shared_prefix.Request, ...]:
    pairs = [encode.answer_pair(tokenizer, context, choice, end=end) for choice in choices]
    return tuple((ids[:start], ids[start:]) for ids, start in pairs)


def probe(
    *, model: torch.nn.Module, sets: Mapping[str, list[Item]], tokens: int = shared_prefix.TOKENS
) -> dict[str, float]:
    """Score probe sets: accuracy and nats per token of the gold choice, or the nats per token of a set of texts.

    Returns {"<name>": accuracy, "<name>_nll": nats per token, "perplexity": exp(general_nll)}. Accuracy is that of
    lm-eval: the likeliest choice, per character for acc_norm, per byte for acc_bytes, by what the context adds for
    acc_mutual_info; with one choice (LAMBADA) and for exact_match, whether the model would write it. For any other
    metric (mcc, brier_score) it is the accuracy of the likeliest choice. Written answers (GSM8K) have nats alone,
    including the end of text. The model's modes and all random states are restored.
    """
    limit = encode.max_length(model)
    windows = {name: [item.windows(limit) for item in items] for name, items in sets.items()}
    requests = [request for rows in windows.values() for row in rows for request in row]
    with preserved(model):
        answers = iter(shared_prefix.log_likelihoods(model, requests, max_length=limit, tokens=tokens))
    report: dict[str, float] = {}
    for name, items in sets.items():
        scored = [[next(answers) for _ in row] for row in windows[name]]
        if items[0].gold is None:
            nats = -math.fsum(value for values in scored for value, _ in values)
            report[f"{name}_nll"] = nats / _tokens(request for row in windows[name] for request in row)
            if name == GENERAL:
                report["perplexity"] = math.exp(min(report[f"{name}_nll"], 700.0))
            continue
        nats = -math.fsum(values[item.gold][0] for item, values in zip(items, scored))
        if not items[0].written:
            report[name] = sum(_right(item, values) for item, values in zip(items, scored)) / len(items)
        report[f"{name}_nll"] = nats / _tokens(row[item.gold] for item, row in zip(items, windows[name]))
    return report


def _right(item: Item, scored: list[tuple[float, bool]]) -> bool:
    choices = len(item.requests)
    if choices == 1 or item.greedy:
        return scored[item.gold][1]
    if item.less:
        scored = [(value - alone, likeliest) for (value, likeliest), (alone, _) in zip(scored, scored[choices:])]
    values = [value / length for (value, _), length in zip(scored[:choices], item.norm or [1] * choices)]
    return values.index(max(values)) == item.gold


def _tokens(requests: Iterable[shared_prefix.Request]) -> int:
    return sum(len(continuation) for _, continuation in requests)


def _rows(file: Path) -> list[Row]:
    rows = read_jsonl(file)
    if not rows:
        raise UserError(f"probe set {file} is empty: it needs at least one row")
    return rows
