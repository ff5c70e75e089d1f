"""Momentum-filtered optimizer (Chen et al., arXiv 2407.20999, algorithm 1).

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²                      every entry, every step
    F = |m| ≥ the k-th largest |m| of the tensor,  k = max(1, ⌊fraction·numel⌋)
    θ ← θ − lr·F⊙( m̂/(√v̂+ε) + weight_decay·θ )

Only the entries with the largest momentum of each tensor move, so that the run stays near the base. Ties are kept, also
where the threshold is 0; tensors of fewer than two dimensions (norms, biases) move in full.

The threshold is exact: numpy's vectorised partition on the CPU, torch.topk elsewhere. Where each process holds a piece
of every tensor it is the k-th largest of the whole tensor all the same, found in histograms that are summed over the
processes. m and v may be kept in bfloat16 (experiments.moments); |m| is then read before it is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.moments import Moments
from methods.part import Part, register, setting

ALLOWED = "(0, 1]"
COUNTED = 1 << 24  # entries that enter a histogram at once: the bound of its temporaries


class MoFO(torch.optim.Optimizer):
    """AdamW that moves, in each tensor of two or more dimensions, only the entries with the largest |m|.

    fraction    share of a tensor's entries that move, in (0, 1]; 1 is AdamW
    decay_all   decoupled weight decay on every entry, as published; by default it touches only those that move
    moments     how m and v are kept; by default in float32 (float64 for float64 parameters)
    shards      the processes that share the parameters: `rank`, `world` and `sum(tensor)`, an in-place all-reduce
    sizes       entries of the whole parameters, one a parameter in their order; by default those held here

    With several processes each holds a slice, which may be empty, of every flattened parameter with the parameter's own
    number of dimensions, and all call `step` and `realised_fraction` together; a missing gradient is then one of zeros,
    and |m| of float64 parameters is selected in float32. The masks are those of one process.

    A parameter given twice is one tensor, and so are two that share storage if there is one process: their gradients
    are summed. Raises ValueError for a fraction outside (0, 1], for sparse gradients, and for another number of sizes
    than of parameters.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, fraction: float = 0.1, *, decay_all: bool = False,
                 moments: Moments | None = None, shards: Any = None, sizes: Sequence[int] | None = None):  # fmt: skip
        self._twins: dict[tuple, list[Tensor]] = {}  # storage → the parameter that is updated, then its other views
        self._scratch: dict[tuple, Tensor] = {}
        self._moments = moments or Moments()
        self._shards = shards if shards is not None and shards.world > 1 else None
        self._moved: Tensor | None = None  # entries moved here in the last step, and in all; on the device, never waited for
        self._moved_total: Tensor | None = None
        self._entries = self._entries_total = 0  # of the whole tensors
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fraction": fraction, "decay_all": decay_all}
        super().__init__(params, defaults)
        given = [p for group in self.param_groups for p in group["params"]]
        if sizes is not None and len(sizes) != len(given):
            raise ValueError(f"{len(sizes)} sizes for {len(given)} parameters: give one a parameter, a repeated one once")
        self._sizes = {id(p): size for p, size in zip(given, sizes or ())}

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
            # an empty piece has no storage to share, and all processes must agree on what is one tensor
            own = self._shards is not None or not p.numel() or p.is_meta
            place = (id(p),) if own else (p.device, p.data_ptr(), p.shape, p.stride())
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
                if not gradients and self._shards is not None:  # the others may have one, and wait in the reduction
                    gradients = [torch.zeros_like(p)]
                if gradients:
                    self._update(p, sum(gradients[1:], gradients[0]), group)
        if self._moved is not None:
            self._moved_total = self._moved if self._moved_total is None else self._moved_total + self._moved
            self._entries_total += self._entries
        return loss

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        entries, decay = self._sizes.get(id(p), p.numel()), group["lr"] * group["weight_decay"]
        filtered = p.dim() >= 2 and entries > 0
        update = self._room("update", p)
        size = self._room("size", p, torch.promote_types(p.dtype, torch.float32)) if filtered else None
        self._moments.adam(weight=p, gradient=gradient, state=self.state[p], update=update, lr=group["lr"],
                           betas=group["betas"], eps=group["eps"], magnitude=size)  # fmt: skip
        keep = self._keep(p, size, entries, group["fraction"]) if filtered else None
        if decay and filtered and group["decay_all"]:
            p.mul_(1 - decay)
        elif decay:
            update.add_(p, alpha=-decay)
        if filtered:
            p.addcmul_(update, keep.to(update.dtype))
        else:
            p.add_(update)

    def _keep(self, p: Tensor, size: Tensor, entries: int, fraction: float) -> Tensor:
        """F of the tensor of `entries` of which `p` is here: 1 or 0, over `size`; counts what moves."""
        k = max(1, int(fraction * entries))
        if self._shards is not None:
            size = size.float()
            threshold = kth_largest_of_all(size, k, self._shards)
        elif size.is_cpu:  # the partition reorders its copy
            threshold = kth_largest(self._room("order", p, size.dtype).copy_(size), k)
        else:
            threshold = kth_largest(size, k)
        keep = size.ge_(threshold)
        moved = keep.sum().double()
        self._moved = moved if self._moved is None else self._moved + moved.to(self._moved.device)
        self._entries += entries
        return keep

    def _room(self, use: str, p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Scratch shaped like `p`: one allocation a use, device and dtype, as large as the largest tensor."""
        dtype = dtype or p.dtype
        key = (use, p.device, dtype)
        if key not in self._scratch or self._scratch[key].numel() < p.numel():
            self._scratch[key] = torch.empty(p.numel(), dtype=dtype, device=p.device)
        return self._scratch[key][: p.numel()].view(p.shape)

    def realised_fraction(self) -> dict[str, float | None]:
        """Share of the filtered tensors' entries that moved, in the last step and over all steps of this object."""
        return {"last": self._share(self._moved, self._entries), "mean": self._share(self._moved_total, self._entries_total)}

    def _share(self, moved: Tensor | None, entries: int) -> float | None:
        if not entries:
            return None
        return float(moved if self._shards is None else self._shards.sum(moved.clone())) / entries


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


def kth_largest_of_all(size: Tensor, k: int, shards: Any) -> Tensor:
    """The exact k-th largest of the non-negative float32 entries of all processes, a 0-dim tensor; every process calls it.

    The bits of non-negative floats are ordered as the floats are. The upper 16 name a bin: the one that holds the k-th
    largest is found in the histogram of all; the lower 16 in a second one, of the entries in that bin.
    """
    pieces = size.view(-1).view(torch.int32).split(COUNTED)
    upper, k = _bin_of_kth(sum(torch.bincount(bits >> 16, minlength=1 << 15) for bits in pieces), k, shards)
    inside = (bits[bits >> 16 == upper] & 0xFFFF for bits in pieces)
    lower, _ = _bin_of_kth(sum(torch.bincount(bits, minlength=1 << 16) for bits in inside), k, shards)
    return (upper << 16 | lower).int().view(torch.float32)


def _bin_of_kth(counts: Tensor, k: int | Tensor, shards: Any) -> tuple[Tensor, Tensor]:
    """The bin that holds the k-th largest entry of all processes, and its rank among those in that bin; both 0-dim."""
    from_above = shards.sum(counts).flip(0).cumsum(0)
    before = from_above < k
    return len(counts) - 1 - before.sum(), k - (from_above * before).max()


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

    def optimizer(self, *, run, learning_rate, betas, eps, weight_decay):
        return MoFO(run.weights.values(), lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay,
                    fraction=self.fraction, decay_all=self.decay_all, moments=run.moments, shards=run.shards,
                    sizes=[run.shapes[name].numel() for name in run.weights])  # fmt: skip

    def optimizer_ready(self, *, run, state, optimizer):
        state["optimizer"] = optimizer

    def report(self, *, run, state):
        realised = state["optimizer"].realised_fraction()
        return {"fraction": self.fraction, "realised_fraction": realised["mean"], "realised_fraction_last_step": realised["last"]}
