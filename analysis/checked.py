"""What a file of results must hold before anything is computed from it; a damaged one is named, with what restores it."""

from datetime import datetime
from numbers import Real
from pathlib import Path

import pandas as pd

from methods.errors import UserError

BLOCKS = ("scores_by_task", "forgetting_by_task", "transfer_by_task", "n", "scoring", "parts")
TEXTS = ("model", "domain", "method", "dtype", "base_sha256", "weights_sha256")
NUMBERS = ("seed", "numerics", "domain_score", "domain_score_base", "domain_gain")
ITEMS = ("task", "doc_id", "doc_hash", "score", "gold")
CURVE = ("step", "tokens", "seconds")


def metrics(path: Path, found) -> dict:
    """A cell's metrics.json, with every block that the comparison reads."""
    _mapping(path, found)
    for keys, kind, name in (
        (BLOCKS, dict, "a mapping"),
        (TEXTS, str, "a text"),
        (NUMBERS, Real, "a number"),
        (("at_chance",), list, "a list"),
        (("not_a_result",), bool, "true or false"),
        (("git", "hardware", "versions"), dict | None, "a mapping"),
    ):
        for key in keys:
            if key not in found or not isinstance(found[key], kind):
                raise _damaged(path, f"{key} is not {name}" if key in found else f"{key} is missing")
    for task, about in found["scores_by_task"].items():
        if not isinstance(about, dict) or not {"value", "base", "n", "role", "metric", "chance"} <= about.keys():
            raise _damaged(path, f"scores_by_task.{task} is not whole")
    return found


def train(path: Path, found) -> dict:
    """A cell's train.json: a mapping whose `when` is a time."""
    _mapping(path, found)
    try:
        datetime.fromisoformat(found.get("when") or "2000-01-01")
    except (TypeError, ValueError):
        raise _damaged(path, f"when is {found['when']!r}, no time") from None
    return found


def failure(path: Path, found) -> dict:
    """A recorded failure: its stage, kind and reason."""
    _mapping(path, found)
    for key in ("stage", "kind", "reason"):
        if not isinstance(found.get(key), str):
            raise _damaged(path, f"{key} is missing")
    return found


def table(path: Path, found: pd.DataFrame, *, columns: tuple[str, ...], numeric: tuple[str, ...]) -> pd.DataFrame:
    """A table with at least these columns, `numeric` ones of numbers alone."""
    for column in columns:
        if column not in found:
            raise _damaged(path, f"column {column} is missing")
    for column in numeric:
        if (
            len(found) and column in found and not pd.api.types.is_numeric_dtype(found[column])
        ):  # a checkpoint made elsewhere has an empty curve
            raise _damaged(path, f"column {column} is not of numbers")
    return found


def _mapping(path: Path, found) -> None:
    if not isinstance(found, dict):
        raise _damaged(path, "it is no mapping")


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is not what its stage writes ({why}): restore it with git, or delete it and run the stage again"
    )
