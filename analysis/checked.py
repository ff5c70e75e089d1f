"""What the stages' files must hold before anything is computed from them; a damaged file is named."""

import zlib
from datetime import datetime
from numbers import Real
from pathlib import Path
from types import NoneType

import pandas as pd

from methods.errors import UserError
from methods.tools.files import AGAIN, read_json

KINDS = {dict: "a mapping", str: "a text", Real: "a number", list: "a list", bool: "true or false"}
METRICS = {  # of metrics.json and details.json
    **dict.fromkeys(("scores_by_task", "forgetting_by_task", "transfer_by_task", "n", "scoring", "parts"), dict),
    **dict.fromkeys(("model", "domain", "method", "dtype", "base_sha256", "weights_sha256"), str),
    **dict.fromkeys(("seed", "numerics", "domain_score", "domain_score_base", "domain_gain"), Real),
    **dict.fromkeys(("git", "hardware", "versions"), (dict, NoneType)),
    "at_chance": list,
    "not_a_result": bool,
}
FAILURE = dict.fromkeys(("stage", "kind", "reason"), str)
SCORE = ("value", "base", "n", "role", "metric", "chance")
ITEMS = ("task", "doc_id", "doc_hash", "score", "gold")
NUMBERS = ("score", "gold", "log_likelihood", "margin", "tokens", "kl", "kl_reverse")  # where they are there
CURVE = ("step", "tokens", "seconds")


def complete(run: Path, content: dict) -> dict:
    """What analysis.load.record read of a cell, which has all METRICS."""
    path = run / ("details.json" if (run / "details.json").is_file() else "metrics.json")
    _holds(path, content, METRICS)
    if (of := "{model}/{domain}/{method}/seed{seed}".format_map(content)) != "/".join(run.parts[-4:]):
        raise damaged(path, f"it is of the cell {of}")
    for task, score in content["scores_by_task"].items():
        if not isinstance(score, dict) or (missing := [key for key in SCORE if key not in score]):
            what = "is not a mapping" if not isinstance(score, dict) else f"lacks {', '.join(missing)}"
            raise damaged(path, f"scores_by_task.{task} {what}")
    return content


def dated(path: Path, content: dict) -> dict:
    """The content, whose `when` is a time where there is one."""
    try:
        datetime.fromisoformat(content.get("when") or "2000-01-01")
    except (TypeError, ValueError):
        raise damaged(path, f"when is {content['when']!r}, not a time") from None
    return content


def mapping(path: Path, kinds: dict) -> dict:
    """The mapping in a JSON file, whose keys `kinds` are there and of their kind."""
    return _holds(path, read_json(path), kinds)


def _holds(path: Path, content: dict, kinds: dict) -> dict:
    for key, kind in kinds.items():
        if key not in content:
            raise damaged(path, f"{key} is missing")
        if not isinstance(content[key], kind):
            raise damaged(path, f"{key} is not {KINDS[kind[0] if isinstance(kind, tuple) else kind]}")
    return content


def items(path: Path, *, without: tuple[str, ...] = ()) -> pd.DataFrame:
    """The score of every item, but for the columns `without`."""
    return table(path, columns=ITEMS, numeric=NUMBERS, without=without)


def table(
    path: Path, *, columns: tuple[str, ...], numeric: tuple[str, ...] | None = None, without: tuple[str, ...] = ()
) -> pd.DataFrame:
    """A CSV file with at least `columns`; the `numeric` ones (all, by default) hold numbers only; `without` some."""
    try:
        if path.suffix == ".csv" and not path.read_bytes().endswith(b"\n"):  # the end of a number may be missing
            raise damaged(path, "its last line is cut off")
        head = pd.read_csv(path, nrows=0).columns
        # by default pandas reads a task called `nan` or `null` as missing, and a task called `01` as a number
        missing = {name: ["", "nan"] for name in head if name != "task"}
        options = {"usecols": [name for name in head if name not in without], "keep_default_na": False}
        frame = pd.read_csv(path, dtype={"task": str}, na_values=missing, **options)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): {AGAIN}") from error
    for column in columns:
        if column not in frame:
            raise damaged(path, f"column {column} is missing")
    for column in frame.columns if numeric is None else numeric:
        known = column in frame and len(frame)  # a checkpoint from elsewhere has no curve
        if known and not pd.api.types.is_numeric_dtype(frame[column]):
            raise damaged(path, f"column {column} holds something that is not a number")
    return frame


def damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not what its stage writes ({why}): {AGAIN}")
