"""The start of a comparison: whether the base was settled, in sentences; gain and loss against the unsettled one."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis import numbers
from analysis.chosen import reported, reported_names
from analysis.families import family
from analysis.load import Loaded, retention_tasks
from analysis.roles import PLAIN
from analysis.statistics.nats import DOMAIN

UNSETTLED = "unsettled_"  # before the key of a measure in the table


def sentences(loaded: Loaded, model: str) -> list[str]:
    """What is known of a model's start: the gate of a settled one, the test of another; empty if nothing is."""
    base = loaded.base.get(model, {})
    if record := base.get("settle"):
        return [_settled(record, model, gate=_gate(loaded, model, record))]
    test = base.get("start", {}).get("improvable")
    return [_tested(test)] if test else []


def is_settled(loaded: Loaded, model: str) -> bool | None:
    """Whether plain fine-tuning on general text could not have improved the base; None if it was not tested.

    Where it is False, the report warns: what a method loses is hidden behind what any training repairs.
    """
    base = loaded.base.get(model, {})
    if record := base.get("settle"):
        return _gate(loaded, model, record)["holds"]
    test = base.get("start", {}).get("improvable")
    return None if not test or test["low"] is None else test["low"] <= 0


def against_unsettled(loaded: Loaded, cell: pd.Series) -> dict[str, float]:
    """What a cell gained and lost against the model that its base was settled from, by the name of the measure; {}
    without one.

    A loss is that against the settled base and what settling itself lost on the same rows, which is negative where it
    improved them; a gain is that against the settled base less what settling lost of the domain. There is none of KL,
    which does not add up.
    """
    base = loaded.base.get(cell["model"], {})
    unsettled = (base.get("start") or {}).get("unsettled")
    if not unsettled:
        return {}
    before, after = unsettled["scores"], base["scores"]
    shift = _lost_by_settling(before, after, retention_tasks(cell))
    nats = [_nats_per_token(scores["tasks"].get(cell["domain"], {})) for scores in (before, after)]
    if None not in nats:
        shift[DOMAIN] = nats[0] - nats[1]
    return {key: cell[key] + lost for key, lost in shift.items() if cell.get(key) is not None}


def with_unsettled(loaded: Loaded, table: pd.DataFrame) -> pd.DataFrame:
    """The comparison with `unsettled_KEY` of each method: its mean gain and losses against the model that its base was
    settled from; without such a model the comparison as it is."""
    rows = {name: against_unsettled(loaded, cell) for name, cell in loaded.cells.iterrows()}
    if not any(rows.values()):
        return table
    by_cell = pd.DataFrame.from_dict(rows, orient="index").add_prefix(UNSETTLED)
    means = by_cell.groupby(by_cell.index.str.rpartition("/").get_level_values(0)).mean()
    names = table["model"] + "/" + table["domain"] + "/" + table["method"]
    return table.assign(**means.reindex(names).set_axis(table.index))


def beside(loaded: Loaded, table: pd.DataFrame, model: str) -> list[str]:
    """What plain fine-tuning of a settled model gained and lost against the one that it was settled from."""
    unsettled, lost = (loaded.base.get(model, {}).get("start") or {}).get("unsettled"), f"{UNSETTLED}general_nll_lost"
    names = table["model"] + "/" + table["domain"] + "/" + table["method"]
    plain = table["method"].map(family) == PLAIN
    rows = table[(table["model"] == model) & plain & names.isin(reported_names(loaded))]
    if not unsettled or rows.empty or lost not in rows:
        return []
    each = " and ".join(f"{numbers.nats(row[lost])} ({row['domain']})" for _, row in rows.iterrows())
    text = (
        f"Against {unsettled['model']}, the model before settling, plain fine-tuning changes the loss on general text "
        f"by {each} nats per token; a negative number is an improvement."
    )
    if (gained := f"{UNSETTLED}{DOMAIN}") in rows:
        known = [row for _, row in rows.iterrows() if not numbers.missing(row[gained]) and row[gained] < row[DOMAIN]]
        each = " and ".join(
            f"{numbers.nats(row[gained])} of {numbers.nats(row[DOMAIN])} on {row['domain']}" for row in known
        )
        text += f" It gains {each}: the rest makes up for what settling lost of the domain." if known else ""
    return [f"{text} The table of scores has every method."]


def _lost_by_settling(before: Mapping[str, Any], after: Mapping[str, Any], tasks: list[str]) -> dict[str, float]:
    """From the contents of two scores.json; the mean over the tasks that have the number."""
    lost = {"general_nll_lost": after["general"]["nats_per_token"] - before["general"]["nats_per_token"]}
    for key, name, sign in (
        ("gold_nll_lost", "gold_nll", 1),
        ("margin_lost", "margin", -1),
        ("forgetting", "value", -1),
    ):
        pairs = [(before["tasks"][task].get(name), after["tasks"][task].get(name)) for task in tasks]
        changes = [sign * (new - old) for old, new in pairs if None not in (old, new)]
        if changes:
            lost[key] = sum(changes) / len(changes)
    return lost


def _nats_per_token(score: Mapping[str, Any]) -> float | None:
    """Of a task's labelled text, or of its gold answers, as in evaluation/retention.py."""
    if score.get("format"):
        return score["value"]
    return score["gold_nll"] * score["n"] / score["tokens"] if {"gold_nll", "tokens"} <= score.keys() else None


def _gate(loaded: Loaded, model: str, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The gate at the rate of plain fine-tuning, at its chosen setting, or else the last one."""
    cells, last, rates = reported(loaded).cells, record["gates"][-1], set()
    if "learning_rate" in cells:
        rates = set(cells[(cells["model"] == model) & (cells["method"].map(family) == PLAIN)]["learning_rate"])
    own = [g for g in record["gates"] if g["steps"] == last["steps"] and g.get("learning_rate") in rates]
    return (own or [last])[-1]


def _settled(record: Mapping[str, Any], model: str, *, gate: Mapping[str, Any]) -> str:
    block, least = record["block"], record["block"]["gate"].get("nats", 0.01)
    others = [g for g in record["gates"] if g is not gate and g["steps"] == gate["steps"] and "learning_rate" in g]
    still = "still" if (gate["low"] or 0) > 0 else "may still"  # the interval of the improvement
    lines = [
        f"{model} is {block['from']} after {record['steps']} steps on general text and on rows of the retention "
        f"tasks' data sets, none of which is scored. They took the general text of the probes from "
        f"{record['nats']:.3f} to {gate['nats']:.3f} nats per token.",
        f"{gate['of']} more steps of plain fine-tuning at a rate of {numbers.rate(gate['learning_rate'])} change that "
        f"by {_changed(gate)}: the base counts as "
        + (
            f"settled at that rate, because they do not lower it by {least:g} or more."
            if gate["holds"]
            else f"not settled, because they {still} lower it, and what a method loses is partly hidden."
        ),
    ]
    if others:
        each = " and ".join(f"{_changed(other)} at {numbers.rate(other['learning_rate'])}" for other in others)
        lines.append(f"At other rates such steps changed it by {each}.")
    return " ".join(lines)


def _changed(gate: Mapping[str, Any]) -> str:
    """By how much a test changed general nats, with its 95 % interval."""
    low, high = (numbers.nats(-gate[end]) for end in ("high", "low"))
    return f"{numbers.nats(-gate['improvement'])} [{low}, {high}]"


def _tested(test: Mapping[str, Any]) -> str:
    found = (
        f"{test['steps']} steps on general text alone change the base's general nats by "
        f"{numbers.nats(-test['improvement'])} a token"
    )
    if test["low"] is None:
        return f"{found}; there are too few texts to say more."
    found += f" (95 % interval {numbers.nats(-test['high'])} to {numbers.nats(-test['low'])})"
    if test["low"] > 0:
        return (
            f"Warning: the base is not settled. {found}: any training can repair it, and what a method loses is hidden "
            "behind that. Settle it first (`settle:` in its block; docs/guide.md)."
        )
    return f"{found}: training on general text does not improve it."
