"""Stay near the base's predictions: KL divergence to the frozen base, per token (Li & Hoiem 2016, learning without
forgetting).

    loss = nll + strength · T² · mean_t KL( p₀(·|x≤t) ‖ p(·|x≤t) )          p = softmax(logits / T), T the temperature

Forward KL over the whole vocabulary, in nats; T² keeps the size of the gradient. The mean is over the step's positions:
of the domain's rows, of general text that is added to the step without labels, or of each (`both` adds the two means).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from methods.errors import UserError
from methods.part import Part, register, setting
from methods.tools.costs import Added, Memory

CHUNK = 1024  # rows of logits that are held at once


@register(
    title="KL to the base",
    paper="https://arxiv.org/abs/1606.09282",
    line="Hold the model's predictions to the base's, on the domain's text, on general text, or on both.",
    phase="loss",
    capabilities=frozenset({"general"}),
)
@dataclass(frozen=True, kw_only=True)
class KL(Part):
    scratch = ("general",)
    neutral = {"strength": 0.0}
    trial = {"strength": 1.0, "text": "both", "share": 0.5, "length": 24}

    strength: float = setting(0.1, within="[0, inf)", help="β of β·T²·mean KL, against a loss in nats a labelled token")
    text: Literal["domain", "general", "both"] = setting("domain", help="text on which predictions are compared")
    positions: Literal["answer", "all"] = setting(
        "answer", help="of the domain's rows: the labelled tokens, or the prompt's too"
    )
    temperature: float = setting(1.0, within="(0, inf)", help="T of both distributions")
    share: float = setting(
        0.25, within="(0, inf)", help="tokens of general text added to a step, for each token of the domain"
    )
    length: int = setting(256, within="[2, inf)", help="tokens a document of general text is cut at")

    @property
    def _general(self) -> bool:
        return self.text != "domain" and self.strength > 0

    def added(self):
        if not self.strength:
            return Added()
        if not self._general:
            return Added(read=1.0)
        return Added(trained=self.share, read=1.0 + self.share, length=self.length, cut_by="length")

    def memory(self, *, counts, phase):
        if phase != "train" or not self.strength:
            return Memory()
        # adapters are switched off for the base's predictions; where base tensors are trained, the base is there twice
        copy = counts.share(counts.compute * counts.base) if counts.trained_base else 0
        return Memory(state=copy, forward=5 * counts.wide * counts.vocabulary * CHUNK)

    def begin(self, *, run, state, examples, general=()):
        if self._general:
            state["general"] = [row["input_ids"] for row in general if len(row["input_ids"]) > 1]
            if not state["general"]:
                raise UserError(f"kl.text is {self.text!r}, but there is no general text: set `general.replay`")

    def examples(self, *, run, state, rows, step):
        if not self.strength:
            return rows
        own = self._documents(run, state, rows, step) if self._general else []
        labelled = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
        weighed = [self._positions(row) if self.text != "general" and "index" in row else None for row in rows]
        domain = labelled / max(1.0, sum(float(mask.sum()) for mask in weighed if mask is not None))
        general = labelled / max(1, sum(len(row["input_ids"]) - 1 for row in own))
        rows = [row if mask is None else row | {"kl": mask * domain} for row, mask in zip(rows, weighed, strict=True)]
        for row in own:
            row["kl"] = torch.full(row["input_ids"].shape, general, dtype=torch.float64)
            row["kl"][0] = 0
        return rows + own

    def _documents(self, run, state, rows, step) -> list[dict]:
        """Rows of general text without labels, `share` times as many tokens as the domain's."""
        left = max(2, round(self.share * sum(len(row["input_ids"]) for row in rows if "index" in row)))
        documents, added = state["general"], []
        draw = run.generator(self.key, step)
        while left > 1:
            for number in torch.randperm(len(documents), generator=draw).tolist():
                ids = documents[number][: min(left, self.length)]
                if len(ids) > 1:
                    added.append({"input_ids": ids, "labels": torch.full_like(ids, -100)})
                    left -= len(ids)
        return added

    def _positions(self, row) -> torch.Tensor:
        """1.0 at the tokens of a row of the domain whose predictions are compared."""
        every = self.positions == "all"
        mask = torch.ones(len(row["labels"]), dtype=torch.float64) if every else (row["labels"] != -100).double()
        mask[0] = 0  # nothing predicts a row's first token
        return mask

    def loss(self, *, run, state, batch, hidden):
        if not self.strength:
            return None
        # every process runs the base for every micro-batch, also where there is nothing to compare
        line, column = batch["kl"][:, 1:].nonzero(as_tuple=True)
        reference = run.reference.hidden(batch)[line, column]
        weights = batch["kl"][line, column + 1]
        term = run.reference.kl(hidden[line, column], reference, temperature=self.temperature, weights=weights)
        return self.strength * self.temperature**2 * term
