"""Scores of texts whose tokens are predicted, without lm-eval: general passages, and rows of a domain with labels.

    nats per token   Σ nats / Σ tokens          over all texts together; perplexity is its exponential
    bits per byte    Σ nats / (Σ bytes · ln 2)  does not depend on the tokenizer
    kl, kl_reverse   Σ KL / Σ tokens            of general passages, from and to the base (evaluation/token_losses.py)

A general passage is read whole after the prefix token, in the windows of lm-eval's rolling log-likelihoods.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from evaluation.encode import encode_rolling
from evaluation.task import LocalTask, doc_hash
from evaluation.token_losses import Labelled, Losses
from methods.errors import UserError

Item = dict[str, Any]


def passages(task: LocalTask, tokenizer: Any) -> list[Labelled]:
    """The ids of each passage, of which all after the first are labelled."""
    texts = [encode_rolling(tokenizer, task.doc_to_target(doc)) for doc in task.eval_docs]
    return [([*context, *ids], [False] * len(context) + [True] * len(ids)) for context, ids in texts]


def general(name: str, task: LocalTask, losses: Sequence[Losses]) -> tuple[dict[str, Any], list[Item]]:
    """(`general` of scores.json, items); an item's score is its nats, and its KL is in nats per token."""
    texts = [task.doc_to_target(doc) for doc in task.eval_docs]
    hashes, sizes = [doc_hash(doc) for doc in task.eval_docs], [len(text.encode()) for text in texts]
    items = _items(name, losses, hashes, sizes)
    for row, one in zip(items, losses):
        row |= {"score": one.nats, "gold": one.tokens}
        if one.kl is not None and one.tokens:
            row |= {"kl": one.kl / one.tokens, "kl_reverse": one.kl_reverse / one.tokens}
    report = _report(name, losses, sizes) | {"n": len(items), "prompt": _digest(hashes, texts)}
    report["perplexity"] = math.exp(min(report["nats_per_token"], 700.0))  # JSON has no infinity
    for key in ("kl", "kl_reverse"):
        known = [getattr(one, key) for one in losses]
        report[key] = None if None in known else math.fsum(known) / report["tokens"]
    return report, items


def _items(name: str, losses: Sequence[Losses], hashes: Sequence[str], sizes: Sequence[int]) -> list[Item]:
    rows = enumerate(zip(losses, hashes, sizes, strict=True))
    return [
        {"task": name, "doc_id": number, "doc_hash": sha, "log_likelihood": -one.nats}
        | {"tokens": one.tokens, "bytes": size}
        for number, (one, sha, size) in rows
    ]


def _report(name: str, losses: Sequence[Losses], sizes: Sequence[int]) -> dict[str, Any]:
    nats, tokens = math.fsum(one.nats for one in losses), sum(one.tokens for one in losses)
    if not tokens:
        raise UserError(
            f"{name}: its {len(losses)} texts have no token to score, because this tokenizer adds no token before "
            "them: give longer texts"
        )
    bits = nats / (sum(sizes) * math.log(2))
    return {"nats_per_token": nats / tokens, "bits_per_byte": bits, "tokens": tokens, "bytes": sum(sizes)}


def _digest(*columns: Sequence[Any]) -> str:
    """A digest of what is scored: values of one name are comparable if it is equal."""
    return hashlib.sha256(json.dumps(columns, sort_keys=True, default=str).encode()).hexdigest()[:16]
