"""The guard of the comparison: cells that were made or scored under different rules are not shown in one table.

Two cells of one (model, domain) are comparable if these are equal: the base's hash and scores, the data's hash, dtype
and compute dtype, NUMERICS, all settings and versions of the scorer (SCORING, scorer, batch size, limit, dtype,
lm-eval, transformers), for each task its version, metric, chance, role, number of rows and, where recorded, its prompt,
the scored rows, and the token budget. An unknown budget (a checkpoint made elsewhere) is shown as unknown and does not
count as a difference.
"""

import hashlib
import json
from dataclasses import replace

import pandas as pd

from analysis.load import Loaded
from analysis.numbers import missing

SAME = ("base_sha256", "data_sha256", "dtype", "compute_dtype", "numerics", "general_perplexity_base")
OF_TASK = ("version", "metric", "chance", "role", "n", "prompt", "base")
BUDGET = "token budget"
ROWS = "scored rows of "
KIND = "not comparable"
SHOWN = 3  # differences that a message spells out


def guarded(loaded: Loaded) -> Loaded:
    """The results without the cells that cannot be compared with the others of their (model, domain).

    Each of them gets a row in `failures` of the kind 'not comparable', with both values of what differs and a remedy.
    """
    rows, dropped = rows_of(loaded.items), {}
    for model, domain in loaded.comparisons:
        dropped |= dict(groups(loaded.of(model, domain), rows=rows)[1])
    if not dropped:
        return loaded
    records = pd.DataFrame({"cell": list(dropped), "stage": "compare", "kind": KIND, "reason": list(dropped.values())})
    records["when"] = [loaded.cells.loc[cell].get("when") or "" for cell in dropped]
    failures = pd.concat([loaded.failures, records], ignore_index=True)
    return replace(loaded.without(dropped), failures=failures)


def groups(
    cells: pd.DataFrame, *, rows: dict[str, dict[str, str]] | None = None
) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The largest group of comparable cells of one (model, domain), and the other cells with the reason for each.

    cells  rows as in `Loaded.cells`, indexed by cell; their order is kept
    rows   cell -> task -> hash of the scored rows, from `rows_of`; tasks that it lacks are not compared
    Of several groups of the largest size, the one with the newest cell is kept.
    """
    rules = {cell: _rules(row, (rows or {}).get(cell, {})) for cell, row in cells.iterrows()}
    when = {cell: str(row.get("when") or "") for cell, row in cells.iterrows()}

    def gathers(one: dict, other: dict) -> bool:
        # a cell of unknown budget fits to several groups, so it gathers only others of unknown budget
        return (BUDGET in one or BUDGET not in other) and not _differences(one, other)

    alike: dict[str, list[str]] = {}  # almost all cells of a study have equal rules, and one of them is compared
    for cell, own in rules.items():
        alike.setdefault(repr(own), []).append(cell)
    firsts = {same[0]: same for same in alike.values()}
    members = {
        one: [cell for other, same in firsts.items() if gathers(rules[one], rules[other]) for cell in same]
        for one in firsts
    }
    best = max(members, key=lambda one: (len(members[one]), max(when[member] for member in members[one])), default=None)
    if best is None:
        return cells, []
    kept = set(members[best])
    out = [(cell, _reason(rules[cell], rules[best], count=len(kept))) for cell in rules if cell not in kept]
    return cells.loc[[cell for cell in rules if cell in kept]], out


def rows_of(items: pd.DataFrame) -> dict[str, dict[str, str]]:
    """cell -> task -> a hash of the rows that were scored, in any order."""
    hashes: dict[str, dict[str, str]] = {}
    for (cell, task), group in items.groupby(["cell", "task"], sort=False) if len(items) else ():
        rows = json.dumps(sorted(map(str, group["doc_hash"])))
        hashes.setdefault(cell, {})[task] = hashlib.sha256(rows.encode()).hexdigest()
    return hashes


def _rules(cell: pd.Series, rows: dict[str, str]) -> dict[str, object]:
    """Everything that has to be equal, by name."""
    tasks = _mapping(cell.get("scores_by_task"))
    rules = {key: cell.get(key) for key in SAME}
    rules |= {f"scoring.{key}": value for key, value in _mapping(cell.get("scoring")).items()}
    rules["tasks"] = ", ".join(sorted(tasks))
    for task, score in tasks.items():
        rules |= {f"{task}.{key}": score.get(key) for key in OF_TASK}
    rules |= {f"{ROWS}{task}": digest for task, digest in rows.items()}
    settings = _mapping(cell.get("settings"))
    tokens, epochs = cell.get("tokens_trained"), settings.get("epochs")
    if not missing(tokens):
        # a part that replays other text in place of domain rows keeps the budget: tokens it leaves out are part of it
        tokens += 0 if missing(cell.get("tokens_left_out")) else cell["tokens_left_out"]
        # a run that a rule on probes may end has the budget of its last step
        tokens = _mapping(cell.get("stopped")).get("tokens_planned", tokens)
        # part of an epoch takes other rows for every seed, so tokens differ a little where the budget does not
        whole = epochs is None or float(epochs).is_integer()
        part = f"epochs of {settings.get('length')} tokens a row, {settings.get('batch')} rows a step"
        rules[BUDGET] = f"{tokens:,.0f} tokens" if whole else f"{epochs:g} {part}"
    return {key: None if missing(value) else value for key, value in rules.items()}


def _differences(one: dict, other: dict) -> list[str]:
    """Names of the rules that differ. Rows or a budget that only one cell has are unknown of the other, and ignored."""
    differ = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
    both = one.keys() & other.keys()
    return [key for key in differ if key in both or not (key == BUDGET or key.startswith(ROWS))]


def _reason(here: dict, there: dict, *, count: int) -> str:
    differ = _differences(here, there)
    values = [f"{key} is {_shown(here.get(key))} here and {_shown(there.get(key))} there" for key in differ[:SHOWN]]
    more = f"; and {len(differ) - SHOWN} more differ" if len(differ) > SHOWN else ""
    remedy = "Bring it up to date with `dvc repro`"
    if differ == [BUDGET]:
        remedy = "Cells of another budget belong in a study of their own"
    cells = f"the {count} cell{'s' if count != 1 else ''} compared"
    return f"not made under the rules of {cells}: {'; '.join(values)}{more}. {remedy}"


def _shown(value: object) -> str:
    """A value as text; a hash by its first 12 digits, as elsewhere in the report."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return "unknown" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}
