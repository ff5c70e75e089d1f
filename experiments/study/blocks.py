"""What each block of params.yaml may hold: one table of keys a block, each key with its type and what its value may be.

`check` goes through a block with its table and refuses, by its whole path, an unknown key, a missing one, a value of
another type and one outside its interval. What depends on several blocks is in experiments/study/config.py.
"""

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from experiments.training.settings import TrainSettings
from methods.errors import UserError
from methods.settings import declared, refuse, shown
from methods.tools.names import unknown

Table = Mapping[str, "Key"]


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a block.

    kind      the type of its value, as in a part's settings; dict with `keys` for a block of its own
    within    the interval a number must lie in
    matches   the regular expression that a text must match, and `form` says it in words
    required  whether the block is refused without it
    keys      the table of the block that stands here
    share     whether the number is a share of 1, so that a larger one may be meant in percent
    """

    kind: Any = str
    within: str = ""
    matches: str = ""
    form: str = ""
    required: bool = False
    keys: Table | None = None
    share: bool = False


def check(block: Any, table: Table, *, where: str, required: bool = True) -> None:
    """Refuse by its path whatever in `block` is not as `table` says. An empty (null) block or list counts as one without entries."""
    refuse({} if block is None else block, dict, where=where or "params.yaml")
    for key in block or {}:
        if key not in table:
            raise unknown("key", key, table, where=where or "params.yaml")
    for name, key in table.items():
        path = f"{where}.{name}" if where else name
        value = (block or {}).get(name)
        if name not in (block or {}) or (value is None and _empty(key.kind)):
            if key.required and required:
                raise UserError(
                    f"{where or 'params.yaml'} has no `{name}`: add it{f' ({key.form})' if key.form else ''}"
                )
            if name in (block or {}) and key.keys is not None:
                check(None, key.keys, where=path)  # `jsonl:` with nothing behind it lacks its path
            continue
        if key.share and isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < 100:
            raise UserError(
                f"{path} is {value}: it must be a share of 1, in {key.within}; {value} % is {value / 100:g}"
            )
        refuse(value, key.kind, within=key.within, where=path)
        if key.required and value == []:
            raise UserError(f"{path} is empty: name at least one")
        if key.matches and isinstance(value, str) and not re.fullmatch(key.matches, value):
            raise UserError(f"{path} is {shown(value)}: it must be {key.form}")
        if key.keys is not None and isinstance(value, dict):
            check(value, key.keys, where=path)


def refuse_odd(value: Any, *, where: str = "", above: tuple[int, ...] = (), seen: set[int] | None = None) -> None:
    """Refuse by its path what YAML can write and no file of settings can hold: keys that are not text, dates, bytes and sets,
    half characters, and aliases inside of their own anchor."""
    seen = set() if seen is None else seen
    if id(value) in above:
        raise UserError(
            f"{where} holds itself: an alias (*) stands inside of its own anchor (&); write out what is meant"
        )
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UserError(
                f"{where} is {shown(value)}: it holds half of a character (\\ud800 to \\udfff); write the character itself"
            )
    elif isinstance(value, dict | list):
        if id(value) in seen:
            return
        seen.add(id(value))
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, list):
                path = where
            elif isinstance(key, str):
                refuse_odd(key, where=f"a key of {where or 'params.yaml'}")
                path = f"{where}.{key}" if where else key
            elif isinstance(key, int) and where.endswith(".doc_to_choice"):  # lm-eval takes the values alone
                path = where
            else:
                raise UserError(f"{where or 'params.yaml'}: the key {shown(key)} is not text: put it in quotes")
            refuse_odd(inner, where=path, above=(*above, id(value)), seen=seen)
    elif isinstance(value, date):
        raise UserError(f"{where} is {value}, which YAML takes for a date: put it in quotes")
    elif value is not None and not isinstance(value, bool | int | float):
        raise UserError(f"{where} is {shown(value)}: write text, a number, true, false, null, a list or a mapping")


def _empty(kind: Any) -> bool:
    """Whether nothing at all, as YAML has it behind a key without a value, is an empty block or list of this kind."""
    return any(
        option is dict or typing.get_origin(option) in (dict, list)
        for option in (typing.get_args(kind) or (kind,)) + (kind,)
    )


def train_keys() -> dict[str, Key]:
    """Training settings as a block may write them."""
    kinds = typing.get_type_hints(TrainSettings)
    return {
        field.name: Key(kind=kinds[field.name], within=field.metadata["within"]) for field in declared(TrainSettings)
    }


NAMES = list[str]
DTYPE = Literal["bfloat16", "float16", "float32", "float64"]
SHA256 = {"matches": "[0-9a-fA-F]{64}", "form": "a sha256: 64 hexadecimal digits"}
PACKAGE = {"matches": r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*", "form": "NAME==VERSION"}
FILLED = {"matches": r"(?s).*\S.*", "form": "text that is not empty"}
METRIC = {"matches": r"[^\s,]+(,[^\s,]+)?", "form": "a metric of the task, or METRIC,FILTER"}
SOURCE = {
    "matches": r"hub:[^@\s]+(@\S*)?|pypi:[^/\s]+==[^/\s]+/.+\.gguf|path:.+|random:.+",
    "form": "hub:NAME@REVISION, pypi:PACKAGE==VERSION/FILE.gguf, path:DIR or random:ARCHITECTURE",
}

TRAIN = train_keys()
NULLS = Key(kind=Literal["empty"])
SHAPED = {"set": Key(kind=dict), "columns": Key(kind=NAMES | dict[str, str])}
HUB = {
    "path": Key(**FILLED, required=True),
    "name": Key(kind=str | NAMES),
    "split": Key(**FILLED, required=True),
    "revision": Key(**FILLED),
    "data_files": Key(kind=str | NAMES | dict),
    **SHAPED,
}
PYPI = {"package": Key(**PACKAGE, required=True), "path": Key(kind=str | NAMES), "requests": Key(**FILLED), **SHAPED}
JSONL = {"path": Key(**FILLED, required=True), **SHAPED}
ROWS = {
    "hub": Key(kind=dict, keys=HUB),
    "pypi": Key(kind=dict, keys=PYPI),
    "jsonl": Key(kind=str | dict, **FILLED, keys=JSONL),
}
COUNT = Key(kind=int, within="[1, inf)")
COUNT_OR_NONE = Key(kind=int, within="[0, inf)")
COUNT_OR_ALL = Key(kind=int | Literal["all"], within="[1, inf)", required=True)

MODEL = {
    "source": Key(**SOURCE, required=True),
    "sha256": Key(**SHA256),
    "bin_sha256": Key(**SHA256),
    "dtype": Key(kind=DTYPE),
    "compute_dtype": Key(kind=DTYPE),
    "note": Key(),
    "licence": Key(),
    "config": Key(kind=dict),
    "architecture": Key(kind=dict),
    "seed": Key(kind=int, within="[0, 9223372036854775807]"),
    "parameters": COUNT,
    "layers": COUNT,
    "width": COUNT,
    "processes": COUNT,
    "train": Key(kind=dict, keys=TRAIN),
}
SCORED = {
    "task": Key(kind=str | dict, **FILLED, required=True),
    "metric": Key(**METRIC, required=True),
    "chance": Key(kind=float, within="[0, 1)", share=True, required=True),
    "licence": Key(),
    "rows": Key(kind=dict, keys=ROWS, required=True),
    **SHAPED,
    "nulls": NULLS,
}
TASK = SCORED | {"test": COUNT, "probe": COUNT_OR_NONE}
SPLIT = {"train": COUNT_OR_ALL, "probe": Key(kind=int, within="[0, inf)", required=True), "test": COUNT_OR_ALL}
DOMAIN = SCORED | {
    "question": Key(**FILLED, required=True),
    "test_rows": Key(kind=dict, keys=ROWS),
    "split": Key(kind=dict, keys=SPLIT, required=True),
    "retention": Key(kind=NAMES),
    "transfer": Key(kind=NAMES),
    "probes": Key(kind=NAMES),
    "why": Key(),
    "train": Key(kind=dict, keys=TRAIN),
}
GENERAL = {
    "rows": Key(kind=dict, keys=ROWS, required=True),
    "text": Key(**FILLED),
    "nulls": NULLS,
    "importance": COUNT,
    "perplexity": COUNT,
    "probe": COUNT_OR_NONE,
    "max_words": COUNT,
    "licence": Key(),
    "note": Key(),
}
GRID = {
    "models": Key(kind=NAMES, required=True),
    "domains": Key(kind=NAMES, required=True),
    "methods": Key(kind=NAMES, required=True),
    "seeds": Key(kind=list[int], required=True),
}
EVALUATE = {"scorer": Key(kind=Literal["shared-prefix", "hflm"]), "batch_size": COUNT}
TUNE = {"methods": Key(kind=dict), "epochs": Key(kind=float, within="(0, inf)")}
DATA = {"source": Key(kind=Literal["pypi", "hub"])}
ARCHIVE = {
    "commit": Key(
        matches="[0-9a-f]{40}", form="the 40 hexadecimal digits of the commit that made the results", required=True
    ),
    "known": Key(kind=NAMES, form="in sentences, what is known against the results", required=True),
}
TOP = {
    "title": Key(),
    "device": Key(kind=Literal["auto", "cpu", "cuda"]),
    "not_a_result": Key(kind=bool),
    "grid": Key(kind=dict, keys=GRID, required=True),
    "data": Key(kind=dict, keys=DATA),
    "packages": Key(kind=dict),
    "models": Key(kind=dict, required=True),
    "tasks": Key(kind=dict),
    "domains": Key(kind=dict, required=True),
    "general": Key(kind=dict, keys=GENERAL, required=True),
    "methods": Key(kind=dict, required=True),
    "train": Key(kind=dict, keys=TRAIN, required=True),
    "evaluate": Key(kind=dict, keys=EVALUATE),
    "tune": Key(kind=dict, keys=TUNE),
    "archive": Key(kind=dict, keys=ARCHIVE),
}
NAMED = {"models": MODEL, "tasks": TASK, "domains": DOMAIN}  # blocks of named blocks
