"""SPIDER (arXiv 2411.10928): after each step every weight is mixed with its pre-trained value, by two importances.

    rank(x) = sigmoid( (|x| − mean|x|) / std|x| )                     mean and std over one tensor
    I_old = rank(θ₀),   I_new = rank(Σ of the task's gradients so far)
    M = I_new / (I_old + I_new) where I_new > I_old, else 0           then M ← min(1, M / mean of the nonzero M)
    θ ← (1 − M)·θ₀ + M·θ                                              after every optimizer step

A weight that is large in the base, and small in the gradients, returns to the base; the others keep a share of their
change. There is no setting. As in the authors' code the sum is of signed gradients, so directions that alternate
cancel, and M is computed anew in every step: a weight whose M falls to 0 loses all of its change.

The gradient is the task's, before penalties and clipping; the authors' code takes what is in `.grad`. The standard
deviation is that of the whole tensor (not n − 1). As in that code a tensor of zeros has the rank 0: a bias that is 0 in
the base trains freely, and a tensor without a gradient returns to the base. Of another tensor that does not vary, as a
norm of ones, every rank is ½; the authors' code divides 0 by 0 there, and such a tensor never trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import threshold

from methods.part import Part, Run, register
from methods.tools.costs import Memory
from methods.tools.effective import base_anchor
from methods.tools.importance import CPU_PIECE, CUDA_PIECE, pieces


@register(
    title="SPIDER",
    paper="https://arxiv.org/abs/2411.10928",
    line="Mix each weight back with the base where its size there outranks the task's gradients.",
    phase="mask",
    capabilities=frozenset({"needs_gradient"}),
)
@dataclass(frozen=True, kw_only=True)
class Spider(Part):
    shares = ("methods.tools.effective", "methods.tools.importance")
    neutral = "none: it has no setting"
    excludes = {
        "adapter": "spider ranks the base's own weights by their size, and an adapter's factors have none in the base"
    }

    def memory(self, *, counts, phase):
        if phase != "train":
            return Memory()
        piece = counts.piece(counts.share(counts.largest_trained), cpu=CPU_PIECE, cuda=CUDA_PIECE)
        return Memory(
            anchor=counts.share(counts.checkpoint * counts.trained_base),
            state=counts.share(counts.wide * counts.trained),
            update=counts.wide * (counts.share(counts.largest_trained) + 2 * piece),
        )

    def begin(self, *, run, state, examples, general=()):
        state["anchor"] = base_anchor(run)
        state["base"] = {name: _spread(run, name, tensor) for name, tensor in state["anchor"].items()}
        state["sum"] = {name: torch.zeros_like(weight) for name, weight in run.weights.items()}

    def after_step(self, *, run, state, step, gradient):
        kept = entries = 0
        masks = torch.empty_like(max(run.weights.values(), key=torch.numel)).view(-1)  # one after the other
        for name, weight in run.weights.items():
            total, anchor = state["sum"][name].add_(gradient[name]), state["anchor"][name]
            mask, spread, sums = masks[: weight.numel()].view_as(weight), _spread(run, name, total), []
            room = _room(weight)
            for share, new, old in pieces(mask, total, anchor):
                new = _rank(new, *spread, out=room[0, : len(share)])
                old = _rank(old, *state["base"][name], out=room[1, : len(share)])
                torch.div(new, torch.add(new, old, out=share), out=share)
                threshold(share, 0.5, 0.0, inplace=True)  # above ½ is M exactly where I_new > I_old
                sums.append(torch.stack([share.sum(), torch.sign(share, out=old).sum()]).double())
            sums = run.shards.sum(sum(sums, torch.zeros(2, dtype=torch.float64, device=weight.device)))
            mean = (sums[0] / sums[1].clamp(min=1)).clamp(min=0.5)  # below ½ only where every entry is 0
            for theta, old, share in pieces(weight, anchor, mask):
                share.div_(mean).clamp_(max=1)
                torch.lerp(room[0, : len(old)].copy_(old), theta, share, out=theta)
            kept, entries = kept + sums[1], entries + math.prod(run.shapes[name])
        state["moving"] = kept / entries

    def report(self, *, run, state):
        return {"moving": state["moving"]} if "moving" in state else {}


def _room(tensor: Tensor) -> Tensor:
    """Memory for two pieces, which all pieces use: new memory costs more than the arithmetic."""
    size = min(tensor.numel(), CUDA_PIECE if tensor.is_cuda else CPU_PIECE)
    return torch.empty(2, size, dtype=tensor.dtype, device=tensor.device)


def _spread(run: Run, name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of |tensor| over all processes' rows of it, for `_rank`.

    The deviation is infinite where the tensor does not vary, for a rank of ½; of zeros the rank is almost 0.
    """
    count, room = math.prod(run.shapes[name]), _room(run.weights[name])[0]

    def mean_of(values: Iterable[Tensor]) -> Tensor:
        start = torch.zeros((), dtype=torch.float64, device=room.device)
        return run.shards.sum(sum((value.double() for value in values), start)) / count

    def absolute(piece: Tensor) -> Tensor:
        return room[: len(piece)].copy_(piece).abs_()

    mean = mean_of(absolute(piece).sum() for (piece,) in pieces(tensor))
    std = mean_of(absolute(piece).sub_(mean).square_().sum() for (piece,) in pieces(tensor)).sqrt()
    std = torch.where(std > 1e-6 * mean, std, math.inf)
    return torch.where(mean > 0, mean, 64.0), torch.where(mean > 0, std, 1.0)  # sigmoid(−64) = 1.6e-28


def _rank(values: Tensor, mean: Tensor, std: Tensor, *, out: Tensor) -> Tensor:
    """sigmoid of the z-score of |values|."""
    return out.copy_(values).abs_().sub_(mean).div_(std).sigmoid_()
