"""Nats of chosen tokens of texts, and how far a model's predictions there are from a reference's. Pure torch.

    nats        Σ −log p(token)             over the labelled tokens, p the model's
    kl          Σ KL(p₀‖p) = Σ Σ_v p₀(v) · (log p₀(v) − log p(v))      at the same places, p₀ the reference's
    kl_reverse  Σ KL(p‖p₀)

Both models read the same tokens. Logits of a few positions exist at once, and softmax and sums are in float32 (float64
for a float64 model).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation import encode
from evaluation.progress import Bar
from evaluation.shared_prefix import CACHED, LOGITS, TOKENS
from methods.errors import UserError
from methods.tools.architecture import head, hidden_states, logits_of, plain

Labelled = tuple[Sequence[int], Sequence[bool]]  # ids, and for each id whether it is labelled


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Sums over the labelled tokens of one sequence, in nats; the KL's are None without a reference."""

    nats: float
    tokens: int
    kl: float | None = None
    kl_reverse: float | None = None


@dataclass(frozen=True, kw_only=True)
class HiddenRows:
    """A reference that has read its texts: it need not be in memory beside the model.

    rows        of each sequence, (labelled tokens, width): the last hidden states that predict them (`hidden_rows`)
    logits_of   from such rows to logits over the vocabulary
    """

    rows: Sequence[Tensor]
    logits_of: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A part of a sequence that the model can take whole."""

    ids: Sequence[int]  # the input
    places: Sequence[int]  # whose hidden states predict a labelled token
    targets: Sequence[int]
    owner: int  # number of its sequence
    first: int  # number of its first labelled token among those of its sequence


@torch.no_grad()
def token_losses(
    model: nn.Module,
    sequences: Sequence[Labelled],
    *,
    reference: nn.Module | HiddenRows | None = None,
    tokens: int = TOKENS,
    max_length: int | None = None,
    description: str | None = None,
) -> list[Losses]:
    """The losses of each sequence: nats of its labelled tokens, and the KL from and to `reference` at their places.

    A sequence is its ids and, for each id, whether it is labelled; the first id is never predicted and never counts. A
    sequence longer than the model takes is read in lm-eval's rolling windows (`encode.windows`).

    reference    another model of the same vocabulary, or its hidden rows; the model itself has a KL of exactly 0
    tokens       padded tokens of a forward pass, at most
    max_length   longest input; None: the model's own
    description  shows a progress bar with the time left on a terminal

    The models must be in evaluation mode. Raises UserError where the vocabularies differ in size.
    """
    count = len(sequences)
    nats, kl, reverse = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    labelled = torch.zeros(count, dtype=torch.long)
    itself = reference is model
    other = None if itself else reference
    to_logits = logits_of(model)
    to_others = other.logits_of if isinstance(other, HiddenRows) else other and logits_of(other)
    for batch, hidden in _read(model, sequences, tokens, max_length, description):
        owners = torch.tensor([piece.owner for piece in batch for _ in piece.places])
        targets = torch.tensor([target for piece in batch for target in piece.targets])
        others = None if other is None else _others(other, batch, model=model)
        values = _values(hidden, targets, to_logits, others, to_others, vocabulary=_vocabulary(model))
        labelled.index_add_(0, owners, torch.ones_like(owners))
        for total, value in zip((nats, kl, reverse), values):
            total.index_add_(0, owners, value)
    known = reference is not None
    return [
        Losses(
            nats=nats[i].item(),
            tokens=int(labelled[i]),
            kl=kl[i].item() if known else None,
            kl_reverse=reverse[i].item() if known else None,
        )
        for i in range(count)
    ]


@torch.no_grad()
def hidden_rows(
    model: nn.Module,
    sequences: Sequence[Labelled],
    *,
    tokens: int = TOKENS,
    max_length: int | None = None,
    description: str | None = None,
) -> list[Tensor]:
    """Of each sequence the last hidden states that predict its labelled tokens, (labelled tokens, width), on the CPU.

    They are read in the batches of `token_losses` with the same settings, so that equal weights give equal rows.
    """
    kept: list[list[tuple[int, Tensor]]] = [[] for _ in sequences]  # windows may be read in another order
    for batch, hidden in _read(model, sequences, tokens, max_length, description):
        for piece, rows in zip(batch, hidden.cpu().split([len(piece.places) for piece in batch])):
            kept[piece.owner].append((piece.first, rows))
    empty = torch.empty(0, head(model).in_features, dtype=plain(model).dtype)
    return [torch.cat([empty, *(rows for _, rows in sorted(own, key=itemgetter(0)))]) for own in kept]


def _read(
    model: nn.Module, sequences: Sequence[Labelled], tokens: int, max_length: int | None, description: str | None
) -> Iterator[tuple[list[_Piece], Tensor]]:
    """Pieces of similar lengths and their hidden states at `places`, one after the other: (places of all, width)."""
    limit = max_length or encode.max_length(model)
    pieces = [piece for number, sequence in enumerate(sequences) for piece in _pieces(number, sequence, limit)]
    device = next(model.parameters()).device
    hidden = None if description else True  # None: hidden if stderr is no terminal
    total = sum(len(piece.ids) for piece in pieces)
    with Bar(total=total, desc=description, unit="tok", unit_scale=True, disable=hidden) as bar:
        for batch in _batches(pieces, tokens):
            states = hidden_states(model, _padded(batch).to(device), None)
            yield batch, _at(states, batch)
            bar.update(sum(len(piece.ids) for piece in batch))


def _pieces(number: int, sequence: Labelled, limit: int) -> Iterator[_Piece]:
    ids, labels = (list(each) for each in sequence)
    if len(ids) != len(labels):
        raise ValueError(f"sequence {number} has {len(ids)} ids and {len(labels)} labels")
    at, first = 1, 0  # numbers of the next token, and of the next labelled one
    for context, continuation in encode.windows(ids[1:], prefix=ids[0], max_length=limit) if ids else ():
        chosen = [i for i in range(len(continuation)) if labels[at + i]]
        if chosen:
            yield _Piece(
                ids=[*context, *continuation[:-1]],
                places=[len(context) - 1 + i for i in chosen],
                targets=[continuation[i] for i in chosen],
                owner=number,
                first=first,
            )
        at, first = at + len(continuation), first + len(chosen)


def _batches(pieces: Sequence[_Piece], tokens: int) -> Iterator[list[_Piece]]:
    """Longest first: memory runs out at once or never."""
    batch: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: (-len(piece.ids), piece.owner, piece.first)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _padded(batch: Sequence[_Piece]) -> Tensor:
    """Padding is on the right, where causal attention does not see it."""
    ids = torch.zeros(len(batch), len(batch[0].ids), dtype=torch.long)
    for row, piece in zip(ids, batch):
        row[: len(piece.ids)] = torch.tensor(piece.ids)
    return ids


def _at(states: Tensor, batch: Sequence[_Piece]) -> Tensor:
    width = states.shape[1]
    rows = torch.tensor([line * width + place for line, piece in enumerate(batch) for place in piece.places])
    return states.flatten(0, 1)[rows.to(states.device)]


def _others(reference: nn.Module | HiddenRows, batch: Sequence[_Piece], *, model: nn.Module) -> Tensor:
    """The reference's hidden states at the places of a batch."""
    device = next(model.parameters()).device
    if isinstance(reference, HiddenRows):
        own = [reference.rows[piece.owner][piece.first : piece.first + len(piece.places)] for piece in batch]
        return torch.cat(own).to(device)
    ids = _padded(batch).to(next(reference.parameters()).device)
    return _at(hidden_states(reference, ids, None), batch)


def _values(
    hidden: Tensor, targets: Tensor, to_logits: Callable, others: Tensor | None, to_others: Callable, *, vocabulary: int
) -> tuple[Tensor, ...]:
    """nats, and with a reference KL and its reverse, of each row; float64 on the CPU."""
    size = max(1, LOGITS // vocabulary)
    block = max(1, CACHED // vocabulary) if hidden.device.type == "cpu" else size
    columns: list[tuple[Tensor, ...]] = []
    for start in range(0, len(hidden), size):
        chunk = slice(start, start + size)
        logits, wanted = to_logits(hidden[chunk]), targets[chunk].to(hidden.device)
        other = [None] * math.ceil(len(logits) / block)
        if others is not None:
            theirs = to_others(others[chunk]).to(logits.device)
            if theirs.shape != logits.shape:
                raise UserError(
                    f"the model has logits of {logits.shape[-1]} tokens and its reference of {theirs.shape[-1]}: KL is "
                    "known only between models of one vocabulary"
                )
            other = theirs.split(block)
        for ours, theirs, target in zip(logits.split(block), other, wanted.split(block)):
            ours = _log_softmax(ours)
            columns.append((-ours.gather(1, target[:, None])[:, 0],))
            if theirs is not None:
                theirs = _log_softmax(theirs).to(ours.dtype)
                columns[-1] += (_kl(theirs, ours), _kl(ours, theirs))
    return tuple(torch.cat(column).double().cpu() for column in zip(*columns))


def _log_softmax(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) of each row, from logarithms."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _vocabulary(model: nn.Module) -> int:
    return plain(model).get_input_embeddings().weight.shape[0]
