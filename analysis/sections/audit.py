"""An audit in words, tables and bars: what the page and the terminal show of the content of audit.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis import numbers, units
from analysis.measures import KL

TOP = 12  # answers lost that the page shows, and half as many gained
CUT = 700  # characters of a question on the page: its end, where the question is asked

Record = Mapping[str, Any]
HEADS = (
    "task",
    "n",
    "chance, %",
    "base",
    "tuned",
    "lost",
    "right answers lost, nats/item",
    "margin lost, nats/item",
    "answers lost",
    "gained",
)


def section(record: Record) -> dict[str, Any]:
    """Everything that audit.html.j2 shows."""
    flips = record["flips"]
    return {
        "base": _short(record["base"]["given"]),
        "tuned": _short(record["tuned"]["given"]),
        "answer": answer(record),
        "verdict": record["verdict"],
        "notes": record["tokenizers"] + record["configs"] + _reading(record),
        "heads": HEADS,
        "tasks": [_task(task) for task in record["tasks"]] + _mean(record),
        "at_chance": record["overall"]["at_chance"],
        "apart": record["overall"]["apart"],
        "general": _general(record["general"]),
        "flips": {
            "lost": [_flip(flip) for flip in flips if flip["kind"] == "lost"][:TOP],
            "gained": [_flip(flip) for flip in flips if flip["kind"] == "gained"][: TOP // 2],
            "count": {kind: sum(flip["kind"] == kind for flip in flips) for kind in ("lost", "gained")},
        },
        "movement": _movement(record["movement"]),
        "facts": _facts(record),
    }


def _short(given: str) -> str:
    """A model's name in a title: a folder without the folders above it."""
    return given if given.startswith("hub:") else given.rstrip("/").rpartition("/")[2]


def answer(record: Record) -> list[str]:
    """What was lost, in sentences: on general text, in right answers, in accuracy, and how far the weights moved."""
    said, general, overall = [], record["general"], record["overall"]
    if general and general["nll_lost"]:
        kl = f", and KL(base‖tuned) is {_nats(general['kl'], sign=False)} nats per token" if general["kl"] else ""
        said.append(
            f"General text: {_nats(general['nll_lost'])} nats per token lost{kl}, on {_passages(general)} of "
            f"{general['tokens']['base']:,} tokens."
        )
    elif general:
        said.append(
            f"General text: {_nats(general['bits_per_byte_lost'])} bits per byte lost on {_passages(general)} of "
            f"{general['bytes']:,} bytes. The two models do not predict the same tokens, so that nats per token "
            "and KL are not defined."
        )
    tasks = len(overall["tasks"])
    if tasks:
        over = f"the {tasks} tasks that the base answers above chance" if tasks > 1 else overall["tasks"][0]
        if overall["gold_nll_lost"]:
            said.append(f"Right answers: {_nats(overall['gold_nll_lost'])} nats per item lost on {over}.")
        said.append(f"Accuracy: {_points(overall['forgetting'])} points lost on {over}{_answers(record)}.")
    elif record["tasks"]:
        said.append("Accuracy: on no task is the base above chance by its 95 % interval, so that none can show a loss.")
    moved = record["movement"]["overall"]
    if moved["distance"]:
        said.append(
            f"The weights moved by {numbers.fine_percent(moved['relative'])} % of their norm; "
            f"{numbers.percent(moved['changed'])} % of them changed."
        )
    else:
        said.append("No weight moved.")
    return said


def _passages(general: Mapping[str, Any]) -> str:
    return f"{general['n']:,} passage{'s' if general['n'] != 1 else ''}"


def _answers(record: Record) -> str:
    counted = [task["answers"] for task in record["tasks"] if task["counts"] and "answers" in task]
    if not counted:
        return ""
    lost, gained, right = (sum(one[key] for one in counted) for key in ("lost", "gained", "right"))
    known = [one["lost_known"] for one in counted]
    guessing = "" if None in known else f" ({numbers.change(sum(known))} less what guessing would lose)"
    answers = "answer" if right == 1 else "answers"
    return f": of {right:,} right {answers} {lost:,} were lost{guessing}, and the tuned model gained {gained:,}"


def _reading(record: Record) -> list[str]:
    general, notes = record["general"], []
    if record["plain_prompts"]:
        notes.append(
            "Tasks are asked without the chat template that the tuned model's tokenizer has: --chat-template writes "
            "their prompts in it."
        )
    if general and not general["same_ids"]:
        notes.append(
            "Each model reads the general text with its own tokenizer, and the text is measured in bits per byte. "
            "Answers to tasks are the same texts for both, so that their nats can be compared."
        )
    elif general and not general["kl"]:
        notes.append("The two models have different numbers of rows for unused tokens, so that KL is not defined.")
    for name, ours, theirs in record["movement"]["rows"]:
        notes.append(
            f"{name} has {ours:,} rows in the base and {theirs:,} in the tuned model: the shared ones are compared."
        )
    for who, other, key in (("base", "tuned model", "only_base"), ("tuned model", "base", "only_tuned")):
        for name in record["movement"][key]:
            notes.append(f"Only the {who} has a head of its own: {name} is compared with the {other}'s embedding.")
    if (one := record["base"]["dtype"]) != (other := record["tuned"]["dtype"]):
        notes.append(f"The base is stored in {one} and the tuned model in {other}: rounding is a part of the movement.")
    return notes


def _task(task: Mapping[str, Any]) -> dict[str, Any]:
    unit, answers = task["unit"], task.get("answers")
    known = {key: None if answers is None else answers[f"{key}_known"] for key in ("lost", "gained")}
    less = {key: "" if value is None else f"{numbers.change(value)} less guessing" for key, value in known.items()}
    return {
        "name": task["name"],
        "note": task["metric"] + ("" if task["counts"] else ", not in the mean"),
        "class": "" if task["counts"] else "aside",
        "cells": [
            (f"{task['n']:,}", ""),
            (numbers.percent(task["chance"]) if unit == units.SHARE else "–", ""),
            (units.level(task["base"], unit), ""),
            (units.level(task["tuned"], unit), ""),
            _ends(task["lost"], lambda value: units.change(value, unit)),
            _ends(task["gold_nll_lost"], numbers.nats),
            _ends(task["margin_lost"], numbers.nats),
            (f"{answers['lost']:,} of {answers['right']:,}", less["lost"]) if answers else ("–", ""),
            (f"{answers['gained']:,}", less["gained"]) if answers else ("–", ""),
        ],
    }


def _mean(record: Record) -> list[dict[str, Any]]:
    """The last row: means over the tasks that count."""
    overall = record["overall"]
    if len(overall["tasks"]) < 2:
        return []
    blank = ("", "")
    cells = [blank, blank, blank, blank, _ends(overall["forgetting"], numbers.points)]
    cells += [_ends(overall[f"{key}_lost"], numbers.nats) for key in ("gold_nll", "margin")]
    return [{"name": f"mean of {len(overall['tasks'])}", "class": "mean", "cells": [*cells, blank, blank]}]


def _general(general: Mapping[str, Any] | None) -> list[dict[str, Any]] | None:
    """Rows of general text, each a measure with base, tuned and lost; None where none was scored."""
    if general is None:
        return None
    rows = []
    if general["nll_lost"]:
        base, tuned = (f"{general['nll'][who]:.4f}" for who in ("base", "tuned"))
        rows.append(("nats per token", base, tuned, _ends(general["nll_lost"], numbers.nats)))
    base, tuned = (f"{general['bits_per_byte'][who]:.4f}" for who in ("base", "tuned"))
    rows.append(("bits per byte", base, tuned, _ends(general["bits_per_byte_lost"], numbers.nats)))
    if general["kl"]:
        rows.append(("KL(base‖tuned), nats per token", "0", "", _ends(general["kl"], KL.show)))
        rows.append(("KL(tuned‖base), nats per token", "0", "", _ends(general["kl_reverse"], KL.show)))
    return [{"name": name, "cells": [(base, ""), (tuned, ""), lost]} for name, base, tuned, lost in rows]


def _flip(flip: Mapping[str, Any]) -> dict[str, Any]:
    question = flip["question"] or ""
    question = f"… {question[-CUT:]}" if len(question) > CUT else question
    change = None if flip["gold_change"] is None else numbers.nats(flip["gold_change"])
    return {**flip, "question": question, "change": change, "hash": flip["doc_hash"][:12]}


def _movement(moved: Mapping[str, Any]) -> dict[str, Any]:
    """A bar for each block and what lies outside of blocks, and a row for each kind of matrix: ‖Δ‖ / ‖θ₀‖."""
    groups = _relative(moved["groups"], "group")
    largest = max((relative or 0.0 for relative, _ in groups.values()), default=0.0)
    bars = [
        {
            "name": name.replace("block.", "block ").replace("_", " "),
            "share": 100 * (relative or 0.0) / largest if largest else 0.0,
            "text": f"{numbers.fine_percent(relative)} %",
        }
        for name, (relative, _) in groups.items()
    ]
    kinds = []
    for kind, (relative, changed) in _relative(moved["groups"], "kind").items():
        texts = (f"{numbers.fine_percent(relative)} %", f"{numbers.percent(changed)} %", _rank(moved["groups"], kind))
        kinds.append({"name": kind, "cells": [(text, "") for text in texts]})
    overall = moved["overall"]
    return {
        "bars": bars,
        "kinds": kinds,
        "moved": bool(overall["distance"]),
        "overall": (f"{numbers.fine_percent(overall['relative'])} %", f"{numbers.percent(overall['changed'])} %"),
        "skipped": len(moved["rank_skipped"]),
        "rank_limit": moved["rank_limit"],
    }


def _relative(groups: list[Mapping[str, Any]], key: str) -> dict[str, tuple[float | None, float]]:
    """(‖Δ‖ / ‖θ₀‖, share of entries that changed) by the groups' `key`, over all tensors of one value of it."""
    found = {}
    for name in dict.fromkeys(group[key] for group in groups):
        own = [group for group in groups if group[key] == name]
        moved, size, entries, changed = (
            np.array([group[what] or 0.0 for group in own]) for what in ("distance", "base_norm", "entries", "changed")
        )
        whole = np.sqrt((size**2).sum())
        relative = float(np.sqrt((moved**2).sum()) / whole) if whole else None
        found[name] = relative, float((entries * changed).sum() / entries.sum())
    return found


def _rank(groups: list[Mapping[str, Any]], kind: str) -> str:
    """The median over blocks of the effective rank of one kind of matrix."""
    ranks = [group["effective_rank"] for group in groups if group["kind"] == kind and group["effective_rank"]]
    return f"{np.median(ranks):.3g}" if ranks else "–"


def _facts(record: Record) -> list[tuple[str, str]]:
    """How it was measured."""
    base, tuned, settings, scoring = record["base"], record["tuned"], record["settings"], record["scoring"]
    models = [(who, _model(about)) for who, about in (("base", base), ("tuned", tuned))]
    computed = f"computed in {settings['dtype']} on {settings['device']}"
    sources = [(name, facts["source"]) for name, facts in record["sources"].items() if facts.get("source")]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return [
        *models,
        ("scoring", f"{scoring['scorer']}, batch size {scoring['batch_size']}, {computed}"),
        *((f"rows of {name}", source) for name, source in sources),
        ("versions", versions),
        ("made", f"{record['when'][:16].replace('T', ' ')}, commit {(record['git'].get('commit') or 'unknown')[:10]}"),
    ]


def _model(about: Mapping[str, Any]) -> str:
    text = f"{about['given']}, {about['dtype']}, weights {about['weights_sha256'][:12]}"
    if "adapter" in about:
        text += f", an adapter ({about['adapter']}) of {about['adapter_of'] or 'the base'}, merged"
    for key in ("source", "commit", "note"):
        text += f", {key} {about[key]}" if about.get(key) else ""
    return text


def _ends(interval: Mapping[str, Any] | None, show) -> tuple[str, str]:
    """(value, its 95 % interval) as text."""
    if interval is None:
        return "–", ""
    if interval["low"] is None:
        return show(interval["value"]), ""
    return show(interval["value"]), f"{show(interval['low'])} to {show(interval['high'])}"


def _nats(interval: Mapping[str, Any], *, sign: bool = True) -> str:
    return _within(*_ends(interval, numbers.nats if sign else KL.show))


def _points(interval: Mapping[str, Any]) -> str:
    return _within(*_ends(interval, numbers.points))


def _within(value: str, ends: str) -> str:
    return f"{value} [{ends}]" if ends else value
