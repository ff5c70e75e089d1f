"""Limits on what may be forgotten, for continuous integration; like `gate`, whose cells are a study's."""

import math
from collections.abc import Mapping
from typing import Any

from analysis import numbers
from methods.errors import UserError

NO_TEXT = "no general text was scored; give --text FILE"
ROUNDING = 1e-9  # as in `gate`: a mean of shares is not exact


def checked(*, max_forgetting: float | None, max_nll_lost: float | None, confidence: bool) -> dict[str, Any]:
    """The limits, or UserError for one that is no share or no number of nats."""
    if max_forgetting is not None and not (math.isfinite(max_forgetting) and -1 <= max_forgetting <= 1):
        raise UserError(f"--max-forgetting {max_forgetting}: it must be a share of 1; 0.02 is 2 points")
    if max_nll_lost is not None and not math.isfinite(max_nll_lost):
        raise UserError(f"--max-nll-lost {max_nll_lost}: it must be a number of nats per token, such as 0.05")
    if confidence and max_forgetting is None and max_nll_lost is None:
        raise UserError("--confidence compares a limit with the end of an interval: give --max-forgetting too")
    return {"max_forgetting": max_forgetting, "max_nll_lost": max_nll_lost, "confidence": confidence}


def verdict(found: Mapping[str, Any], allowed: Mapping[str, Any]) -> dict[str, Any]:
    """{"limits", "exceeded"}: the limits in words, and why the tuned model does not pass, a sentence each.

    General text is in nats per token, of the base's tokenizer where the two differ.
    """
    limits, exceeded = [], []
    general = found["general"] or {}
    measured = (
        (
            "max_forgetting",
            "forgetting",
            found["overall"]["forgetting"],
            _points,
            "no task is above chance for the base",
        ),
        ("max_nll_lost", "general text lost", general.get("nats_lost_per_base_token"), _nats, NO_TEXT),
    )
    for key, name, interval, show, why in measured:
        limit = allowed[key]
        if limit is None:
            continue
        limits.append(f"{name} at most {show(limit)}")
        if interval is None:
            exceeded.append(f"{name} is not known: {why}")
            continue
        end = interval["high"] if allowed["confidence"] else interval["value"]
        if end is None:
            exceeded.append(f"{name} has no confidence interval")
        elif end - limit > ROUNDING:
            what = "the upper end of its interval is" if allowed["confidence"] else "it is"
            exceeded.append(f"{name}: {what} {show(end)}, above {show(limit)}")
    return {**allowed, "limits": limits, "exceeded": exceeded}


def _points(share: float) -> str:
    return f"{100 * share:+.4g} points".replace("-", numbers.MINUS)


def _nats(value: float) -> str:
    return f"{value:+.6g} nats per token".replace("-", numbers.MINUS)
