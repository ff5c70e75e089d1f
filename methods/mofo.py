"""Momentum-filtered optimizer (Chen et al., arXiv 2407.20999, algorithm 1).

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²                      every entry, every step
    F = |m| ≥ the k-th largest |m| of the tensor,  k = max(1, ⌊fraction·numel⌋)
    θ ← θ − lr·F⊙( m̂/(√v̂+ε) + weight_decay·θ )

Only the entries with the largest momentum of each tensor move, so that the run stays near the base. Ties are kept, also
where the threshold is 0; tensors of fewer than two dimensions (norms, biases) move in full.

The exact threshold is computed first, from the |m| that the step will arrive at (methods/tools/selection.py). Then m, v
and θ advance together in pieces, so that no temporary is as large as a tensor except |m| itself, which the partition
on the CPU reorders. On other devices, and where several processes hold pieces of every tensor, histograms replace the
partition.
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
from methods.tools.adam import CHUNK, CPU_CHUNK, SCRATCH, Moments, kernel_is_lerp, pieces
from methods.tools.costs import Memory
from methods.tools.selection import HISTOGRAM, kth_by_histogram, kth_largest

ALLOWED = "(0, 1]"
SHARED = 1 << 18  # entries from which on another thread is worthwhile


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One tensor's part of a step."""

    weight: Tensor
    gradient: Tensor
    entries: int  # of the whole tensor
    state: dict[str, Any]
    group: dict[str, Any]


class MoFO(torch.optim.Optimizer):
    """AdamW that moves, in each tensor of two or more dimensions, only the entries with the largest |m|.

    fraction    share of a tensor's entries that move, in (0, 1]; 1 is AdamW
    decay_all   decoupled weight decay on every entry, as published; by default only on those that move
    moments     how m and v are kept; by default in float32 (float64 for float64 parameters)
    shards      the processes that share the parameters: `rank`, `world` and `sum(tensor)`, an in-place all-reduce
    sizes       numbers of entries of the whole parameters, in their order; by default those of the parameters given

    With several processes each holds a slice, which may be empty, of every flattened parameter with the parameter's own
    number of dimensions. All call `step` and `realised_fraction` together; a missing gradient then counts as zeros,
    and |m| of float64 parameters is compared in float32. The masks are those of one process.

    On the CPU one process works on several tensors at once, one in each thread; the result does not depend on the
    number of threads. Scratch: 4 bytes (8 for float64) for each entry of the largest tensor in each thread.

    Raises ValueError for a fraction outside (0, 1], for sparse gradients, and where the numbers of sizes and of
    parameters differ. Deep copies and pickles keep `realised_fraction`; a `state_dict` does not.
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
        self._scratch: dict[tuple, Tensor] = {}  # for each thread, device and dtype
        self._moments = moments or Moments()
        self._shards = shards if shards is not None and shards.world > 1 else None
        # entries moved by this process in the last step and in all; tensors, so that the host need not wait for them
        self._moved = self._moved_total = None
        self._entries = self._entries_total = 0  # of the whole tensors
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"fraction": fraction, "decay_all": decay_all})
        count = sum(len(group["params"]) for group in self.param_groups)
        if sizes is not None and len(sizes) != count:
            raise ValueError(f"{len(sizes)} sizes for {count} parameters: give one for each parameter")
        self._sizes = list(sizes or ())

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
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_moments", "_shards", "_sizes", "_moved", "_moved_total", "_entries", "_entries_total")
        return super().__getstate__() | {name: getattr(self, name) for name in kept} | {"_scratch": {}}

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        jobs = list(self._jobs())
        counts = {i: count for i, count in enumerate(self._move_all(jobs)) if count is not None}
        self._entries = sum(jobs[i].entries for i in counts)
        self._moved = None
        for count in counts.values():
            self._moved = count if self._moved is None else self._moved + count.to(self._moved.device)
        if counts:
            self._moved_total = self._moved if self._moved_total is None else self._moved_total + self._moved
            self._entries_total += self._entries
        return loss

    def _jobs(self) -> Iterator[_Job]:
        weights = [(p, group) for group in self.param_groups for p in group["params"]]
        for index, (p, group) in enumerate(weights):
            gradient = p.grad
            if gradient is None and self._shards is not None:  # other processes may have one and wait in the all-reduce
                gradient = torch.zeros_like(p)
            if gradient is not None:
                entries = self._sizes[index] if index < len(self._sizes) else p.numel()
                yield _Job(weight=p, gradient=gradient, entries=entries, state=self.state[p], group=group)

    def _move_all(self, jobs: list[_Job]) -> list[Tensor | None]:
        """The results of `_move` for every job."""
        counts: list[Tensor | None] = [None] * len(jobs)
        order, workers = list(range(len(jobs))), 1  # several processes take the same order, in which they all-reduce
        if self._shards is None and all(job.weight.is_cpu for job in jobs):
            # the largest first: threads end together, and a thread's first scratch is large enough for the later ones
            order.sort(key=lambda index: -jobs[index].weight.numel())
            workers = _workers([jobs[index].weight.numel() for index in order])
        rest = iter(order[workers:])

        def work(worker: int) -> None:
            with torch.no_grad():  # the mode belongs to the thread
                for index in chain(order[worker : worker + 1], rest):
                    counts[index] = self._move(jobs[index], worker)

        if workers == 1:
            work(0)
        else:
            list(_threads(workers, torch.get_num_threads() // workers, os.getpid()).map(work, range(workers)))
        return counts

    def _move(self, job: _Job, worker: int) -> Tensor | None:
        """Advance m and v of a tensor and move its chosen entries; returns how many moved, None without a filter."""
        p, state, group = job.weight, job.state, job.group
        self._moments.advance(weight=p, gradient=job.gradient, state=state)
        flat, gradient, momentum = p.detach().reshape(-1), job.gradient.reshape(-1), state["exp_avg"].view(-1)
        wide, beta = torch.promote_types(p.dtype, torch.float32), group["betas"][0]
        decay = group["lr"] * group["weight_decay"]

        def size(piece: slice, out: Tensor | None = None) -> Tensor:
            """|m| of a piece after the step; the same operation each time, so that the threshold is met to the bit."""
            return torch.lerp(momentum[piece].to(wide), gradient[piece].to(wide), 1 - beta, out=out).abs_()

        filtered = p.dim() >= 2 and job.entries > 0
        threshold = self._threshold(job, size, worker) if filtered else None
        moved = torch.zeros((), dtype=torch.float64, device=p.device)
        # where the kernel leaves the very m that the threshold is of, reading it is faster than computing it again
        same = p.is_cpu and kernel_is_lerp(wide, beta) and {t.dtype for t in (flat, gradient, momentum)} == {wide}
        longest = next((piece.stop for piece in pieces(p)), 0)
        updates = self._room("update", worker, longest, like=flat)
        keeps = self._room("keep", worker, longest, like=flat, dtype=wide)
        for piece in pieces(p):
            weight = flat[piece]
            update, keep = updates[: len(weight)], keeps[: len(weight)]
            if filtered and not same:
                size(piece, out=keep)
            self._moments.move(weight=p, gradient=gradient[piece], state=state, group=group, update=update, piece=piece)
            if filtered:
                keep = (torch.abs(momentum[piece], out=keep) if same else keep).to(threshold.dtype).ge_(threshold)
                moved += keep.sum()
            if decay and filtered and group["decay_all"]:
                weight.mul_(1 - decay)
            elif decay:
                update.add_(weight, alpha=-decay)
            if filtered:
                weight.addcmul_(update, keep.to(update.dtype))
            else:
                weight.add_(update)
        if not p.is_contiguous():  # flattening has copied it
            p.copy_(flat.view(p.shape))
        return moved if filtered else None

    def _threshold(self, job: _Job, size: Any, worker: int) -> Tensor:
        """The k-th largest |m| of the whole tensor, 0-dim."""
        p, k = job.weight, max(1, int(job.group["fraction"] * job.entries))
        if self._shards is not None or not p.is_cpu:
            return kth_by_histogram(
                lambda: (size(piece).float() for piece in pieces(p)), k, device=p.device, shards=self._shards
            )
        room = self._room("order", worker, p.numel(), like=p, dtype=torch.promote_types(p.dtype, torch.float32))
        for piece in pieces(p):
            size(piece, out=room[piece])
        return kth_largest(room, k)

    def _room(self, use: str, worker: int, entries: int, *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A thread's flat scratch memory, which is kept: new memory costs the CPU more than the arithmetic on it."""
        key = (use, worker, like.device, dtype or like.dtype)
        if key not in self._scratch or len(self._scratch[key]) < entries:
            self._scratch[key] = torch.empty(entries, dtype=key[-1], device=like.device)
        return self._scratch[key][:entries]

    def realised_fraction(self) -> dict[str, float | None]:
        """Share of the filtered tensors' entries that moved, in the last step and over all steps of this object."""
        return {
            "last": self._share(self._moved, self._entries),
            "mean": self._share(self._moved_total, self._entries_total),
        }

    def _share(self, moved: Tensor | None, entries: int) -> float | None:
        return float(moved if self._shards is None else self._shards.sum(moved.clone())) / entries if entries else None


def _workers(entries: Sequence[int]) -> int:
    """The number of threads for tensors of these sizes, largest first; more would only wait for the largest tensor."""
    total = sum(entries)
    return max(1, min(torch.get_num_threads(), total // SHARED, -(-total // max(entries, default=1)))) if total else 1


@cache
def _threads(workers: int, each: int, process: int) -> ThreadPoolExecutor:
    """`workers` threads whose operations use `each` threads. A fork needs its own, hence the id of the process."""
    ours, all_here = torch.get_num_threads(), Barrier(workers)

    def begin() -> None:
        torch.set_num_threads(each)
        torch.get_num_threads()  # torch fixes a thread's number when it is first read; later it would read ours
        all_here.wait(timeout=60)

    pool = ThreadPoolExecutor(workers, "mofo", begin)
    list(pool.map(lambda _: None, range(workers)))
    torch.set_num_threads(ours)  # setting it in a thread also sets it for threads that start later
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
