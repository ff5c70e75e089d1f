"""Null cells: a template would print them as the words None or nan, on which a model would be trained and scored."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

_WRITTEN = ContextVar("whether a template writes null as the word None", default=False)


class NullCell(Exception):
    """A template, or a column that stands for a text, gave null."""


def is_null(value: Any) -> bool:
    """None or NaN, also inside a list or mapping."""
    if isinstance(value, list | tuple):
        return any(map(is_null, value))
    if isinstance(value, Mapping):
        return any(map(is_null, value.values()))
    return value is None or (isinstance(value, float) and value != value)


def refuse(value: Any) -> Any:
    """`value` unless it is null."""
    if is_null(value):
        raise NullCell
    return value


def finalize(value: Any) -> Any:
    """Jinja's `finalize`, which is called with all that a template prints: null is refused, except in `written`."""
    return value if _WRITTEN.get() else refuse(value)


@contextlib.contextmanager
def written() -> Iterator[None]:
    """Let templates write null as lm-eval writes it, as the word None."""
    token = _WRITTEN.set(True)
    try:
        yield
    finally:
        _WRITTEN.reset(token)


def describe(row: Mapping[str, Any], used: Iterable[str] = ()) -> str:
    """A row's null columns (those among `used` if there are any) and what to do about them, for a message."""
    empty = [column for column, value in row.items() if is_null(value)]
    named = [column for column in empty if column in set(used)] or empty
    what = f"{', '.join(map(repr, named))} is null" if named else "a template gives null"
    return (
        f"{what}, which would be written as the word None: correct the rows, or let the template test for it "
        "(`{% if column %}…{% endif %}`), or set `nulls: empty` in the block to read every null cell as empty text"
    )


def emptied(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with "" in its null cells; lists are left as they are."""
    return {
        column: "" if not isinstance(value, list | tuple | Mapping) and is_null(value) else value
        for column, value in row.items()
    }
