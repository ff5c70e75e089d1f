"""Momentum-filtered optimizer (Chen et al., arXiv 2407.20999, algorithm 1).

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²                      every entry, every step
    F = |m| ≥ the k-th largest |m| of the tensor,  k = max(1, ⌊fraction·numel⌋)
    θ ← θ − lr·F⊙( m̂/(√v̂+ε) + weight_decay·θ )

Only the entries with the largest momentum of each tensor move, so that the run stays near the base. Ties are kept, also
where the threshold is 0; tensors of fewer than two dimensions (norms, biases) move in full.

The threshold comes first, from the |m| that the step will arrive at, and is exact (methods.tools.selection); then m, v and θ
advance together, a piece at a time, so that nothing as large as a tensor is held but what the partition reorders on the
CPU: |m| of one tensor a thread. On other devices, and where each process holds a piece of every tensor, histograms take
its place: the threshold is then the k-th largest of the whole tensor all the same. m and v may be kept in bfloat16
(methods.tools.adam); |m| is then read before it is rounded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from methods.part import Part, register, setting
from methods.tools.adam import CHUNK, CPU_CHUNK, SCRATCH, Moments, fused_adam, kernel_is_lerp, pieces
from methods.tools.costs import Memory
from methods.tools.selection import HISTOGRAM, kth_by_histogram, kth_largest

ALLOWED = "(0, 1]"
SHARED = 1 << 18  # entries for which another thread is worth while


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A tensor's part of a step."""

    weight: Tensor
    gradients: list[Tensor]  # of the tensor and of its twins
    state: dict[str, Any]
    group: dict[str, Any]


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

    On the CPU one process gives every thread a tensor at a time; the result does not depend on their number. Scratch: 4 bytes
    (8 for float64) for an entry of the largest tensor, of the second largest too where there are two threads, and so on.

    A parameter given twice is one tensor, and so are two that share storage if there is one process: their gradients
    are summed. Raises ValueError for a fraction outside (0, 1], for sparse gradients, and for another number of sizes
    than of parameters. What `realised_fraction` says goes along with a deep copy and a pickle, not with a `state_dict`.
    """

    scratch = ("_scratch",)  # attributes that hold nothing from one step to the next

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fraction: float = 0.1,
        *,
        decay_all: bool = False,
        moments: Moments | None = None,
        shards: Any = None,
        sizes: Sequence[int] | None = None,
    ):
        self._twins: dict[tuple, list[Tensor]] = {}  # storage → the parameter that is updated, then its other views
        self._scratch: dict[tuple, Tensor] = {}
        self._moments = moments or Moments()
        self._shards = shards if shards is not None and shards.world > 1 else None
        self._moved = self._moved_total = (
            None  # entries moved here in the last step, and in all: tensors, never waited for
        )
        self._entries = self._entries_total = 0  # of the whole tensors
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "fraction": fraction,
            "decay_all": decay_all,
        }
        super().__init__(params, defaults)
        given = [p for group in self.param_groups for p in group["params"]]
        if sizes is not None and len(sizes) != len(given):
            raise ValueError(
                f"{len(sizes)} sizes for {len(given)} parameters: give one a parameter, a repeated one once"
            )
        self._sizes = {id(p): size for p, size in zip(given, sizes or ())}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = self.defaults | param_group
        limits = {
            "lr": group["lr"] >= 0,
            "eps": group["eps"] >= 0,
            "weight_decay": group["weight_decay"] >= 0,
            "betas": all(0 <= beta < 1 for beta in group["betas"]),
            "fraction": 0 < group["fraction"] <= 1,
        }
        for name, right in limits.items():
            if not right:
                allowed = {"fraction": ALLOWED, "betas": "[0, 1)"}.get(name, "[0, inf)")
                raise ValueError(f"{name} is {group[name]!r}: it must be in {allowed}")
        given = param_group["params"]
        kept = []
        for item in [given] if isinstance(given, Tensor) else given:
            p = item[1] if isinstance(item, tuple) else item
            twins = self._twins.setdefault(self._place(p), [])
            if not twins:
                kept.append(item)
            if not any(p is twin for twin in twins):
                twins.append(p)
        super().add_param_group(param_group | {"params": kept})

    def _place(self, p: Tensor) -> tuple:
        """What two parameters that are one tensor have in common."""
        # an empty piece has no storage to share, and all processes must agree on what is one tensor
        own = self._shards is not None or not p.numel() or p.is_meta
        return (id(p),) if own else (p.device, p.data_ptr(), p.shape, p.stride())

    def __getstate__(self) -> dict[str, Any]:
        sizes = [self._sizes.get(id(first)) for first, *_ in self._twins.values()]
        kept = ("_moments", "_shards", "_moved", "_moved_total", "_entries", "_entries_total")
        return (
            super().__getstate__()
            | {name: getattr(self, name) for name in kept}
            | {"_scratch": {}, "_twins": list(self._twins.values()), "_sizes": sizes}
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_twins" in state:  # a copy, whose tensors have other ids, and not a state_dict that is loaded
            self._sizes = {
                id(first): size for (first, *_), size in zip(state["_twins"], state["_sizes"]) if size is not None
            }
            self._twins = {self._place(twins[0]): twins for twins in state["_twins"]}

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
        self._moved, self._entries = None, 0
        jobs = list(self._jobs())
        for job, moved in zip(jobs, self._move_all(jobs)):
            if moved is not None:
                self._moved = moved if self._moved is None else self._moved + moved.to(self._moved.device)
                self._entries += self._whole(job.weight)
        if self._moved is not None:
            self._moved_total = self._moved if self._moved_total is None else self._moved_total + self._moved
            self._entries_total += self._entries
        return loss

    def _jobs(self) -> Iterator[_Job]:
        shared = {id(first): others for first, *others in self._twins.values() if others}
        for group in self.param_groups:
            for p in group["params"]:
                gradients = [t.grad for t in (p, *shared.get(id(p), ())) if t.grad is not None]
                if not gradients and self._shards is not None:  # the others may have one, and wait in the reduction
                    gradients = [torch.zeros_like(p)]
                if gradients:
                    yield _Job(weight=p, gradients=gradients, state=self.state[p], group=group)

    def _move_all(self, jobs: list[_Job]) -> list[Tensor | None]:
        """What `_move` says of every job."""
        done: list[Tensor | None] = [None] * len(jobs)
        order, workers = list(range(len(jobs))), 1  # several processes meet their reductions in this one order
        if self._shards is None and all(job.weight.is_cpu for job in jobs):
            # what is large comes first: threads end together, and the room for a thread's first tensor holds all later ones
            order.sort(key=lambda index: -jobs[index].weight.numel())
            workers = _workers([jobs[index].weight.numel() for index in order])
        rest = iter(order[workers:])

        def work(worker: int) -> None:
            with torch.no_grad():  # every thread has a mode of its own
                for index in chain(order[worker : worker + 1], rest):
                    done[index] = self._move(jobs[index], worker)

        if workers == 1:
            work(0)
        else:
            list(_threads(workers, torch.get_num_threads() // workers, os.getpid()).map(work, range(workers)))
        return done

    def _move(self, job: _Job, worker: int) -> Tensor | None:
        """Advance m and v of a tensor and move its chosen entries; how many, where it is filtered."""
        p, state, group, (beta, _) = job.weight, job.state, job.group, job.group["betas"]
        gradient = sum(job.gradients[1:], job.gradients[0])
        self._moments.advance(weight=p, gradient=gradient, state=state)
        wide = torch.promote_types(p.dtype, torch.float32)
        flat, decay = p.detach().reshape(-1), group["lr"] * group["weight_decay"]
        adam = {key: group[key] for key in ("lr", "betas", "eps")}
        cuts = list(pieces(p))
        longest = cuts[0].stop if cuts else 1
        kinds = (flat, gradient.reshape(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1))
        parts = list(zip(cuts, *(t.split(longest) for t in kinds)))
        plain = all(t.dtype == wide for t in kinds)  # nothing to convert or to round

        def size(gradient: Tensor, m: Tensor, out: Tensor | None = None) -> Tensor:
            """|m| of a piece as it will be, by the same operation each time: the threshold is met to the bit."""
            gradient, m = (t if t.dtype == wide else t.to(wide) for t in (gradient, m))
            return torch.lerp(m, gradient, 1 - beta, out=out).abs_()

        entries, moved = self._whole(p), []
        filtered = p.dim() >= 2 and entries > 0
        if filtered:
            k = max(1, int(group["fraction"] * entries))
            if self._shards is None and p.is_cpu:
                room = self._room("order", worker, p.numel(), p, wide)
                for (_, _, g, m, _), out in zip(parts, room.split(longest)):
                    size(g, m, out)
                threshold = kth_largest(room, k)
            else:
                threshold = kth_by_histogram(
                    lambda: (size(g, m).float() for _, _, g, m, _ in parts), k, device=p.device, shards=self._shards
                )
        again = filtered and not (plain and p.is_cpu and kernel_is_lerp(wide, beta))
        updates, kept = self._room("update", worker, longest, flat), self._room("keep", worker, longest, flat, wide)
        for piece, weight, g, m, v in parts:
            update, keep = (updates, kept) if len(weight) == longest else (updates[: len(weight)], kept[: len(weight)])
            if again:
                size(g, m, keep)
            if (
                plain
            ):  # what `move` does then; every further operation here is one more that threads wait for each other in
                fused_adam(update.zero_(), g, m, v, state["step"], **adam)
            else:
                self._moments.move(weight=p, gradient=g, state=state, update=update, piece=piece, **adam)
            if filtered:
                keep = keep if again else torch.abs(m, out=keep)
                keep = (keep if keep.dtype == threshold.dtype else keep.to(threshold.dtype)).ge_(threshold)
                moved.append(keep.sum())
            if decay and filtered and group["decay_all"]:
                weight.mul_(1 - decay)
            elif decay:
                update.add_(weight, alpha=-decay)
            if filtered:
                weight.addcmul_(update, keep if keep.dtype == update.dtype else keep.to(update.dtype))
            else:
                weight.add_(update)
        if not p.is_contiguous():  # flattening has copied it
            p.copy_(flat.view(p.shape))
        if not filtered:
            return None
        return (
            torch.stack(moved).sum(dtype=torch.float64)
            if moved
            else torch.zeros((), dtype=torch.float64, device=p.device)
        )

    def _room(self, use: str, worker: int, entries: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A thread's flat scratch on the device of `like`: one allocation a use, as large as the largest so far."""
        dtype, key = dtype or like.dtype, (use, worker, like.device)
        if key not in self._scratch or self._scratch[key].numel() < entries * dtype.itemsize:
            self._scratch[key] = torch.empty(entries * dtype.itemsize, dtype=torch.uint8, device=like.device)
        return self._scratch[key][: entries * dtype.itemsize].view(dtype)

    def _whole(self, p: Tensor) -> int:
        """Entries of the whole tensor."""
        return self._sizes.get(id(p), p.numel())

    def realised_fraction(self) -> dict[str, float | None]:
        """Share of the filtered tensors' entries that moved, in the last step and over all steps of this object."""
        return {
            "last": self._share(self._moved, self._entries),
            "mean": self._share(self._moved_total, self._entries_total),
        }

    def _share(self, moved: Tensor | None, entries: int) -> float | None:
        return float(moved if self._shards is None else self._shards.sum(moved.clone())) / entries if entries else None


def _workers(entries: Sequence[int]) -> int:
    """How many threads share tensors of so many entries, the largest first: more would only wait for that one."""
    total = sum(entries)
    return max(1, min(torch.get_num_threads(), total // SHARED, -(-total // max(entries, default=1)))) if total else 1


@cache
def _threads(workers: int, each: int, process: int) -> ThreadPoolExecutor:
    """`workers` threads of `process` (those of a parent are not there after a fork), whose operations use `each` threads."""
    ours, all_here = torch.get_num_threads(), Barrier(workers)

    def begin() -> None:
        torch.set_num_threads(each)
        torch.get_num_threads()  # torch settles a thread's number when it is first read, and would then read ours
        all_here.wait(timeout=60)

    pool = ThreadPoolExecutor(workers, "mofo", begin)
    list(pool.map(lambda _: None, range(workers)))
    torch.set_num_threads(ours)  # what is said in a thread holds there, and for threads that begin later
    return pool


@register(
    title="MoFO",
    paper="https://arxiv.org/abs/2407.20999",
    line="AdamW that moves only the entries with the largest momentum of each tensor.",
    phase="mask",
    capabilities=frozenset({"optimizer"}),
)
@dataclass(frozen=True, kw_only=True)
class MomentumFilter(Part):
    shares = ("methods.tools.selection",)

    neutral = {"fraction": 1.0}

    fraction: float = setting(0.1, within=ALLOWED, help="share of each tensor's entries that move in a step")
    decay_all: bool = setting(False, help="weight decay on every entry, as published, and not only on those that move")

    def memory(self, *, counts, phase):
        """Update and mask of a chunk, and beside them |m| of a tensor, which a partition reorders, or histograms."""
        if phase == "prepare":
            return Memory()
        alone = counts.device == "cpu" and (counts.processes or 1) == 1
        largest = counts.share(counts.largest_trained)
        chunk = counts.piece(largest, cpu=CPU_CHUNK, cuda=CHUNK)
        return Memory(
            kept=2 * counts.wide * chunk + alone * counts.wide * largest,
            optimizer=0 if alone else SCRATCH * chunk + HISTOGRAM,
        )

    def optimizer(self, *, run, learning_rate, betas, eps, weight_decay):
        if self.fraction == 1:
            return None  # AdamW itself: its fused kernel rounds otherwise than an update that is added
        return MoFO(
            run.weights.values(),
            lr=learning_rate,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fraction=self.fraction,
            decay_all=self.decay_all,
            moments=run.moments,
            shards=run.shards,
            sizes=[run.shapes[name].numel() for name in run.weights],
        )

    def optimizer_ready(self, *, run, state, optimizer):
        state["optimizer"] = optimizer

    def report(self, *, run, state):
        optimizer = state["optimizer"]
        realised = optimizer.realised_fraction() if isinstance(optimizer, MoFO) else {"last": 1.0, "mean": 1.0}
        return {
            "fraction": self.fraction,
            "realised_fraction": realised["mean"],
            "realised_fraction_last_step": realised["last"],
        }
