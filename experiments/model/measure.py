"""`measure` of a part's `finish`: how weights would score on general probe text, rounded as they will be kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.encode import max_length
from evaluation.probe import load_probes
from evaluation.shared_prefix import Request
from experiments.model import tuned, weights
from experiments.training.flops import Flops
from methods.errors import UserError
from methods.tools import architecture
from methods.tools.process_group import Shards

ROWS = 1024  # of logits that are held at once


@dataclass(kw_only=True)
class Measure:
    """measure(weights) → {"nll", "kl"}, nats per token of the general probe rows; nothing is loaded before the first
    call.

    nll       −log p(token) by the weights
    kl        KL(base ‖ weights), Σ p₀·(log p₀ − log p) over the vocabulary
    weights   by base parameter name, whole, in full precision, at the first process; what is absent is the base's

    Every process must call it and gets the first one's answer. `charge` is given the tokens and FLOPs of a call.
    """

    folder: Path  # of the base model
    probes: Path  # the domain's probe folder
    base: Mapping[str, Tensor]
    dtype: torch.dtype  # to compute in
    device: torch.device
    shards: Shards

    def __call__(
        self, weights: Mapping[str, Tensor], *, charge: Callable[..., None] = lambda **costs: None
    ) -> dict[str, float]:
        return self.shards.broadcast(self._score(weights, charge) if self.shards.first else None)

    @torch.no_grad()
    def _score(self, final: Mapping[str, Tensor], charge: Callable[..., None]) -> dict[str, float]:
        passes = 1 if "_reference" in vars(self) else 2
        reference = self._reference
        tuned.fill(self._model, tuned.rounded(self.base, final).items())
        logits, logits_of_base = (architecture.logits_of(model) for model in (self._model, self._base_model))
        nll = kl = torch.zeros((), dtype=torch.float64)
        for (context, continuation), before in zip(self._requests, reference, strict=True):
            after = self._hidden(self._model, (context, continuation))
            targets = torch.tensor(continuation, device=self.device)
            for rows in torch.arange(len(targets), device=self.device).split(ROWS):
                p, p_of_base = (
                    log_probabilities(of(hidden.to(self.device)[rows]))
                    for of, hidden in ((logits, after), (logits_of_base, before))
                )
                nll = nll - p.gather(1, targets[rows, None]).double().sum().cpu()
                kl = kl + (p_of_base.exp() * (p_of_base - p)).double().sum().cpu()
        count = sum(len(continuation) for _, continuation in self._requests)
        lengths = [len(context) + len(continuation) - 1 for context, continuation in self._requests]
        flops = Flops(self._model).forward(lengths=lengths, predicted=count)
        charge(tokens=passes * sum(lengths), flops=flops and passes * flops)
        return {"nll": float(nll / count), "kl": float(kl / count)}

    def _hidden(self, model: nn.Module, request: Request) -> Tensor:
        """The hidden rows that predict the continuation of a request: (its tokens, width)."""
        context, continuation = request
        ids = torch.tensor([[*context, *continuation][:-1]], device=self.device)
        return architecture.hidden_states(model, ids, None)[0, -len(continuation) :]

    @cached_property
    def _requests(self) -> list[Request]:
        sets = load_probes(self.probes, weights.load_tokenizer(self.folder)) if any(self.probes.glob("*.jsonl")) else {}
        if "general" not in sets:
            raise UserError(
                "weights are measured on general probe text, and there is none: set `general.probe` to 1 or more rows"
            )
        limit = max_length(self._model)
        return [request for item in sets["general"] for request in item.windows(limit)]

    @cached_property
    def _reference(self) -> list[Tensor]:
        """The base's hidden rows of every request, on the CPU."""
        with torch.no_grad():
            return [self._hidden(self._base_model, request).cpu() for request in self._requests]

    @cached_property
    def _model(self) -> nn.Module:
        return self._loaded()

    @cached_property
    def _base_model(self) -> nn.Module:
        return self._loaded()

    def _loaded(self) -> nn.Module:
        return weights.load_model(self.folder, dtype=self.dtype, device=self.device).requires_grad_(False).eval()


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax over the vocabulary, in float32 or wider."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
