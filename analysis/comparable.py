"""The guard of the comparison: cells that were not made and scored under equal rules do not stand in one table.

Two cells of one (model, domain) are comparable if these are equal: the base's hash and its scores, the data's hash, dtype and
compute dtype, NUMERICS, all of the scorer's settings and versions (SCORING, scorer, batch size, limit, dtype, lm-eval,
transformers), for each task its version, metric, chance, role, number of rows and prompt where that is recorded, the scored
rows, and the token budget. A budget that nobody knows (a checkpoint made elsewhere) is shown as unknown and is no difference.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace

import pandas as pd

from analysis.load import Loaded

SAME = ("base_sha256", "data_sha256", "dtype", "compute_dtype", "numerics", "general_perplexity_base")
OF_TASK = ("version", "metric", "chance", "role", "n", "prompt", "base")
BUDGET = "token budget"
KIND = "not comparable"
SHOWN = 3  # differences that a message spells out


def guarded(loaded: Loaded) -> Loaded:
    """The results without the cells that cannot be compared with the others of their (model, domain).

    Each stands in `failures` as 'not comparable', with what differs, both values and what to do; its curve and items are left out.
    """
    rows, dropped = rows_of(loaded.items), {}
    for model, domain in loaded.comparisons:
        dropped |= dict(groups(loaded.of(model, domain), rows=rows)[1])
    if not dropped:
        return loaded
    out = [
        {
            "cell": cell,
            "stage": "compare",
            "kind": KIND,
            "reason": reason,
            "when": loaded.cells.loc[cell].get("when") or "",
        }
        for cell, reason in dropped.items()
    ]
    return replace(loaded.without(dropped), failures=pd.concat([loaded.failures, pd.DataFrame(out)], ignore_index=True))


def groups(
    cells: pd.DataFrame, *, rows: dict[str, dict[str, str]] | None = None
) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The largest group of comparable cells of one (model, domain), and the other cells with the reason for each.

    cells  rows as in `Loaded.cells`, indexed by cell; their order is kept
    rows   cell -> task -> hash of the scored rows, from `rows_of`; tasks that it lacks are not looked at
    Of groups of one size the one with the newest cell is kept.
    """
    rules = {cell: _rules(row, (rows or {}).get(cell, {})) for cell, row in cells.iterrows()}
    when = {cell: str(row.get("when") or "") for cell, row in cells.iterrows()}
    # a cell of unknown budget would fit to several groups, so it leads only its like
    leads = lambda one, other: BUDGET in rules[one] or BUDGET not in rules[other]
    members = {
        one: [other for other in rules if leads(one, other) and not _differences(rules[one], rules[other])]
        for one in rules
    }
    best = max(rules, key=lambda one: (len(members[one]), max(when[member] for member in members[one])), default=None)
    if best is None:
        return cells, []
    kept = members[best]
    out = [(cell, _reason(rules[cell], rules[best], count=len(kept))) for cell in rules if cell not in kept]
    return cells.loc[kept], out


def rows_of(items: pd.DataFrame) -> dict[str, dict[str, str]]:
    """cell -> task -> a hash of the rows that were scored, in any order."""
    found: dict[str, dict[str, str]] = {}
    for (cell, task), group in items.groupby(["cell", "task"], sort=False) if len(items) else ():
        found.setdefault(cell, {})[task] = _digest(sorted(map(str, group["doc_hash"])))
    return found


def _rules(cell: pd.Series, rows: dict[str, str]) -> dict[str, object]:
    """What has to be equal, by name."""
    found = {key: cell.get(key) for key in SAME}
    found |= {f"scoring.{key}": value for key, value in _mapping(cell.get("scoring")).items()}
    tasks = _mapping(cell.get("scores_by_task"))
    found["tasks"] = ", ".join(sorted(tasks))
    for task, about in tasks.items():
        found |= {f"{task}.{key}": about.get(key) for key in OF_TASK}
    found |= {f"scored rows of {task}": digest for task, digest in rows.items()}
    settings = _mapping(cell.get("settings"))
    tokens, epochs = cell.get("tokens_trained"), settings.get("epochs")
    if not _unknown(tokens):
        # a share of an epoch takes other rows for every seed, so that tokens differ a little where the budget does not
        whole = epochs is None or float(epochs).is_integer()
        share = f"epochs of {settings.get('length')} tokens a row, {settings.get('batch')} rows a step"
        found[BUDGET] = f"{tokens:,.0f} tokens" if whole else f"{epochs:g} {share}"
    return {key: None if _unknown(value) else value for key, value in found.items()}


def _differences(one: dict, other: dict) -> list[str]:
    """Names of the rules that differ; what only one of them has differs too, except for rows and a budget that are not known."""
    optional = lambda key: key == BUDGET or key.startswith("scored rows of ")
    keys: Iterable[str] = dict.fromkeys([*one, *other])
    return [
        key
        for key in keys
        if one.get(key) != other.get(key) and not (optional(key) and (key not in one or key not in other))
    ]


def _reason(here: dict, there: dict, *, count: int) -> str:
    differ = _differences(here, there)
    said = "; ".join(
        f"{key} is {_shown(here.get(key))} here and {_shown(there.get(key))} there" for key in differ[:SHOWN]
    )
    more = f"; and {len(differ) - SHOWN} more differ" if len(differ) > SHOWN else ""
    todo = (
        "Cells of another budget belong in a study of their own"
        if differ == [BUDGET]
        else "Bring it up to date with `dvc repro`"
    )
    return f"not made under the rules of the {count} cell{'s' if count != 1 else ''} compared: {said}{more}. {todo}"


def _shown(value: object) -> str:
    """Hashes by their first 12 digits, as elsewhere on the page."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return "unknown" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _unknown(value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _digest(values: list[str]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
