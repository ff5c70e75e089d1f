"""The claims of the two papers (docs/claims.yaml) beside what was measured here. Verdicts are computed.

agrees          the measured value, with its whole interval, lies within what the claim says and its tolerance
disagrees       none of it does
not comparable  measured, but on other models or data than a claim about scores, or under unequal settings
not measured    nothing was measured, a time was taken once, or the interval lies only partly within (too few rows)

A claim that is looked for in several places has one verdict: that of the places that agree or disagree, "mixed" where
these differ, and otherwise "not comparable" before "not measured".
"""

import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from analysis import numbers
from analysis.load import Loaded
from analysis.measures import BY_KEY
from analysis.statistics.claimed import Measure, Measured, Strict, Table, measured
from methods.errors import UserError
from methods.tools.names import unknown

FILE = Path(__file__).resolve().parents[2] / "docs" / "claims.yaml"
MIXED = "mixed"
VERDICTS = ("agrees", "disagrees", MIXED, "not comparable", "not measured")
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
    "nats": lambda value: f"{numbers.nats(value)} nats",
}
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Paper(Strict):
    """Where a claim was made."""

    title: str
    source: str


class On(Strict):
    """The models and domains on which a claim about scores can agree or disagree."""

    models: list[str]
    domains: list[str]


class Claim(Strict):
    """One claim; the head of docs/claims.yaml says what each key means."""

    paper: str
    claim: str
    number: Finite | list[Finite]
    unit: Literal["times", "share", "points", "nats"]
    direction: Literal["about", "at least", "at most"]
    tolerance: Annotated[Finite, Field(ge=0)]
    setting: str
    scope: Literal["any", "setting"]
    seen: Literal["abstract", "review", "note", "code", "unverified"]
    on: On | None = None
    why: str = ""
    measures: list[Measure] = []

    @field_validator("number")
    @classmethod
    def _ascending(cls, number):
        if isinstance(number, list) and (len(number) != 2 or number[0] > number[1]):
            raise ValueError("it must be a number or [low, high]")
        return number

    @model_validator(mode="after")
    def _agrees_with_itself(self):
        if (self.on is None) == (self.scope == "setting"):
            raise ValueError("scope `setting` names models and domains under `on`, scope `any` does not")
        if not self.measures and not self.why:
            raise ValueError("a claim that nothing measures says in `why` what would")
        if any(self.other_unit(measure.table) for measure in self.measures if measure.table) and any(
            end or self.tolerance for end in self.range
        ):
            raise ValueError("a difference is measured in nats and in points only where the claim is about its sign: 0")
        if self.scope == "setting" and any(measure.bench or measure.fact for measure in self.measures):
            raise ValueError("a benchmark is of no model and domain of a study, so the claim's scope must be `any`")
        return self

    def other_unit(self, table: Table) -> bool:
        """Whether a place holds nats and the claim is in points, or the other way round."""
        return table.way != "ratio" and (table.metric in BY_KEY) != (self.unit == "nats")

    @property
    def one_sided(self) -> bool:
        """Whether any value beyond the number agrees, however far."""
        return self.direction != "about"

    @property
    def range(self) -> tuple[float, float]:
        """The number as (low, high), equal for a single number."""
        return tuple(self.number) if isinstance(self.number, list) else (self.number, self.number)

    @property
    def accepted(self) -> tuple[float, float]:
        """The values that agree: the number with its tolerance, open to the side that the direction allows."""
        low, high = self.range[0] - self.tolerance, self.range[1] + self.tolerance
        return (-math.inf if self.direction == "at most" else low), (math.inf if self.direction == "at least" else high)

    def verdict(self, entry: Measured) -> tuple[str, str]:
        """One of VERDICTS, and the reason where it needs one."""
        if entry.value is None:
            needed = f"it would take {self.why}" if self.why else ""
            return "not measured", "; ".join(filter(None, [entry.why, needed]))
        if entry.why:
            return "not comparable", entry.why
        if self.on and not (entry.model in self.on.models and entry.domain in self.on.domains):
            return "not comparable", "a claim about scores of other models and data"
        if entry.once:
            return "not measured", "timed once, which a busy machine changes: more seeds would tell"
        (low, high), value = self.accepted, entry.value
        least, most = (value, value) if entry.low is None else (min(entry.low, value), max(entry.high, value))
        if low <= least and most <= high:
            return "agrees", ""
        if most < low or least > high:
            return "disagrees", ""
        return "not measured", "not precise enough: the interval lies partly within what agrees and partly outside"


class Claims(Strict):
    """The whole file."""

    papers: dict[str, Paper]
    claims: dict[str, Claim]

    @model_validator(mode="after")
    def _known_papers(self):
        for name, claim in self.claims.items():
            if claim.paper not in self.papers:
                raise unknown("paper", claim.paper, self.papers, where=f"claims.{name}")
        return self


def load(path: Path = FILE) -> Claims:
    """The claims of a file. Raises UserError for an unknown or missing key or a wrong value, by name."""
    try:
        return Claims.model_validate(YAML(typ="safe", pure=True).load(path))
    except (OSError, YAMLError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): restore it with git") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        value = "" if isinstance(first["input"], dict) else f" is {first['input']!r}"
        raise UserError(f"{path.name}: {where}{value}: {first['msg'].removeprefix('Value error, ')}") from error


def table(loaded: Loaded, comparison: pd.DataFrame, *, path: Path = FILE) -> pd.DataFrame:
    """One row per claim and place: name, where, value, low, high, ends, n, metric, verdict, why.

    `comparison` is the table of `analysis.statistics.comparison`.
    """
    rows = []
    for name, claim in load(path).claims.items():
        for entry in measured(loaded, comparison, claim.measures):
            verdict, why = claim.verdict(entry)
            row = {"name": name, "verdict": verdict, "why": why}
            shown = ("where", "value", "low", "high", "ends", "n", "metric")
            rows.append(row | {key: getattr(entry, key) for key in shown})
    return pd.DataFrame(rows)


def of_claims(rows: pd.DataFrame) -> dict[str, str]:
    """name -> the verdict of a claim over all its places."""
    found = {}
    for name, verdicts in rows.groupby("name", sort=False)["verdict"]:
        given = set(verdicts) & {"agrees", "disagrees"}
        first = next(verdict for verdict in VERDICTS if verdict in set(verdicts))
        found[name] = MIXED if len(given) > 1 else first
    return found


def section(loaded: Loaded, comparison: pd.DataFrame) -> dict:
    """What analysis/sections/claims.html.j2 shows: the papers, their claims, and what was measured of each."""
    rows, file = table(loaded, comparison), load()
    verdicts, papers = of_claims(rows), []
    for name, paper in file.papers.items():
        claims = []
        for key, claim in file.claims.items():
            if claim.paper == name:
                about = {"claim": claim.claim, "setting": claim.setting, "seen": SEEN[claim.seen]}
                about |= {"claimed": _claimed(claim), "accepted": _accepted(claim), "verdict": verdicts[key]}
                own = rows[rows["name"] == key].to_dict("records")
                claims.append(about | {"rows": [_place(row, _shower(claim, row["metric"])) for row in own]})
        papers.append({"title": paper.title, "source": paper.source.split("://")[-1], "claims": claims})
    counted = Counter(verdicts.values())
    each = ", ".join(f"{verdict} {counted[verdict]}" for verdict in VERDICTS if counted[verdict])
    sentence = f"{len(file.claims)} claims, each counted once: {each}."
    wide = sum(verdict == "agrees" and file.claims[name].one_sided for name, verdict in verdicts.items())
    if wide:
        those = "that agrees is" if wide == 1 else "of those that agree are"
        sentence += f" {wide} {those} one-sided: any value beyond agrees."
    return {"papers": papers, "sentence": sentence}


def _shower(claim: Claim, metric: str):
    """How a place's numbers are written: in nats, or in the claim's unit; scores under a claim in nats in points."""
    if claim.unit in ("points", "nats"):
        return SHOW["nats" if metric in BY_KEY else "points"]
    return SHOW[claim.unit]


def _place(row: dict, show) -> dict:
    """One place as text: value, interval, n, where, verdict, why."""
    ends = "" if numbers.missing(row["low"]) else f"[{show(row['low'])}, {show(row['high'])}] {row['ends']}"
    value = "–" if numbers.missing(row["value"]) else show(row["value"])
    return {"value": value, "ends": ends} | {key: row[key] for key in ("n", "where", "verdict", "why")}


def _claimed(claim: Claim) -> str:
    low, high = map(SHOW[claim.unit], claim.range)
    if low != high:
        return f"{low} to {high}"
    return low if claim.direction == "about" else f"{claim.direction} {low}"


def _accepted(claim: Claim) -> str:
    low, high = (SHOW[claim.unit](end) if math.isfinite(end) else "" for end in claim.accepted)
    if low and high:
        return f"agrees from {low} to {high}"
    return f"one-sided: anything from {low} on agrees" if low else f"one-sided: anything up to {high} agrees"
