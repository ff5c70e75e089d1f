"""What MLflow's runs hold, as plain values read from results/: parameters, points of metrics, tags, times and files.

Three kinds of run: a cell; above it the (model, domain, method) with the row of the comparison and the mean curves of
its seeds; and the bare base of a (model, domain). MLflow is not imported here: `experiments.commands.track` writes.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from numbers import Real
from pathlib import Path

import pandas as pd

from analysis import numbers, units
from analysis.comparable import KIND, guarded
from analysis.load import Loaded, load_cells
from analysis.measures import GENERAL
from analysis.sections.tables import BANNER
from analysis.statistics.comparison import comparison
from methods.tools.files import sha256

# numbers of a cell that are settings, or shown as `system/`; every other number of metrics.json is a metric
NOT_METRICS = ["seed", "numerics", "processes", "learning_rate", "steps", "peak_memory_train_bytes"]
MACHINE = ("tokens_per_second", "mfu")  # columns of a curve about the machine: MLflow shows `system/` on its own page
FILES = ("metrics.json", "train.json", "curve.csv", "scores.json", "evaluate.json")
NAMES = {"score_by_task": "gain"}  # a change, where `score/TASK` is the level
EXPERIMENT = "DVC_EXP_NAME"  # the tag of a run made within `dvc exp run`
KINDS = ("holdfast.base", "holdfast.group", "holdfast.cell")  # the tag that holds a run's key, by what it is
CHARACTERS, DIGITS = 5000, 6  # of a parameter or tag, as MLflow limits it; of a fraction, for MLflow shows them all

Point = tuple[str, float, int, int]  # metric, value, milliseconds since 1970, step


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run; its `key` is a cell's name, `model/domain/method`, or `model/domain` for the base. `parent` is a key."""

    key: str
    status: str
    start: int
    end: int
    tags: dict[str, str]
    parent: str = ""
    parameters: dict[str, str] = field(default_factory=dict)
    metrics: list[Point] = field(default_factory=list)
    files: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """`ewc science smollm2-135m seed0` for a cell, without the seed for a method, `base science smollm2-135m`."""
        model, domain, *rest = self.key.split("/")
        method, *seed = rest or ["base"]
        return " ".join((method, domain, model, *seed))

    @cached_property
    def digest(self) -> str:
        """A hash of all that is written, the files' bytes included."""
        content = {**asdict(self), "files": [(folder, file.name, sha256(file)) for file, folder in self.files]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def key_of(tags: dict[str, str]) -> str:
    """The key of a run in the store; empty for a run that is not of this mirror."""
    return next((tags[kind] for kind in KINDS if kind in tags), "")


def runs_of(root: Path, cells, *, work: str = "work") -> Iterator[Run]:
    """Every run of a study, parents before their children. `work` is the folder with the study's weights."""
    loaded = load_cells(root, cells)
    compared = guarded(loaded)
    table = comparison(compared)
    excluded = {row["cell"]: row["reason"] for row in compared.failures.to_dict("records") if row["kind"] == KIND}
    groups = defaultdict(list)
    for cell in loaded.planned:
        groups[cell.rsplit("/", 1)[0]].append(cell)
    for pair in dict.fromkeys(group.rsplit("/", 1)[0] for group in groups):
        if (base := base_of(compared, pair, table=table)) is not None:
            yield base
    for group, planned in groups.items():
        every = [run_of(loaded, cell, root=root, work=work, excluded=excluded.get(cell, "")) for cell in planned]
        if children := [run for run in every if run]:
            yield group_of(group, table=table, planned=len(planned), children=children, files=group_files(root, group))
            yield from children


def run_of(loaded: Loaded, cell: str, *, root: Path = Path(), work: str = "work", excluded: str = "") -> Run | None:
    """The run of a finished or failed cell, None for one that has not run; `excluded` says why it is not compared."""
    failure = next((row for row in loaded.failures.to_dict("records") if row["cell"] == cell), None)
    if failure:
        return None if failure["kind"] == "not run" else _failed(failure, root=root)
    row = loaded.cells.loc[cell]
    curve = loaded.curves[loaded.curves["cell"] == cell] if len(loaded.curves) else pd.DataFrame()
    end = _milliseconds(row["when"])
    seconds = curve["seconds"].max() if len(curve) else None
    start = end if numbers.missing(seconds) else end - round(1000 * float(seconds))
    parts = row["parts"] if isinstance(row.get("parts"), dict) else {}
    about = {key: row[key] for key in ("model", "domain", "method", "seed", "dtype", "numerics", "scoring")}
    note = (
        f"{row['model']} fine-tuned on {row['domain']} with **{row['method']}**, seed {row['seed']}.\n\nGain "
        f"{_change(row['domain_gain'], units.of_domain(row))}, general text lost "
        f"{_change(row.get(GENERAL.key), GENERAL.unit)}, forgetting {_change(row['forgetting'], units.SHARE)}."
        + (" **NOT A RESULT.**" if row["not_a_result"] else "")
        + (f" **Not in the comparison**: {excluded}" if excluded else "")
    )
    tags = {key: row[key] for key in ("device", "weights_sha256", "base_sha256", "data_sha256")} | {
        "mlflow.note.content": note,
        "mlflow.source.git.commit": row["git"].get("commit"),
        **_commit(row["git"]),
        "not_comparable": excluded,
        "not_a_result": bool(row["not_a_result"]),
        "gpu": (row["hardware"] or {}).get("gpu"),
        "weights": f"{work}/cells/{cell}/weights",
        "at_chance": ", ".join(row["at_chance"]),
        "model_note": row.get("model_note"),
    }
    return Run(
        key=cell,
        parent=cell.rsplit("/", 1)[0],
        status="FINISHED",
        start=start,
        end=end,
        parameters=_texts(_flat({**parts, **row["settings"], **about})),
        metrics=_points(_scores(loaded, row), end) + _curves(curve, start),
        files=_existing([(root / "runs" / cell / name, "") for name in FILES]),
        tags=_tags(cell, tags),
    )


def _failed(failure: dict, *, root: Path) -> Run:
    cell, when = failure["cell"], _milliseconds(failure["when"])
    settings, parts, git = (
        failure[key] if isinstance(failure[key], dict) else {} for key in ("settings", "parts", "git")
    )
    stage = f" in {failure['stage']}" if failure["stage"] else ""
    note = f"**Failed**{stage}: {failure['kind']}, {failure['reason']}"
    about = {f"failure.{key}": failure[key] for key in ("kind", "stage", "reason")}
    return Run(
        key=cell,
        parent=cell.rsplit("/", 1)[0],
        status="FAILED",
        start=when,
        end=when,
        parameters=_texts(_flat({**parts, **settings})),
        files=_existing([(root / "failures" / f"{cell}.json", "failure")]),
        tags=_tags(cell, {"mlflow.note.content": note} | _commit(git) | about),
    )


def _commit(git: dict) -> dict:
    return {"git.commit": git.get("commit"), "git.dirty": git.get("dirty"), EXPERIMENT: git.get("experiment")}


def group_of(group: str, *, table: pd.DataFrame, planned: int, children: list[Run], files=()) -> Run:
    """The run of a method, above its `children`; FAILED where one of them is.

    Its numbers are the method's row of the comparison `table`, and means over the seeds that are compared.
    """
    failed = [run for run in children if run.status == "FAILED"]
    excluded = [run for run in children if "not_comparable" in run.tags]
    counted = [run for run in children if run not in failed and run not in excluded]
    row, start = _row(table, group), min(run.start for run in children)
    end = start + round(sum(run.end - run.start for run in children) / len(children))  # as long as a seed took
    common = dict(set.intersection(*(set(run.parameters.items()) for run in counted))) if counted else {}

    def collect(key: str, runs: list[Run]) -> str:
        return ", ".join(dict.fromkeys(run.tags[key] for run in runs if key in run.tags))

    def any_of(key: str) -> bool | None:
        return any(run.tags.get(key) == "True" for run in counted) if counted else None

    tags = {
        "mlflow.note.content": _note(group, row, planned=planned, counted=counted, failed=failed, excluded=excluded),
        "git.commit": collect("git.commit", counted),
        "git.dirty": any_of("git.dirty"),
        EXPERIMENT: collect(EXPERIMENT, children),
        "not_comparable": ", ".join(run.key for run in excluded),
        "not_a_result": any_of("not_a_result"),
        "base_sha256": collect("base_sha256", counted),
        "failure.reason": collect("failure.reason", failed),
        "note": row.get("note"),
    }
    return Run(
        key=group,
        status="FAILED" if failed else "FINISHED",
        start=start,
        end=end,
        parameters=_texts({**common, "seeds": ", ".join(run.tags["seed"] for run in counted)}) if counted else {},
        metrics=_points(row, end) + _means(counted, end),
        files=list(files),
        tags=_tags(group, tags),
    )


def base_of(loaded: Loaded, pair: str, *, table: pd.DataFrame) -> Run | None:
    """The bare model's run: gain and forgetting are 0, the point from which every method starts."""
    model, domain = pair.split("/")
    base, row = loaded.base.get(model), _row(table, pair)
    if base is None or not row:
        return None
    about, cells = base["evaluate"], loaded.of(model, domain)
    end, seconds = _milliseconds(about.get("when")), about.get("seconds_evaluate")
    tasks = set(cells.iloc[0]["n"])  # a model's base is scored on the tasks of all its domains
    scores = {f"score/{task}": value["value"] for task, value in base["scores"]["tasks"].items() if task in tasks}
    not_a_result = bool(cells["not_a_result"].any())
    note = (
        f"{model} before any fine-tuning, on the tasks of {domain}: every method is compared with it.\n\n"
        f"Score {units.level(row['domain_score'], row['unit'])} "
        f"{'%' if row['unit'] == units.SHARE else units.named(row['metric'])}."
    )
    tags = {
        "mlflow.note.content": note + (f" **{BANNER}.**" if not_a_result else ""),
        "base_sha256": base["scores"].get("weights_sha256"),
        "git.commit": about.get("git", {}).get("commit"),
        "git.dirty": about.get("git", {}).get("dirty"),
        "not_a_result": not_a_result,
    }
    return Run(
        key=pair,
        status="FINISHED",
        start=end - round(1000 * (seconds or 0)),
        end=end,
        metrics=_points({**row, "seconds_evaluate": seconds, **scores}, end),
        tags=_tags(pair, tags),
    )


def group_files(root: Path, group: str) -> list[tuple[Path, str]]:
    """The report and the figures of the group's own comparison, with the folder that each goes to."""
    model, domain, _ = group.split("/")
    figures = sorted((root / "summary" / "figures").glob("*.png"))
    # the name of a figure has no "-", so what follows the first one is the comparison
    own = [(file, "figures") for file in figures if file.stem.partition("-")[2] == f"{model}-{domain}"]
    return _existing([(root / "summary" / "report.html", ""), *own])


def _note(group: str, row: dict, *, planned: int, counted: list[Run], failed: list[Run], excluded: list[Run]) -> str:
    model, domain, method = group.split("/")
    seeds = f"{planned} seeds" if len(counted) == planned else f"{len(counted)} of {planned} seeds"
    seeds = "one seed" if planned == 1 else f"the mean of {seeds}"
    text = f"{model} fine-tuned on {domain} with **{method}**: {seeds}."
    if excluded:
        names = ", ".join(run.key.rsplit("/", 1)[1] for run in excluded)
        text += f" **Not in the comparison: {names}** (see the reason there)."
    if failed:
        reason = failed[0].tags.get("failure.reason", "no reason recorded")
        return f"{text} **{len(failed)} failed.**\n\n{failed[0].title}: {reason}"
    measures = (
        ("Gain", "domain_gain", row.get("unit", units.SHARE)),
        ("general text lost", GENERAL.key, GENERAL.unit),
        ("forgetting", "forgetting", units.SHARE),
    )
    values = ", ".join(f"{name} {_change(row.get(key), unit)}{_bounds(row, key, unit)}" for name, key, unit in measures)
    only = "; one seed: this run, not this method" if len(counted) == 1 else ""
    flag = " **NOT A RESULT.**" if any(run.tags["not_a_result"] == "True" for run in counted) else ""
    return f"{text}\n\n{values} (95 % intervals{only}).{flag}"


def _change(value, unit: str) -> str:
    return "unknown" if numbers.missing(value) else f"{units.change(value, unit)} {units.named(unit)}"


def _bounds(row: dict, key: str, unit: str) -> str:
    bounds = [row.get(f"{key}_{end}") for end in ("low", "high")]
    return "" if any(map(numbers.missing, bounds)) else f" [{', '.join(units.change(end, unit) for end in bounds)}]"


def _row(table: pd.DataFrame, key: str) -> dict:
    """The row of a method in the comparison, or of the base, which has no seeds; empty if there is none."""
    if table.empty:
        return {}
    model, domain, method = (*key.split("/"), "base")[:3]
    own = (table["model"] == model) & (table["domain"] == domain) & (table["method"] == method)
    rows = table[own & ((table["seeds"] == 0) == (key.count("/") == 1))]
    return rows.iloc[0].to_dict() if len(rows) else {}


def _scores(loaded: Loaded, row: pd.Series) -> dict:
    values = row.drop(NOT_METRICS, errors="ignore").to_dict()
    if row.get("general_perplexity") and row.get("general_perplexity_base"):
        values["perplexity_ratio"] = row["general_perplexity"] / row["general_perplexity_base"]
    for key in [key for key in row.index if key.endswith("_by_task") and key != "scores_by_task"]:
        by_task = row[key] if isinstance(row[key], dict) else {}
        name = NAMES.get(key, key.removesuffix("_by_task"))
        values |= {f"{name}/{task}": value for task, value in by_task.items()}
    if isinstance(apart := row.get("forgetting_apart"), dict):
        values |= {f"forgetting/{task}": about["forgetting"] for task, about in apart.items()}
    values |= {f"score/{task}": about["value"] for task, about in row["scores_by_task"].items()}
    for stage, parts in (row["added"] if isinstance(row.get("added"), dict) else {}).items():
        values |= {f"added/{part}/{stage}_{kind}": cost for part in parts or () for kind, cost in parts[part].items()}
    prepared = loaded.prepared.get(row["cell"], {})
    values["system/peak_memory_prepare_bytes"] = prepared.get("peak_memory_bytes")
    values["system/peak_memory_train_bytes"] = row.get("peak_memory_train_bytes")
    return values


def _points(values: dict, when: int) -> list[Point]:
    """Every known number, as a point at step 0."""
    known = {key: value for key, value in values.items() if isinstance(value, Real) and value == value}
    return [(key, _rounded(value), when, 0) for key, value in known.items() if not isinstance(value, bool)]


def _curves(curve: pd.DataFrame, start: int) -> list[Point]:
    points = []
    for column in [column for column in curve.columns if column not in ("cell", "step", "seconds")]:
        name = f"{'system' if column in MACHINE else 'curve'}/{column}"
        if column.startswith("probe_"):
            name = f"probe/{column.removeprefix('probe_')}"
        rows = curve[["step", "seconds", column]].dropna().itertuples(index=False)
        points += [(name, _rounded(value), start + round(1000 * seconds), int(step)) for step, seconds, value in rows]
    return points


def _means(runs: list[Run], end: int) -> list[Point]:
    """Scores by task and curves: the mean over seeds where all have the point, as long before `end` as in the first."""
    values, times = defaultdict(list), {}
    for run in runs:
        for key, value, when, step in run.metrics:
            if "/" in key:
                values[key, step].append(value)
                times.setdefault((key, step), end - run.end + when)
    whole = {point: own for point, own in values.items() if len(own) == len(runs)}
    return [(key, _rounded(sum(own) / len(own)), times[key, step], step) for (key, step), own in whole.items()]


def _rounded(value: float) -> float:
    value = float(value)
    return value if value.is_integer() else float(f"{value:.{DIGITS}g}")


def _tags(key: str, tags: dict) -> dict[str, str]:
    """The known `tags` as text, and those by which a run is found."""
    model, domain, *rest = key.split("/")
    about = {KINDS[len(rest)]: key, "model": model, "domain": domain, "method": rest[0] if rest else "base"}
    seed = {"seed": rest[1].removeprefix("seed")} if len(rest) > 1 else {}
    return _texts({name: value for name, value in {**tags, **about, **seed}.items() if value not in (None, "")})


def _texts(values: dict) -> dict[str, str]:
    return {key: str(value)[:CHARACTERS] for key, value in sorted(values.items())}


def _flat(block: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in block.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _milliseconds(when) -> int:
    """Since 1970, of an ISO time; 0 where there is none."""
    return round(1000 * datetime.fromisoformat(when).timestamp()) if isinstance(when, str) and when else 0


def _existing(files: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    return [(file, folder) for file, folder in files if file.is_file()]
