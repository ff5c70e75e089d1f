"""Gradient-mask tuning (Li et al., arXiv 2406.15330): of each tensor only the largest gradients are kept.

    F = |g| ≥ the k-th largest |g| of the tensor,  k = max(1, ⌊fraction·numel⌋);   g ← F ⊙ g

g is the gradient of the whole optimizer step, with penalties, before clipping. The published code masks after every
micro-batch, so that its result depends on the accumulation, and fails where k is 0. As published, every tensor is
masked, norms and biases too, and AdamW still moves the other entries by their momentum and weight decay
(`mask: gradient`). With `mask: update` they do not move in this step at all, which is what MoFO does by momentum. Ties
are kept; an entry without a gradient is never among the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from methods.part import Part, register, setting
from methods.tools.adam import CHUNK, CPU_CHUNK, SCRATCH, pieces
from methods.tools.costs import Memory
from methods.tools.process_group import Shards
from methods.tools.selection import HISTOGRAM, kth_by_histogram, kth_largest


@register(
    title="GMT",
    paper="https://arxiv.org/abs/2406.15330",
    line="Keep only the largest gradients of each tensor.",
    phase="mask",
)
@dataclass(frozen=True, kw_only=True)
class GradientMask(Part):
    shares = ("methods.tools.selection",)
    scratch = ("frozen",)

    neutral = {"fraction": 1.0}
    frozen = "for a step: the entries with the largest gradients are chosen anew in each one"

    fraction: float = setting(0.2, within="(0, 1]", help="share of each tensor's entries whose gradient is kept")
    mask: Literal["gradient", "update"] = setting(
        "gradient", help="the other entries move by momentum alone, as published, or do not move in this step"
    )

    def memory(self, *, counts, phase):
        """|g| of a tensor, which a partition reorders, or histograms; masks and what they freeze for `update`."""
        if phase == "prepare":
            return Memory()
        largest = counts.share(counts.largest_trained)
        alone = counts.device == "cpu" and (counts.processes or 1) == 1
        select = counts.wide * largest if alone else SCRATCH * counts.piece(largest, cpu=CPU_CHUNK, cuda=CHUNK)
        masks = counts.share(counts.trained) if self.mask == "update" else 0
        # the masks of a step are made while those of the last one are there
        return Memory(state=masks, update=masks + max(counts.wide * masks, select + HISTOGRAM * (not alone)))

    def begin(self, *, run, state, examples, general=()):
        state["kept"], state["steps"] = torch.zeros((), dtype=torch.float64, device=run.device), 0

    def before_clip(self, *, run, state, step):
        if self.fraction == 1:
            return
        frozen = {}
        for name, weight in run.weights.items():
            k = max(1, int(self.fraction * run.shapes[name].numel()))
            limit = smallest_kept(weight.grad, k, shards=run.shards)
            flat = weight.grad.view(-1)
            mask = torch.empty(flat.shape, dtype=torch.bool, device=flat.device) if self.mask == "update" else None
            for piece in pieces(flat):
                keep = flat[piece].abs().to(limit.dtype).ge_(limit)
                state["kept"] += keep.sum()
                if mask is None:
                    flat[piece].mul_(keep)
                else:
                    torch.eq(keep, 0, out=mask[piece])
            if mask is not None:
                frozen[name] = mask.view(weight.shape)
        state["steps"] += 1
        if frozen:
            state["frozen"] = frozen

    def report(self, *, run, state):
        entries = state["steps"] * sum(shape.numel() for shape in run.shapes.values())
        kept = run.shards.sum(state["kept"].clone()).item()
        return {"realised_fraction": kept / entries if entries else 1.0}


def smallest_kept(gradient: Tensor, k: int, *, shards: Shards = Shards()) -> Tensor:
    """The k-th largest |gradient| of the rows of all processes, 0-dim; above 0, and float32 where there are several."""
    if gradient.is_cpu and shards.world == 1:
        limit = kth_largest(gradient.abs(), k)
    else:
        flat = gradient.view(-1)
        limit = kth_by_histogram(
            lambda: (flat[piece].abs().float() for piece in pieces(flat)), k, device=gradient.device, shards=shards
        )
    return limit.clamp(min=torch.finfo(limit.dtype).smallest_normal)
