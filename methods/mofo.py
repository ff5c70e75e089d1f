"""Momentum-filtered optimizer (Chen et al., arXiv 2407.20999, algorithm 1).

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²                      every entry, every step
    F = |m| ≥ the k-th largest |m| of the tensor,  k = max(1, ⌊fraction·numel⌋)
    θ ← θ − lr·F⊙( m̂/(√v̂+ε) + weight_decay·θ )

Only the entries with the largest momentum of each tensor move, so that the run stays near the base. Ties are kept, also
where the threshold is 0; tensors of fewer than two dimensions (norms, biases) move in full.

The update is computed by torch's fused AdamW kernel on a zeroed scratch tensor, which then holds −lr·m̂/(√v̂+ε), and
added where F says; the threshold is exact (numpy's vectorised partition on the CPU, torch.topk elsewhere).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.part import Part, register, setting

ALLOWED = "(0, 1]"


class MoFO(torch.optim.Optimizer):
    """AdamW that moves, in each tensor of two or more dimensions, only the entries with the largest |m|.

    fraction    share of a tensor's entries that move, in (0, 1]; 1 is AdamW
    decay_all   decoupled weight decay on every entry, as published; by default it touches only those that move

    m and v have their parameter's dtype. A parameter given twice, or under two names that share storage, is one
    tensor: its gradients are summed. Raises ValueError for a fraction outside (0, 1] and for sparse gradients.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, fraction: float = 0.1, *, decay_all: bool = False):  # fmt: skip
        self._twins: dict[tuple, list[Tensor]] = {}  # storage → the parameter that is updated, then its other views
        self._scratch: dict[tuple, Tensor] = {}
        self._moved: Tensor | None = None  # entries moved in the last step, and in all; on the device, never waited for
        self._moved_total: Tensor | None = None
        self._entries = self._entries_total = 0
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fraction": fraction, "decay_all": decay_all}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = self.defaults | param_group
        limits = {"lr": group["lr"] >= 0, "eps": group["eps"] >= 0, "weight_decay": group["weight_decay"] >= 0,
                  "betas": all(0 <= beta < 1 for beta in group["betas"]), "fraction": 0 < group["fraction"] <= 1}  # fmt: skip
        for name, right in limits.items():
            if not right:
                allowed = {"fraction": ALLOWED, "betas": "[0, 1)"}.get(name, "[0, inf)")
                raise ValueError(f"{name} is {group[name]!r}: it must be in {allowed}")
        given = param_group["params"]
        kept = []
        for item in [given] if isinstance(given, Tensor) else given:
            p = item[1] if isinstance(item, tuple) else item
            place = (p.device, p.data_ptr(), p.shape, p.stride()) if p.numel() and not p.is_meta else (id(p),)
            twins = self._twins.setdefault(place, [])
            if not twins:
                kept.append(item)
            if not any(p is twin for twin in twins):
                twins.append(p)
        super().add_param_group(param_group | {"params": kept})

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for _, *others in self._twins.values():
            for twin in others:
                twin.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shared = {id(first): others for first, *others in self._twins.values() if others}
        self._moved, self._entries = None, 0
        for group in self.param_groups:
            for p in group["params"]:
                gradients = [t.grad for t in (p, *shared.get(id(p), ())) if t.grad is not None]
                if gradients:
                    self._update(p, sum(gradients[1:], gradients[0]), group)
        if self._moved is not None:
            self._moved_total = self._moved if self._moved_total is None else self._moved_total + self._moved
            self._entries_total += self._entries
        return loss

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse:
            raise ValueError("MoFO has no sparse gradients: build the embedding with sparse=False")
        state, decay = self.state[p], group["lr"] * group["weight_decay"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        if state["step"].device != p.device:  # load_state_dict leaves it on the CPU
            state["step"] = state["step"].to(p.device)
        update = self._room("update", p).zero_()
        state["step"] += 1
        torch._fused_adamw_(
            [update], [gradient.contiguous()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=0.0, eps=group["eps"],
            amsgrad=False, maximize=False,
        )  # fmt: skip
        if p.dim() < 2:
            p.mul_(1 - decay).add_(update)
            return
        size = torch.abs(state["exp_avg"], out=self._room("size", p))
        threshold = kth_largest(size, max(1, int(group["fraction"] * p.numel())))
        keep = torch.abs(state["exp_avg"], out=size).ge_(threshold)  # 1 or 0; the partition has reordered the sizes
        if decay and group["decay_all"]:
            p.mul_(1 - decay)
        elif decay:
            update.add_(p, alpha=-decay)
        p.addcmul_(update, keep)
        moved = keep.sum(dtype=torch.promote_types(keep.dtype, torch.float32)).double()
        self._moved = moved if self._moved is None else self._moved + moved.to(self._moved.device)
        self._entries += p.numel()

    def _room(self, use: str, p: Tensor) -> Tensor:
        """Scratch shaped like `p`: one allocation a use, device and dtype, as large as the largest tensor."""
        key = (use, p.device, p.dtype)
        if key not in self._scratch or self._scratch[key].numel() < p.numel():
            self._scratch[key] = torch.empty(p.numel(), dtype=p.dtype, device=p.device)
        return self._scratch[key][: p.numel()].view(p.shape)

    def realised_fraction(self) -> dict[str, float | None]:
        """Share of the filtered tensors' entries that moved, in the last step and over all steps of this object."""
        return {
            "last": float(self._moved) / self._entries if self._entries else None,
            "mean": float(self._moved_total) / self._entries_total if self._entries_total else None,
        }


def kth_largest(size: Tensor, k: int) -> Tensor | float:
    """The exact k-th largest of non-negative entries; `size` (contiguous scratch) may come back in another order."""
    if size.device.type != "cpu" or size.dtype not in (torch.float32, torch.float64):
        return torch.topk(size.flatten(), k, sorted=False).values.min()
    values = size.view(-1).numpy()
    sample = values[:: max(1, values.size // 4096)]
    if np.count_nonzero(sample) <= 0.6 * sample.size:
        # many equal values make the partition forty times slower, and zeros (rows without gradient) are the usual ones
        values = values[values > 0]
        if values.size < k:
            return 0.0
    place = values.size - k
    values.partition(place)
    return float(values[place])


@register(
    title="MoFO",
    paper="https://arxiv.org/abs/2407.20999",
    line="AdamW that moves only the entries with the largest momentum of each tensor.",
    capabilities=frozenset({"optimizer"}),
)
@dataclass(frozen=True, kw_only=True)
class MomentumFilter(Part):
    fraction: float = setting(0.1, within=ALLOWED, help="share of each tensor's entries that move in a step")
    decay_all: bool = setting(False, help="weight decay on every entry, as published, and not only on those that move")

    def optimizer(self, *, weights, learning_rate, betas, eps, weight_decay):
        return MoFO(weights.values(), lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay,
                    fraction=self.fraction, decay_all=self.decay_all)  # fmt: skip

    def optimizer_ready(self, *, run, state, optimizer):
        state["optimizer"] = optimizer

    def report(self, *, run, state):
        realised = state["optimizer"].realised_fraction()
        return {"fraction": self.fraction, "realised_fraction": realised["mean"], "realised_fraction_last_step": realised["last"]}
