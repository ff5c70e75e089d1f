"""Importance-aware sparse tuning (Yao et al. 2024, arXiv 2410.11772): the adapters of a few blocks train in each step.

    a step trains k = fraction·L of L blocks, drawn without replacement with weights σ(−s_l); the others do not move
    every `every` steps, `trials` times: suppress a share of the blocks, drawn with weights σ(s_l), by multiplying their
    adapters' output by `scale`;    reward r = exp(−loss);    s_l += rate·(r − mean r)·σ(s_l)·(1 − σ(s_l))

The score s_l of a block starts at 0 and rises where the loss is lower than in the other trials although the block is
suppressed: a high score means that the block matters little. This is the authors' code, whose trials read one batch;
here they read the domain's rows of the step. The loss is in nats per labelled token, without dropout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from methods.errors import UserError
from methods.part import Part, register, setting
from methods.tools.architecture import blocks
from methods.tools.costs import Added, Memory
from methods.tools.effective import lora_layers


@register(
    title="IST",
    paper="https://arxiv.org/abs/2410.11772",
    line="Train the adapters of a few blocks in each step, drawn by how much the loss needs them.",
    phase="mask",
)
@dataclass(frozen=True, kw_only=True)
class IST(Part):
    shares = ("methods.tools.effective", "methods.tools.importance")
    neutral = {"fraction": 1.0}
    frozen = "for a while: the blocks that train are drawn anew in each step"
    trial = {"every": 1}
    beside = {"lora": {"rank": 2}}

    fraction: float = setting(0.25, within="(0, 1]", help="share of the blocks that train in a step, at least one")
    choice: Literal["importance", "random"] = setting("importance", help="by score, or all alike without trials (RST)")
    every: int = setting(10, within="[1, inf)", help="optimizer steps from one round of trials to the next")
    trials: int = setting(3, within="[2, inf)", help="trials in a round")
    suppressed: float = setting(0.5, within="(0, 1)", help="share of the blocks that a trial suppresses, at least one")
    scale: float = setting(0.25, within="[0, 1)", help="what a suppressed block's adapters are multiplied by")
    rate: float = setting(10.0, within="[0, inf)", help="how fast the scores change")

    @property
    def _tries(self) -> bool:
        return self.choice == "importance" and self.fraction < 1

    def added(self):
        return Added(read=self.trials / self.every * self._tries)

    def memory(self, *, counts, phase):
        """What is frozen is held once more during a step."""
        return Memory(update=counts.share(counts.wide * counts.adapters) if phase == "train" else 0)

    def begin(self, *, run, state, examples, general=()):
        adapted = [path for path, _ in lora_layers(run.model)]
        paths = [path for path, _ in blocks(run.model) if any(layer.startswith(f"{path}.") for layer in adapted)]
        if not paths:
            raise UserError("ist: the method has no adapters to choose from: add `lora` to its block")
        state["blocks"], state["steps"] = paths, [0] * len(paths)
        state["scores"] = torch.zeros(len(paths), dtype=torch.float64)

    def examples(self, *, run, state, rows, step):
        if self.fraction == 1:
            return rows
        domain = [row for row in rows if "index" in row]  # none where other text has taken the place of all
        if self._tries and (step + 1) % self.every == 0 and domain:
            self._try(run, state, domain, step)
        trained = _drawn(-state["scores"], self.fraction, run.generator(self.key, "train", step))
        for block in trained:
            state["steps"][block] += 1
        state["frozen"] = {
            name: torch.tensor(True)
            for number, path in enumerate(state["blocks"])
            for name in run.weights
            if number not in trained and name.startswith(f"{path}.")
        }
        return rows

    def _try(self, run, state, rows, step) -> None:
        """One round of trials, which changes the scores."""
        from peft.helpers import rescale_adapter_scale

        layers, sets, losses = dict(lora_layers(run.model)), [], []
        for trial in range(self.trials):
            sets.append(_drawn(state["scores"], self.suppressed, run.generator(self.key, "suppress", step, trial)))
            prefixes = tuple(f"{state['blocks'][block]}." for block in sets[-1])
            suppressed = nn.ModuleList(layer for path, layer in layers.items() if path.startswith(prefixes))
            with rescale_adapter_scale(suppressed, self.scale):
                scores = torch.cat(run.score(rows)).double()
            losses.append(-scores.sum().item() / max(1, len(scores)))
        state["scores"] = updated(state["scores"], sets=sets, losses=losses, rate=self.rate)

    def report(self, *, run, state):
        return {"steps_by_block": state["steps"], "scores": [round(score, 6) for score in state["scores"].tolist()]}


def updated(scores: Tensor, *, sets: Sequence[Sequence[int]], losses: Sequence[float], rate: float) -> Tensor:
    """The scores (blocks,) after trials that suppressed `sets` of blocks and had these losses."""
    rewards = torch.tensor([math.exp(-loss) for loss in losses], dtype=scores.dtype)
    slope = torch.sigmoid(scores) * torch.sigmoid(-scores)
    total = torch.zeros_like(scores)
    for suppressed, reward in zip(sets, rewards - rewards.mean(), strict=True):
        total[list(suppressed)] += reward
    return scores + rate * slope * total


def _drawn(scores: Tensor, share: float, generator: torch.Generator) -> list[int]:
    """A share of the blocks, drawn without replacement with weights σ(score)."""
    count = max(1, round(share * len(scores)))
    weights = torch.sigmoid(scores).clamp_min(torch.finfo(scores.dtype).tiny)  # zeros cannot be drawn
    return torch.multinomial(weights, count, generator=generator).tolist()
