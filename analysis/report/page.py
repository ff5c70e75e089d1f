"""The report: one self-contained HTML page from the loaded results, the comparison table and the figures."""

import json
from collections import Counter
from pathlib import Path

import jinja2
import pandas as pd

from analysis import numbers, style, units, words
from analysis.chosen import reported
from analysis.families import family
from analysis.load import Loaded, retention_tasks
from analysis.report.figures import Figure
from analysis.report.inline import inline
from analysis.sections import answer, bench, claims, costs, drift, flips, front, matched, significance, tables

TEMPLATES = Path(__file__).parents[1]
ROLES = ["domain", "score", "retention", "transfer"]


def write_report(
    loaded: Loaded,
    table: pd.DataFrame,
    tests: pd.DataFrame,
    figures: list[Figure],
    *,
    path: Path,
    title: str,
    study: str,
    archive=None,
) -> Path:
    """Write the page; `study` is the study's name, empty for the default one; `archive` as in `write_summary`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    show = {"percent": numbers.percent, "points": numbers.points, "seconds": numbers.seconds, "size": numbers.size}
    environment.filters |= show | {"sha": short, "level": units.level, "named": units.named}
    glyphs: dict[str, str] = {}  # drawn once for the whole page
    page = environment.get_template("report/report.html.j2").render(
        title=title,
        study=study,
        archive=archive,
        banner=tables.BANNER if loaded.not_a_result else "",
        comparisons=_comparisons(loaded, table, tests, figures, folder=path.parent, glyphs=glyphs),
        failures=tables.missing(loaded),
        planned=len(loaded.planned),
        finished=len(loaded.cells),
        legend=tables.legend(table) if len(table) else [],
        tuning=[_tuning(pair, record) for pair, record in loaded.tuning.items()],
        provenance=_provenance(loaded),
        gpu=_gpu(loaded.gpu),
        claim=next((bench.claim(record) for file, record in loaded.bench.items() if file.stem == bench.HEADLINE), None),
        claims=claims.section(loaded, table),
        benchmarks=[_benchmark(file, record, path.parent, glyphs) for file, record in loaded.bench.items()],
        many=style.MANY,
        colours={method: style.colour(method) for method in dict.fromkeys(table["method"])} if len(table) else {},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def short(digest) -> str:
    if digest is None:
        return "–"
    return digest[:12] if isinstance(digest, str) else short(json.dumps(digest, sort_keys=True))


def _comparisons(
    loaded: Loaded, table: pd.DataFrame, tests: pd.DataFrame, figures: list[Figure], *, folder: Path, glyphs: dict
) -> list[dict]:
    """Everything that the page shows of each (model, domain)."""
    costed, by_part, chosen, made = costs.costs(loaded), costs.added(loaded), reported(loaded), []
    for model, domain in loaded.comparisons:
        rows, own_tests, spent, parts = (
            frame[(frame["model"] == model) & (frame["domain"] == domain)] for frame in (table, tests, costed, by_part)
        )
        cells = loaded.of(model, domain)
        first, methods, shown = cells.iloc[0], list(dict.fromkeys(cells["method"])), tables.columns(rows)
        answering = list(dict.fromkeys(chosen.of(model, domain)["method"]))  # at the setting chosen on probe rows
        blocks, kept = Counter(map(family, methods)), retention_tasks(first)
        answered = rows[rows["method"].isin(["base", *answering])]
        picked = [name for name in answering if blocks[family(name)] > 1]
        made.append(
            {
                "model": model,
                "domain": domain,
                "methods": methods,
                "anchor": f"{model}-{domain}",
                "seeds": sorted(cells["seed"].unique().tolist()),
                "swept": len(methods) > len(answering),
                "note": next((note for note in cells["model_note"] if note), ""),
                "answer": answer.sentences(answered, own_tests, domain=domain, model=model, tasks=kept),
                "reading": answer.reading(answered, tested=len(own_tests) > 0, chosen=picked),
                "heads": [column.head for column in shown],
                "rows": [_row(row, shown) for _, row in rows.iterrows()],
                "tasks": _tasks(cells, methods, kept),
                "at_chance": first["at_chance"],
                "rules": _rules(cells),
                "figures": {
                    figure.name: _figure(figure, folder, prefix=f"f{number}", glyphs=glyphs)
                    for number, figure in enumerate(figures)
                    if (figure.model, figure.domain) == (model, domain)
                },
                "front": front.section(loaded, rows, model=model, domain=domain),
                "significance": significance.section(loaded, tests, model=model, domain=domain),
                "matched": matched.section(loaded, model=model, domain=domain),
                "flips": flips.section(loaded, model=model, domain=domain),
                "drift": drift.section(loaded, model=model, domain=domain),
                "cost": {
                    "tables": [
                        (costs.SECONDS_HEADS, [costs.seconds_row(row) for _, row in spent.iterrows()]),
                        (costs.BYTES_HEADS, [costs.bytes_row(row) for _, row in spent.iterrows()]),
                        *[(costs.PARTS_HEADS, [costs.part_row(row) for _, row in parts.iterrows()])][: len(parts)],
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


def _tasks(cells: pd.DataFrame, methods: list[str], kept: list[str]) -> list[dict]:
    """The scores of every task by method, means over seeds."""
    first, tasks = cells.iloc[0], []
    for name, score in cells.iloc[0]["scores_by_task"].items():
        by_cell = cells["scores_by_task"].map(lambda scores, name=name: scores[name]["value"])
        means = by_cell.groupby(cells["method"], sort=False).mean()
        about = {"name": name, **score, "unit": units.of_task(first, name), "counts": name in kept}
        tasks.append(about | {"at_chance": name in first["at_chance"], "by_method": [means[m] for m in methods]})
    return sorted(tasks, key=lambda task: ROLES.index(task["role"]) if task["role"] in ROLES else len(ROLES))


def _row(row: pd.Series, columns: list[tables.Column]) -> dict:
    """A row of the comparison, each text split into value and interval so that a phone can show one below the other."""
    texts = [column.text(row) for column in columns]
    return {
        "method": row["method"],
        "cells": [text.split(" [") if " [" in text else [text, ""] for text in texts[1:]],
        "name": texts[0],
    }


def _figure(figure: Figure, folder: Path, *, prefix: str, glyphs: dict) -> dict:
    stem, label = figure.stem.relative_to(folder).as_posix(), f"{figure.title}. {figure.caption}"
    svg = figure.stem.with_suffix(".svg").read_text(encoding="utf-8")
    return {
        "title": figure.title,
        "caption": figure.caption,
        "svg": inline(svg, prefix=prefix, label=label, drawn=glyphs),
        "files": [(suffix.upper(), f"{stem}.{suffix}") for suffix in ("png", "svg", "csv")],
    }


def _benchmark(file: Path, record: dict, folder: Path, glyphs: dict) -> dict:
    """A benchmark with its figure as an element of the page."""
    block = bench.shown(file, record, folder=folder)
    label = f"{record['title']}: times the reference of each race"
    lead = [
        block["when"][:16].replace("T", " "),
        _pairs(block["hardware"]),
        f"load {block['load']}" if block["load"] is not None else "",
        _pairs(block["versions"]),
        _commit(block["git"]),
    ]
    svg = inline(block["svg"], prefix=f"bench-{file.stem}", label=label, drawn=glyphs) if block["svg"] else ""
    return block | {"svg": svg, "lead": "; ".join(filter(None, lead))}


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
        ("learning rate", by_method("learning_rate", "{:g}".format)),
        ("scorer", settings),
        ("weights scored in", each(cells["dtype"])),
        ("numerics, scoring", f"{each(cells['numerics'])}, {scorer('scoring')}"),
    ]


def _tuning(pair: tuple[str, str], record: dict) -> dict:
    """The trials of one (model, domain), and the bare base, in nats per token on probe rows."""

    def probed(values: dict) -> dict:
        tasks = [key for key in values if key.endswith("_nll") and key not in (f"{pair[1]}_nll", "general_nll")]
        retention = sum(values[key] for key in tasks) / len(tasks) if tasks else None
        return {"nats": values.get(f"{pair[1]}_nll"), "retention": retention, "perplexity": values.get("perplexity")}

    trials = []
    for trial in record.get("trials", []):
        values = {k: f"{v:g}" if isinstance(v, float) else v for k, v in trial["settings"].items()}
        text = ", ".join(f"{key} = {value}" for key, value in values.items())
        outcome = "failed" if trial.get("failed") else "yes" if trial.get("chosen") else ""
        outcome = "equal" if trial.get("tied") else outcome
        outcome += f", the {trial['end']} value: others may be better" if trial.get("end") else ""
        about = {"method": trial["method"], "text": text, "chosen": outcome}
        trials.append(about | {key: trial.get(key) for key in ("seconds", "failed")} | probed(trial))
    base = probed(record.get("base") or {})
    return {"model": pair[0], "domain": pair[1], "rule": record.get("rule", ""), "trials": trials, "base": base}


def _gpu(check: dict | None) -> dict | None:
    """The newest GPU check: what failed, and one row per measured method; None if nothing was measured."""
    if check is None:
        return None
    parts: dict[str, dict[str, dict]] = {"checks": {}, "speed": {}}
    for name, piece in check["pieces"].items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = piece
    statuses = Counter(piece["status"] for piece in parts["checks"].values())
    optimizers = []
    for name, piece in parts["speed"].items():
        for optimizer, seconds in piece.get("seconds_by_optimizer", {}).items():
            times, share = piece["times_fused_adamw"][optimizer], piece["entries"] / piece["entries_of"]
            optimizers.append((name.split("/")[0], optimizer, 1e3 * seconds, times, share))
    return {
        "device": check["device"],
        "when": check["when"],
        "facts": _pairs(check["hardware"]),
        "versions": _pairs(check["versions"]),
        "commit": _commit(check["git"]),
        "passed": statuses["passed"],
        "skipped": statuses["skipped"],
        "failed": [
            (name, piece["status"], piece.get("reason", ""))
            for name, piece in parts["checks"].items()
            if piece["status"] in ("failed", "broken", "out of memory")
        ],
        "rows": [_gpu_row(name, piece) for name, piece in parts["speed"].items() if not name.endswith("/optimizers")],
        "optimizers": optimizers,
        "goals": [(name, goal) for name, piece in parts["speed"].items() for goal in piece.get("goals", [])],
    }


def _gpu_row(name: str, piece: dict) -> dict:
    model, method, layout, shape = name.split("/")
    memory, stored, prepare = piece.get("memory") or {}, piece.get("bytes") or {}, piece.get("prepare") or {}
    keys = ("tokens_per_second", "mfu", "seconds_optimizer", "share_penalty", "checkpointing")
    return {
        **{"model": model, "method": method, "layout": layout, "shape": shape},
        "status": piece["status"],
        "reason": piece.get("reason", ""),
        **{key: piece.get(key) for key in keys},
        "prepare": prepare.get("seconds_per_million_tokens"),
        "peak": memory.get("peak"),
        "predicted": (memory.get("predicted") or {}).get("total"),
        "stored": sum(stored.values()),
    }


def _provenance(loaded: Loaded) -> dict:
    """Hashes by cell, and the distinct versions, hardware and commits with the cells that have them."""
    cells = loaded.cells
    if not len(cells):
        return {"cells": [], "groups": []}
    groups = []
    for key, show in (("git", _commit), ("hardware", _pairs), ("versions", _pairs)):
        names: dict[str, list[str]] = {}
        for cell, value in cells[key].items():
            names.setdefault(show(value or {}), []).append(cell)
        for text, own in names.items():
            groups.append((key, text, "all cells" if len(own) == len(cells) else words.few(own)))
    keys = ("weights_sha256", "base_sha256", "data_sha256", "dtype", "device", "when")
    records = [{"cell": cell, **{key: row.get(key) for key in keys}} for cell, row in cells.iterrows()]
    return {"cells": records, "groups": groups}


def _commit(git: dict) -> str:
    return f"commit {git.get('commit') or 'unknown'}{', with uncommitted changes (dirty)' if git.get('dirty') else ''}"


def _pairs(block: dict) -> str:
    known = {key: value for key, value in block.items() if value is not None}
    sizes = {key: numbers.size(value) for key, value in known.items() if key.endswith("_bytes")}
    return ", ".join(f"{key.removesuffix('_bytes')} {value}" for key, value in (known | sizes).items())
