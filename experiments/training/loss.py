"""Cross-entropy on labelled positions only, in chunks: the logits of a batch are never whole.

LLaMA-3's logits cost 1.28 MB a token with their gradient; an answer of four tokens behind a prompt of a
hundred needs four rows of them, not a hundred.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from experiments.training.batches import sent

CHUNK = 1024  # rows of logits alive at once


def shifted(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden rows that predict a label, and those labels (transformers' shift: position t predicts t+1).

    hidden (batch, tokens, width), labels (batch, tokens) with -100 where nothing is asked; labels on the CPU spare a
    GPU the wait for their number. Returns (rows, width) and (rows,) on the device of `hidden`.
    """
    targets = labels.cpu()[:, 1:]
    line, column = (targets != -100).nonzero(as_tuple=True)
    rows = sent(line * labels.shape[1] + column, hidden.device)
    return hidden.flatten(0, 1).index_select(0, rows), sent(targets[line, column], hidden.device)


def summed_nll(hidden: Tensor, labels: Tensor, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ −log p(label) in nats over all labelled positions; a scalar in float32 (float64 for float64 hidden states).

    logits_of   the model's own map from hidden rows (rows, width) to logits (`architecture.logits_of`)
    """
    rows, targets = shifted(hidden, labels)
    if len(rows) <= CHUNK:
        return _chunk_nll(rows, targets, logits_of)
    total = rows.new_zeros((), dtype=_wide(rows.dtype))
    for start in range(0, len(rows), CHUNK):
        piece = slice(start, start + CHUNK)
        # recomputed in backward, so that only one chunk of logits is ever held
        total = total + checkpoint(_chunk_nll, rows[piece], targets[piece], logits_of, use_reentrant=False)
    return total


def _chunk_nll(rows: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
    logits = logits_of(rows)
    return F.cross_entropy(logits.to(_wide(logits.dtype)), targets, reduction="sum")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
