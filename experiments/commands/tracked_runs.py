"""What MLflow's runs hold, as plain values read from results/: parameters, points of metrics, tags, times and files.

Three kinds of run: a cell; above it the method with its row of the comparison and the mean curves of its seeds; and the
bare base of a (model, domain), with the study's report. MLflow draws a chart of every metric, so only the headline
numbers and what changes along training are metrics. Intervals and costs are tags, as people write them.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path

import pandas as pd

from analysis import numbers, style, units, words
from analysis.comparable import KIND, guarded
from analysis.load import Loaded, load_cells, retention_tasks
from analysis.sections.tables import BANNER
from analysis.statistics.comparison import comparison
from experiments.commands.tracked_page import HEADLINES, ROW, shown
from methods.tools.files import sha256

FILES = "metrics.json details.json train.json scores.json evaluate.json drift.json curve.csv items.csv.gz".split()
PAGES = ("report.html", "bench.html", "details.html", "table.csv", "tests.csv")  # of the study's summary
FRONT = "overview"  # the figure that names every method's point, which MLflow's own scatter chart cannot
EXPERIMENT = "DVC_EXP_NAME"  # the tag of a run made within `dvc exp run`
KEY, ROWS = "holdfast.key", ("base", "method", "cell")  # the tag of a run's key; what a run is, by the key's length
CHARACTERS, DIGITS = 5000, 6  # of a parameter or tag, as MLflow limits it; of a fraction, for MLflow shows them all

Point = tuple[str, float, int, int]  # metric, value, milliseconds since 1970, step


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run; its `key` is a cell's name, `model/domain/method`, or `model/domain` for the base.

    files  a file, and the folder that it goes to; `image` is a file among the charts
    """

    key: str
    start: int
    end: int
    tags: dict[str, str]
    status: str = "FINISHED"
    parameters: dict[str, str] = field(default_factory=dict)
    metrics: list[Point] = field(default_factory=list)
    files: list[tuple[Path, str]] = field(default_factory=list)
    image: Path | None = None

    @property
    def title(self) -> str:
        return " ".join(self.key.split("/")[2:]) or "base"

    @property
    def parent(self) -> str:
        """The key of the run above a cell; empty for others."""
        return self.key.rsplit("/", 1)[0] if self.key.count("/") == 3 else ""

    @cached_property
    def digest(self) -> str:
        """A hash of all that is written, the files' bytes included."""
        files = [*self.files, *([(self.image, "images")] if self.image else [])]
        content = asdict(self) | {"image": "", "files": [(folder, file.name, sha256(file)) for file, folder in files]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def runs_of(root: Path, cells, *, work: str = "work") -> Iterator[Run]:
    """Every run of a study, parents before their children. `work` is the folder with the study's weights."""
    loaded = load_cells(root, cells)
    compared = guarded(loaded)
    table = comparison(compared)
    excluded = {row["cell"]: row["reason"] for row in compared.failures.to_dict("records") if row["kind"] == KIND}
    failures = {row["cell"]: row for row in loaded.failures.to_dict("records")}
    groups = defaultdict(list)
    for cell in loaded.planned:
        groups[cell.rsplit("/", 1)[0]].append(cell)
    for pair in dict.fromkeys(group.rsplit("/", 1)[0] for group in groups):
        if (base := base_of(compared, pair, table=table, root=root)) is not None:
            yield base
    for group, planned in groups.items():
        children = []
        for cell in planned:
            if cell not in failures:
                children.append(run_of(loaded, cell, root=root, work=work, excluded=excluded.get(cell, "")))
            elif failures[cell]["kind"] != "not run":
                children.append(_failed(failures[cell], root=root))
        if children:
            yield group_of(group, table=table, planned=len(planned), children=children)
            yield from children


def run_of(loaded: Loaded, cell: str, *, root: Path = Path(), work: str = "work", excluded: str = "") -> Run:
    """The run of a finished cell; `excluded` says why it is not compared."""
    row, curve = loaded.cells.loc[cell], loaded.curves_of(loaded.cells.loc[[cell]])
    end = _milliseconds(row["when"])
    start = end - round(1000 * float(curve["seconds"].max())) if len(curve) else end
    about = {key: row[key] for key in ("model", "domain", "method", "seed", "dtype", "numerics", "scoring")}
    stored = (row.get("bytes_importance"), row.get("bytes_anchor"))
    values = {**row, "unit": units.of_domain(row)}
    values["bytes_stored"] = None if any(map(numbers.missing, stored)) else sum(stored)
    tags = {
        **_commit(row["git"] or {}),
        "not_comparable": excluded,
        "not_a_result": bool(row["not_a_result"]),
        "device": row["device"],
        "gpu": (row["hardware"] or {}).get("gpu"),
        "weights": f"{work}/cells/{cell}/weights",
        "weights_sha256": row["weights_sha256"],
    }
    return Run(
        key=cell,
        start=start,
        end=end,
        parameters=_texts(_flat({**row["parts"], **row["settings"], **about})),
        metrics=_headlines(values, end) + (_curves(curve, row, start) if len(curve) else []),
        files=[(file, "") for name in FILES if (file := root / "runs" / cell / name).is_file()],
        tags=_tags(cell, tags | shown(values)),
    )


def _failed(failure: dict, *, root: Path) -> Run:
    cell, when = failure["cell"], _milliseconds(failure["when"])
    known = {key: failure[key] if isinstance(failure[key], dict) else {} for key in ("parts", "settings", "git")}
    about = {f"failure.{key}": failure[key] for key in ("kind", "stage", "reason")}
    about["mlflow.note.content"] = f"Failed:\n\n{_verbatim(failure['reason'])}"
    return Run(
        key=cell,
        status="FAILED",
        start=when,
        end=when,
        parameters=_texts(_flat(known["parts"] | known["settings"])),
        files=[(root / "failures" / f"{cell}.json", "")],
        tags=_tags(cell, _commit(known["git"]) | about),
    )


def _commit(git: dict) -> dict:
    keys = {"mlflow.source.git.commit": "commit", "git.dirty": "dirty", EXPERIMENT: "experiment"}
    return {tag: git.get(key) for tag, key in keys.items()}


def group_of(group: str, *, table: pd.DataFrame, planned: int, children: list[Run]) -> Run:
    """The run of a method, above its `children`; FAILED where one of them is.

    Its numbers are the method's row of the comparison `table`; its curves are means over the seeds that are compared.
    """
    failed = [run for run in children if run.status == "FAILED"]
    excluded = [run for run in children if "not_comparable" in run.tags]
    counted = [run for run in children if run not in failed and run not in excluded]
    row, start = _row(table, group), min(run.start for run in children)
    end = start + round(sum(run.end - run.start for run in children) / len(children))  # as long as a seed took
    common = dict(set.intersection(*(set(run.parameters.items()) for run in counted))) if counted else {}

    def collect(key: str, runs: list[Run]) -> str:
        return ", ".join(dict.fromkeys(run.tags[key] for run in runs if key in run.tags))

    tags = {
        "mlflow.note.content": _note(group, planned=planned, counted=counted, failed=failed, excluded=excluded),
        "mlflow.runColor": style.colour(group.rsplit("/", 1)[1]),
        EXPERIMENT: collect(EXPERIMENT, children),
        "seeds": f"{len(counted)}" if len(counted) == planned else f"{len(counted)} of {planned}",
        "not_comparable": ", ".join(run.key for run in excluded),
        "not_a_result": any(run.tags["not_a_result"] == "True" for run in counted) if counted else None,
        "failure.reason": collect("failure.reason", failed),
        "note": row.get("note"),
    }
    return Run(
        key=group,
        status="FAILED" if failed else "FINISHED",
        start=start,
        end=end,
        parameters=_texts({**common, "seeds": ", ".join(run.tags["seed"] for run in counted)}) if counted else {},
        metrics=_headlines(row, end) + _means(counted, end),
        tags=_tags(group, tags | shown(row)),
    )


def base_of(loaded: Loaded, pair: str, *, table: pd.DataFrame, root: Path) -> Run | None:
    """The bare model's run, from which every method starts; its files are the report and the comparison's figures."""
    model, domain = pair.split("/")
    base, row = loaded.base.get(model), _row(table, pair)
    if base is None or not row:
        return None
    about, summary, metric = base["evaluate"], root / "summary", units.named(row["metric"])
    end, not_a_result = _milliseconds(about.get("when")), bool(loaded.of(model, domain)["not_a_result"].any())
    score = units.level(row["domain_score"], row["unit"]) + (
        " %" if row["unit"] == units.SHARE else f" {words.markdown(metric)}"
    )
    tags = {
        "mlflow.note.content": f"{model} before any fine-tuning, to which every method on {domain} is compared. Its "
        f"score there is {score}. The study's report and figures are among the artifacts of this run."
        + (f" **{BANNER}.**" if not_a_result else ""),
        "mlflow.runColor": style.INK,
        "not_a_result": not_a_result,
        **_commit(about.get("git", {})),
    }
    figures = sorted((summary / "figures").glob(f"*-{model}-{domain}.png"))
    own = [file for file in figures if "-" not in file.stem.removesuffix(f"-{model}-{domain}")]  # not of another model
    own += [file for file in [summary / "figures" / f"{FRONT}.png"] if file.is_file()]  # of all comparisons
    return Run(
        key=pair,
        start=end - round(1000 * (about.get("seconds_evaluate") or 0)),
        end=end,
        metrics=_headlines(row, end),
        tags=_tags(pair, tags | shown(row)),
        files=[(file, "") for name in PAGES if (file := summary / name).is_file()]
        + [(file, "figures") for file in own],
        image=next((file for file in own if file.stem == FRONT), None),
    )


def _note(group: str, *, planned: int, counted: list[Run], failed: list[Run], excluded: list[Run]) -> str:
    means = f"mean of {planned if len(counted) == planned else f'{len(counted)} of {planned}'} seeds, 95 % intervals"
    one = "one seed; the intervals are of this run, not of this method"
    text = "{} fine-tuned on {} with **{}**: {}.".format(*group.split("/"), one if planned == 1 else means)
    if any(run.tags["not_a_result"] == "True" for run in counted):
        text += f" **{BANNER}.**"
    if excluded:
        text += f" **Not in the comparison: {', '.join(run.title for run in excluded)}** (see the reason there)."
    if failed:
        reason = failed[0].tags.get("failure.reason", "no reason recorded")
        text += f" **{len(failed)} failed.** {failed[0].title}:\n\n{_verbatim(reason)}"
    return text


def _verbatim(text: str) -> str:
    """Text as Markdown shows it unchanged, whatever it holds: an indented block."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _row(table: pd.DataFrame, key: str) -> dict:
    """The row of a method in the comparison, or of the base, which has no seeds; empty if there is none."""
    if table.empty:
        return {}
    model, domain, method = (*key.split("/"), "base")[:3]
    own = (table["model"] == model) & (table["domain"] == domain) & (table["method"] == method)
    rows = table[own & ((table["seeds"] == 0) == (key.count("/") == 1))]
    return rows.iloc[0].to_dict() if len(rows) else {}


def _headlines(values: dict, when: int) -> list[Point]:
    return [(key, _rounded(values[key]), when, 0) for key in HEADLINES if not numbers.missing(values.get(key))]


def _curves(curve: pd.DataFrame, cell: pd.Series, start: int) -> list[Point]:
    """The training loss and the probes, by the names of CURVES; of the retention tasks the mean."""
    probed = {"domain_nll": "{}_nll", "domain_accuracy": "{}", "gold_nll": "{}_nll", "accuracy": "{}"}
    columns = {"loss": ["loss"], "probe/general_nll": ["probe_general_nll"]}
    for name, column in probed.items():
        tasks = [cell["domain"]] if name.startswith("domain") else retention_tasks(cell)
        columns[f"probe/{name}"] = [f"probe_{column.format(task)}" for task in tasks]
    points = []
    for name, own in columns.items():
        if own and set(own) <= set(curve):
            rows = zip(curve["step"], curve["seconds"], curve[own].mean(axis=1, skipna=False))
            known = [(int(step), seconds, value) for step, seconds, value in rows if not numbers.missing(value)]
            points += [(name, _rounded(value), start + round(1000 * seconds), step) for step, seconds, value in known]
    return points


def _means(runs: list[Run], end: int) -> list[Point]:
    """Curves: the mean over seeds where all have the point, as long before `end` as in the first."""
    values, times = defaultdict(list), {}
    for run in runs:
        for key, value, when, step in run.metrics:
            if key not in HEADLINES:
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
    about = {KEY: key, ROW: ROWS[len(rest)], "model": model, "domain": domain, "method": rest[0] if rest else "base"}
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
