"""`measure` of a part's `finish`: how weights would score on general probe text, rounded as they will be kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.encode import max_length
from evaluation.probe import load_probes
from experiments.model import tuned, weights
from experiments.training.flops import Flops
from experiments.training.loss import shifted, summed_kl, summed_nll
from methods.errors import UserError
from methods.tools.architecture import hidden_states, logits_of
from methods.tools.process_group import Shards


def _nothing(**_: float | None) -> None:
    """`charge` of a call whose costs are not counted."""


@dataclass(kw_only=True)
class Measure:
    """measure(weights) → {"nll", "kl"}, nats per token of the general probe rows. The first call loads the models.

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

    def __call__(self, weights: Mapping[str, Tensor], *, charge: Callable[..., None] = _nothing) -> dict[str, float]:
        return self.shards.broadcast(self._score(weights, charge) if self.shards.first else None)

    @torch.no_grad()
    def _score(self, final: Mapping[str, Tensor], charge: Callable[..., None]) -> dict[str, float]:
        passes = 1 if "_reference" in vars(self) else 2
        (base, model), reference = self._models, self._reference
        tuned.fill(model, tuned.rounded(self.base, final).items())
        nll = kl = 0.0
        for (ids, labels), before in zip(self._texts, reference, strict=True):
            hidden = hidden_states(model, ids.to(self.device), None)
            rows, _ = shifted(hidden, labels)
            nll += summed_nll(hidden, labels, logits_of(model)).item()
            kl += summed_kl(rows, before.to(self.device), logits_of(model), logits_of(base)).item()
        lengths, count = [ids.numel() for ids, _ in self._texts], sum(map(len, reference))
        flops = Flops(model).forward(lengths=lengths, predicted=count)
        charge(tokens=passes * sum(lengths), flops=flops and passes * flops)
        return {"nll": nll / count, "kl": kl / count}

    @cached_property
    def _models(self) -> tuple[nn.Module, nn.Module]:
        """The base, and a model for the weights that are scored."""
        base, model = (weights.load_model(self.folder, dtype=self.dtype, device=self.device) for _ in range(2))
        return base.requires_grad_(False), model.requires_grad_(False)

    @cached_property
    def _texts(self) -> list[tuple[Tensor, Tensor]]:
        """Token ids and labels, (1, tokens) each, of every piece of text that the model can take."""
        sets = load_probes(self.probes, weights.load_tokenizer(self.folder)) if any(self.probes.glob("*.jsonl")) else {}
        if "general" not in sets:
            raise UserError("weights are measured on general probe text, and there is none: set `general.probe`")
        limit = max_length(self._models[0]) - 1  # the last token is read, too
        pieces = [piece for item in sets["general"] for piece in item.windows(limit)]
        return [
            (torch.tensor([[*context, *text]]), torch.tensor([[-100] * len(context) + [*text]]))
            for context, text in pieces
        ]

    @cached_property
    def _reference(self) -> list[Tensor]:
        """The base's hidden rows that predict the labels of each text, on the CPU."""
        base, _ = self._models
        return [shifted(hidden_states(base, ids.to(self.device), None), labels)[0].cpu() for ids, labels in self._texts]
