"""The two pages beside the report: details.html (settings, tests by task, provenance) and bench.html (benchmarks)."""

from collections import Counter
from pathlib import Path

from analysis import numbers, parallel, words
from analysis.load import Loaded
from analysis.report.inline import Drawn, inline
from analysis.report.pages import write_page
from analysis.sections import bench, significance
from analysis.statistics.signs import mcnemar


def write_details(loaded: Loaded, *, path: Path, title: str, banner: str) -> Path:
    """How settings were chosen, McNemar's counts by task and seed, hashes, versions, machines and commits."""

    def by_task(model: str, domain: str) -> dict:
        tests = significance.by_task(mcnemar(loaded, model=model, domain=domain))
        return {"model": model, "domain": domain, "mcnemar": tests}

    return write_page(
        "report/details.html.j2",
        path=path,
        title=title,
        banner=banner,
        tuning=[_tuning(pair, record) for pair, record in loaded.tuning.items()],
        comparisons=parallel.each(by_task, loaded.comparisons),
        provenance=_provenance(loaded),
    )


def write_bench(loaded: Loaded, *, path: Path, title: str) -> Path:
    """The headline claim, every benchmark and the newest check of a GPU."""
    drawn = Drawn()
    headline = next((record for file, record in loaded.bench.items() if file.stem == bench.HEADLINE), None)
    return write_page(
        "report/bench.html.j2",
        path=path,
        title=title,
        claim=headline and bench.claim(headline),
        benchmarks=[_benchmark(file, record, path.parent, drawn) for file, record in loaded.bench.items()],
        gpu=_gpu(loaded.gpu),
        drawn=drawn,
    )


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


def _benchmark(file: Path, record: dict, folder: Path, drawn: Drawn) -> dict:
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
    svg = inline(block["svg"], prefix=f"bench-{file.stem}", label=label, drawn=drawn) if block["svg"] else ""
    caption = "Bars are median ratios, ticks are the ratios of the fastest rounds, crosses are goals; the axis is "
    caption += "logarithmic."
    return block | {"svg": svg, "caption": caption, "lead": "; ".join(filter(None, lead))}


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
