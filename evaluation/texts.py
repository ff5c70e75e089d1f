"""Scores of texts whose tokens are predicted, without lm-eval: general passages, and rows of a domain with labels.

    nats per token   Σ nats / Σ tokens          over all texts together; perplexity is its exponential
    bits per byte    Σ nats / (Σ bytes · ln 2)  does not depend on the tokenizer
    kl, kl_reverse   Σ KL / Σ tokens            of general passages, from and to the base (evaluation/token_losses.py)

A general passage is read whole after the prefix token, in the windows of lm-eval's rolling log-likelihoods. Of a
domain's row the labelled tokens count, which are those that it is trained on (evaluation/labelled.py).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.chance import WARNING
from evaluation.encode import encode_rolling
from evaluation.labelled import encode_row
from evaluation.task import LocalTask, doc_hash, read_rows
from evaluation.token_losses import Labelled, Losses
from methods.errors import UserError

Item = dict[str, Any]
METRIC = "nats_per_token"  # of a domain's labelled tokens


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The texts of an entry of tasks.json, encoded; `rows` are their numbers in its file, counted from 0."""

    name: str
    sequences: Sequence[Labelled]
    rows: Sequence[int]
    hashes: Sequence[str]
    sizes: Sequence[int]  # bytes of the labelled text

    def items(self, losses: Sequence[Losses]) -> list[Item]:
        """Their rows of items.csv.gz, without scores."""
        each = zip(self.rows, self.hashes, self.sizes, losses, strict=True)
        return [
            {"task": self.name, "doc_id": number, "doc_hash": sha, "log_likelihood": -one.nats}
            | {"tokens": one.tokens, "bytes": size}
            for number, sha, size, one in each
        ]

    def report(self, losses: Sequence[Losses], *digested: Any) -> dict[str, Any]:
        """Nats per token, bits per byte, sums, and a digest: values of one name are comparable if it is equal."""
        nats, tokens, size = math.fsum(one.nats for one in losses), sum(one.tokens for one in losses), sum(self.sizes)
        if not tokens:
            raise UserError(
                f"{self.name}: its {len(losses)} texts have no token to score, because this tokenizer adds no token "
                "before them: give longer texts"
            )
        content = json.dumps([self.hashes, *digested]).encode()
        return {
            METRIC: nats / tokens,
            "bits_per_byte": nats / (size * math.log(2)),
            "tokens": tokens,
            "bytes": size,
            "n": len(losses),
            "prompt": hashlib.sha256(content).hexdigest()[:16],
        }


def passages(name: str, task: LocalTask, tokenizer: Any) -> Texts:
    """General passages, of which all tokens after the first are labelled."""
    texts = [task.doc_to_target(doc) for doc in task.eval_docs]
    pairs = [encode_rolling(tokenizer, text) for text in texts]
    return Texts(
        name=name,
        sequences=[([*context, *ids], [False] * len(context) + [True] * len(ids)) for context, ids in pairs],
        rows=range(len(texts)),
        hashes=[doc_hash(doc) for doc in task.eval_docs],
        sizes=[len(text.encode()) for text in texts],
    )


def labelled(entry: Mapping[str, Any], folder: Path, tokenizer: Any) -> Texts:
    """The rows of a domain's entry with a `format`.

    A row that cannot be encoded with this tokenizer is left out, which is said; UserError where none is left.
    """
    template = (folder / entry["template"]).read_text(encoding="utf-8") if entry.get("template") else None
    found, refused = [], {}
    rows = read_rows(folder / entry["file"])
    for number, row in enumerate(rows):
        try:
            ids, labels, size = encode_row(tokenizer, row, template=template)
        except UserError as error:
            refused[number + 1] = error
        else:
            found.append(((ids, labels), number, doc_hash(row), size))
    reason = next((f"row {number}: {error}" for number, error in refused.items()), "")
    if not found:
        raise UserError(f"{entry['name']}: none of its rows can be scored with this tokenizer, {reason}")
    if refused:
        problem = f"{len(refused)} of {len(rows)} rows of {entry['file']} are not scored, {reason}"
        others = f" (and rows {', '.join(map(str, list(refused)[1:]))})" * (len(refused) > 1)
        print(f"{WARNING}{entry['name']}: {problem}{others}", flush=True)
    sequences, numbers, hashes, sizes = zip(*found)
    return Texts(name=entry["name"], sequences=sequences, rows=numbers, hashes=hashes, sizes=sizes)


def general(texts: Texts, losses: Sequence[Losses]) -> tuple[dict[str, Any], list[Item]]:
    """(`general` of scores.json, items); an item's score is its nats, and its KL is in nats per token."""
    items, report = texts.items(losses), texts.report(losses)
    for row, one in zip(items, losses):
        row["score"] = one.nats
        if one.kl is not None and one.tokens:
            row |= {"kl": one.kl / one.tokens, "kl_reverse": one.kl_reverse / one.tokens}
    report["perplexity"] = math.exp(min(report[METRIC], 700.0))  # JSON has no infinity
    for key in ("kl", "kl_reverse"):
        known = [getattr(one, key) for one in losses]
        report[key] = None if None in known else math.fsum(known) / report["tokens"]
    return report, items


def domain(entry: Mapping[str, Any], texts: Texts, losses: Sequence[Losses]) -> tuple[dict[str, Any], list[Item]]:
    """(the entry's score, items): nats per labelled token, fewer are better.

    An item's score is log_likelihood · n / Σ tokens, so that the mean over items is −nats per token.
    """
    items, report = texts.items(losses), texts.report(losses, texts.sequences)
    value = report.pop(METRIC)
    for row in items:
        row["score"] = row["log_likelihood"] * report["n"] / report["tokens"]
    about = {"role": entry["role"], "metric": METRIC, "chance": None, "format": entry["format"]}
    about |= {"value": value, "compared": -value, "unit": "nats", "higher_is_better": False, "per_item": True}
    return about | report | {"metrics": {METRIC: value, "bits_per_byte": report["bits_per_byte"]}}, items
