"""Benchmark records (results/bench/*.json) as the report shows them, and the headline claim, which is one of them."""

import os
from pathlib import Path

from analysis import numbers

HEADLINE = "headline"


def shown(path: Path, record: dict, *, folder: Path) -> dict:
    """One record for a page that lies in `folder`: its races as rows of text, its facts, the files beside it."""
    beside = [(suffix.upper(), path.with_suffix(f".{suffix}")) for suffix in ("png", "svg", "csv", "json")]
    goals = [(race, goal) for race in record["races"] for goal in race["goals"]]
    svg = path.with_suffix(".svg")
    return {
        "name": path.stem,
        **{key: record[key] for key in ("title", "text", "when")},
        "load": record.get("load"),
        **{key: record.get(key) or {} for key in ("hardware", "versions", "git")},
        "races": [_race(race) for race in record["races"]],
        "missed": [f"{goal['runner']} {goal['text']} ({race['title']})" for race, goal in goals if not goal["met"]],
        "goals": len(goals),
        "svg": svg.read_text(encoding="utf-8") if svg.is_file() else "",
        "files": [(kind, Path(os.path.relpath(file, folder)).as_posix()) for kind, file in beside if file.is_file()],
    }


def facts(block: dict) -> list[tuple[str, str]]:
    """The facts of a race as names and values to read, without its sentence."""
    return [
        (key.removeprefix("bytes_").removesuffix("_bytes").replace("_", " "), as_text(value, bytes=_counts_bytes(key)))
        for key, value in block.items()
        if key != "sentence"
    ]


def as_text(value, *, bytes: bool = False) -> str:
    """A JSON value in words: 0.0003071 -> '0.0003071', [True, 3.0] -> 'yes, 3', {'a': 1} -> 'a: 1'."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {as_text(inner, bytes=bytes or _counts_bytes(key))}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(as_text(inner, bytes=bytes) for inner in value)
    if value is None or isinstance(value, bool):
        return {None: "unknown", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        if bytes and value >= 0:
            return numbers.size(value)
        return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


def _shares(value) -> str:
    if isinstance(value, list):
        return " to ".join(map(_shares, value))
    return f"{100 * value:.3g} %" if isinstance(value, int | float) else as_text(value)


# The headline's claims: of the paper, against its baseline, and against a Fisher of the same matrices.
CLAIMED = (
    (
        "preparation, times as long as ours (EWC-LoRA by batch size)",
        as_text,
        (
            "paper: times faster",
            "times as long, EWC-LoRA by batch size",
            "times as long, Fisher of the adapted matrices",
        ),
    ),
    (
        "storage of our importance in the same bits, share of theirs",
        _shares,
        (
            "paper: share of the storage",
            "share of EWC-LoRA's entries",
            "share of the storage of a Fisher of the adapted matrices",
        ),
    ),
)


def claim(record: dict) -> dict:
    """The headline record for its own block: the claims beside what was measured, or else all facts."""
    races = []
    for race in record["races"]:
        values = race["facts"]
        claims = [claim for claim in CLAIMED if values.keys() >= {*claim[2]}]
        rows = [(what, *(show(values[key]) for key in keys)) for what, show, keys in claims]
        sentence = " ".join(filter(None, [str(values.get("sentence", "")), once(race)]))
        block = {"title": race["title"], "sentence": sentence, "rows": rows}
        races.append(block | {"facts": [] if rows else facts(values)})
    return {"title": record["title"], "races": races}


def once(race: dict) -> str:
    """What to know of a race of one round; '' for others."""
    return "Timed in one round, which a busy machine changes." if race.get("rounds") == 1 else ""


def _race(race: dict) -> dict:
    goals: dict[str, list] = {}
    for goal in race["goals"]:
        goals.setdefault(goal["runner"], []).append((goal["text"], bool(goal["met"])))
    rows = [
        {
            "runner": row["runner"],
            "goals": goals.get(row["runner"], []),
            "times": [_milliseconds(row["seconds_min"]), _milliseconds(row["seconds_median"])],
            "ratios": [numbers.times(row["ratio_min"]), numbers.times(row["ratio_median"])],
        }
        for row in race["rows"]
    ]
    return {
        **{key: race[key] for key in ("title", "against", "rounds")},
        "rows": rows,
        "goals": bool(goals),
        "sentence": " ".join(filter(None, [str(race["facts"].get("sentence", "")), once(race)])),
        "facts": facts(race["facts"]),
    }


def _milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def _counts_bytes(key: str) -> bool:
    return key.startswith("bytes_") or key.endswith(("_bytes", " bytes")) or key == "bytes"
