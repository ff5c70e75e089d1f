"""Rows that cannot be used: a few are left out, counted and named; where they are many, something is wrong, and the
run stops.
"""

import re
from typing import Any

from evaluation.chance import WARNING
from methods.errors import UserError

FEW = 0.1  # share of the rows up to which they are left out
SMALL = (
    10  # so many rows of a small set, whose first mistakes would be more than that share, unless they are most of it
)
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")
NAMED = 3  # places that a message names for each reason


class LeftOut:
    """Rows that are left out, and rows that lose a part, by reason, each with the places where they were read."""

    def __init__(self) -> None:
        self.places: dict[str, list[str]] = {}
        self.changed: dict[str, list[str]] = {}
        self._alike: dict[str, str] = {}

    def add(self, reason: str, place: str) -> None:
        """Count a row. Reasons that differ in what they quote and in numbers are one, in the words of the first."""
        reason = self._alike.setdefault(_QUOTED.sub("…", reason), reason)
        self.places.setdefault(reason, []).append(place)

    def change(self, what: str, place: str) -> None:
        self.changed.setdefault(what, []).append(place)

    @property
    def rows(self) -> int:
        return sum(map(len, self.places.values()))

    def settle(self, *, where: str, of: int, remedy: str, quiet: bool = False) -> None:
        """Say what was left out of `of` rows, unless `quiet`; raises UserError where it is more than a few."""
        if self.rows:
            problem = f"{where}: {self.rows} of {of} rows cannot be used: {_listed(self.places)}"
            if self.rows > max(FEW * of, min(SMALL, of / 2)):
                share = "more than one in ten" if 2 * self.rows <= of else "most"
                raise UserError(f"{problem}. That is {share}: {remedy}")
            if not quiet:
                print(f"{WARNING}{problem}. They are left out", flush=True)
        for what, places in self.changed.items():
            if not quiet:
                print(f"{WARNING}{where}: {what} in {len(places)} of {of} rows ({first_of(places)})", flush=True)

    def facts(self) -> dict[str, Any]:
        """Counts and places by reason, for data.json."""
        return {
            kind: {reason: {"n": len(places), "rows": places} for reason, places in sorted(named.items())}
            for kind, named in (("left_out", self.places), ("changed", self.changed))
            if named
        }


def first_of(places: list[str]) -> str:
    """The first places, for a message."""
    return ", ".join(places[:NAMED]) + (", …" if len(places) > NAMED else "")


def _listed(named: dict[str, list[str]]) -> str:
    """The reasons, those with the most places first, and how many places each has if there are several."""
    most = sorted(named.items(), key=lambda item: -len(item[1]))
    count = len(most) > 1
    return "; ".join(f"{len(places)}: " * count + f"{reason} ({first_of(places)})" for reason, places in most)
