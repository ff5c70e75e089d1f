"""What the hooks of parts give back, looked at before it is used: what is not as methods/part.py says is refused by the part's name."""

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from methods.errors import UserError
from methods.part import Part, Run

# what a part may do without having a share in how the weights are trained
APART = {"settings", "resolved", "look", "finish", "report", "memory"}
TRAINING = [name for name, value in vars(Part).items() if callable(value) and name[0] != "_" and name not in APART]


def overridden(parts: Sequence[Part], hook: str) -> bool:
    """Whether one of the parts has this hook."""
    return any(getattr(type(part), hook) is not getattr(Part, hook) for part in parts)


def finishers(parts: Sequence[Part]) -> list[Part]:
    """The parts that end the order of `finish` and act in no hook of a training: cells that differ in these alone share one."""
    finishing = [part for part in parts if overridden([part], "finish")]
    return list(itertools.takewhile(_acts_in_finish_alone, reversed(finishing)))[::-1]


def _acts_in_finish_alone(part: Part) -> bool:
    return not part.capabilities and not any(overridden([part], hook) for hook in TRAINING)


def trainers(parts: Sequence[Part]) -> list[Part]:
    """All other parts."""
    return [part for part in parts if part not in finishers(parts)]


def batch(part: Part, *, run: Run, state: dict, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The micro-batch as the part's `batch` changes it. Raises UserError for what cannot be trained on as it is."""
    if not overridden([part], "batch"):
        return before
    found = part.batch(run=run, state=state, batch=before)
    said = f"{part.key}: the micro-batch that its `batch` gives"
    if not isinstance(found, Mapping) or not all(
        isinstance(found.get(name), Tensor) for name in ("input_ids", "labels")
    ):
        raise UserError(f"{said} is {_told(found)}: it must be a dict with input_ids and labels")
    ids = found["input_ids"]
    for name, tensor in found.items():
        if name in before and (
            tensor.shape != ids.shape
            or tensor.dim() != 2
            or tensor.device.type != "cpu"
            or tensor.dtype != before[name].dtype
        ):
            raise UserError(
                f"{said} has {name} {_told(tensor)} beside input_ids {_told(ids)}: "
                f"it must be {before[name].dtype}, (batch, tokens), on the CPU"
            )
    mask = found.get("attention_mask")
    if mask is not None and (mask[:, 1:] > mask[:, :-1]).any():
        raise UserError(
            f"{said} has an attention_mask with a 0 before a 1: padding stands on the right, and no other mask is read"
        )
    return dict(found)


def worked(batch: Mapping[str, Tensor]) -> tuple[list[int], int]:
    """Tokens of each example of a micro-batch, without padding, and how many of them a loss is taken of."""
    ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    if positions is not None:  # packed: an example begins where its positions do
        starts = (positions.flatten() == 0).nonzero().flatten().tolist()
        lengths = [end - start for start, end in zip(starts, [*starts[1:], positions.numel()])]
    else:
        lengths = mask.sum(1).tolist() if mask is not None else [ids.shape[1]] * len(ids)
    return lengths, int((batch["labels"][:, 1:] != -100).sum())


def term(part: Part, hook: str, value: Any, *, like: Tensor) -> Tensor | float | None:
    """What a part's `loss` or `before_clip` adds to the 0-dim `like`. Raises UserError for what is not one number."""
    if value is None or (hook == "before_clip" and isinstance(value, int | float)):
        return value
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        raise UserError(
            f"{part.key}: its `{hook}` gives {_told(value)}: it must give a 0-dim tensor of floats, or None"
        )
    if value.device != like.device and value.device.type != "cpu":
        raise UserError(f"{part.key}: its `{hook}` gives a tensor on {value.device}, the run is on {like.device}")
    return value.reshape(())


def optimizer(parts: Sequence[Part], *, run: Run, **settings: Any) -> torch.optim.Optimizer | None:
    """The optimizer that one of the parts brings. Raises UserError for two, and for one that the loop cannot drive."""
    found = {part.key: one for part in parts if (one := part.optimizer(run=run, **settings)) is not None}
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} cannot be combined: each brings an optimizer; keep one")
    for key, one in found.items():
        if not isinstance(one, torch.optim.Optimizer):
            raise UserError(f"{key}: its `optimizer` gives {_told(one)}: it must give a torch.optim.Optimizer, or None")
        own = {id(weight) for weight in run.weights.values()}
        if not any(id(tensor) in own for group in one.param_groups for tensor in group["params"]):
            raise UserError(
                f"{key}: its optimizer holds none of the trained tensors: give it those of run.weights themselves, not copies"
            )
        closure = inspect.signature(one.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UserError(
                f"{key}: {type(one).__name__} computes the loss again in its step (it needs a closure), which this loop "
                "cannot do; choose an optimizer that steps on a gradient"
            )
    return next(iter(found.values()), None)


def finished(part: Part, final: Any, *, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a part's `finish` gives. Raises UserError for tensors that cannot be the base's."""
    if not isinstance(final, Mapping):
        raise UserError(
            f"{part.key}: its `finish` gives {_told(final)}: it must give a dict of tensors by base parameter name"
        )
    if unknown := [name for name in final if name not in base]:
        raise UserError(f"{part.key}: its `finish` gives {unknown[0]}, which the base model does not have")
    for name, tensor in final.items():
        there = base[name]
        if not isinstance(tensor, Tensor) or tensor.shape != there.shape:
            raise UserError(f"{part.key}: its `finish` gives {_told(tensor)} for {name}, which is {list(there.shape)}")
        if (
            tensor.dtype not in (torch.float32, torch.float64)
            and torch.promote_types(tensor.dtype, there.dtype) != tensor.dtype
        ):
            raise UserError(
                f"{part.key}: its `finish` gives {name} in {tensor.dtype}, which holds less than the base's {there.dtype}: "
                "give the full-precision weights"
            )
    return dict(final)


def starts(states: Mapping[str, dict], run: Run) -> dict[str, Tensor]:
    """The weights that one of the parts prepared as the start, taken out of its state. Raises UserError for two, and for strange ones."""
    found = {key: start for key, state in states.items() if (start := state.pop("start", None))}
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} cannot be combined: each brings weights to start from; keep one")
    for key, start in found.items():
        for name, tensor in start.items():
            if name not in run.shapes or tensor.shape != run.shapes[name]:
                raise UserError(
                    f"{key}: it starts {name} from {_told(tensor)}, which is no trained tensor of this run or not in its shape"
                )
    return next(iter(found.values()), {})


def report(part: Part, *, run: Run, state: dict) -> Any:
    """A part's report as JSON takes it: what JSON cannot hold is written as text, so that nothing trained is lost over it."""
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


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{value!r}" if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
