"""The comparison as people read it: in the terminal, as CSV and as Markdown."""

import pandas as pd

from analysis import numbers, units
from analysis.load import NOT_STARTED, Loaded
from analysis.statistics.intervals import SCOPES

BANNER = "NOT A RESULT: demo or random weights; these numbers mean nothing"
GAIN, FORGETTING = "gain, points", "forgetting, points"
HEADS = ("method", "score %", GAIN, FORGETTING, "perplexity", "prepare", "train", "stored", "delta", "n")


def readable(row: pd.Series) -> dict[str, str]:
    """One row of the comparison as text, by HEADS."""
    is_base, share = row["method"] == "base", row.get("unit", units.SHARE) == units.SHARE
    unit = row.get("unit", units.SHARE)
    # the heads of the columns name the unit of shares; any other is written behind the number
    metric, own_unit = ("", "") if share else (f" {row['metric']}", f" {unit}" if unit != row["metric"] else "")

    def level(value: float) -> str:
        return units.level(value, unit)

    def change(value: float) -> str:
        return units.change(value, unit)

    def cost(key: str, show) -> str:
        return "" if is_base else show(row.get(key))

    texts = (
        row["method"] + ("*" if row.get("note") and isinstance(row["note"], str) else ""),
        f"{level(row['domain_score'])}{metric}{_range(row, 'domain_score', level)}",
        "" if is_base else f"{change(row['domain_gain'])}{own_unit}{_range(row, 'domain_gain', change)}",
        "" if is_base else f"{numbers.points(row['forgetting'])}{_range(row, 'forgetting', numbers.points)}",
        f"{row['perplexity']:.1f}" if is_base else _ratio(row),
        cost("seconds_prepare", numbers.seconds),
        cost("seconds_train", numbers.seconds),
        cost("bytes_stored", numbers.size),
        cost("bytes_weights_delta", numbers.size),
        f"{row['n_domain']} + {row['n_retention']}",
    )
    return dict(zip(HEADS, texts))


def _ratio(row: pd.Series) -> str:
    if numbers.missing(row["perplexity_ratio"]):
        return "–"
    return f"×{row['perplexity_ratio']:.2f}{_range(row, 'perplexity_ratio', '{:.2f}'.format)}"


def _range(row: pd.Series, key: str, show) -> str:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return "" if numbers.missing(low) or numbers.missing(high) else f" [{show(low)}, {show(high)}]"


def legend(table: pd.DataFrame) -> list[str]:
    """What the columns mean, one line each."""
    seeds = set(table[table["method"] != "base"]["seeds"]) if len(table) else set()
    scopes = [f"over seeds and items ({SCOPES['method']})"] if max(seeds, default=1) > 1 else []
    if 1 in seeds or not scopes:
        one = ", for a method with one seed" if scopes else ""
        scopes.append(f"over the scored items{one} ({SCOPES['run']})")
    lines = [
        f"[ , ] is the 95 % confidence interval {'; '.join(scopes)}.",
        "Gain and forgetting are percentage points against the bare base model; forgetting is the mean over "
        "retention tasks above chance.",
        *_other_units(table),
        "Perplexity is on general text: the base's own, and for each method its ratio to the base's.",
        "Stored is importance plus anchor, delta what the tuned weights add to the base; n is domain + retention rows.",
    ]
    if "note" in table:
        notes = table[table["note"].fillna("") != ""].drop_duplicates("method")
        lines += [f"* {row['method']}: {row['note']}." for _, row in notes.iterrows()]
    return lines


def _other_units(table: pd.DataFrame) -> list[str]:
    """Lines about domains and retention tasks whose metric is not a proportion of rows."""
    lines = []
    for domain, rows in table[table["apart"].notna()].groupby("domain", sort=False) if "apart" in table else ():
        for task, unit in rows["apart"].iloc[0].items():
            values = [f"{row['method']} {units.change(row[f'apart_{task}'], unit)}" for _, row in rows.iterrows()]
            lines.append(
                f"{task} ({domain}) is not a proportion of rows and not in the mean; its own forgetting, in {unit}: "
                f"{', '.join(values)}."
            )
    others = table[table["unit"] != units.SHARE].drop_duplicates("domain") if "unit" in table else table[:0]
    if len(others):
        named = [
            f"{row.domain} in {row.unit}" + (f" of {row.metric}" if row.unit != row.metric else "")
            for row in others.itertuples()
        ]
        lines.append(f"Not in points, and with its sign such that more is better: the gain of {', '.join(named)}.")
    return lines


def missing(loaded: Loaded) -> list[dict]:
    """The cells without a result, one record each; those that were not started, one record per (model, domain)."""
    waiting = loaded.failures[loaded.failures["reason"] == NOT_STARTED]
    records = loaded.failures.drop(index=waiting.index).to_dict("records")
    for pair, cells in waiting.groupby(waiting["cell"].str.split("/").str[:2].str.join("/"), sort=False):
        if len(cells) == 1:
            records += cells.to_dict("records")
            continue
        seeds: dict[str, list[str]] = {}
        for _, _, method, seed in cells["cell"].str.split("/"):
            seeds.setdefault(method, []).append(seed.removeprefix("seed"))
        listed = "; ".join(f"{method} {', '.join(own)}" for method, own in seeds.items())
        reason = f"{len(cells)} of its cells, by method and seed: {listed}"
        records.append({"cell": pair, "stage": "", "kind": "not run", "reason": reason, "when": ""})
    return records


def failure_lines(loaded: Loaded) -> list[str]:
    return [
        f"{f['cell']}: {' in '.join(filter(None, (f['kind'], f['stage'])))}: {f['reason']}" for f in missing(loaded)
    ]


def as_text(loaded: Loaded, table: pd.DataFrame) -> str:
    """For the terminal: aligned, about 130 columns."""
    lines = [BANNER, ""] if loaded.not_a_result else []
    for (model, domain), rows in table.groupby(["model", "domain"], sort=False) if len(table) else ():
        texts = [dict(zip(HEADS, HEADS)), *(readable(row) for _, row in rows.iterrows())]
        widths = {head: max(len(text[head]) for text in texts) for head in HEADS}
        seeds = int(rows["seeds"].max())
        lines.append(f"{model}, {domain}, {seeds} seed{'s' if seeds != 1 else ''}")
        for text in texts:
            columns = [text["method"].ljust(widths["method"]), *(text[head].rjust(widths[head]) for head in HEADS[1:])]
            lines.append("  ".join(columns).rstrip())
        lines.append("")
    lines += legend(table) if len(table) else ["No cell has finished."]
    if without := failure_lines(loaded):
        lines += ["", "Without a result:", *("  " + line for line in without)]
    return "\n".join(lines) + "\n"


def as_markdown(loaded: Loaded, table: pd.DataFrame) -> str:
    lines = [f"**{BANNER}**", ""] if loaded.not_a_result else []
    for (model, domain), rows in table.groupby(["model", "domain"], sort=False) if len(table) else ():
        lines += [f"### {model}, {domain}", "", f"| {' | '.join(HEADS)} |", f"|:--|{'--:|' * (len(HEADS) - 1)}"]
        lines += [f"| {' | '.join(readable(row).values())} |".replace("*", r"\*") for _, row in rows.iterrows()]
        lines.append("")
    lines += [f"- {line}".replace("*", r"\*") for line in legend(table)] if len(table) else ["No cell has finished."]
    if without := failure_lines(loaded):
        lines += ["", "Without a result:", "", *(f"- {line}" for line in without)]
    return "\n".join(lines) + "\n"


def as_csv(loaded: Loaded, table: pd.DataFrame) -> str:
    """Every number, unrounded; a column `not_a_result`; cells without a result as rows with their reason."""
    whole = table.assign(not_a_result=loaded.not_a_result, failure="")
    rows = [
        dict(zip(("model", "domain", "method"), f.cell.split("/"))) | {"failure": f"{f.kind}: {f.reason}"}
        for f in loaded.failures.itertuples()
    ]
    if rows:
        without = pd.DataFrame(rows).assign(not_a_result=loaded.not_a_result)
        whole = pd.concat([whole, without], ignore_index=True)
    return whole.to_csv(index=False, lineterminator="\n", float_format="%.10g")
