"""Random mask: only entries drawn at random move, the control that a chosen mask has to beat at the same density.

    M ~ Bernoulli(fraction) for each entry, column or matrix;   θ ← θ where M = 0, whatever the optimizer does

The draw is a hash of (seed, number of the draw, tensor, index in the whole tensor), so it depends neither on the number
of processes nor on the device. The share that may move is therefore `fraction` on average, and the realised one is
reported. Tensors of fewer than two dimensions (norms, biases) move in full, as with MoFO. The gradient of what is
frozen is 0 and counts in no norm; the control in MoFO's paper (section on the selection rule) draws a mask for each
step and keeps Adam's moments of all entries, where here the moments of frozen entries decay (`every: 1`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from methods.part import Part, Run, register, setting
from methods.tools.adam import pieces, random_bits
from methods.tools.architecture import base_name, linear_weights
from methods.tools.costs import Memory


@register(
    title="Random mask",
    paper="https://arxiv.org/abs/2407.20999",
    line="Move only entries drawn at random: the control for every other mask.",
    phase="mask",
)
@dataclass(frozen=True, kw_only=True)
class RandomMask(Part):
    neutral = {"fraction": 1.0}

    fraction: float = setting(0.1, within="[0, 1]", help="probability with which an entry, column or matrix moves")
    by: Literal["entry", "column", "tensor"] = setting(
        "entry", help="what is drawn: each entry, each input's column of a matrix, or each matrix"
    )
    scope: Literal["all", "linear"] = setting(
        "all", help="every matrix, as MoFO filters, or those of linear layers in the blocks, as SSU freezes"
    )
    every: int = setting(0, within="[0, inf)", help="steps after which the mask is drawn anew; 0: once for the run")

    def memory(self, *, counts, phase):
        """A byte for each entry (two masks while one is drawn anew), and what is frozen once more during a step."""
        if phase == "prepare":
            return Memory()
        masks = counts.share(counts.trained) if self.by == "entry" else 0
        return Memory(state=masks, update=masks * bool(self.every) + counts.share(counts.wide * counts.trained))

    def begin(self, *, run, state, examples, general=()):
        state["frozen"] = self._drawn(run, 0)

    def examples(self, *, run, state, rows, step):
        if self.every and step and step % self.every == 0:
            state["frozen"] = self._drawn(run, step // self.every)
        return rows

    def report(self, *, run, state):
        masks = {name: mask.expand_as(run.weights[name]) for name, mask in state["frozen"].items()}
        zero = torch.zeros((), dtype=torch.int64, device=run.device)
        frozen = run.shards.sum(sum((mask.sum().to(run.device) for mask in masks.values()), zero))
        entries = sum(run.shapes[name].numel() for name in masks)
        return {"realised_fraction": 1 - frozen.item() / entries if entries else 1.0}

    def _drawn(self, run: Run, draw: int) -> dict[str, Tensor]:
        """The masks of a draw: true where nothing moves."""
        if self.fraction == 1:
            return {}
        linear = linear_weights(run.model)
        names = [name for name, shape in run.shapes.items() if len(shape) >= 2]
        return {
            name: self._mask(run, name, draw, inputs=linear.get(name, 1))
            for name in names
            if self.scope == "all" or name in linear
        }

    def _mask(self, run: Run, name: str, draw: int, *, inputs: int) -> Tensor:
        """Of one tensor, whose columns are those of its dimension `inputs`."""
        weight, shape, device = run.weights[name], run.shapes[name], run.device
        # of the 2³² values that the bits can have, as signed integers, those from here on freeze
        limit = min(round(self.fraction * 2**32) - 2**31, 2**31 - 1)

        def frozen(start: int, entries: int, device=device) -> Tensor:
            key = {"seed": run.seed, "step": draw, "name": f"{self.key}/{base_name(name)}"}
            return random_bits(**key, start=start, entries=entries, device=device) >= limit

        if self.by == "tensor":
            return frozen(0, 1, "cpu")[0]
        if self.by == "column":
            columns = frozen(0, shape[inputs]).view([-1 if d == inputs else 1 for d in range(len(shape))])
            return run.shards.local(columns) if inputs == 0 else columns
        mask = torch.empty(weight.numel(), dtype=torch.bool, device=weight.device)
        start = run.shards.rows(shape[0]).start * math.prod(shape[1:])
        for piece in pieces(weight):
            mask[piece] = frozen(start + piece.start, piece.stop - piece.start)
        return mask.view(weight.shape)
