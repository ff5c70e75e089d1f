"""Splits that depend on the rows alone: no seed, no order, no machine.

Rows are put in the order of a sha256 and taken from the front, so a row's split does not depend on where it stood, and
a sample of n lies in the sample of n+1. Which rows are copies of one another is asked of `sameness`.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from experiments.data.sameness import sameness
from methods.errors import UserError

Row = dict[str, Any]
SHOWN = 80  # characters of a text in a message
_NUMBERING = {"id", "idx", "ind", "index"}  # columns that number a row: two rows that differ in them alone are the same


@dataclass(frozen=True, kw_only=True)
class Split:
    """Three disjoint sets of rows, and what was dropped: copies within the rows, and between the sets, with a pair of these to show."""

    train: list[Row]
    probe: list[Row]
    test: list[Row]
    duplicates_within: int
    duplicates_between: int
    pair: str = ""


def normalised(text: str) -> str:
    """Lower case, compatibility forms folded, runs of anything but letters and digits as one space: for the order alone.

    It is coarse ("7 + 3" and "7 - 3" are one), so it says nothing of copies. It stays as it is because any other one would
    deal the rows of every domain anew into train, probe and test.
    """
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def text_hash(text: str) -> str:
    """Hex sha256 of the normalised text, by which rows are dealt."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()


def row_hash(row: Row) -> str:
    """Hex sha256 of a row, whatever the order of its columns, without the columns that only number it."""
    content = {name: value for name, value in row.items() if name not in _NUMBERING}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def distinct(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """Rows in the order of their hash, each once, and the number of copies dropped."""
    by_hash: dict[str, Row] = {}
    count = 0
    for count, row in enumerate(rows, 1):
        by_hash.setdefault(row_hash(row), row)
    return [by_hash[key] for key in sorted(by_hash)], count - len(by_hash)


def sample(rows: Iterable[Row], *, test: int, probe: int) -> Split:
    """The first `test` rows by hash and the next `probe` ones; where there are fewer, all of them, test first."""
    ordered, copies = distinct(rows)
    return Split(
        train=[],
        probe=ordered[test : test + probe],
        test=ordered[:test],
        duplicates_within=copies,
        duplicates_between=0,
    )


def three_way(
    rows: Iterable[Row],
    *,
    question: Callable[[Row], str],
    train: int | str,
    probe: int,
    test: int | str,
    test_rows: Iterable[Row] | None = None,
    where: str = "rows",
) -> Split:
    """Split by hash of the normalised question: test first, then probe, then train.

    No question stands in two sets: a row whose question is in an earlier set already (`sameness`) is dropped and counted. With
    `test_rows` the test set is taken from those alone. `train` may be "all" (what is left), and so may `test` with
    test_rows. Raises UserError where there are too few rows.
    """
    ordered, copies = distinct(rows)
    deal = {id(row): text_hash(question(row)) for row in ordered}
    ordered.sort(key=lambda row: deal[id(row)])  # stable: rows of one question stay in the order of their own hash
    same = {id(row): sameness(question(row)) for row in ordered}
    between, pair = 0, ""
    if test_rows is None:
        taken, rest = ordered[: _number(test, where)], ordered[_number(test, where) :]
        seen = {same[id(row)]: row for row in reversed(taken)}
        _enough(taken, test, "test", len(ordered), where)
    else:
        pool, more = distinct(test_rows)
        copies += more
        taken, rest = pool if test == "all" else pool[: _number(test, where)], ordered
        _enough(taken, len(pool) if test == "all" else test, "test", len(pool), where)
        # also against the test rows that are not scored: a later, larger test set must not meet training rows
        seen = {sameness(question(row)): row for row in reversed(pool)}
    sets = []
    for name, wanted in (("probe", probe), ("train", train)):
        free = [row for row in rest if same[id(row)] not in seen]
        if dropped := [row for row in rest if same[id(row)] in seen]:
            between += len(dropped)
            pair = pair or _pair(dropped[0], seen[same[id(dropped[0])]], question)
        number = len(free) if wanted == "all" and name == "train" else _number(wanted, where)
        _enough(free[:number], number, name, len(ordered), where, copies=between, pair=pair)
        sets.append(free[:number])
        seen |= {same[id(row)]: row for row in free[:number]}
        rest = free[number:]
    return Split(
        train=sets[1], probe=sets[0], test=taken, duplicates_within=copies, duplicates_between=between, pair=pair
    )


def halves(texts: Iterable[str]) -> tuple[list[str], list[str], int]:
    """Different texts in two halves by the first bit of their hash, each in the order of the hash, and the copies."""
    by_key: dict[tuple[str, str], str] = {}
    count = 0
    for count, text in enumerate(texts, 1):
        by_key.setdefault((text_hash(text), sameness(text)), text)
    first, second, known = [], [], set()
    for key in sorted(by_key):
        if key[1] in known:  # one text in two spellings that are dealt differently
            continue
        known.add(key[1])
        # the first bit chooses the half and the rest the order, so a larger number asked for never moves a text across
        (first if int(key[0][0], 16) < 8 else second).append(by_key[key])
    return first, second, count - len(first) - len(second)


def _pair(copy: Row, kept: Row, question: Callable[[Row], str]) -> str:
    """Two rows of one question as a message shows them."""
    show = lambda row: f"{question(row)[:SHOWN]!r}" + (f" ({row.at})" if hasattr(row, "at") else "")
    return f"{show(copy)} is a copy of {show(kept)}"


def _number(wanted: int | str, where: str) -> int:
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 0:
        raise UserError(
            f"{where}: a split of {wanted!r} rows; write a whole number"
            " (train, and test with test_rows, may also be `all`)"
        )
    return wanted


def _enough(
    rows: list[Row], wanted: int, name: str, total: int, where: str, *, copies: int = 0, pair: str = ""
) -> None:
    if len(rows) < max(wanted, 0 if name == "probe" else 1):
        told = (
            (
                f" ({copies} are left out because their questions stand in an earlier set: {pair}). Lower the numbers under `split`, or let "
                "`question` name what tells the rows apart"
            )
            if copies
            else ": lower the numbers under `split`"
        )
        raise UserError(
            f"{where}: {max(wanted, 1)} {name} rows are asked for, {len(rows)} can be had out of {total}{told}"
        )
