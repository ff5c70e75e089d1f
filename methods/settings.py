"""Settings of a part: dataclass fields with phase, help, type and interval, checked when the part is built."""

import contextlib
import dataclasses
import functools
import math
import types
import typing
from typing import Any, Literal

from methods.errors import UserError

PHASES = ("prepare", "train")


def setting(
    default: Any, *, phase: Literal["prepare", "train"] = "train", help: str = "", within: str = "", path: bool = False
) -> Any:
    """A field of a part.

    phase      "prepare" if the preparation depends on the setting: a change prepares and trains again;
               "train" if only the training does: a sweep over it prepares once
    within     the interval a number must lie in, as it is printed: "(0, 1]", "[0, inf)"
    path       the value is a file or folder that is read, or a list of them: a change of its content makes a cell stale
    """
    if phase not in PHASES:
        raise ValueError(f"phase is {phase!r}: it must be one of {', '.join(PHASES)}")
    metadata = {"phase": phase, "help": help, "within": within, "default": default, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


def declared(part: Any) -> list[dataclasses.Field]:
    """The settings of a part, its class or an instance, in the order of their definition."""
    return [f for f in dataclasses.fields(part) if "phase" in f.metadata]


@functools.cache
def _kinds(part: type) -> dict[str, Any]:
    """The types of a part's fields."""
    return typing.get_type_hints(part)


def check(part: Any, key: str) -> None:
    """Check every setting of a part; lists become tuples, and whole numbers become floats where a float is expected.

    Raises UserError that names the first setting of a wrong type or outside its interval.
    """
    kinds = _kinds(type(part))
    for field in declared(part):
        value, kind = getattr(part, field.name), kinds[field.name]
        refuse(value, kind, within=field.metadata["within"], where=f"{key}.{field.name}")
        if isinstance(value, list):
            value = tuple(value)
        if _number(value) and float in _options(kind):
            value = float(value)
        object.__setattr__(part, field.name, value)


def refuse(value: Any, kind: Any, *, within: str = "", where: str) -> None:
    """Raise UserError unless a value has its type and lies in its interval; `where` is its path in the message."""
    if fits(value, kind) and not (_number(value) and within and not inside(value, within)):
        return
    raise UserError(f"{where} is {shown(value)}: it must be {describe(kind, within)}{hint(value, kind)}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from YAML has a field's type."""
    options = _options(kind)
    if len(options) > 1:
        return any(fits(value, option) for option in options)
    (kind,) = options
    origin = typing.get_origin(kind)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind))
    if origin in (tuple, list):
        return isinstance(value, list | tuple) and all(fits(item, typing.get_args(kind)[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(item, option)
            for pair in value.items()
            for item, option in zip(pair, typing.get_args(kind), strict=True)
        )
    if kind is float:
        return _number(value) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def describe(kind: Any, within: str = "") -> str:
    """A type and an interval in words, for messages and tables: "a whole number from 1"."""
    if within:
        low, high = within[1:-1].split(", ")
        bounds = f"in {within}" if high != "inf" else f"from {low}" if within[0] == "[" else f"above {low}"
        return f"{describe(kind)} {bounds}"
    options = _options(kind)
    if len(options) > 1:
        return " or ".join(describe(option) for option in options)
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = [repr(c) if c == "" else str(c) for c in typing.get_args(kind)]
        return f"the word {choices[0]}" if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin is dict:
        return "a mapping of names to " + {str: "names", float: "numbers"}[typing.get_args(kind)[1]]
    if origin in (tuple, list):
        return "a list of " + {str: "names", int: "whole numbers", float: "numbers"}[typing.get_args(kind)[0]]
    return {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        dict: "a mapping",
        list: "a list",
        types.NoneType: "null",
    }[kind]


def shown(value: Any) -> str:
    """A value as YAML writes it, on one line and cut to the length of a message."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def hint(value: Any, kind: Any) -> str:
    """What was probably meant by a value of another type: "; write [a]", "; put it in quotes"."""
    if fits(value, kind):
        return ""
    for option in _options(kind):
        if typing.get_origin(option) in (tuple, list) and fits(value, typing.get_args(option)[0]):
            return f"; write [{value}]"
    if _number(value) and fits(str(value), kind):
        return "; put it in quotes"
    if kind is bool and isinstance(value, str) and value.lower() in ("yes", "on", "no", "off"):
        return f"; write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    for number in (int, float) if isinstance(value, str) else ():
        with contextlib.suppress(ValueError):
            if fits(number(value), kind):
                return f"; write {number(value)} without quotes"
    return ""


def inside(value: float, within: str) -> bool:
    """Whether a number lies in an interval in mathematical notation, such as "[0, 1)"."""
    low, high = (float(end) for end in within[1:-1].split(","))
    above = value >= low if within[0] == "[" else value > low
    below = value <= high if within[-1] == "]" else value < high
    return above and below


def _options(kind: Any) -> tuple:
    kind = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
