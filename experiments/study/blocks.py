"""What a block of params.yaml is made of: typed keys with bounds, default and help, and the kinds of values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, WrapValidator, create_model, model_validator

from experiments.training.settings import TrainSettings
from methods.settings import declared, describe, hint
from methods.tools.names import LONGEST, NAME


@dataclass(frozen=True)
class Form:
    """What a value must be, in the words of a message, and a hint for a wrong one."""

    words: str
    hint: Callable[[Any], str] = lambda value: ""


def key(help: str, default: Any = ...) -> Any:
    """A key of a block with its help; without a default it is required.

    With the default None the attribute is None if the key is not written, and null in the file is refused.
    """
    if isinstance(default, type | list | dict):
        return Field(default_factory=default if isinstance(default, type) else default.copy, description=help)
    return Field(default, description=help)


class Block(BaseModel):
    """A block of params.yaml. Null stands for an empty block, list or mapping, and counts as missing if required."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = {}  # former names of keys, and what they are called now
    _written: dict = PrivateAttr(default_factory=dict)

    @property
    def as_written(self) -> dict[str, Any]:
        """The block as it is written, without defaults."""
        return self._written

    @model_validator(mode="wrap")
    @classmethod
    def _validate(cls, value: Any, validate: Callable[[Any], Any]) -> Any:
        if value is not None and not isinstance(value, dict):
            return validate(value)
        written = value or {}
        block = validate({name: inner for name, inner in written.items() if not cls._is_missing(name, inner)})
        block._written = written
        return block

    @classmethod
    def _is_missing(cls, name: str, value: Any) -> bool:
        """Whether a value is null where a list, a mapping or a required value is expected."""
        field = cls.model_fields.get(name)
        if value is not None or field is None:
            return False
        kinds = {get_origin(kind) or kind for kind in (field.annotation, *get_args(field.annotation))}
        return field.is_required() or not kinds.isdisjoint({list, dict})


def bounds(within: str) -> dict[str, float]:
    """The arguments of pydantic's Field for an interval: {"ge": 1} for "[1, inf)"."""
    if not within:
        return {}
    low, high = within[1:-1].split(", ")
    ends = {"ge" if within[0] == "[" else "gt": float(low), "le" if within[-1] == "]" else "lt": float(high)}
    return {name: int(end) if end.is_integer() else end for name, end in ends.items() if isfinite(end)}


def settings_block(kind: type, *, name: str, without: tuple[str, ...] = ()) -> type[Block]:
    """The block with the settings of a part or of training; every key may be left out."""
    kinds, keys = get_type_hints(kind), {}
    for field in declared(kind):
        if field.name not in without:
            type_, within = kinds[field.name], field.metadata["within"]
            options = get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,)
            bounded = [Annotated[o, Field(**bounds(within))] if o in (int, float) else o for o in options]
            settings = Annotated[Union[tuple(bounded)], Form(describe(type_, within))]  # noqa: UP007 (made at run time)
            keys[field.name] = (settings, key(field.metadata["help"], field.metadata["default"]))
    return create_model(name, __base__=Block, __doc__=None, **keys)


def text(pattern: str, words: str) -> Any:
    """A text that must match a pattern, with the pattern in words."""
    return Annotated[str, Field(pattern=pattern), Form(words)]


Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$", max_length=LONGEST)]
Text = text(r"\S", "text that is not empty")
Sha256 = text("^[0-9a-fA-F]{64}$", "a sha256: 64 hexadecimal digits")
Package = text(r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*$", "NAME==VERSION")
Metric = text(r"^[^\s,]+(,[^\s,]+)?$", "a metric of the task, or METRIC,FILTER")
Source = text(
    r"^(hub:[^@\s]+(@\S*)?|pypi:[^/\s]+==[^/\s]+/.+\.gguf|path:.+|random:.+)$",
    "hub:NAME@REVISION, pypi:PACKAGE==VERSION/FILE.gguf, path:DIR or random:ARCHITECTURE",
)
Count = Annotated[int, Field(ge=1), Form("a whole number from 1")]
CountOrNone = Annotated[int, Field(ge=0), Form("a whole number from 0")]
CountOrAll = Annotated[
    Annotated[int, Field(ge=1)] | Literal["all"], Form("a whole number from 1, or all", lambda value: hint(value, int))
]
Seed = Annotated[int, Field(ge=0, lt=2**63), Form(f"a whole number from 0 to {2**63 - 1}")]
Seeds = Annotated[list[Seed], Field(min_length=1), Form(f"a list of whole numbers from 0 to {2**63 - 1}")]
Positive = Annotated[float, Field(gt=0), Form("a number above 0")]
Share = Annotated[
    float,
    Field(ge=0, lt=1),
    WrapValidator(lambda value, check: (check(value), value)[1]),  # keeps 0 an integer in the files of tasks
    Form("a share of 1, in [0, 1)", lambda value: f"; {value} % is {value / 100:g}" if value in range(1, 100) else ""),
]
Dtype = Literal["bfloat16", "float16", "float32", "float64"]
Names = list[str]
Configured = Annotated[Text | dict, Form("text that is not empty or a mapping")]
Suite = Annotated[list[str], Field(min_length=1), Form("a list of names of tasks, groups or suites")]
Chosen = Annotated[list[str], Field(min_length=1)]
Train = settings_block(TrainSettings, name="Train")
