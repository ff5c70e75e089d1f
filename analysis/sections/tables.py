"""The comparison as people read it: in the terminal, as CSV and as Markdown."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from analysis import numbers, units, words
from analysis.load import NOT_STARTED, Loaded
from analysis.measures import KL, NATS, Measure
from analysis.statistics.intervals import SCOPES
from analysis.statistics.nats import DOMAIN

BANNER = "NOT A RESULT: demo or random weights; these numbers mean nothing"
WIDTH = 140  # characters of a line of the legend in the terminal
GAIN, FORGETTING = "gain, points", "forgetting, points"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the comparison: its head, and the text of a row of `comparison`; `short` heads it in the terminal.

    terminal  whether the terminal shows it, which has room for some 150 characters
    """

    head: str
    text: Callable[[pd.Series], str]
    short: str = ""
    terminal: bool = True


def columns(rows: pd.DataFrame, *, terminal: bool = False) -> list[Column]:
    """The columns of one comparison: what was learned, what was forgotten (in nats first), what it cost.

    A measure that is known of no method, as in results before it was recorded, has no column.
    """

    def known(key: str) -> bool:
        return key in rows and rows.loc[rows["method"] != "base", key].notna().any()

    of_text = (rows["metric"] == units.PER_TOKEN).all()
    made = [
        Column(head="method", text=_method),
        Column(
            head="nats/token" if of_text else "score %",
            text=lambda row: _score(row, interval=not terminal, metric=not of_text),
        ),
        Column(head="gain, nats/token" if of_text else GAIN, text=lambda row: _gain(row, unit=not of_text)),
    ]
    if of_text and known("domain_bits_per_byte"):
        made.append(Column(head="bits/byte", text=lambda row: _plain(row, "domain_bits_per_byte"), terminal=False))
    for key in units.gains(rows):
        task = key.removeprefix("gain_")
        unit = rows.loc[rows["method"] != "base", f"unit_{task}"].iloc[0]
        made.append(
            Column(
                head=f"{task}: gain, {units.named(unit)}",
                short=f"{task}: gain",
                text=lambda row, key=key, unit=unit: _bounded(
                    row, key, lambda value: units.change(value, unit), interval=not terminal
                ),
            )
        )
    if known(DOMAIN) and not of_text:
        made.append(
            Column(head="gain, nats/token", text=lambda row: _bounded(row, DOMAIN, numbers.nats), terminal=False)
        )
    made += [
        Column(
            head=measure.head,
            short=SHORT.get(measure.key, ""),
            text=lambda row, m=measure: _bounded(row, m.key, m.show, interval=not (terminal and m is KL)),
            terminal=measure.key in SHORT,
        )
        for measure in NATS
        if known(measure.key)
    ]
    made += [
        Column(head=FORGETTING, text=lambda row: _bounded(row, "forgetting", numbers.points)),
        Column(head="perplexity", text=_perplexity, terminal=False),
        Column(head="prepare", text=lambda row: _cost(row, "seconds_prepare", numbers.seconds), terminal=False),
        Column(head="train", text=lambda row: _cost(row, "seconds_train", numbers.seconds)),
        Column(head="n", text=lambda row: f"{row['n_domain']} + {row['n_retention']}"),
    ]
    return [column for column in made if column.terminal or not terminal]


SHORT = {"general_nll_lost": "text lost, nats", "general_kl": "KL", "gold_nll_lost": "answers lost, nats"}


def _method(row: pd.Series) -> str:
    return row["method"] + ("*" if row.get("note") and isinstance(row["note"], str) else "")


def _score(row: pd.Series, *, interval: bool, metric: bool) -> str:
    unit = row.get("unit", units.SHARE)
    # the heads of the columns name the unit of shares; any other is written behind the number
    after = "" if unit == units.SHARE or not metric else f" {row['metric']}"
    bounds = _range(row, "domain_score", lambda value: units.level(value, unit)) if interval else ""
    return f"{units.level(row['domain_score'], unit)}{after}{bounds}"


def _gain(row: pd.Series, *, unit: bool) -> str:
    own = row.get("unit", units.SHARE)
    after = "" if own in (units.SHARE, row["metric"]) or not unit else f" {own}"
    show = numbers.nats if row["metric"] == units.PER_TOKEN else lambda value: units.change(value, own)
    return _bounded(row, "domain_gain", show, after=after)


def _gain_in_nats(row: pd.Series) -> str:
    return _bounded(row, DOMAIN, numbers.nats)


def _bounded(row: pd.Series, key: str, show, *, after: str = "", interval: bool = True) -> str:
    """A method's number with its interval; nothing for the base, from which all differences are."""
    if row["method"] == "base" and row["seeds"] == 0:
        return ""
    return f"{show(row[key])}{after}{_range(row, key, show) if interval else ''}"


def _cost(row: pd.Series, key: str, show) -> str:
    return "" if row["method"] == "base" else show(row.get(key))


def _plain(row: pd.Series, key: str) -> str:
    return "–" if numbers.missing(row.get(key)) else f"{row[key]:.3f}"


def _perplexity(row: pd.Series) -> str:
    if row["method"] == "base":
        return f"{row['perplexity']:.1f}"
    if numbers.missing(row["perplexity_ratio"]):
        return "–"
    return f"×{row['perplexity_ratio']:.2f}{_range(row, 'perplexity_ratio', '{:.2f}'.format)}"


def _range(row: pd.Series, key: str, show) -> str:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return "" if numbers.missing(low) or numbers.missing(high) else f" [{show(low)}, {show(high)}]"


def legend(table: pd.DataFrame, *, terminal: bool = False) -> list[str]:
    """What the columns mean, one line each."""
    seeds = set(table[table["method"] != "base"]["seeds"]) if len(table) else set()
    scopes = [f"over seeds and items ({SCOPES['method']})"] if max(seeds, default=1) > 1 else []
    if 1 in seeds or not scopes:
        one = ", for a method with one seed" if scopes else ""
        scopes.append(f"over the scored items{one} ({SCOPES['run']})")
    methods = table[table["method"] != "base"] if len(table) else table

    def known(measure: Measure) -> bool:
        return measure.key in methods and bool(methods[measure.key].notna().any())

    items = len(methods) and (methods["n_retention"] > 0).any()  # without a task above chance nothing is lost
    absent = [m.head.split(",")[0] for m in NATS if (m.general or items) and not known(m)]
    lines = [
        f"[ , ] is the 95 % confidence interval {'; '.join(scopes)}.",
        *(measure.says for measure in NATS if known(measure) and (measure.key in SHORT or not terminal)),
        *([f"Not known of results that were scored before it was recorded: {', '.join(absent)}."] if absent else []),
        "All are against the bare base model, and above 0 more is forgotten. Forgetting in points is the share of "
        "right answers lost, the mean over retention tasks above chance: it sees only the answers that turned.",
        *_other_units(table),
        "n is domain + retention rows.",
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
                f"{words.few(values)}."
            )
    others = table[table["unit"] != units.SHARE].drop_duplicates("domain") if "unit" in table else table[:0]
    if len(others):
        named = [
            f"{row.domain} in {row.unit}" + (f" of {row.metric}" if row.unit != row.metric else "")
            if row.metric != units.PER_TOKEN
            else f"{row.domain} in nats per token of its test rows"
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
    """For the terminal: aligned, about 150 columns."""
    lines = [BANNER, ""] if loaded.not_a_result else []
    for (model, domain), rows in table.groupby(["model", "domain"], sort=False) if len(table) else ():
        shown = columns(rows, terminal=True)
        texts = [[column.short or column.head, *(column.text(row) for _, row in rows.iterrows())] for column in shown]
        widths = [max(map(len, column)) for column in texts]
        seeds = int(rows["seeds"].max())
        lines.append(f"{model}, {domain}, {seeds} seed{'s' if seeds != 1 else ''}")
        for first, *others in zip(*texts):
            cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:]))]
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    told = legend(table, terminal=True) if len(table) else ["No cell has finished."]
    lines += [part for line in told for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ")]
    if without := failure_lines(loaded):
        lines += ["", "Without a result:", *("  " + line for line in without)]
    return "\n".join(lines) + "\n"


def as_markdown(loaded: Loaded, table: pd.DataFrame) -> str:
    lines = [f"**{BANNER}**", ""] if loaded.not_a_result else []
    for (model, domain), rows in table.groupby(["model", "domain"], sort=False) if len(table) else ():
        shown = columns(rows)
        heads = " | ".join(column.head for column in shown)
        lines += [f"### {model}, {domain}", "", f"| {heads} |", f"|:--|{'--:|' * (len(shown) - 1)}"]
        for _, row in rows.iterrows():
            lines.append(f"| {' | '.join(column.text(row) for column in shown)} |".replace("*", r"\*"))
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
