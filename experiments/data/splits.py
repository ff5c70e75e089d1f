"""Split rows by their content alone: no seed, order or machine matters.

Rows are sorted by a sha256 and taken from the front, so a row's split does not depend on its position in the file, and
a sample of n rows is part of the sample of n+1 rows. `sameness` decides which rows ask the same question.
"""

import hashlib
import json
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.data.sameness import sameness
from methods.errors import UserError

Row = dict[str, Any]
SHOWN = 80  # characters of a text in a message
_NUMBERING = {"id", "idx", "ind", "index"}  # columns that only number a row: rows that differ only in them are copies


@dataclass(frozen=True, kw_only=True)
class Split:
    """Three disjoint sets of rows, and the numbers of dropped copies, within the rows and between the sets.

    pair  one dropped row and the row that it copies, for a message
    """

    train: list[Row]
    probe: list[Row]
    test: list[Row]
    duplicates_within: int
    duplicates_between: int = 0
    pair: str = ""


def normalised(text: str) -> str:
    """Lower case with compatibility forms folded; anything but letters and digits becomes one space.

    It only sorts rows. It is too coarse to find copies ("7 + 3" and "7 - 3" are equal), and it must not change, because
    any other normalisation would split the rows of every domain differently.
    """
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def text_hash(text: str) -> str:
    """Hex sha256 of the normalised text, by which rows are sorted."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()


def row_hash(row: Row) -> str:
    """Hex sha256 of a row, independent of the order of its columns and of the columns that only number it."""
    content = {name: value for name, value in row.items() if name not in _NUMBERING}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def without_copies(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """The distinct rows sorted by their hash, and the number of copies dropped."""
    by_hash: dict[str, Row] = {}
    rows = list(rows)
    for row in rows:
        by_hash.setdefault(row_hash(row), row)
    return [by_hash[key] for key in sorted(by_hash)], len(rows) - len(by_hash)


def sample(rows: Iterable[Row], *, test: int | str, probe: int, settle: int = 0) -> Split:
    """The first `test` rows by hash, the next `probe` rows, and as `train` the last `settle` rows.

    If there are fewer, test gets its rows before the probe, and settling gets only what both leave. "all" leaves these
    rows to the others.
    """
    ordered, copies = without_copies(rows)
    test = max(len(ordered) - probe - settle, 1) if test == "all" else test
    last = ordered[max(test + probe, len(ordered) - settle) :]
    drawn = {"train": last, "probe": ordered[test : test + probe], "test": ordered[:test]}
    return Split(**drawn, duplicates_within=copies)


def three_way(
    rows: Iterable[Row],
    *,
    question: Callable[[Row], str],
    train: int | str,
    probe: int,
    test: int | str,
    distinct: bool = False,
    test_rows: Iterable[Row] | None = None,
    where: str = "rows",
) -> Split:
    """Split by hash of the normalised question: test first, then probe, then train.

    No question is in two sets: a row whose question is already in an earlier set (`sameness`) is dropped and counted.
    With `distinct` the probe, and a test set without `test_rows`, have one row of a question.
    With `test_rows` the test set is taken from these rows only. `train` may be "all" (every remaining row), and so may
    `test` with `test_rows`. Raises UserError if there are too few rows.
    """
    ordered, copies = without_copies(rows)
    ordered.sort(key=lambda row: text_hash(question(row)))  # stable: rows of one question stay sorted by their own hash
    same = {id(row): sameness(question(row)) for row in ordered}
    between, pair = 0, ""
    if test_rows is None:
        taken, rest = _front(ordered, _number(test, where), same if distinct else None)
        seen = {same[id(row)]: row for row in reversed(taken)}
        _enough(taken, test, "test", len(ordered), where)
    else:
        pool, more = without_copies(test_rows)
        copies += more
        taken, rest = pool if test == "all" else pool[: _number(test, where)], ordered
        _enough(taken, len(pool) if test == "all" else test, "test", len(pool), where)
        # compare with the test rows that are not scored too: a later, larger test set must not contain training rows
        seen = {sameness(question(row)): row for row in reversed(pool)}
    sets = []
    for name, wanted in (("probe", probe), ("train", train)):
        free = [row for row in rest if same[id(row)] not in seen]
        if dropped := [row for row in rest if same[id(row)] in seen]:
            between += len(dropped)
            pair = pair or _pair(dropped[0], seen[same[id(dropped[0])]], question)
        number = len(free) if wanted == "all" and name == "train" else _number(wanted, where)
        chosen, rest = _front(free, number, same if distinct and name == "probe" else None)
        _enough(chosen, number, name, len(ordered), where, copies=between, pair=pair)
        sets.append(chosen)
        seen |= {same[id(row)]: row for row in chosen}
    return Split(
        train=sets[1], probe=sets[0], test=taken, duplicates_within=copies, duplicates_between=between, pair=pair
    )


def _front(rows: list[Row], number: int, same: Mapping[int, str] | None) -> tuple[list[Row], list[Row]]:
    """The first `number` rows, with `same` only the first of each question, and the others."""
    firsts: dict[str | int, Row] = {}
    for row in rows:
        firsts.setdefault(same[id(row)] if same else id(row), row)
    taken = list(firsts.values())[:number]
    chosen = set(map(id, taken))
    return taken, [row for row in rows if id(row) not in chosen]


def by_article(
    texts: Iterable[tuple[str, str]], *, sizes: Mapping[str, int]
) -> tuple[dict[str, list[str]], list[list[str]], int]:
    """Disjoint sets of texts that share no article: (the texts of each set, articles that are left, copies dropped).

    texts   (article, text); without an article, a text is its own
    sizes   texts of each set, in the order in which they are filled; one that cannot be filled is shorter

    Articles are sorted by the hash of their name. The set `test` takes whole articles from the front and the others
    from the end, so that other sizes of the others never change what is scored; the texts of a set's last article that
    are too many are in no set.
    """
    texts, known = list(texts), set()
    articles: dict[str, list[str]] = {}
    keyed = ((text_hash(text), sameness(text), text, article) for article, text in texts)
    for _, same, text, article in sorted(keyed):
        if same not in known:
            known.add(same)
            articles.setdefault(text_hash(article or text), []).append(text)
    left = deque(articles[key] for key in sorted(articles))
    sets: dict[str, list[str]] = {}
    for name, size in sizes.items():
        drawn = sets[name] = []
        while left and len(drawn) < size:
            drawn += left.popleft() if name == "test" else left.pop()
        del drawn[size:]
    return sets, list(left), len(texts) - len(known)


def _pair(copy: Row, kept: Row, question: Callable[[Row], str]) -> str:
    """Two rows with the same question, for a message."""
    shown = [f"{question(row)[:SHOWN]!r}" + (f" ({row.at})" if hasattr(row, "at") else "") for row in (copy, kept)]
    return " is a copy of ".join(shown)


def _number(wanted: int | str, where: str) -> int:
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 0:
        raise UserError(
            f"{where}: a split cannot have {wanted!r} rows; write a whole number"
            " (train, and test with test_rows, may also be `all`)"
        )
    return wanted


def _enough(
    rows: list[Row], wanted: int, name: str, total: int, where: str, *, copies: int = 0, pair: str = ""
) -> None:
    if len(rows) < max(wanted, 0 if name == "probe" else 1):
        remedy = ": lower the numbers under `split`"
        if copies:
            remedy = (
                f" ({copies} are left out because their questions are in an earlier set: {pair}). "
                "Lower the numbers under `split`, or let `question` name a text that differs between the rows"
            )
        raise UserError(
            f"{where}: {max(wanted, 1)} {name} rows are requested, and {len(rows)} of {total} are available{remedy}"
        )
