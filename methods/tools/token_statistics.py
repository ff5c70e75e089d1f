"""Statistics of labelled tokens where their logits already are, for weights of the loss (`Part.token_weights`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """The model's predictions at some labelled tokens, without a gradient; n of them, over a vocabulary of v.

    logits   (n, v), float32 (float64 for float64 models)
    targets  (n,), the labels
    rows     (n,), the row of the micro-batch that each label stands in
    columns  (n,), the position of the label in that row; the logits are those of the position before it
    nll      (n,), −log p(label) in nats
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    nll: Tensor

    @cached_property
    def log_probabilities(self) -> Tensor:
        """log p over the vocabulary, (n, v)."""
        return torch.log_softmax(self.logits, dim=-1)

    @property
    def probability(self) -> Tensor:
        """p(label), (n,)."""
        return (-self.nll).exp()

    def entropy(self, top: int | None = None) -> Tensor:
        """Entropy in nats, (n,), of the `top` largest probabilities divided by their sum; None: of all."""
        logits = self.logits if top is None else self.logits.topk(min(top, self.logits.shape[-1]), dim=-1).values
        probabilities = torch.softmax(logits, dim=-1)
        return torch.special.entr(probabilities, out=probabilities).sum(-1)
