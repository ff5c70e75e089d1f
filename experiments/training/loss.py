"""Losses over the vocabulary in chunks, so that the logits of a batch are never whole.

LLaMA-3's logits cost 1.28 MB a token with their gradient; an answer of four tokens behind a prompt of a
hundred needs four rows of them, not a hundred. A chunk of several is computed again in backward.
"""

import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from experiments.training.batches import sent
from methods.tools.token_statistics import TokenStatistics

CHUNK = 1024  # rows of logits alive at once

Logits = Callable[[Tensor], Tensor]  # a model's own map from hidden rows (rows, width) to logits


def shifted(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden rows that predict a label, and those labels (transformers' shift: position t predicts t+1).

    hidden (batch, tokens, width), labels (batch, tokens) with -100 where nothing is learned; labels on the CPU spare a
    GPU the wait for their number. Returns (rows, width) and (rows,) on the device of `hidden`.
    """
    line, column, targets = _labelled(labels)
    return _rows(hidden, line, column), sent(targets, hidden.device)


def _labelled(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Line and column of what predicts a label, and the label; all on the CPU."""
    targets = labels.cpu()[:, 1:]
    line, column = (targets != -100).nonzero(as_tuple=True)
    return line, column, targets[line, column]


def _rows(hidden: Tensor, line: Tensor, column: Tensor) -> Tensor:
    return hidden.flatten(0, 1).index_select(0, sent(line * hidden.shape[1] + column, hidden.device))


def summed_nll(hidden: Tensor, labels: Tensor, logits_of: Logits) -> Tensor:
    """Σ −log p(label) in nats over all labelled positions; a scalar in float32 (float64 for float64 hidden states)."""
    return weighted_nll(hidden, labels, logits_of, None)[0]


def weighted_nll(
    hidden: Tensor,
    labels: Tensor,
    logits_of: Logits,
    weights_of: Callable[[TokenStatistics], Tensor | None] | None,
    batch_weights_of: Callable[[Tensor, Tensor, Tensor], Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ w·nll over all labelled positions, and Σ nll without a gradient; scalars as `summed_nll` gives them.

    weights_of         statistics of a chunk's n tokens → weights (n,), or None where all are 1; called once for each
                       chunk
    batch_weights_of   nll, row and column of all labelled tokens → their weights, or None; multiplied with the others
    """
    line, column, targets = _labelled(labels)
    rows, targets = _rows(hidden, line, column), sent(targets, hidden.device)

    def chunk(piece: slice) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        known: list[Tensor | None] = []  # weights, which must be the same when the chunk is computed again

        def compute(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = logits_of(rows)
            logits = logits.to(_wide(logits.dtype))
            plain = weights_of is None and batch_weights_of is None
            nll = None if plain else F.cross_entropy(logits, targets, reduction="none")
            if weights_of is not None and not known:
                places = dict(zip(("rows", "columns"), (sent(at[piece], rows.device) for at in (line, column + 1))))
                given = {"logits": logits.detach(), "targets": targets, "nll": nll.detach(), **places}
                with torch.no_grad():
                    known.append(weights_of(TokenStatistics(**given)))
            if batch_weights_of is not None:
                return nll if not known or known[0] is None else known[0].to(nll) * nll, nll.detach()
            if plain or known[0] is None:
                nll = F.cross_entropy(logits, targets, reduction="sum")
                return nll, nll.detach()
            return (known[0].to(nll) * nll).sum(), nll.detach().sum()

        return compute

    if batch_weights_of is None:
        return _in_chunks(chunk, rows, targets)
    weighted, nll = _in_chunks(chunk, rows, targets, join=lambda a, b: torch.cat((a, b)))
    with torch.no_grad():
        weights = batch_weights_of(nll, *(sent(place, rows.device) for place in (line, column + 1)))
    if weights is None:  # a sum of single losses is not the sum that cross_entropy makes, to the bit
        return weighted_nll(hidden, labels, logits_of, weights_of)
    return (weights.to(nll) * weighted).sum(), nll.sum()


def summed_kl(
    hidden: Tensor,
    reference: Tensor,
    logits_of: Logits,
    reference_logits_of: Logits,
    *,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """Σ over rows of w·KL(p₀‖p) in nats, p = softmax(logits/temperature); a scalar with a gradient to `hidden`.

    hidden, reference    (rows, width): last hidden states of the model and of the reference, which gets no gradient
    weights              w (rows,); None: all 1
    reverse              KL(p‖p₀) instead
    """

    def chunk(piece: slice) -> Callable[[Tensor, Tensor], tuple[Tensor]]:
        def compute(rows: Tensor, others: Tensor) -> tuple[Tensor]:
            logits = logits_of(rows)
            logits = logits.to(_wide(logits.dtype))
            with torch.no_grad():
                ours, theirs = (
                    torch.log_softmax(each.to(logits.dtype) / temperature, dim=-1)
                    for each in (logits, reference_logits_of(others))
                )
                (p, q) = (ours, theirs) if reverse else (theirs, ours)
                kl = (p.exp() * (p - q)).sum(-1)
                # The gradient in closed form is exactly 0 where both agree. Autograd's is a rounding error there, which
                # Adam would scale up to whole steps.
                slope = ours.exp() * (ours - theirs - kl[:, None]) if reverse else ours.exp() - theirs.exp()
                if weights is not None:
                    kl, slope = kl * weights[piece].to(kl), slope * weights[piece, None].to(kl)
            moving = (slope * logits).sum() / temperature
            return (kl.sum() + moving - moving.detach(),)

        return compute

    return _in_chunks(chunk, hidden, reference)[0]


def _in_chunks(
    chunk: Callable[[slice], Callable[..., tuple]], *tensors: Tensor, join: Callable = operator.add
) -> tuple[Tensor, ...]:
    """What `chunk(piece)(*pieces)` gives for consecutive pieces of tensors with equally many rows, added or joined."""
    count = len(tensors[0])
    if count <= CHUNK:
        return chunk(slice(0, count))(*tensors)
    totals: tuple | None = None
    for start in range(0, count, CHUNK):
        piece = slice(start, start + CHUNK)
        # recomputed in backward, so that only one chunk of logits is ever held
        values = checkpoint(chunk(piece), *(tensor[piece] for tensor in tensors), use_reentrant=False)
        totals = values if totals is None else tuple(map(join, totals, values))
    return totals


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
