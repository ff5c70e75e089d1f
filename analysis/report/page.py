"""The report: one self-contained HTML page from the loaded results, the comparison table and the figures."""

from functools import partial
from pathlib import Path

import pandas as pd

from analysis import numbers, parallel, style, units, words
from analysis.chosen import reported_methods
from analysis.load import Loaded, retention_tasks
from analysis.report.figures import OVERVIEWS, Figure
from analysis.report.inline import Drawn, inline
from analysis.report.pages import write_page
from analysis.sections import (
    answer,
    claims,
    columns,
    costs,
    drift,
    flips,
    front,
    matched,
    overview,
    significance,
    start,
    tables,
)

PARTS_HEADS = [head.split(": ")[-1] for head in costs.PARTS_HEADS]
PARTS_ABOVE = [("", 2), ("added to the preparation", 4), ("added to the training", 4)]
SUFFIXES = ("png", "svg", "csv")
# the parts behind a comparison that the list of contents names, if the comparison has them
CONTENTS = {
    "rules": "rules",
    "scores": "scores",
    "tests": "tests",
    "front": "front",
    "matched": "at the same gain",
    "flips": "answers lost",
    "drift": "how far weights moved",
    "costs": "costs",
    "tasks": "tasks",
}


def write_report(
    loaded: Loaded,
    table: pd.DataFrame,
    tests: pd.DataFrame,
    figures: list[Figure],
    beside: pd.DataFrame = pd.DataFrame(),
    *,
    path: Path,
    title: str,
    study: str,
) -> Path:
    """Write the page; `study` is the study's name, empty for the default one."""
    drawn = Drawn()  # once for the whole page
    heads, rows = overview.table(loaded, table, beside)
    return write_page(
        "report/report.html.j2",
        path=path,
        title=title,
        study=study,
        banner=tables.BANNER if loaded.not_a_result else "",
        answer=answer.sentences(loaded, table, tests) if len(table) else [],
        overview=_overview(figures, path.parent, drawn),
        notes=_notes(loaded, table),
        heads=heads,
        rows=rows,
        legend=tables.legend(table) if len(table) else [],
        comparisons=_comparisons(loaded, table, tests, figures, folder=path.parent, drawn=drawn),
        claims=claims.section(loaded, table),
        failures=tables.missing(loaded),
        planned=len(loaded.planned),
        tuned=bool(loaded.tuning),
        example=next(iter(loaded.cells.index), ""),
        many=style.MANY,
        drawn=drawn,
    )


def _notes(loaded: Loaded, table: pd.DataFrame) -> list[tuple[str, bool]]:
    """Lines below the figure: how each base began, how much of the study is there, and what the intervals are about.

    True marks the line of a base that is not settled.
    """
    done, planned = len(loaded.cells), len(loaded.planned)
    lines = [f"{done} of {planned} planned cells have a result{'.' if done == planned else '; the others are listed.'}"]
    if len(table):
        lines[0] += f" {answer.reading(loaded, table)}"
        lines += answer.without_accuracy(table)
    begun = []
    for model in dict.fromkeys(model for model, _ in loaded.comparisons):
        begun += [(line, start.is_settled(loaded, model) is False) for line in start.sentences(loaded, model)]
        begun += [(line, False) for line in start.beside(loaded, table, model)]
    return [*begun, *((line, False) for line in lines)]


def _overview(figures: list[Figure], folder: Path, drawn: Drawn) -> dict | None:
    """The figure of the first screen, drawn for a wide page and for a phone; None if nothing can be drawn."""
    first = {figure.name: figure for figure in figures if figure.name in OVERVIEWS}
    if not first:
        return None
    wide, phone = (_figure(first[name], folder, prefix=name, drawn=drawn) for name in OVERVIEWS)
    return wide | {"wide": wide["svg"], "phone": phone["svg"]}


def _comparisons(
    loaded: Loaded, table: pd.DataFrame, tests: pd.DataFrame, figures: list[Figure], *, folder: Path, drawn: Drawn
) -> list[dict]:
    """Everything that the page shows of each (model, domain)."""
    costed, by_part, made = costs.costs(loaded), costs.added(loaded), []
    all_sections = parallel.each(partial(_sections, loaded, tests), loaded.comparisons)
    for (model, domain), sections in zip(loaded.comparisons, all_sections):
        rows, spent, parts = (
            frame[(frame["model"] == model) & (frame["domain"] == domain)] for frame in (table, costed, by_part)
        )
        cells = loaded.of(model, domain)
        first, methods, shown = cells.iloc[0], list(dict.fromkeys(cells["method"])), columns.others(rows)
        answering = reported_methods(loaded, model=model, domain=domain)  # at the setting chosen on probe rows
        absent = {"tests" if key == "significance" else key for key, shown in sections.items() if not shown}
        made.append(
            sections
            | {
                "contents": [(key, name) for key, name in CONTENTS.items() if key not in absent],
                "model": model,
                "domain": domain,
                "methods": methods,
                "anchor": f"{model}-{domain}",
                "seeds": sorted(cells["seed"].unique().tolist()),
                "swept": len(methods) > len(answering),
                "note": next((note for note in cells["model_note"] if note), ""),
                "heads": [column.head for column in shown],
                "rows": [overview.row_of(row, shown) for _, row in rows.iterrows()],
                "tasks": _tasks(cells, methods, retention_tasks(first)),
                "at_chance": first["at_chance"],
                "rules": _rules(cells),
                "figures": {
                    figure.name: _figure(figure, folder, prefix=f"f{number}", drawn=drawn)
                    for number, figure in enumerate(figures)
                    if (figure.model, figure.domain) == (model, domain)
                },
                "cost": {
                    "tables": [
                        (costs.SECONDS_HEADS, [], _spent(spent, costs.seconds_row)),
                        (costs.BYTES_HEADS, [], _spent(spent, costs.bytes_row)),
                        *[(PARTS_HEADS, PARTS_ABOVE, _spent(parts, costs.part_row))][: len(parts)],
                    ],
                    "formula": costs.formula(spent),
                },
                "warnings": [
                    (cell, report["warning"])
                    for cell, parts in cells["parts_report"].items()
                    for report in (parts or {}).values()
                    if isinstance(report, dict) and report.get("warning")
                ],
            }
        )
    return made


def _sections(loaded: Loaded, tests: pd.DataFrame, model: str, domain: str) -> dict:
    return {
        "front": front.section(loaded, model=model, domain=domain),
        "significance": significance.section(loaded, tests, model=model, domain=domain),
        "matched": matched.section(loaded, model=model, domain=domain),
        "flips": flips.section(loaded, model=model, domain=domain),
        "drift": drift.section(loaded, model=model, domain=domain),
    }


def _tasks(cells: pd.DataFrame, methods: list[str], kept: list[str]) -> list[dict]:
    """The scores of every task by method, means over seeds."""
    first, tasks = cells.iloc[0], []
    for name, score in cells.iloc[0]["scores_by_task"].items():
        by_cell = cells["scores_by_task"].map(lambda scores, name=name: scores[name]["value"])
        means = by_cell.groupby(cells["method"], sort=False).mean()
        about = {"name": name, **score, "unit": units.of_task(first, name), "counts": name in kept}
        tasks.append(about | {"at_chance": name in first["at_chance"], "by_method": [means[m] for m in methods]})
    return sorted(tasks, key=lambda task: (*flips.ROLES, task["role"]).index(task["role"]))


def _spent(rows: pd.DataFrame, texts) -> list[dict]:
    """Rows of a table of costs."""
    return [
        {"name": name, "colour": style.colour(name), "cells": cells}
        for (name, _), *cells in (texts(row) for _, row in rows.iterrows())
    ]


def _figure(figure: Figure, folder: Path, *, prefix: str, drawn: Drawn) -> dict:
    stem, label = figure.stem.relative_to(folder).as_posix(), f"{figure.title}. {figure.caption}"
    svg = figure.stem.with_suffix(".svg").read_text(encoding="utf-8")
    return {
        "title": figure.title,
        "caption": figure.caption,
        "svg": inline(svg, prefix=prefix, label=label, drawn=drawn),
        "files": [(suffix.upper(), f"{stem}.{suffix}") for suffix in SUFFIXES],
    }


def _rules(cells: pd.DataFrame) -> list[tuple[str, str]]:
    """What was held equal, read from the cells; if cells differ, all values are shown."""
    scoring = [scoring if isinstance(scoring, dict) else {} for scoring in cells["scoring"]]

    def each(values) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values))

    def scorer(key: str) -> str:
        return each(settings.get(key) for settings in scoring)

    def by_method(key: str, text) -> str:
        shown = cells[key].map(lambda value: "unknown" if numbers.missing(value) else text(value))
        own = shown.groupby(cells["method"], sort=False).agg(lambda values: " / ".join(dict.fromkeys(values)))
        if len(own) <= style.MANY and own.nunique() > 1:
            return ", ".join(f"{method} {value}" for method, value in own.items())
        common, *others = own.value_counts().index
        named = [f"{value} for {words.few(own.index[own == value])}" for value in others]
        return "; ".join([*named, f"{common} for {'the others' if named else 'every method'}"])

    limit = each("no limit" if s.get("limit") is None else f"limit {s['limit']}" for s in scoring)
    settings = f"{scorer('scorer')}, batch size {scorer('batch_size')}, {limit}, lm-eval {scorer('lm_eval')}"
    return [
        ("training tokens", by_method("tokens_trained", "{:,.0f}".format)),
        ("learning rate", by_method("learning_rate", numbers.rate)),
        ("scorer", settings),
        ("weights scored in", each(cells["dtype"])),
        ("numerics, scoring", f"{each(cells['numerics'])}, {scorer('scoring')}"),
    ]
