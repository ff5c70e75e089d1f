"""The hooks of a method's parts, called in order; what they return is checked and what they cost is charged.

What is not as methods/part.py says is refused by the part's name.
"""

import functools
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods.errors import UserError
from methods.part import Part, Row, Run, in_order, overrides
from methods.tools.process_group import Shards
from methods.tools.token_statistics import TokenStatistics

if TYPE_CHECKING:
    from experiments.training.flops import Flops

COSTS = ("tokens", "left_out", "flops", "seconds", "bytes")  # left out: tokens of domain rows

# what a part may do without having a share in how the weights are trained
APART = {"settings", "resolved", "look", "finish", "report", "preparation", "added", "memory"}
TRAINING = [name for name, value in vars(Part).items() if callable(value) and name[0] != "_" and name not in APART]


class Hooks:
    """The parts of one run in the order of their hooks, with their states and what each of them costs.

    added    {part: {kind of `COSTS`: number}}: what this process has charged to each part. Seconds are the host's while
             its hooks run; what all processes know alike is charged by the first one alone.
    asking_twice  the part that takes each step's gradient once more, if one does
    counted  false while a micro-batch is computed that counts with weight zero: nothing is charged then
    """

    def __init__(self, parts: Sequence[Part], states: Mapping[str, dict], *, flops: "Flops", shards: Shards) -> None:
        self.parts = in_order(parts)
        self.states = {part.key: dict(states.get(part.key, {})) for part in self.parts}
        self.added: dict[str, dict[str, float | None]] = {}
        self.asking_twice = asking_twice(self.parts)
        self.counted = True
        self._flops, self._shards, self._at_work = flops, shards, ""

    def having(self, hook: str) -> list[Part]:
        """The parts that have this hook of their own."""
        return [part for part in self.parts if overrides(part, hook)]

    def call(self, part: Part, hook: str, **arguments: Any) -> Any:
        """What the hook of one part returns, given its state."""
        with self.working(part):
            return getattr(part, hook)(state=self.states[part.key], **arguments)

    @contextmanager
    def working(self, part: Part) -> Iterator[None]:
        """Charge what is done meanwhile to `part`."""
        before, self._at_work, began = self._at_work, part.key, time.perf_counter()
        try:
            yield
        finally:
            self.charge(seconds=time.perf_counter() - began)
            self._at_work = before

    def charge(self, *, part: str = "", rows: Sequence[Row] = (), **costs: float | None) -> None:
        """Add costs to those of `part`, by default the one at work; FLOPs of None are not known.

        rows   the tokens and FLOPs of a training step on them are added
        """
        if not self.counted or not (part or self._at_work):
            return
        if rows:
            lengths = [len(row["input_ids"]) for row in rows]
            flops = self._flops.step(lengths=lengths, labelled=labelled(rows))
            self.charge(part=part, tokens=sum(lengths), flops=flops)
        sums = self.added.setdefault(part or self._at_work, dict.fromkeys(COSTS, 0))
        for kind, cost in costs.items():
            sums[kind] = None if cost is None or sums[kind] is None else sums[kind] + cost

    def charge_rows(self, rows: Sequence[Row], *, part: str) -> None:
        """Charge a training step on rows that all processes know alike."""
        if self._shards.first:
            self.charge(part=part, rows=rows)

    def _charge_changes(self, before: Sequence[Row], after: Sequence[Row], *, part: str) -> None:
        """Charge what the domain's rows take more after a part has changed them; less is a negative cost."""
        domain = [[row for row in rows if "index" in row] for rows in (before, after)]
        (was, labels_were), (now, labels_now) = (
            (sorted(len(row["input_ids"]) for row in rows), labelled(rows)) for rows in domain
        )
        if self._shards.first and (was, labels_were) != (now, labels_now):
            cost = self._flops.step(lengths=now, labelled=labels_now)
            flops = None if cost is None else cost - self._flops.step(lengths=was, labelled=labels_were)
            self.charge(part=part, tokens=sum(now) - sum(was), flops=flops)

    def total(self) -> dict[str, dict[str, float | None]]:
        """What each part has cost in all processes together; the seconds are the first one's."""
        everywhere = self._shards.all_gather(self.added)
        total = {}
        for key in self.added:
            each = [added[key] for added in everywhere if key in added]
            for kind in COSTS:
                costs = [one[kind] for one in each]
                total.setdefault(key, {})[kind] = None if None in costs else sum(costs)
            total[key]["seconds"] = self.added[key]["seconds"]
        return total

    def begin(self, run: Run, examples: Sequence[Row], general: Sequence[Row]) -> None:
        for part in self.having("begin"):
            wanted = general if "general" in part.capabilities else ()
            self.call(part, "begin", run=run, examples=examples, general=wanted)

    def epoch(self, run: Run, rows: list[Row], number: int, *, begins: bool) -> list[Row]:
        """The rows of an epoch; where it does not begin, those that it began with, which a state contains."""
        drawing = self.having("epoch")
        if not drawing:
            return rows
        kept = self.states[drawing[-1].key]
        if begins or "epoch" not in kept:
            drawn = rows
            for part in drawing:
                drawn = list(self.call(part, "epoch", run=run, examples=drawn, epoch=number))
                refuse_rows(part, "epoch", drawn)
                if len(drawn) != len(rows):
                    raise UserError(
                        f"{part.key}: its `epoch` gives {len(drawn)} rows where the domain has {len(rows)}: "
                        "give as many, so that every epoch has the same number of steps"
                    )
            kept["epoch"] = [row | {"index": index} for index, row in enumerate(drawn)]
        return kept["epoch"]

    def examples(self, run: Run, own: list[Row], rows: list[Row], step: int) -> list[Row]:
        """The rows of a step as the parts change them.

        own   the domain's rows of the step; `rows` are what the parts made of them at the beginning of the epoch

        A row without an index is charged to the part that adds it. So is what a part makes more or less of a domain row
        that it keeps; one that it leaves out is counted.
        """
        if drawing := self.having("epoch"):
            self._charge_changes(own, rows, part=drawing[-1].key)
        for part in self.having("examples"):
            before = rows
            rows = list(self.call(part, "examples", run=run, rows=rows, step=step))
            refuse_rows(part, "examples", rows)
            kept = {row["index"] for row in rows if "index" in row}
            left = [row for row in own if row["index"] not in kept]
            own = [row for row in own if row["index"] in kept]
            if self._shards.first and left:
                self.charge(part=part.key, left_out=sum(len(row["input_ids"]) for row in left))
            self._charge_changes([row for row in before if row.get("index") in kept], rows, part=part.key)
            rows = [row if "index" in row or "part" in row else row | {"part": part.key} for row in rows]
            if not rows:
                raise UserError(f"{part.key}: its `examples` gives no rows at step {step}: give at least one")
        for key in dict.fromkeys(row["part"] for row in rows if "index" not in row):
            self.charge_rows([row for row in rows if row.get("part") == key], part=key)
        extra = {name: one for row in rows for name, one in row.items() if isinstance(one, Tensor)}
        if len(extra) > 2:
            rows = [
                {name: torch.zeros_like(row["input_ids"], dtype=one.dtype) for name, one in extra.items()} | row
                for row in rows
            ]
        return rows

    def batch(self, run: Run, batch: dict[str, Tensor], *, counted: bool) -> dict[str, Tensor]:
        """The micro-batch as the parts' `batch` changes it; tokens that it adds are charged to the part."""
        self.counted = counted
        for part in self.having("batch"):
            before, lengths, count = batch, lengths_of(batch), labelled_in(batch)
            batch = changed(part, self.call(part, "batch", run=run, batch=batch), before=before)
            after, count_after = lengths_of(batch), labelled_in(batch)
            if (lengths, count) != (after, count_after):
                cost = self._flops.step(lengths=after, labelled=count_after)
                flops = None if cost is None else cost - self._flops.step(lengths=lengths, labelled=count)
                self.charge(part=part.key, tokens=sum(after) - sum(lengths), flops=flops)
        self.counted = True
        return batch

    def weigh(self, run: Run, batch: dict[str, Tensor], statistics: TokenStatistics) -> Tensor | None:
        """The product of the parts' token weights; None where none has any."""
        product = None
        for part in self.having("token_weights"):
            weights = self.call(part, "token_weights", run=run, batch=batch, statistics=statistics)
            product = multiplied(part, "token_weights", weights, product, like=statistics.nll)
        return product

    def weigh_batch(
        self, run: Run, batch: dict[str, Tensor], nll: Tensor, rows: Tensor, columns: Tensor
    ) -> Tensor | None:
        """The product of the weights that parts give the labelled tokens of a micro-batch; None where none has any."""
        product, given = None, {"batch": batch, "nll": nll, "rows": rows, "columns": columns}
        for part in self.having("batch_weights"):
            weights = self.call(part, "batch_weights", run=run, **given)
            product = multiplied(part, "batch_weights", weights, product, like=nll)
        return product

    def loss(self, run: Run, batch: dict[str, Tensor], hidden: Tensor, loss: Tensor) -> Tensor:
        """The loss of a micro-batch with the terms that parts add to it."""
        like = loss
        for part in self.having("loss"):
            value = term(part, "loss", self.call(part, "loss", run=run, batch=batch, hidden=hidden), like=like)
            loss = loss if value is None else loss + value
        return loss

    def penalty(self, run: Run, step: int) -> Tensor:
        """The sum of the penalties whose gradients the parts add."""
        penalty = torch.zeros((), device=run.device)
        for part in self.having("before_clip"):
            value = term(part, "before_clip", self.call(part, "before_clip", run=run, step=step), like=penalty)
            penalty = penalty if value is None else penalty + value
        return penalty

    def finish(
        self, run: Run, parts: Sequence[Part], final: dict[str, Tensor], measure: Callable | None
    ) -> dict[str, Tensor]:
        """`final` after the `finish` of these parts; what `measure` takes is charged to the part that calls it."""
        charged = measure and functools.partial(measure, charge=self.charge)
        for part in in_order(parts):
            if overrides(part, "finish"):
                given = self.call(part, "finish", run=run, final=final, measure=charged)
                final = finished(part, given, base=run.base)
        return final

    def reports(self, run: Run) -> dict[str, Any]:
        """The parts' reports by key."""
        return {part.key: report(part, run=run, state=self.states[part.key]) for part in self.parts}

    def frozen(self, *, before: bool = False) -> dict[str, Tensor]:
        """Entries that the step may not move, by the names of `run.weights`: those of all parts together.

        before   the step's gradient is not known yet: without those that a part chooses by it, and calls scratch
        """
        masks: dict[str, Tensor] = {}
        for part in self.parts:
            if before and "frozen" in part.scratch:
                continue
            for name, mask in (self.states[part.key].get("frozen") or {}).items():
                masks[name] = _either(masks[name], mask) if name in masks else mask
        return masks


def _either(one: Tensor, other: Tensor) -> Tensor:
    """What one of two masks freezes; where one freezes the tensor whole it stays a mask of no dimension."""
    whole = [mask for mask in (one, other) if mask.dim() == 0 and mask.device.type == "cpu" and mask]
    return whole[0] if whole else one | other


def asking_twice(parts: Sequence[Part]) -> Part | None:
    """The part that takes the gradient of a step once more; one at its neutral settings does not. Two are refused."""

    def neutral(part: Part) -> bool:
        settings = {} if isinstance(part.neutral, str) else part.neutral
        return bool(settings) and all(getattr(part, name) == value for name, value in settings.items())

    asking = [part for part in parts if overrides(part, "second_gradient") and not neutral(part)]
    if len(asking) > 1:
        keys = " and ".join(part.key for part in asking)
        raise UserError(f"{keys} cannot be combined: each takes the step's gradient at other weights; keep one")
    return asking[0] if asking else None


def refuse_second_gradient(parts: Sequence[Part], dtype: torch.dtype) -> None:
    """Where processes share the model, refuse to compute in `dtype` at weights that it cannot tell from the others."""
    if (asking := asking_twice(parts)) and dtype.itemsize < 4:
        raise UserError(
            f"{asking.key}: it takes a gradient at weights moved by less than {dtype} can tell, in which processes "
            "that share the model compute: set `compute_dtype: float32` in the model's block, or no `processes`"
        )


def finishers(parts: Sequence[Part]) -> list[Part]:
    """The last parts that act in `finish` and in no hook of a training, which cells that differ in them share."""

    def trains(part: Part) -> bool:
        return bool(part.capabilities - {"measures"}) or any(overrides(part, hook) for hook in TRAINING)

    finishing = [part for part in parts if overrides(part, "finish")]
    return list(itertools.takewhile(lambda part: not trains(part), reversed(finishing)))[::-1]


def changers(parts: Sequence[Part]) -> list[Part]:
    """Those that change the weights in `finish`, so that probes during training are not of the weights that are kept.

    Merging what a part adapted computes the same and does not count.
    """
    return [part for part in parts if overrides(part, "finish") and "adapts" not in part.capabilities]


def trainers(parts: Sequence[Part]) -> list[Part]:
    """All other parts."""
    return [part for part in parts if part not in finishers(parts)]


def refuse_rows(part: Part, hook: str, rows: Sequence[Any]) -> None:
    """Raises UserError for rows that are no rows."""
    for row in rows:
        ids = row.get("input_ids") if isinstance(row, Mapping) else None
        if not isinstance(ids, Tensor) or not isinstance(row.get("labels"), Tensor):
            raise UserError(f"{part.key}: a row that its `{hook}` gives is {_show(row)}: give input_ids and labels")
        for name, tensor in row.items():
            if isinstance(tensor, Tensor) and (
                tensor.shape != ids.shape or tensor.dim() != 1 or not len(tensor) or tensor.device.type != "cpu"
            ):
                raise UserError(
                    f"{part.key}: a row that its `{hook}` gives has {name} {_show(tensor)} beside input_ids "
                    f"{_show(ids)}: each must be (tokens,), of the same length, on the CPU"
                )


def labelled(rows: Sequence[Mapping[str, Tensor]]) -> int:
    """Labelled tokens of rows; a row's first token has no position that predicts it."""
    return sum(int((row["labels"][1:] != -100).sum()) for row in rows)


def changed(part: Part, given: Any, *, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The micro-batch that a part's `batch` gives. Raises UserError for what cannot be trained on as it is."""
    subject = f"{part.key}: the micro-batch that its `batch` gives"
    if not isinstance(given, Mapping) or not all(
        isinstance(given.get(name), Tensor) for name in ("input_ids", "labels")
    ):
        raise UserError(f"{subject} is {_show(given)}: it must be a dict with input_ids and labels")
    ids = given["input_ids"]
    for name, tensor in given.items():
        if name in before and (
            tensor.shape != ids.shape
            or tensor.dim() != 2
            or tensor.device.type != "cpu"
            or tensor.dtype != before[name].dtype
        ):
            raise UserError(
                f"{subject} has {name} {_show(tensor)} beside input_ids {_show(ids)}: "
                f"it must be {before[name].dtype}, (batch, tokens), on the CPU"
            )
    mask = given.get("attention_mask")
    if mask is not None and (mask[:, 1:] > mask[:, :-1]).any():
        raise UserError(
            f"{subject} has an attention_mask with a 0 before a 1: padding stands on the right, and no other mask is "
            "read"
        )
    return dict(given)


def lengths_of(batch: Mapping[str, Tensor]) -> list[int]:
    """Tokens of each example of a micro-batch, without padding."""
    ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    if positions is not None:  # packed: an example begins where its positions do
        starts = (positions.flatten() == 0).nonzero().flatten().tolist()
        return [end - start for start, end in zip(starts, [*starts[1:], positions.numel()])]
    return mask.sum(1).tolist() if mask is not None else [ids.shape[1]] * len(ids)


def labelled_in(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a micro-batch that a loss is taken of."""
    return int((batch["labels"][:, 1:] != -100).sum())


def multiplied(part: Part, hook: str, weights: Any, product: Tensor | None, *, like: Tensor) -> Tensor | None:
    """The product of token weights, times what a part's hook gives. Raises UserError for what are no weights."""
    if weights is None:
        return product
    if not isinstance(weights, Tensor) or weights.shape != like.shape:
        raise UserError(
            f"{part.key}: its `{hook}` gives {_show(weights)}: it must give a tensor of {list(like.shape)}, a weight "
            "for each labelled token, or None"
        )
    weights = weights.detach().to(like)
    return weights if product is None else product * weights


def term(part: Part, hook: str, value: Any, *, like: Tensor) -> Tensor | float | None:
    """What a part's `loss` or `before_clip` adds to the 0-dim `like`. Raises UserError for what is not one number."""
    if value is None or (hook == "before_clip" and isinstance(value, int | float)):
        return value
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        raise UserError(f"{part.key}: its `{hook}` gives {_show(value)}: it must give a 0-dim float tensor, or None")
    if value.device != like.device and value.device.type != "cpu":
        raise UserError(f"{part.key}: its `{hook}` gives a tensor on {value.device}, the run is on {like.device}")
    return value.reshape(())


def optimizer(parts: Sequence[Part], *, run: Run, **settings: Any) -> torch.optim.Optimizer | None:
    """The optimizer that one of the parts brings. Raises UserError for two, and for one that the loop cannot drive."""
    brought = {part.key: one for part in parts if (one := part.optimizer(run=run, **settings)) is not None}
    if len(brought) > 1:
        raise UserError(f"{' and '.join(brought)} cannot be combined: each brings an optimizer; keep one")
    for key, one in brought.items():
        if not isinstance(one, torch.optim.Optimizer):
            raise UserError(f"{key}: its `optimizer` gives {_show(one)}: it must give a torch.optim.Optimizer, or None")
        own = {id(weight) for weight in run.weights.values()}
        if not any(id(tensor) in own for group in one.param_groups for tensor in group["params"]):
            raise UserError(
                f"{key}: its optimizer holds none of the trained tensors: give it those of run.weights themselves, not "
                "copies"
            )
        closure = inspect.signature(one.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UserError(
                f"{key}: {type(one).__name__} computes the loss again in its step (it needs a closure), which this "
                "loop cannot do; choose an optimizer that steps on a gradient"
            )
    return next(iter(brought.values()), None)


def finished(part: Part, final: Any, *, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a part's `finish` gives. Raises UserError for tensors that cannot be the base's."""
    if not isinstance(final, Mapping):
        raise UserError(f"{part.key}: its `finish` gives {_show(final)}: it must give tensors by base parameter name")
    if unknown := [name for name in final if name not in base]:
        raise UserError(f"{part.key}: its `finish` gives {unknown[0]}, which the base model does not have")
    for name, tensor in final.items():
        there = base[name]
        if not isinstance(tensor, Tensor) or tensor.shape != there.shape:
            raise UserError(f"{part.key}: its `finish` gives {_show(tensor)} for {name}, which is {list(there.shape)}")
        if (
            tensor.dtype not in (torch.float32, torch.float64)
            and torch.promote_types(tensor.dtype, there.dtype) != tensor.dtype
        ):
            raise UserError(
                f"{part.key}: its `finish` gives {name} in {tensor.dtype}, which holds less than the base's "
                f"{there.dtype}: give the full-precision weights"
            )
    return dict(final)


def starts(states: Mapping[str, dict], run: Run) -> dict[str, Tensor]:
    """The start that one of the parts prepared, taken out of its state. Raises UserError for two or a wrong shape."""
    brought = {key: start for key, state in states.items() if (start := state.pop("start", None))}
    if len(brought) > 1:
        raise UserError(f"{' and '.join(brought)} cannot be combined: each brings weights to start from; keep one")
    for key, start in brought.items():
        for name, tensor in start.items():
            if name not in run.shapes or tensor.shape != run.shapes[name]:
                raise UserError(
                    f"{key}: it starts {name} from {_show(tensor)}, which is no trained tensor of this run or not in "
                    "its shape"
                )
    return next(iter(brought.values()), {})


def report(part: Part, *, run: Run, state: dict) -> Any:
    """A part's report as JSON; what JSON cannot hold is written as text, so that no finished training is lost."""
    return _json(part.report(run=run, state=state))


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_json(one) for one in value]
    if hasattr(value, "tolist"):  # a tensor, or numpy's
        return _json(value.tolist())
    if isinstance(value, bool | int | str | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{value!r}" if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
