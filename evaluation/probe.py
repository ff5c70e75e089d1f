"""Small fixed sets scored while a model is trained, and in choosing settings: no lm-eval, no trace left behind.

A set is a file <name>.jsonl of work/data/train/<domain>/probe: rows {"context", "choices", "gold"} and, for an acc_norm
or acc_bytes task, "norm", and what else `evaluation.task.render` writes; for a task whose answers are written, "end";
or {"text"} for general text. Probe rows are disjoint from every scored row.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evaluation import encode, shared_prefix
from evaluation.preserve import preserved
from evaluation.rendered import read_jsonl
from methods.errors import UserError
from methods.tools.jsonl import Row


@dataclass(frozen=True, kw_only=True)
class Item:
    """One row, encoded: a request for each choice, or for a text all of it behind the prefix token."""

    requests: tuple[shared_prefix.Request, ...]
    gold: int | None  # None for a text
    norm: tuple[int, ...] | None  # characters or bytes of each choice, where accuracy is per character or byte
    less: tuple[
        shared_prefix.Request, ...
    ] = ()  # the choices without a context, where accuracy is by what the context adds
    greedy: bool = False  # right is where the gold choice is what the model would write
    written: bool = (
        False  # the one choice is a whole solution: its log-likelihood counts, accuracy would take generation
    )

    def windows(self, max_length: int) -> list[shared_prefix.Request]:
        """The requests as a model of `max_length` can take them: a long text in pieces, a long solution cut off."""
        if self.written:
            return [(context, solution[:max_length]) for context, solution in self.requests]
        if self.gold is not None:
            return [*self.requests, *self.less]
        (((prefix,), ids),) = self.requests
        return list(encode.windows(ids, prefix=prefix, max_length=max_length))


Sets = dict[str, list[Item]]


def load_probes(folder: Path, tokenizer: Any) -> Sets:
    """Every set of a probe folder by its file's name, in alphabetical order, encoded once."""
    files = sorted(Path(folder).glob("*.jsonl"))
    if not files:
        raise UserError(f"no probe sets (*.jsonl) in {folder}: run the `data` stage first")
    sets = {file.stem: encoded(_rows(file), tokenizer) for file in files}
    if empty := [name for name, items in sets.items() if not items]:
        raise UserError(
            f"probe set {empty[0]}: its texts have no token to score in this tokenizer, which puts nothing before "
            "them: give longer texts"
        )
    return sets


def encoded(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> list[Item]:
    """Rows as HFLM would encode them."""
    items = []
    for row in rows:
        if "text" in row:
            text = encode.encode_rolling(tokenizer, row["text"])
            if text[1]:  # without a prefix a text of one token has nothing to score
                items.append(Item(requests=(text,), gold=None, norm=None))
        else:
            written = row.get("end", False)
            try:
                pairs = [
                    encode.answer_pair(tokenizer, row["context"], choice, end=written) for choice in row["choices"]
                ]
            except UserError as error:
                raise UserError(f"a probe row: {error}") from error

            def split(pairs):
                return tuple((ids[:start], ids[start:]) for ids, start in pairs)

            less = [encode.answer_pair(tokenizer, "", choice) for choice in row["choices"]] if row.get("less") else []
            norm = tuple(row["norm"]) if row.get("norm") else None
            items.append(
                Item(
                    requests=split(pairs),
                    gold=row["gold"],
                    norm=norm,
                    written=written,
                    less=split(less),
                    greedy=row.get("greedy", False),
                )
            )
    return items


def probe(
    *, model: torch.nn.Module, sets: Mapping[str, list[Item]], tokens: int = shared_prefix.TOKENS
) -> dict[str, float]:
    """{"<name>": accuracy, "<name>_nll": nats per token of the gold choice} for sets of choices, and
    {"perplexity": exp(nats per token)} for the set of texts.

    Accuracy is lm-eval's: the likeliest choice, per character for acc_norm, per byte for acc_bytes, by what the context
    adds to it for acc_mutual_info; where there is only one choice (LAMBADA) and for exact_match, whether it is what the
    model would write. A task by another metric (mcc, brier_score) has the accuracy of its likeliest choice here. Of
    written answers (GSM8K) there are the nats alone, end of text included. The model's modes and all random states are
    left as they were.
    """
    limit = encode.max_length(model)
    asked = {name: [item.windows(limit) for item in items] for name, items in sets.items()}
    requests = [request for rows in asked.values() for row in rows for request in row]
    with preserved(model):
        answers = iter(shared_prefix.log_likelihoods(model, requests, max_length=limit, tokens=tokens))
    report: dict[str, float] = {}
    for name, items in sets.items():
        scored = [[next(answers) for _ in row] for row in asked[name]]
        if items[0].gold is None:
            nats = -math.fsum(value for values in scored for value, _ in values)
            report["perplexity"] = math.exp(min(nats / _tokens(r for i in items for r in i.requests), 700.0))
            continue
        nats = -math.fsum(values[item.gold][0] for item, values in zip(items, scored))
        if not items[0].written:
            report[name] = sum(_right(item, values) for item, values in zip(items, scored)) / len(items)
        report[f"{name}_nll"] = nats / _tokens(row[item.gold] for item, row in zip(items, asked[name]))
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
