"""What the tuned model lost against the base: by task, in all, on general text, and answer by answer.

All differences are the base's less the tuned model's, paired item by item, so that more is more forgotten; intervals
are at 95 % and over items (analysis/statistics/intervals.py): they are about these two models.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.load import Loaded
from analysis.statistics.flips import by_task, flips
from analysis.statistics.intervals import KEYS, Interval, of_arrays, per_token
from analysis.units import step
from evaluation.harness import load_tasks
from evaluation.retention import change, forgetting
from evaluation.task import HASH_DIGITS, doc_hash, gold_index, requests
from experiments.audit.data import Data
from experiments.audit.scoring import Scores
from experiments.commands.flips import questions

NATS = {"gold_nll": "log_likelihood", "margin": "margin"}  # what a model may lose of an answer, and its column of items
GENERAL = "general"
FLIP = ("task", "doc_hash", "kind", "question", "right", "base", "tuned", "gold_change")  # columns of flips.csv


def compare(base: Scores, tuned: Scores, *, same: bool, same_ids: bool) -> dict[str, Any]:
    """{"tasks", "overall", "general"} of audit.json.

    same       whether both are one model: then no answer can differ, and intervals have no width
    same_ids   whether both models predict the same tokens: nats per token and KL are not defined otherwise
    """
    items = joined(base.items, tuned.items)
    lost = forgetting(base.scores["tasks"], tuned.scores["tasks"])
    answers = flips_of(base, tuned)
    counts = {} if answers.empty else by_task(answers).set_index("task").to_dict("index")
    tasks = [
        _task(name, base.scores["tasks"][name], score, items[items["task"] == name], lost, counts.get(name), same)
        for name, score in tuned.scores["tasks"].items()
    ]
    return {"tasks": tasks, "overall": _overall(items, lost, same), "general": _general(base, tuned, items, same_ids)}


def flips_of(base: Scores, tuned: Scores) -> pd.DataFrame:
    """A row for each item that is answered right or wrong, as analysis/statistics/flips.py gives them of a cell."""
    lost = forgetting(base.scores["tasks"], tuned.scores["tasks"])
    cell = "base/audit/tuned/seed0"
    row = {"model": "base", "domain": "audit", "method": "tuned", "seed": 0, "scores_by_task": tuned.scores["tasks"]}
    row |= {"forgetting_by_task": lost["by_task"], "at_chance": lost["at_chance"]}
    loaded = Loaded(
        cells=pd.DataFrame([row], index=[cell]),
        curves=pd.DataFrame(),
        items=tuned.items.assign(cell=cell),
        failures=pd.DataFrame(),
        base={"base": {"scores": base.scores, "items": base.items}},
    )
    return flips(loaded, model="base", domain="audit")


def joined(base: pd.DataFrame, tuned: pd.DataFrame) -> pd.DataFrame:
    """Items of both models, paired; columns of the base's end in _base."""
    return tuned.merge(base, on=KEYS, suffixes=("", "_base"), validate="one_to_one")


def _task(
    name: str, base: Mapping, tuned: Mapping, items: pd.DataFrame, lost: Mapping, counts: Mapping | None, same: bool
) -> dict[str, Any]:
    about = {key: tuned.get(key) for key in ("metric", "chance", "n")} | {
        "name": name,
        "counts": name in lost["by_task"],
    }
    changed = change(base, tuned)
    about |= {"unit": changed["unit"], "base": base["value"], "tuned": tuned["value"]}
    about["lost"] = _shown(_lost(items, "score", 0.0 if same else step(changed["unit"])), value=0.0 - changed["change"])
    if changed.get("change_low") is not None:  # a metric of the whole set: bootstrap over rows
        about["lost"] |= {"low": -changed["change_high"], "high": -changed["change_low"]}
    about |= {f"{key}_lost": _shown(_lost(items, column)) for key, column in NATS.items()}
    if counts is not None:
        about["answers"] = {key: int(counts[key]) for key in ("right", "lost", "gained")}
        about["answers"] |= {key: _known(counts[key]) for key in ("lost_known", "gained_known")}
    return about


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _overall(items: pd.DataFrame, lost: Mapping, same: bool) -> dict[str, Any]:
    """The means over the tasks that count, which are those on which the base is above chance."""
    kept = list(lost["by_task"])
    each = {task: items[items["task"] == task] for task in kept}
    found: dict[str, Any] = {"tasks": kept, "at_chance": lost["at_chance"], "apart": sorted(lost["apart"])}
    found["forgetting"] = _shown(
        _mean([_difference(own, "score") for own in each.values()], 0.0 if same else 1.0), value=lost["forgetting"]
    )
    for key, column in NATS.items():
        changes = [_difference(own, column) for own in each.values()]
        found[f"{key}_lost"] = _shown(_mean([change for change in changes if change is not None], 0.0))
    return found


def _general(base: Scores, tuned: Scores, items: pd.DataFrame, same_ids: bool) -> dict[str, Any] | None:
    """General text: nats and KL per token where the tokens are the same, bits per byte in any case."""
    if GENERAL not in tuned.scores:
        return None
    one, other = base.scores[GENERAL], tuned.scores[GENERAL]
    own = items[items["task"] == GENERAL]
    nats = _difference(own, "log_likelihood")
    size, tokens = (own[column].to_numpy(dtype=float) for column in ("bytes", "tokens_base"))
    found: dict[str, Any] = {"n": other["n"], "bytes": other["bytes"], "same_ids": same_ids}
    found["tokens"] = {"base": one["tokens"], "tuned": other["tokens"]}
    found["bits_per_byte"] = {"base": one["bits_per_byte"], "tuned": other["bits_per_byte"]}
    found["bits_per_byte_lost"] = _shown(per_token(nats / np.log(2), size))
    found["nats_lost_per_base_token"] = _shown(per_token(nats, tokens))
    if not same_ids:
        return found | dict.fromkeys(("nll", "nll_lost", "kl", "kl_reverse"))
    found["nll"] = {"base": one["nats_per_token"], "tuned": other["nats_per_token"]}
    found["nll_lost"] = found["nats_lost_per_base_token"]
    for key in ("kl", "kl_reverse"):  # not known where one model has more rows than the other for unused tokens
        known = own[key].notna().all()
        found[key] = _shown(per_token(own[key].to_numpy(dtype=float)[None] * tokens, tokens)) if known else None
    return found


def _difference(items: pd.DataFrame, column: str) -> np.ndarray | None:
    """The base's values less the tuned model's, (1, n); None where an item has none."""
    if f"{column}_base" not in items or not len(items):
        return None
    values = (items[f"{column}_base"] - items[column]).to_numpy(dtype=float)
    return values[None] if np.isfinite(values).all() else None  # an answer may be impossible to a model


def _lost(items: pd.DataFrame, column: str, moved: float = 0.0) -> Interval | None:
    values = _difference(items, column)
    return None if values is None else of_arrays([values], step=moved)


def _mean(tasks: list[np.ndarray], moved: float) -> Interval | None:
    return of_arrays(tasks, step=moved) if tasks else None


def _shown(interval: Interval | None, *, value: float | None = None) -> dict[str, float | None] | None:
    """An interval as JSON; `value` is the recorded one where there is one."""
    if interval is None:
        return None if value is None else {"value": value, "low": None, "high": None}
    return {"value": interval.value if value is None else value, "low": interval.low, "high": interval.high}


def flipped(base: Scores, tuned: Scores, data: Data) -> list[dict[str, Any]]:
    """Answers that turned from right to wrong ("lost") or from wrong to right ("gained"), with their text.

    Lost ones first, and of each kind those whose right answer changed most in log-likelihood.
    """
    items = flips_of(base, tuned)
    if items.empty or not (items["lost"] | items["gained"]).any():
        return []
    nats = joined(base.items, tuned.items)
    nats = nats.assign(gold_change=nats["log_likelihood"] - nats["log_likelihood_base"])
    items = items[items["lost"] | items["gained"]].merge(nats[[*KEYS, "choice_base", "gold_change"]], on=KEYS)
    wanted = set(items["task"])
    asked = [(entry["name"], task) for entry, task in load_tasks(data.folder) if entry["name"] in wanted]
    texts = {(name, row["id"][:HASH_DIGITS]): row for name, task in asked for row in _asked(task)}
    made = [
        {"task": item.task, "doc_hash": item.doc_hash, "kind": "lost" if item.lost else "gained"}
        | _worded(texts.get((item.task, item.doc_hash[:HASH_DIGITS])), item)
        | {"gold_change": _known(item.gold_change)}
        for item in items.itertuples()
    ]
    made.sort(key=lambda one: (one["kind"] != "lost", -abs(one["gold_change"] or 0.0), one["task"], one["doc_hash"]))
    return made


def _asked(task: Any) -> list[dict[str, Any]]:
    """The rows of a task in words; if not all can be written down, each as far as it can."""
    try:
        return questions(task)
    except Exception:  # a gold answer that is no choice, or the task's own Python
        return [_row(task, doc) for doc in task.eval_docs]


def _row(task: Any, doc: Mapping[str, Any]) -> dict[str, Any]:
    row = {"id": doc_hash(doc), "context": requests(task, doc)[0].args[0]}
    try:
        return row | {"choices": task.doc_to_choice(doc), "gold": gold_index(task, doc)}
    except Exception:  # as above
        return row


def _worded(row: Mapping[str, Any] | None, item: Any) -> dict[str, str | None]:
    """The question, the right answer, and what each model chose where there were choices."""
    if row is None:
        return dict.fromkeys(("question", "right", "base", "tuned"))
    choices = [choice.strip() for choice in row.get("choices", ())]
    right = choices[row["gold"]] if choices else None
    picked = {"base": item.choice_base, "tuned": item.choice}
    several = len(choices) > 1
    chosen = {who: choices[int(one)] if several and not pd.isna(one) else None for who, one in picked.items()}
    return {"question": row["context"], "right": right} | chosen
