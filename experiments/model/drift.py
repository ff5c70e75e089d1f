"""How far fine-tuning moved the weights, where, in how many directions, and whether it spared important weights.

The measures of a group of tensors, with Δ = θ − θ₀, θ the weights as kept (rounded to the checkpoint's dtype) and F an
importance:

    distance        ‖Δ‖, the root of the sum of squares over all entries
    base_norm       ‖θ₀‖; `relative` is ‖Δ‖ / ‖θ₀‖
    changed         share of entries that changed
    effective_rank  exp(H) of a matrix's Δ, H the entropy in nats of its singular values over their sum
                    (effective_rank.py): 1 where all columns move alike, the matrix's rank where all directions move
                    equally; of several matrices the median. Of a matrix whose smaller side exceeds `EXACT` it is
                    estimated, to about 2 %; where an adapter alone moved a matrix of which one side exceeds it, it is
                    the exact value of the adapter's update s·B·A, before this is rounded to the checkpoint's dtype
    overlap         (ΣFΔ² / ΣΔ²) / mean F: 1 where movement is independent of importance, below 1 where it avoided
                    important weights
    overlap_within  ΣFΔ² / Σ_tensor (mean F of the tensor · its ΣΔ²): the same relative to how much each tensor moved,
                    so that a method that trains few matrices is judged by what it does within them
    top_share       share of ΣΔ² in the most important `TOP` of the entries: `TOP` where movement is independent of it

A measure that is not defined is None: a ratio to zero, the effective rank of no movement, the last three without
importance.
"""

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.model import delta
from experiments.model.effective_rank import effective_rank, estimated, of_factors
from methods.tools.architecture import blocks, group_of
from methods.tools.importance import Codes, encode, pieces

TOP = 0.10
EXACT = 1024  # of matrices with a smaller side above it the effective rank is estimated: the time grows with its cube
AT_ONCE = 4  # tensors on a CPU: each is in memory twice
OUTSIDE = "other"  # the group of tensors in a file that are no parameters of the model
DIGITS = 6  # digits that are kept, so that the order of additions does not show


@dataclass(frozen=True, kw_only=True, eq=False)
class _Moved:
    """One tensor's sums."""

    entries: int
    changed: int
    movement: float  # ΣΔ²
    size: float  # Σθ₀²
    rank: float | None = None
    bins: Tensor | None = None  # importance, entries that have it and their ΣΔ²: (3, 256)


def measure(
    *,
    base: Mapping[str, Tensor],
    tuned: Iterable[tuple[str, Tensor]],
    roles: Mapping[str, tuple[str, str]],
    importance: Mapping[str, Tensor | Codes] | None = None,
    factors: Mapping[str, Mapping[str, Tensor]] | None = None,
    still: Container[str] = (),
    device: torch.device | str = "cpu",
) -> dict:
    """{"overall": {...}, "groups": [{"group", "kind", ...}], "rank_skipped": []} in the measures above.

    With "rank_estimated": [names] where the effective rank of a matrix is estimated.

    base        θ₀ by name
    tuned       (name, θ), one tensor at a time, shaped like the base's
    roles       (group, kind) by name, see `roles`; effective ranks are of matrices in blocks
    importance  F by name, non-negative, read in 8-bit steps (each value to 5.6 %); its measures leave out tensors that
                it lacks
    factors     {"a": A, "b": B} by name, of the matrices that an adapter alone has moved, by s·B·A
    still       names of tensors that are known not to have moved
    device      where singular values are computed
    Numbers have `DIGITS` digits.
    """

    def one(given: tuple[str, Tensor, Tensor]) -> tuple[str, _Moved, bool]:
        name, before, after = given
        moved = _moved(name, before, after, (importance or {}).get(name))
        if not moved.changed or after.dim() != 2 or not roles.get(name, ("",))[0].startswith("block."):
            return name, moved, False
        rank, is_estimate = _rank(before, after, (factors or {}).get(name), device)
        return name, dataclasses.replace(moved, rank=rank), is_estimate

    on_cpu = torch.device(device).type == "cpu"
    pairs = (
        (name, theta if name in still else base[name], theta) for name, theta in tuned if theta.is_floating_point()
    )
    groups: dict[tuple[str, str], list[_Moved]] = {}
    rank_estimated = []
    for name, moved, is_estimate in _side_by_side(one, pairs, at_once=AT_ONCE if on_cpu else 1):
        rank_estimated += [name] * is_estimate
        groups.setdefault(roles.get(name, (OUTSIDE, OUTSIDE)), []).append(moved)
    order = sorted(groups, key=lambda role: (_place(role[0]), role[1]))
    return {
        "groups": [{"group": group, "kind": kind} | _summary(groups[group, kind]) for group, kind in order],
        "overall": _summary([moved for role in order for moved in groups[role]]),
        "rank_skipped": [],  # by earlier versions large matrices were
    } | ({"rank_estimated": sorted(rank_estimated)} if rank_estimated else {})


def _side_by_side(function: Callable[[Any], Any], given: Iterable, *, at_once: int) -> Iterator:
    """The results in order, computed side by side with torch's threads shared out: a matrix alone uses few of them."""
    threads = torch.get_num_threads()
    at_once = min(at_once, threads)
    torch.set_num_threads(each := threads // at_once)
    try:
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(each,)) as pool:
            begun: deque[Future] = deque()
            for one in given:
                begun.append(pool.submit(function, one))
                if len(begun) > at_once:  # what comes after is not read yet
                    yield begun.popleft().result()
            yield from (one.result() for one in begun)
    finally:
        torch.set_num_threads(threads)


def roles(model: nn.Module) -> dict[str, tuple[str, str]]:
    """(group, kind) by parameter name; the model may be on the meta device.

    The group is `block.3`, `embedding`, `final_norm` or `head`. The kind is the last word of the module's path
    (`q_proj`, `fc_in`), its path in the block where two modules of the block share that word, and `norm` for a module
    without a matrix.
    """
    modules = dict(model.named_modules())
    paths = {f"block.{index}": path for index, (path, _) in enumerate(blocks(model))}
    roles = {}
    for name, _ in model.named_parameters():
        owner, group = name.rpartition(".")[0], group_of(model, name)
        if not any(p.dim() > 1 for p in modules[owner].parameters(recurse=False)):
            roles[name] = group, "norm"
            continue
        word = owner.rpartition(".")[2]
        inside = f"{paths.get(group, owner)}."
        siblings = [path for path in modules if path.startswith(inside) and path.rpartition(".")[2] == word]
        roles[name] = group, owner.removeprefix(f"{paths[group]}.") if len(siblings) > 1 else word
    return roles


def reference(study) -> tuple[str, str] | None:
    """(method, part) of the first method of the grid whose importance is of the whole model; None where none is."""
    for method in study.grid.methods:
        parts = study.methods[method].parts
        adapted = any("adapts" in part.capabilities for part in parts)
        for part in parts:
            whole = not adapted or any(made.gradients == "whole-model" for made in part.preparation())
            if "importance" in part.capabilities and whole:
                return method, part.key
    return None


@torch.no_grad()
def _moved(name: str, before: Tensor, after: Tensor, importance: Tensor | Codes | None) -> _Moved:
    """The sums of one tensor."""
    if importance is not None and not isinstance(importance, Codes):
        importance = encode(importance, name=name)
    before, after = before.contiguous(), after.contiguous()
    still = before is after or delta.same(before, after)
    rows = [before] if still else [before, after, *([importance.codes.contiguous()] if importance else [])]
    changed, movement, size, moved = 0, 0.0, 0.0, torch.zeros(256, dtype=torch.float64)
    for old, *rest in pieces(*rows):
        old = old.double()
        size += torch.dot(old, old).item()
        if still:
            continue
        square = rest[0].double().sub_(old).square_()
        changed += torch.count_nonzero(square).item()
        movement += square.sum().item()
        if importance:
            moved += rest[1].bincount(weights=square, minlength=256)
    bins = None
    if importance:
        counts, values = importance.histogram()
        bins = torch.stack([values, counts, moved])
    return _Moved(entries=before.numel(), changed=changed, movement=movement, size=size, bins=bins)


def _rank(
    before: Tensor, after: Tensor, factors: Mapping[str, Tensor] | None, device: torch.device | str
) -> tuple[float | None, bool]:
    """The effective rank of a matrix's Δ, and whether it is an estimate."""
    if factors and max(after.shape) > EXACT:
        return of_factors(**factors), False
    if min(after.shape) <= EXACT:
        return effective_rank(after.to(device).double() - before.to(device).double()), False
    return estimated(after.to(device).float() - before.to(device).float()), True


def _summary(tensors: Sequence[_Moved]) -> dict:
    """The measures of these tensors together."""
    entries = sum(t.entries for t in tensors)
    movement, size = (math.fsum(getattr(t, key) for t in tensors) for key in ("movement", "size"))
    ranks = [t.rank for t in tensors if t.rank is not None]
    measures = {
        "distance": math.sqrt(movement),
        "base_norm": math.sqrt(size),
        "relative": math.sqrt(movement / size) if size else None,
        "changed": sum(t.changed for t in tensors) / entries if entries else None,
        "effective_rank": statistics.median(ranks) if ranks else None,
    }
    return {"entries": entries, "matrices": len(ranks)} | {
        key: _short(value) for key, value in (measures | _overlaps(tensors)).items()
    }


def _overlaps(tensors: Sequence[_Moved]) -> dict[str, float | None]:
    """The measures of movement against importance, over the tensors that have an importance."""
    undefined = dict.fromkeys(("overlap", "overlap_within", "top_share"))
    known = [t.bins for t in tensors if t.bins is not None]
    if not known:
        return undefined
    bins = torch.stack(known, dim=1)  # (3, tensors, 256)
    value, count, moved = bins
    total = moved.sum()
    mean = (value * count).sum() / count.sum()
    if not total or not mean:
        return undefined
    weighted = (value * moved).sum()
    expected = ((value * count).sum(1) / count.sum(1) * moved.sum(1)).sum()
    levels, place = value.flatten().unique(return_inverse=True)  # several tensors may share a level
    at = torch.zeros(2, len(levels), dtype=torch.float64)
    at = at.index_add_(1, place, torch.stack([count, moved]).flatten(1)).flip(1)
    above = at[0].cumsum(0) - at[0]
    taken = ((TOP * at[0].sum() - above) / at[0].clamp(min=1)).clamp(0, 1)  # a part of the level on the border
    return {
        "overlap": (weighted / total / mean).item(),
        "overlap_within": (weighted / expected).item() if expected else None,
        "top_share": ((taken * at[1]).sum() / total).item(),
    }


def _place(group: str) -> tuple[int, int]:
    """The position of a group in the order of the forward pass."""
    if group.startswith("block."):
        return 1, int(group.removeprefix("block."))
    return {"embedding": 0, "final_norm": 2, "head": 3}.get(group, 4), 0


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")
