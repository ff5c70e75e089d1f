"""Settings of a part: a dataclass field with its phase, its help and what it may be; checked when it is built."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal

from experiments.errors import UserError

PHASES = ("prepare", "train")


def setting(default: Any, *, phase: Literal["prepare", "train"] = "train", help: str = "", within: str = "",
            by_preset: bool = False) -> Any:  # fmt: skip
    """A field of a part.

    phase      "prepare" where the preparation depends on it, so that changing it prepares and trains again;
               "train" where only the training does, so that a sweep over it prepares once
    within     the interval a number must lie in, as it is printed: "(0, 1]", "[0, inf)"
    by_preset  not set unless the block sets it: a preset, or else `default`, fills it in `Part.settings()`
    """
    if phase not in PHASES:
        raise ValueError(f"phase is {phase!r}: it must be one of {', '.join(PHASES)}")
    metadata = {"phase": phase, "help": help, "within": within, "default": default}
    return dataclasses.field(default=None if by_preset else default, metadata=metadata | {"by_preset": by_preset})


def declared(part: Any) -> list[dataclasses.Field]:
    """The settings of a part (its class or an instance) in the order they are written."""
    return [f for f in dataclasses.fields(part) if "phase" in f.metadata]


def check(part: Any, key: str) -> None:
    """Refuse, by name, a setting of the wrong type or outside its interval; lists become tuples, whole numbers floats."""
    kinds = typing.get_type_hints(type(part))
    for field in declared(part):
        value, kind = getattr(part, field.name), kinds[field.name]
        if value is None and field.metadata["by_preset"]:
            continue
        if isinstance(value, list):
            value = tuple(value)
        within = field.metadata["within"]
        if not fits(value, kind) or (_number(value) and within and not inside(value, within)):
            said = describe(kind) + (f" in {within}" if within else "")
            hint = f"; write {float(value)} without quotes" if _quoted_number(value) and not fits(value, kind) else ""
            raise UserError(f"{key}.{field.name} is {value!r}: it must be {said}{hint}")
        if _number(value) and float in _options(kind):
            value = float(value)
        object.__setattr__(part, field.name, value)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from YAML is of a field's type."""
    options = _options(kind)
    if len(options) > 1:
        return any(fits(value, option) for option in options)
    origin = typing.get_origin(kind)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind))
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, typing.get_args(kind)[0]) for item in value)
    if kind is float:
        return _number(value) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def describe(kind: Any) -> str:
    """A field's type in words, for messages and tables."""
    options = _options(kind)
    if len(options) > 1:
        return " or ".join(describe(option) for option in options)
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = [repr(c) if c == "" else str(c) for c in typing.get_args(kind)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin is tuple:
        return f"a list of {typing.get_args(kind)[0].__name__.replace('str', 'names')}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}[kind]


def inside(value: float, within: str) -> bool:
    """Whether a number lies in an interval written as mathematicians do: "[0, 1)"."""
    low, high = (float(end) for end in within[1:-1].split(","))
    above = value >= low if within[0] == "[" else value > low
    below = value <= high if within[-1] == "]" else value < high
    return above and below


def _options(kind: Any) -> tuple:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _quoted_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False
