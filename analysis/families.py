"""Families of methods: a method and the blocks of its sweep, `ewc`, `ewc-s1`, `ewc-s2`. Imports nothing heavy."""

import re
from collections.abc import Iterable

SWEPT = re.compile(r"(?P<family>.+)-s(?P<number>[1-9][0-9]*)")


def family(method: str) -> str:
    """The method that a block of a sweep was made from: 'ewc-s3' -> 'ewc'; any other name is its own family."""
    swept = SWEPT.fullmatch(method)
    return swept["family"] if swept else method


def member(method: str, number: int) -> str:
    """The name of a family's block `number`, from 1: ('ewc', 3) -> 'ewc-s3'."""
    return f"{method}-s{number}"


def families(methods: Iterable[str]) -> dict[str, list[str]]:
    """Methods by family, both in the order given."""
    grouped: dict[str, list[str]] = {}
    for method in methods:
        grouped.setdefault(family(method), []).append(method)
    return grouped
