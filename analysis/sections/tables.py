"""The comparison as people read it: in the terminal, as CSV and as Markdown."""

import textwrap
from collections.abc import Sequence

import pandas as pd

from analysis import spreadsheet, units, words
from analysis.load import NOT_STARTED, Loaded
from analysis.measures import NATS, Measure
from analysis.sections.columns import SHORT, columns, others
from analysis.statistics.intervals import SCOPES

BANNER = "NOT A RESULT: demo or random weights; these numbers mean nothing"
WIDTH = 140  # characters of a line of the legend in the terminal
LINES = {"subsequent_indent": "  ", "break_on_hyphens": False}  # names of methods have hyphens


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
        *(_of_columns(methods) if not terminal else []),
    ]
    if "note" in table:
        notes = table[table["note"].fillna("") != ""].drop_duplicates("method")
        lines += [f"* {row['method']}: {row['note']}." for _, row in notes.iterrows()]
    return lines


def _of_columns(methods: pd.DataFrame) -> list[str]:
    """What the columns besides gain and forgetting mean, which the terminal has no room for."""
    lines = [
        "+ tokens: what a method reads on top of training on the domain's rows, while it prepares or trains.",
        "Seconds are of training, + of a preparation; bytes are of the weights or adapter to keep, + of importance and "
        "anchor. They are measured, and differ from run to run.",
        "n is domain + retention rows.",
    ]
    if "told" in methods and methods["told"].notna().any():
        lines.append(
            "Less, more or no: whether a method loses significantly less or more general text than plain fine-tuning "
            "(the chosen setting of each, or another at the same setting), after Holm's correction; behind a no the "
            "true difference that 80 of 100 such studies would find; below it the other measures that tell the two "
            "apart."
        )
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


def as_text(loaded: Loaded, table: pd.DataFrame, *, answer: Sequence[str] = ()) -> str:
    """For the terminal: the answer's sentences and the table, aligned, about 150 columns."""
    lines = [BANNER, ""] if loaded.not_a_result else []
    lines += [part for sentence in answer for part in textwrap.wrap(sentence, WIDTH, **LINES)]
    lines += [""] if answer else []
    for (model, domain), rows in table.groupby(["model", "domain"], sort=False) if len(table) else ():
        shown = [column for column in [*columns(rows), *others(rows)[1:]] if column.terminal]
        texts = [
            [column.short or column.head, *((column.brief or column.text)(row) for _, row in rows.iterrows())]
            for column in shown
        ]
        widths = [max(map(len, column)) for column in texts]
        seeds = int(rows["seeds"].max())
        lines.append(f"{model}, {domain}, {seeds} seed{'s' if seeds != 1 else ''}")
        for first, *rest in zip(*texts):
            cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(rest, widths[1:]))]
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    told = legend(table, terminal=True) if len(table) else ["No cell has finished."]
    lines += [part for line in told for part in textwrap.wrap(line, WIDTH, **LINES)]
    if without := failure_lines(loaded):
        lines += ["", "Without a result:", *("  " + words.visible(line) for line in without)]
    return "\n".join(lines) + "\n"


def as_markdown(loaded: Loaded, table: pd.DataFrame) -> str:
    lines = [f"**{BANNER}**", ""] if loaded.not_a_result else []
    for (model, domain), rows in table.groupby(["model", "domain"], sort=False) if len(table) else ():
        shown = [*columns(rows), *others(rows)[1:]]
        heads = " | ".join(column.head for column in shown)
        lines += [f"### {model}, {domain}", "", f"| {heads} |", f"|:--|{'--:|' * (len(shown) - 1)}"]
        for _, row in rows.iterrows():
            lines.append(f"| {' | '.join(column.text(row) for column in shown)} |".replace("*", r"\*"))
        lines.append("")
    lines += [f"- {line}".replace("*", r"\*") for line in legend(table)] if len(table) else ["No cell has finished."]
    if without := failure_lines(loaded):
        lines += ["", "Without a result:", "", *(f"- {words.markdown(line)}" for line in without)]
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
    return spreadsheet.text(whole, digits="%.10g")
