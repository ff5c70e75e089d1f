"""The task vector Δ = θ − θ₀ of finished weights, which methods after training scale or prune (2212.04089)."""

from collections.abc import Mapping

import torch
from torch import Tensor


def scaled(base: Mapping[str, Tensor], final: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """θ₀ + scale·Δ of every tensor of `final`, in its dtype: at scale 1 the tuned weights, bit for bit."""
    return {name: moved(base[name], tuned, scale) for name, tuned in final.items()}


def moved(base: Tensor, tuned: Tensor, scale: float) -> Tensor:
    """θ₀ + scale·(θ − θ₀) of one tensor."""
    return tuned if scale == 1 else torch.lerp(base.to(tuned), tuned, scale)


def largest(scores: Tensor, share: float) -> Tensor:
    """A mask of the ⌊share·n⌋ largest of n scores, of equal ones the first in the tensor's order, in the same shape."""
    flat = scores.flatten()
    k = int(share * len(flat))
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(len(flat) - k + 1).values
    mask = flat > threshold
    mask[(flat == threshold).nonzero().flatten()[: k - int(mask.sum())]] = True
    return mask.view(scores.shape)
