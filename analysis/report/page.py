"""The report: one self-contained HTML page from the loaded results, the comparison table and the figures."""

import json
from collections import Counter
from pathlib import Path

import jinja2
import pandas as pd

from analysis import numbers, style, units
from analysis.chosen import reported
from analysis.families import family
from analysis.load import Loaded, retention_tasks
from analysis.report.figures import Figure
from analysis.report.inline import inline
from analysis.sections import answer, bench, claims, costs, drift, flips, front, matched, significance, tables

TEMPLATES = Path(__file__).parents[1]


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
    environment.filters.update(
        percent=numbers.percent,
        points=numbers.points,
        seconds=numbers.seconds,
        size=numbers.size,
        sha=short,
        level=units.level,
    )
    costed, drawn, speaking = costs.costs(loaded), {}, reported(loaded)
    page = environment.get_template("report/report.html.j2").render(
        title=title,
        study=study,
        archive=archive,
        banner=tables.BANNER if loaded.not_a_result else "",
        comparisons=[
            _comparison(
                loaded,
                table,
                tests,
                costed,
                figures,
                model=m,
                domain=d,
                folder=path.parent,
                drawn=drawn,
                speaking=list(dict.fromkeys(speaking.of(m, d)["method"])),
            )
            for m, d in loaded.comparisons
        ],
        failures=tables.missing(loaded),
        planned=len(loaded.planned),
        finished=len(loaded.cells),
        legend=tables.legend(table) if len(table) else [],
        heads=tables.HEADS,
        tuning=[_tuning(pair, record) for pair, record in loaded.tuning.items()],
        provenance=_provenance(loaded),
        gpu=_gpu(loaded.gpu),
        claim=next((bench.claim(record) for file, record in loaded.bench.items() if file.stem == bench.HEADLINE), None),
        claims=claims.section(loaded, table),
        benchmarks=[_benchmark(file, record, path.parent, drawn) for file, record in loaded.bench.items()],
        colours={method: style.colour(method) for method in dict.fromkeys(table["method"])} if len(table) else {},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def short(digest) -> str:
    return (
        digest[:12] if isinstance(digest, str) else "–" if digest is None else short(json.dumps(digest, sort_keys=True))
    )


def _comparison(
    loaded: Loaded,
    table: pd.DataFrame,
    tests: pd.DataFrame,
    costed: pd.DataFrame,
    figures: list[Figure],
    *,
    model: str,
    domain: str,
    folder: Path,
    drawn: dict,
    speaking: list[str],
) -> dict:
    """Everything the page says of one (model, domain); `speaking` are the methods, each at the setting chosen on probe rows."""
    rows = table[(table["model"] == model) & (table["domain"] == domain)]
    cells = loaded.of(model, domain)
    first = cells.iloc[0]
    spoken = rows[rows["method"].isin(["base", *speaking])]
    own_tests = tests[(tests["model"] == model) & (tests["domain"] == domain)]
    kept = retention_tasks(first)
    methods = list(dict.fromkeys(cells["method"]))
    swept = Counter(map(family, methods))
    mean = lambda task, method: float(
        pd.Series([by[task]["value"] for by in cells[cells["method"] == method]["scores_by_task"]]).mean()
    )
    tasks = [
        {
            "name": task,
            **about,
            "unit": units.of_task(first, task),
            "counts": task in kept,
            "at_chance": task in first["at_chance"],
            "by_method": [mean(task, method) for method in methods],
        }
        for task, about in first["scores_by_task"].items()
    ]
    order = ["domain", "retention", "transfer"]
    spent = costed[(costed["model"] == model) & (costed["domain"] == domain)]
    shown = {
        figure.name: _figure(figure, folder, prefix=f"f{number}", drawn=drawn)
        for number, figure in enumerate(figures)
        if (figure.model, figure.domain) == (model, domain)
    }
    return {
        "model": model,
        "domain": domain,
        "methods": methods,
        "anchor": f"{model}-{domain}",
        "seeds": sorted(cells["seed"].unique().tolist()),
        "swept": len(methods) > len(speaking),
        "note": next((note for note in cells["model_note"] if note), ""),
        "answer": answer.sentences(spoken, own_tests, domain=domain, model=model, tasks=kept),
        "reading": answer.reading(
            spoken, tested=len(own_tests) > 0, chosen=[name for name in speaking if swept[family(name)] > 1]
        ),
        "rows": [_row(row) for _, row in rows.iterrows()],
        "tasks": sorted(tasks, key=lambda task: order.index(task["role"]) if task["role"] in order else 9),
        "at_chance": first["at_chance"],
        "rules": _rules(cells),
        "figures": shown,
        "front": front.section(loaded, model=model, domain=domain),
        "significance": significance.section(loaded, tests, model=model, domain=domain),
        "matched": matched.section(loaded, model=model, domain=domain),
        "flips": flips.section(loaded, model=model, domain=domain),
        "drift": drift.section(loaded, model=model, domain=domain),
        "cost": {
            "tables": [
                (costs.SECONDS_HEADS, [costs.seconds_row(row) for _, row in spent.iterrows()]),
                (costs.BYTES_HEADS, [costs.bytes_row(row) for _, row in spent.iterrows()]),
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


def _row(row: pd.Series) -> dict:
    """A table row: each text split into its value and its interval, so that a phone can set one below the other."""
    texts = list(tables.readable(row).values())
    return {
        "method": row["method"],
        "cells": [text.split(" [") if " [" in text else [text, ""] for text in texts[1:]],
        "name": texts[0],
    }


def _figure(figure: Figure, folder: Path, *, prefix: str, drawn: dict) -> dict:
    stem = figure.stem.relative_to(folder).as_posix()
    svg = inline(
        figure.stem.with_suffix(".svg").read_text(encoding="utf-8"),
        prefix=prefix,
        label=f"{figure.title}. {figure.caption}",
        drawn=drawn,
    )
    return {
        "title": figure.title,
        "caption": figure.caption,
        "svg": svg,
        "files": [(suffix.upper(), f"{stem}.{suffix}") for suffix in ("png", "svg", "csv")],
    }


def _benchmark(file: Path, record: dict, folder: Path, drawn: dict) -> dict:
    """A benchmark for the page, its figure as an element of it."""
    found = bench.shown(file, record, folder=folder)
    label = f"{record['title']}: times the reference of each race"
    return found | {
        "svg": inline(found["svg"], prefix=f"bench-{file.stem}", label=label, drawn=drawn) if found["svg"] else "",
        "lead": "; ".join(
            filter(
                None,
                [
                    found["when"][:16].replace("T", " "),
                    _pairs(found["hardware"]),
                    f"load {found['load']}" if found["load"] is not None else "",
                    _pairs(found["versions"]),
                    _commit(found["git"]),
                ],
            )
        ),
    }


def _rules(cells: pd.DataFrame) -> list[tuple[str, str]]:
    """What was held equal, read from the cells; where cells differ, all values are shown."""
    scoring = [scoring if isinstance(scoring, dict) else {} for scoring in cells["scoring"]]
    several = lambda values: ", ".join(dict.fromkeys(str(value) for value in values))
    by_method = lambda key, show: ", ".join(
        f"{method} {' / '.join(dict.fromkeys(show(v) for v in own[key]))}"
        for method, own in cells.groupby("method", sort=False)
    )
    limits = several("no limit" if s.get("limit") is None else f"limit {s['limit']}" for s in scoring)
    tokens = list(dict.fromkeys(cells["tokens_trained"].dropna()))
    return [
        (
            "training tokens",
            f"{tokens[0]:,.0f} for every method"
            if len(tokens) == 1
            else by_method("tokens_trained", lambda v: "unknown" if numbers.missing(v) else f"{v:,.0f}"),
        ),
        ("learning rate", by_method("learning_rate", lambda v: "unknown" if numbers.missing(v) else f"{v:g}")),
        (
            "scorer",
            f"{several(s.get('scorer') for s in scoring)}, batch size {several(s.get('batch_size') for s in scoring)}, {limits}, lm-eval {several(s.get('lm_eval') for s in scoring)}",
        ),
        ("weights scored in", several(cells["dtype"])),
        ("numerics, scoring", f"{several(cells['numerics'])}, {several(s.get('scoring') for s in scoring)}"),
    ]


def _tuning(pair: tuple[str, str], record: dict) -> dict:
    base, domain = record.get("base") or {}, pair[1]
    tasks = [key for key in base if key not in (domain, "perplexity") and not key.endswith("_nll")]
    probes = {
        "domain": base.get(domain),
        "retention": sum(base[key] for key in tasks) / len(tasks) if tasks else None,
        "perplexity": base.get("perplexity"),
    }
    keys = ("domain_probe", "retention_probe", "general_perplexity_probe", "objective", "seconds", "failed")
    trials = [
        {
            **dict.fromkeys(keys),
            **trial,
            "text": ", ".join(
                f"{key} = {value:g}" if isinstance(value, float) else f"{key} = {value}"
                for key, value in trial["settings"].items()
            ),
        }
        for trial in record.get("trials", [])
    ]
    return {"model": pair[0], "domain": pair[1], "rule": record.get("rule", ""), "trials": trials, "base": probes}


def _gpu(check: dict | None) -> dict | None:
    """The newest GPU check: what failed, and a row for each measured method; None where nothing was measured."""
    if check is None:
        return None
    named = lambda part: {
        name.split("/", 1)[1]: piece for name, piece in check["pieces"].items() if name.startswith(f"{part}/")
    }
    checked, measured = named("checks"), named("speed")
    rows = [_gpu_row(name, piece) for name, piece in measured.items() if not name.endswith("/optimizers")]
    optimizers = [
        (
            name.split("/")[0],
            optimizer,
            1e3 * seconds,
            piece["times_fused_adamw"][optimizer],
            piece["entries"] / piece["entries_of"],
        )
        for name, piece in measured.items()
        if name.endswith("/optimizers")
        for optimizer, seconds in piece.get("seconds_by_optimizer", {}).items()
    ]
    count = lambda *status: sum(piece["status"] in status for piece in checked.values())
    return {
        "device": check["device"],
        "when": check["when"],
        "facts": _pairs(check["hardware"]),
        "versions": _pairs(check["versions"]),
        "commit": _commit(check["git"]),
        "passed": count("passed"),
        "skipped": count("skipped"),
        "failed": [
            (name, piece["status"], piece.get("reason", ""))
            for name, piece in checked.items()
            if piece["status"] in ("failed", "broken", "out of memory")
        ],
        "rows": rows,
        "optimizers": optimizers,
        "goals": [(name, goal) for name, piece in measured.items() for goal in piece.get("goals", [])],
    }


def _gpu_row(name: str, piece: dict) -> dict:
    model, method, layout, shape = name.split("/")
    memory, stored, prepare = piece.get("memory") or {}, piece.get("bytes") or {}, piece.get("prepare") or {}
    return {
        "model": model,
        "method": method,
        "layout": layout,
        "shape": shape,
        "status": piece["status"],
        "reason": piece.get("reason", ""),
        "tokens_per_second": piece.get("tokens_per_second"),
        "mfu": piece.get("mfu"),
        "seconds_optimizer": piece.get("seconds_optimizer"),
        "share_penalty": piece.get("share_penalty"),
        "prepare": prepare.get("seconds_per_million_tokens"),
        "peak": memory.get("peak"),
        "predicted": (memory.get("predicted") or {}).get("total"),
        "stored": sum(stored.values()),
        "checkpointing": piece.get("checkpointing"),
    }


def _provenance(loaded: Loaded) -> dict:
    """Hashes by cell; versions, hardware and commits as the distinct ones with the cells they hold for."""
    cells = loaded.cells
    if not len(cells):
        return {"cells": [], "groups": []}
    groups = []
    for key, show in (("git", _commit), ("hardware", _pairs), ("versions", _pairs)):
        seen: dict[str, list[str]] = {}
        for cell, value in cells[key].items():
            seen.setdefault(show(value or {}), []).append(cell)
        groups += [
            (key, text, "all cells" if len(names) == len(cells) else ", ".join(names)) for text, names in seen.items()
        ]
    keys = ("weights_sha256", "base_sha256", "data_sha256", "dtype", "device", "when")
    return {
        "cells": [{"cell": cell, **{key: row.get(key) for key in keys}} for cell, row in cells.iterrows()],
        "groups": groups,
    }


def _commit(git: dict) -> str:
    return f"commit {git.get('commit') or 'unknown'}" + (
        ", with uncommitted changes (dirty)" if git.get("dirty") else ""
    )


def _pairs(block: dict) -> str:
    show = lambda key, value: f"{key.removesuffix('_bytes')} {numbers.size(value) if key.endswith('_bytes') else value}"
    return ", ".join(show(key, value) for key, value in block.items() if value is not None)
