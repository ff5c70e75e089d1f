"""The comparison: one row a method, for the terminal, as CSV and as Markdown."""

import pandas as pd

from analysis import numbers, units
from analysis.load import UNBEGUN, Loaded, retention_tasks
from analysis.statistics import intervals
from analysis.statistics.intervals import SCOPES, Interval, mean_difference, of_set, paired, perplexity_ratio, wilson

BANNER = "NOT A RESULT: demo or random weights; these numbers mean nothing"
COSTS = (
    "seconds_prepare",
    "seconds_train",
    "seconds_evaluate",
    "peak_memory_bytes",
    "bytes_importance",
    "bytes_anchor",
    "bytes_weights_delta",
    "bytes_optimizer_state",
    "tokens_prepare",
    "tokens_trained",
)


def comparison(loaded: Loaded) -> pd.DataFrame:
    """Numbers by (model, domain, method): shares of 1, seconds, bytes; `_low`/`_high` are 95 % bounds over items.

    Over several seeds every number is the mean, `*_min` and `*_max` its range. A bare base model comes first in its comparison.
    """
    rows = []
    for model, domain in loaded.comparisons:
        cells = loaded.of(model, domain)
        rows.append(_base_row(loaded, model=model, domain=domain, first=cells.iloc[0]))
        for method in dict.fromkeys(cells["method"]):
            rows.append(_method_row(loaded, cells[cells["method"] == method]))
    return pd.DataFrame(rows)


def _base_row(loaded: Loaded, *, model: str, domain: str, first: pd.Series) -> dict:
    n = first["n"]
    kept = retention_tasks(first)
    score = _proportion(first, first["domain_score_base"])
    return {
        "model": model,
        "domain": domain,
        "method": "base",
        "unit": units.of_domain(first),
        "metric": units.metric_of(first, domain),
        "seeds": 0,
        "n_domain": n.get(domain, 0),
        "n_retention": sum(n[t] for t in kept),
        **_bounds("domain_score", score),
        "domain_gain": 0.0,
        "forgetting": 0.0 if kept else None,
        "general_score": first["general_score_base"],
        "perplexity": first["general_perplexity_base"],
        "perplexity_ratio": 1.0,
    }


def _method_row(loaded: Loaded, cells: pd.DataFrame) -> dict:
    first, n = cells.iloc[0], cells.iloc[0]["n"]
    domain, kept = first["domain"], retention_tasks(cells.iloc[0])
    mean = lambda key: mean_if_known(cells[key]) if key in cells else None
    found = item_intervals(loaded, cells)
    score = found.get("domain_score") or _proportion(first, mean("domain_score"))
    ratio = mean("general_perplexity") / first["general_perplexity_base"] if mean("general_perplexity") else None
    if len(cells) > 1 and "perplexity_ratio" in found:
        ratio = None  # the interval's own centre is the geometric mean
    row = {
        "model": first["model"],
        "domain": domain,
        "method": first["method"],
        "unit": units.of_domain(first),
        "metric": units.metric_of(first, domain),
        "seeds": len(cells),
        "n_domain": n.get(domain, 0),
        "n_retention": sum(n[t] for t in kept),
        **_bounds("domain_score", score),
        **_bounds("domain_gain", found.get("domain_gain"), mean("domain_gain")),
        **_bounds("forgetting", found.get("forgetting"), mean("forgetting")),
        "general_score": mean("general_score"),
        "perplexity": mean("general_perplexity"),
        **_bounds("perplexity_ratio", found.get("perplexity_ratio"), ratio),
        **{key: mean(key) for key in COSTS},
        "bytes_stored": mean("bytes_importance") + mean("bytes_anchor")
        if mean("bytes_importance") is not None and mean("bytes_anchor") is not None
        else None,
        **_apart(cells),
        "cost_known": bool(cells["cost_known"].all()) if "cost_known" in cells else True,
        "note": _note(first),
    }
    if len(cells) > 1:
        for key in ("domain_score", "domain_gain", "forgetting"):
            row |= {f"{key}_min": cells[key].min(), f"{key}_max": cells[key].max()}
    return row


def _apart(cells: pd.DataFrame) -> dict:
    """Forgetting of the retention tasks that are no proportions, each in its own unit, the mean over seeds; nothing where there is none."""
    by_seed = [
        found for found in (cells["forgetting_apart"] if "forgetting_apart" in cells else ()) if isinstance(found, dict)
    ]
    if len(by_seed) < len(cells) or not by_seed[0]:
        return {}
    told = {task: about["unit"] for task, about in by_seed[0].items()}
    return {
        f"apart_{task}": float(pd.Series([found[task]["forgetting"] for found in by_seed]).mean()) for task in told
    } | {"apart": told}


def _proportion(cell: pd.Series, score: float) -> Interval:
    """A score of the domain without its items: a proportion of its rows by Wilson's interval, anything else without one."""
    n = cell["n"].get(cell["domain"], 0)
    return wilson(score * n, n) if n and units.of_domain(cell) == units.SHARE else Interval(score, None, None, n)


def item_intervals(loaded: Loaded, cells: pd.DataFrame) -> dict[str, Interval]:
    """Intervals of one method's cells, crossed with seeds where there are several; empty where items of the base or of a cell are not there."""
    first = cells.iloc[0]
    base = loaded.base.get(first["model"], {}).get("items", pd.DataFrame())
    tuned = loaded.items[loaded.items["cell"].isin(cells.index)] if len(loaded.items) else pd.DataFrame()
    if base.empty or tuned.empty or tuned["cell"].nunique() < len(cells):
        return {}
    pairs = paired(base, tuned)
    counts = pairs["task"].value_counts()
    whole = lambda tasks: bool(tasks) and all(counts.get(task, 0) == first["n"].get(task) for task in tasks)
    kept, found, domain, unit = retention_tasks(first), {}, first["domain"], units.of_domain(first)
    if not units.per_item(first, domain):
        about = [by_task[domain] for by_task in cells["scores_by_task"]]
        found["domain_gain"] = of_set(
            [one["change"] for one in about], [one.get("change_error") for one in about], n=first["n"][domain]
        )
    elif whole([domain]):
        found["domain_gain"] = mean_difference(pairs, [domain], step=units.step(unit))
        if unit == units.SHARE:
            found["domain_score"] = intervals.score(tuned, domain)
    if whole(kept):
        found["forgetting"] = -mean_difference(pairs, kept)
    if counts.get("general", 0):
        found["perplexity_ratio"] = perplexity_ratio(pairs)
    return found


def _bounds(key: str, interval: Interval | None, value: float | None = None) -> dict:
    """The committed value with the interval's bounds beside it; the interval's own centre where none is given."""
    if interval is None:
        return {key: value, f"{key}_low": None, f"{key}_high": None}
    return {key: interval.value if value is None else value, f"{key}_low": interval.low, f"{key}_high": interval.high}


def mean_if_known(column: pd.Series) -> float | None:
    """None where any run does not know it: a mean over what happens to be known would compare unlike things."""
    if column.isna().any():
        return None
    mean = float(column.mean())
    return mean if abs(mean) > 1e-12 else 0.0  # gains of seeds that cancel leave -3.7e-17


def _note(cell: pd.Series) -> str:
    notes = []
    if any(_has(cell.get(key), "estimator", "batched") for key in ("parts", "settings", "parts_report")):
        notes.append("batched Fisher: only for the published baseline")
    if not cell.get("cost_known", True):
        notes.append("made elsewhere: cost unknown")
    return "; ".join(notes)


def _has(block, key: str, value) -> bool:
    """Whether a nested block holds `key: value` anywhere."""
    if isinstance(block, dict):
        return block.get(key) == value or any(_has(inner, key, value) for inner in block.values())
    return False


HEADS = (
    "method",
    "score %",
    "gain, points",
    "forgetting, points",
    "perplexity",
    "prepare",
    "train",
    "stored",
    "delta",
    "n",
)


def readable(row: pd.Series) -> dict[str, str]:
    """One row of the comparison as text, a column each of HEADS."""
    base = row["method"] == "base"
    cost = lambda key, show: "" if base else show(row.get(key))
    level, change, (of_score, of_gain) = _in_unit(row)
    texts = (
        row["method"] + ("*" if row.get("note") and isinstance(row["note"], str) else ""),
        f"{level(row['domain_score'])}{of_score}{_range(row, 'domain_score', level)}",
        "" if base else f"{change(row['domain_gain'])}{of_gain}{_range(row, 'domain_gain', change)}",
        "" if base else f"{numbers.points(row['forgetting'])}{_range(row, 'forgetting', numbers.points)}",
        f"{row['perplexity']:.1f}" if base else _ratio(row),
        cost("seconds_prepare", numbers.seconds),
        cost("seconds_train", numbers.seconds),
        cost("bytes_stored", numbers.size),
        cost("bytes_weights_delta", numbers.size),
        f"{row['n_domain']} + {row['n_retention']}",
    )
    return dict(zip(HEADS, texts))


def _in_unit(row: pd.Series):
    """How a row's score and gain are written, and what is put behind them where the columns' heads do not say it."""
    unit = row.get("unit", units.SHARE)
    behind = ("", "") if unit == units.SHARE else (f" {row['metric']}", f" {unit}" if unit != row["metric"] else "")
    return lambda value: units.level(value, unit), lambda value: units.change(value, unit), behind


def _ratio(row: pd.Series) -> str:
    if numbers.missing(row["perplexity_ratio"]):
        return "–"
    return f"×{row['perplexity_ratio']:.2f}{_range(row, 'perplexity_ratio', lambda v: f'{v:.2f}')}"


def _range(row: pd.Series, key: str, show) -> str:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return "" if numbers.missing(low) or numbers.missing(high) else f" [{show(low)}, {show(high)}]"


def legend(table: pd.DataFrame) -> list[str]:
    """What the columns are; one line each."""
    seeds = set(table[table["method"] != "base"]["seeds"]) if len(table) else set()
    scopes = [f"over seeds and items: {SCOPES['method']}"] if max(seeds, default=1) > 1 else []
    scopes += (
        [f"over the scored items{' where there is one seed' if scopes else ''}: {SCOPES['run']}"]
        if 1 in seeds or not scopes
        else []
    )
    lines = [
        f"[ , ] is a 95 % interval {'; '.join(scopes)}.",
        "gain and forgetting are percentage points against the bare base model; forgetting is the mean over retention tasks above chance.",
        *_other_units(table),
        "perplexity is on general text: the base's own, then how many times it for each method.",
        "stored is importance and anchor, delta what the tuned weights add to the base; n is domain + retention rows.",
    ]
    if "note" in table:
        notes = table[table["note"].fillna("") != ""]
        lines += [f"* {row['method']}: {row['note']}." for _, row in notes.drop_duplicates("method").iterrows()]
    return lines


def _other_units(table: pd.DataFrame) -> list[str]:
    """Lines where a domain's or a retention task's metric is no proportion of rows."""
    lines = []
    for domain, rows in table[table["apart"].notna()].groupby("domain", sort=False) if "apart" in table else ():
        for task, unit in rows["apart"].iloc[0].items():
            each = ", ".join(
                f"{row['method']} {units.change(row[f'apart_{task}'], unit)}" for _, row in rows.iterrows()
            )
            lines.append(
                f"{task} ({domain}) is no proportion of rows and not in the mean; its own forgetting, in {unit}: {each}."
            )
    if "unit" not in table or (table["unit"] == units.SHARE).all():
        return lines
    told = [
        f"{row['domain']} in {row['unit']} of {row['metric']}"
        if row["unit"] != row["metric"]
        else f"{row['domain']} in {row['metric']}"
        for _, row in table[table["unit"] != units.SHARE].drop_duplicates("domain").iterrows()
    ]
    return [*lines, f"Not in points, but turned so that more is better: the gain of {', '.join(told)}."]


def missing(loaded: Loaded) -> list[dict]:
    """The cells without a result, as records: each by itself, but several that nobody has begun in one record a (model, domain)."""
    unbegun = loaded.failures[loaded.failures["reason"] == UNBEGUN]
    found = loaded.failures.drop(index=unbegun.index).to_dict("records")
    for pair, cells in unbegun.groupby(unbegun["cell"].str.split("/").str[:2].str.join("/"), sort=False):
        if len(cells) == 1:
            found += cells.to_dict("records")
            continue
        seeds: dict[str, list[str]] = {}
        for _, _, method, seed in cells["cell"].str.split("/"):
            seeds.setdefault(method, []).append(seed.removeprefix("seed"))
        listed = "; ".join(f"{method} {', '.join(numbers)}" for method, numbers in seeds.items())
        found.append(
            {
                "cell": pair,
                "stage": "",
                "kind": "not run",
                "reason": f"{len(cells)} of its cells, by method and seed: {listed}",
                "when": "",
            }
        )
    return found


def failure_lines(loaded: Loaded) -> list[str]:
    return [
        f"{f['cell']}: {f['kind']}{f' in {stage}' if (stage := f['stage']) else ''}: {f['reason']}"
        for f in missing(loaded)
    ]


def as_text(loaded: Loaded, table: pd.DataFrame) -> str:
    """For the terminal: aligned, about 130 columns."""
    lines = [BANNER, ""] if loaded.not_a_result else []
    for (model, domain), rows in table.groupby(["model", "domain"], sort=False) if len(table) else ():
        texts = [readable(row) for _, row in rows.iterrows()]
        widths = {head: max(len(head), *(len(text[head]) for text in texts)) for head in HEADS}
        pad = lambda text, head: text.ljust(widths[head]) if head == "method" else text.rjust(widths[head])
        seeds = int(rows["seeds"].max())
        lines += [
            f"{model}, {domain}, {seeds} seed{'s' if seeds != 1 else ''}",
            "  ".join(pad(head, head) for head in HEADS),
        ]
        lines += ["  ".join(pad(text[head], head) for head in HEADS).rstrip() for text in texts]
        lines.append("")
    lines += legend(table) if len(table) else ["No cell has finished."]
    without = failure_lines(loaded)
    return (
        "\n".join([*lines, *(["", "Without a result:"] if without else []), *("  " + line for line in without)]) + "\n"
    )


def as_markdown(loaded: Loaded, table: pd.DataFrame) -> str:
    lines = [f"**{BANNER}**", ""] if loaded.not_a_result else []
    for (model, domain), rows in table.groupby(["model", "domain"], sort=False) if len(table) else ():
        lines += [f"### {model}, {domain}", "", f"| {' | '.join(HEADS)} |", f"|:--|{'--:|' * (len(HEADS) - 1)}"]
        lines += [f"| {' | '.join(readable(row).values())} |".replace("*", r"\*") for _, row in rows.iterrows()]
        lines.append("")
    lines += [f"- {line}".replace("*", r"\*") for line in legend(table)] if len(table) else ["No cell has finished."]
    without = failure_lines(loaded)
    return (
        "\n".join([*lines, *(["", "Without a result:", ""] if without else []), *(f"- {line}" for line in without)])
        + "\n"
    )


def as_csv(loaded: Loaded, table: pd.DataFrame) -> str:
    """Every number, unrounded; a column `not_a_result`; cells without a result as rows with their reason."""
    flagged = table.assign(not_a_result=loaded.not_a_result, failure="")
    rows = [
        dict(
            zip(("model", "domain", "method"), f.cell.split("/")),
            failure=f"{f.kind}: {f.reason}",
            not_a_result=loaded.not_a_result,
        )
        for f in loaded.failures.itertuples()
    ]
    whole = pd.concat([flagged, pd.DataFrame(rows)], ignore_index=True) if rows else flagged
    return whole.to_csv(index=False, lineterminator="\n", float_format="%.10g")
