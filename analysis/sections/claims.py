"""What the two papers claim beside what was measured here: docs/claims.yaml, held against the results. Verdicts are computed.

agrees          the measured value, with its whole interval, lies within what the claim says and its tolerance
disagrees       none of it does
not comparable  measured, but of other models or data than a claim about scores, or under unequal settings
not measured    there is nothing to look at, a time was taken once, or the interval reaches in and out: more rows or seeds could tell
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from analysis import numbers
from analysis.load import Loaded
from analysis.sections import claims_measured
from analysis.sections.claims_measured import Measured
from methods.errors import UserError
from methods.tools.names import unknown

FILE = Path(__file__).resolve().parents[2] / "docs" / "claims.yaml"
VERDICTS = ("agrees", "disagrees", "not comparable", "not measured")
TOP, PAPER = {"papers", "claims"}, {"title", "source"}
CLAIM = {
    "paper",
    "claim",
    "number",
    "unit",
    "direction",
    "tolerance",
    "setting",
    "scope",
    "on",
    "seen",
    "why",
    "measures",
}
OPTIONAL = {"on", "why", "measures"}
CHOICES = {
    "unit": ("times", "share", "points"),
    "direction": ("about", "at least", "at most"),
    "scope": ("any", "setting"),
    "seen": ("abstract", "review", "note", "code", "unverified"),
}
SEEN = {
    "abstract": "the paper's abstract",
    "review": "public reviews of the paper",
    "note": "a reader's note on the paper",
    "code": "the paper's code",
    "unverified": "memory, not checked",
}
SHOW = {
    "times": numbers.times,
    "share": lambda share: f"{numbers.percent(share)} %",
    "points": lambda share: f"{numbers.points(share)} points",
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of docs/claims.yaml, checked; `number` is (low, high), equal for a single number."""

    name: str
    paper: Mapping[str, str]
    claim: str
    number: tuple[float, float]
    unit: str
    direction: str
    tolerance: float
    setting: str
    scope: str
    seen: str
    on: Mapping[str, list[str]]
    why: str
    measures: tuple[Mapping[str, Any], ...]

    @property
    def accepted(self) -> tuple[float, float]:
        """The values that agree: the number, its tolerance to either side, and all beyond it on the side that it allows."""
        low, high = self.number[0] - self.tolerance, self.number[1] + self.tolerance
        return (-math.inf if self.direction == "at most" else low), (math.inf if self.direction == "at least" else high)

    def verdict(self, found: Measured) -> tuple[str, str]:
        """One of VERDICTS, and the reason where it needs one."""
        if found.value is None:
            return "not measured", "; ".join(filter(None, [found.why, self.why]))
        if found.why:
            return "not comparable", found.why
        if self.scope == "setting" and not (found.model in self.on["models"] and found.domain in self.on["domains"]):
            return "not comparable", "a claim about scores of other models and data"
        if found.once:
            return "not measured", "timed once, which a busy machine moves: more seeds would tell"
        low, high = self.accepted
        least, most = (
            (found.value, found.value)
            if found.low is None
            else (min(found.low, found.value), max(found.high, found.value))
        )
        if low <= least and most <= high:
            return "agrees", ""
        if most < low or least > high:
            return "disagrees", ""
        return "not measured", "not precisely enough: what was measured reaches into what agrees and out of it"


def load(path: Path = FILE) -> list[Claim]:
    """All claims in the file's order. Raises UserError for unknown keys, missing ones and values of the wrong kind, by name."""
    try:
        raw = YAML(typ="safe", pure=True).load(path)
    except (OSError, YAMLError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): restore it with git") from error
    _keys(raw, TOP, TOP, path.name)
    for name, paper in raw["papers"].items():
        _keys(paper, PAPER, PAPER, f"papers.{name}")
    return [_claim(name, block, raw["papers"]) for name, block in raw["claims"].items()]


def table(
    loaded: Loaded, comparison: pd.DataFrame, *, drift: Mapping[str, dict] | None = None, path: Path = FILE
) -> pd.DataFrame:
    """A row a claim and place it was looked for: name, the claim and what agrees with it, where, value, low, high, ends, n, verdict, why.

    comparison  the rows of analysis.sections.tables.comparison
    drift       drift.json by cell; without it movements are not measured
    """
    rows = []
    for claim in load(path):
        for found in claims_measured.look(loaded, comparison, claim.measures, drift=drift or {}):
            verdict, why = claim.verdict(found)
            low, high = claim.accepted
            rows.append(
                {
                    "name": claim.name,
                    "paper": claim.paper["title"],
                    "source": claim.paper["source"],
                    "claim": claim.claim,
                    "unit": claim.unit,
                    "claimed": _claimed(claim),
                    "accepted": _accepted(claim),
                    "accepted_low": low,
                    "accepted_high": high,
                    "setting": claim.setting,
                    "scope": claim.scope,
                    "seen": SEEN[claim.seen],
                    "where": found.where,
                    "value": found.value,
                    "low": found.low,
                    "high": found.high,
                    "ends": found.ends,
                    "n": found.n,
                    "verdict": verdict,
                    "why": why,
                }
            )
    return pd.DataFrame(rows)


def section(loaded: Loaded, comparison: pd.DataFrame, *, drift: Mapping[str, dict] | None = None) -> dict:
    """For analysis/sections/claims.html.j2: the papers, each with its claims, and each claim with what was found of it."""
    found = table(loaded, comparison, drift=drift)
    papers = []
    for (title, source), own in found.groupby(["paper", "source"], sort=False):
        claims = []
        for _, rows in own.groupby("name", sort=False):
            first = rows.iloc[0]
            about = {key: first[key] for key in ("claim", "claimed", "accepted", "setting", "seen")}
            claims.append(about | {"rows": [_shown(row) for _, row in rows.iterrows()]})
        papers.append({"title": title, "source": source.split("://")[-1], "claims": claims})
    counted = Counter(found["verdict"])
    sentence = ", ".join(f"{verdict} {counted[verdict]}" for verdict in VERDICTS)
    return {
        "papers": papers,
        "sentence": f"{found['name'].nunique()} claims, looked for in {len(found)} places: {sentence}.",
    }


def _shown(row: pd.Series) -> dict:
    """One place as text: value, interval, n, where, verdict, why."""
    show = SHOW[row["unit"]]
    known = not numbers.missing(row["value"])
    ends = (
        f"[{show(row['low'])}, {show(row['high'])}] {row['ends']}" if known and not numbers.missing(row["low"]) else ""
    )
    return {"value": show(row["value"]) if known else "–", "ends": ends} | {
        key: row[key] for key in ("n", "where", "verdict", "why")
    }


def _claimed(claim: Claim) -> str:
    low, high = map(SHOW[claim.unit], claim.number)
    if low != high:
        return f"{low} to {high}"
    return low if claim.direction == "about" else f"{claim.direction} {low}"


def _accepted(claim: Claim) -> str:
    low, high = (SHOW[claim.unit](end) if math.isfinite(end) else "" for end in claim.accepted)
    return f"agrees from {low}" + (f" to {high}" if high else "") if low else f"agrees up to {high}"


def _claim(name: str, block: Any, papers: Mapping[str, dict]) -> Claim:
    where = f"claims.{name}"
    _keys(block, CLAIM, CLAIM - OPTIONAL, where)
    if block["paper"] not in papers:
        raise unknown("paper", block["paper"], papers, where=where)
    for key, known in CHOICES.items():
        if block[key] not in known:
            raise UserError(f"{where}.{key} is {block[key]!r}: it must be one of {', '.join(known)}")
    numbered = block["number"] if isinstance(block["number"], list) else [block["number"]] * 2
    if len(numbered) != 2 or not all(map(_finite, numbered)) or numbered[0] > numbered[1]:
        raise UserError(f"{where}.number is {block['number']!r}: it must be a number or [low, high]")
    if not _finite(block["tolerance"]) or block["tolerance"] < 0:
        raise UserError(f"{where}.tolerance is {block['tolerance']!r}: it must be a number from 0, in the claim's unit")
    on = block.get("on")
    if (on is None) == (block["scope"] == "setting"):
        raise UserError(f"{where}: scope `setting` names models and domains under `on`, scope `any` does not")
    _keys(on or {}, {"models", "domains"}, {"models", "domains"} if on is not None else set(), f"{where}.on")
    measures = tuple(block.get("measures") or ())
    if not measures and not block.get("why"):
        raise UserError(f"{where}: a claim that nothing measures says in `why` what would")
    for k, measure in enumerate(measures):
        claims_measured.check(measure, where=f"{where}.measures[{k}]", scope=block["scope"])
    return Claim(
        name=name,
        paper=papers[block["paper"]],
        number=(float(numbered[0]), float(numbered[1])),
        on=on or {},
        measures=measures,
        tolerance=float(block["tolerance"]),
        why=f"it would take {block['why']}" if block.get("why") else "",
        **{key: block[key] for key in ("claim", "unit", "direction", "setting", "scope", "seen")},
    )


def _keys(block: Any, known: set[str], needed: set[str], where: str) -> None:
    if not isinstance(block, Mapping):
        raise UserError(f"{where} must be a mapping, not {block!r}")
    for key in block:
        if key not in known:
            raise unknown("key", key, known, where=where)
    if missing := sorted(needed - block.keys()):
        raise UserError(f"{where}: {', '.join(missing)} is missing")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
