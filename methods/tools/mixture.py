"""Rows of other text in a step: in place of some of the domain's rows, or beside all of them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Generator

from methods.part import Row
from methods.tools.costs import Added

Mode = Literal["swap", "add"]


def added(*, share: float, mode: Mode, **known: Any) -> Added:
    """What `mixed` adds to a step; `known` are the other fields of `Added`."""
    if mode == "swap":
        return Added(trained=share, replaced=share, **known)
    return Added(trained=share / (1 - share), **known)


def mixed(
    rows: list[Row], other: Callable[[], Iterator[Row]], *, share: float, mode: Mode, draw: Generator
) -> list[Row]:
    """The rows of a step with `share` of its tokens from `other`, to within one row, and on average exactly.

    other   other() → rows without end, without an index; the same ones in each call
    mode    "swap": rows of the domain are left out that hold as many tokens; "add": none are
    """
    domain = [row for row in rows if "index" in row]  # the others are what another part has added
    if mode == "add":
        return [*rows, *filled(other(), share / (1 - share) * tokens(domain), draw)]
    order = torch.randperm(len(domain), generator=draw).tolist()
    left_out = filled((domain[i] for i in order), share * tokens(domain), draw)
    indices = {row["index"] for row in left_out}
    kept = [row for row in rows if row.get("index") not in indices]
    taken = filled(other(), tokens(left_out), draw)
    return [*kept, *taken] or [next(other())]  # a step has at least one row


def filled(rows: Iterable[Row], room: float, draw: Generator) -> list[Row]:
    """The first rows that hold `room` tokens, to within the last one, and on average exactly."""
    taken = []
    for row in rows:
        size = len(row["input_ids"])
        if size > room and size * float(torch.rand((), generator=draw)) >= room:
            break
        taken.append(row)
        room -= size
    return taken


def tokens(rows: Iterable[Row]) -> int:
    return sum(len(row["input_ids"]) for row in rows)
