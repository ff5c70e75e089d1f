"""Reads what the stages left in results/; knows what was planned, so that nothing goes missing silently."""

import zlib
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from analysis import checked
from methods.errors import UserError
from methods.tools.files import read_json

UNBEGUN = "has not been run"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One study's results.

    cells     one row a finished cell: metrics.json, with `settings`, `device`, `when` and `steps` from train.json
              and the two peaks apart: `peak_memory_train_bytes` from there, the preparation's in `prepared`
    curves    curve.csv of all finished cells below one another, with a `cell` column
    items     items.csv.gz likewise; the score of every item
    failures  one row a cell without a result: cell, stage, kind, reason, when (kind 'not run' where nothing is recorded), and where they
              are recorded settings, parts, git
    base      model -> {"scores": scores.json, "items": DataFrame, "evaluate": evaluate.json}
    tuning    (model, domain) -> the tuning record
    prepared  cell -> prepare.json
    drift     cell -> drift.json
    planned   every cell asked for, in order
    gpu       the newest GPU check (results/gpu/*.json, docs/gpu-check.md); None where there is none
    bench     path -> benchmark record (results/bench/*.json), the newest of each name, in alphabetical order
    """

    cells: pd.DataFrame
    curves: pd.DataFrame
    items: pd.DataFrame
    failures: pd.DataFrame
    base: dict = field(default_factory=dict)
    tuning: dict = field(default_factory=dict)
    prepared: dict = field(default_factory=dict)
    drift: dict = field(default_factory=dict)
    planned: tuple[str, ...] = ()
    gpu: dict | None = None
    bench: dict[Path, dict] = field(default_factory=dict)

    @property
    def not_a_result(self) -> bool:
        """True where any cell says so: one demo cell taints the whole comparison."""
        return bool(len(self.cells)) and bool(self.cells["not_a_result"].any())

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """The (model, domain) pairs with at least one finished cell, in planned order."""
        pairs = [tuple(name.split("/")[:2]) for name in self.cells.index]
        return list(dict.fromkeys(pairs))

    def without(self, names: Collection[str]) -> "Loaded":
        """The results but for the cells `names`, with all that is read of a cell."""
        rows = lambda frame: frame[~frame["cell"].isin(names)].reset_index(drop=True) if len(frame) else frame
        of = lambda records: {cell: record for cell, record in records.items() if cell not in names}
        return replace(
            self,
            cells=self.cells.drop(index=list(names)),
            curves=rows(self.curves),
            items=rows(self.items),
            prepared=of(self.prepared),
            drift=of(self.drift),
        )

    def of(self, model: str, domain: str) -> pd.DataFrame:
        """The finished cells of one comparison."""
        return self.cells[(self.cells["model"] == model) & (self.cells["domain"] == domain)]


def load_cells(results_root: Path | str, cells) -> Loaded:
    """Reads the results of `cells` (names `model/domain/method/seed0`, or objects with a `.name`).

    A file in failures/ outranks older metrics of the same cell: the last attempt is what counts.
    Raises UserError where a results file cannot be read.
    """
    root = Path(results_root)
    names = [getattr(cell, "name", cell) for cell in cells]
    rows, curves, items, failures, prepared, drift = [], [], [], [], {}, {}
    for name in names:
        model, domain, method, seed = name.split("/")
        run, failure = root / "runs" / name, root / "failures" / f"{name}.json"
        if failure.exists():
            failures.append({**checked.failure(failure, read_json(failure)), "cell": name})
            continue
        if not (run / "metrics.json").exists():
            failures.append({"cell": name, "stage": "", "kind": "not run", "reason": _how_far(root, name), "when": ""})
            continue
        metrics = checked.metrics(run / "metrics.json", read_json(run / "metrics.json"))
        train = (
            checked.train(run / "train.json", read_json(run / "train.json")) if (run / "train.json").exists() else {}
        )
        rows.append(
            {
                **metrics,
                "cell": name,
                **{key: train[key] for key in ("settings", "device", "when", "steps") if key in train},
                "peak_memory_train_bytes": train.get("peak_memory_bytes"),
            }
        )
        if (path := run / "curve.csv").exists():
            curve = _read_csv(path)
            curves.append(
                checked.table(path, curve, columns=checked.CURVE, numeric=tuple(curve.columns)).assign(cell=name)
            )
        if (path := run / "items.csv.gz").exists():
            items.append(_items(path).assign(cell=name))
        costs = root / "prepared" / model / method / seed / "prepare.json"
        if costs.exists():
            prepared[name] = read_json(costs)
        if (run / "drift.json").exists():
            drift[name] = read_json(run / "drift.json")
    models = dict.fromkeys(name.split("/")[0] for name in names)
    pairs = dict.fromkeys(tuple(name.split("/")[:2]) for name in names)
    tuning = {pair: root / "tuning" / pair[0] / f"{pair[1]}.json" for pair in pairs}
    return Loaded(
        cells=pd.DataFrame(rows, index=[row["cell"] for row in rows]) if rows else pd.DataFrame(),
        curves=pd.concat(curves, ignore_index=True) if curves else pd.DataFrame(),
        items=pd.concat(items, ignore_index=True) if items else pd.DataFrame(),
        failures=pd.DataFrame(
            failures, columns=["cell", "stage", "kind", "reason", "when", "settings", "parts", "git"]
        ),
        base={
            model: _read_base(root / "base" / model)
            for model in models
            if (root / "base" / model / "scores.json").exists()
        },
        tuning={pair: read_json(path) for pair, path in tuning.items() if path.exists()},
        prepared=prepared,
        drift=drift,
        planned=tuple(names),
        gpu=newest_gpu_check(root),
        bench=newest_benchmarks(root),
    )


def newest_gpu_check(root: Path) -> dict | None:
    """The last written check of a GPU; it is the machine's and no study's, and lies beside the default study's results."""
    found = [check for check in map(read_json, _beside(root, "gpu")) if not check.get("tiny")]
    return max(found, key=lambda check: check.get("when") or "", default=None)


def newest_benchmarks(root: Path) -> dict[Path, dict]:
    """The last record of every benchmark, by its path; the machine's and no study's, like the GPU check.

    Raises UserError where a file is not a record as `python -m experiments bench` writes it.
    """
    newest: dict[str, tuple[Path, dict]] = {}
    for path in _beside(root, "bench"):
        record = read_json(path)
        if wrong := _not_a_benchmark(record):
            raise UserError(
                f"{path} is not a benchmark's record ({wrong}): delete it, or write it again with `python -m experiments bench {path.stem}`"
            )
        if path.stem not in newest or record["when"] > newest[path.stem][1]["when"]:
            newest[path.stem] = path, record
    return dict(newest[name] for name in sorted(newest))


def _beside(root: Path, folder: str) -> list[Path]:
    """The JSON files of a folder in the default study's results, whichever study `root` belongs to."""
    return [path for place in (root / folder, root.parent / folder) for path in sorted(place.glob("*.json"))]


def _not_a_benchmark(record) -> str:
    """What keeps a file's content from being a benchmark's record; empty where nothing does."""
    try:
        for key in ("title", "text", "when"):
            if not isinstance(record[key], str):
                return f"{key} is no text"
        if not record["races"]:
            return "it holds no race"
        for race in record["races"]:
            for row in race["rows"]:
                for key in ("seconds_min", "seconds_median", "ratio_min", "ratio_median"):
                    float(row[key])
            if race["against"] not in (runners := [row["runner"] for row in race["rows"]]):
                return f"{race['against']!r} is no runner of {race['title']!r}"
            for goal in race["goals"]:
                goal["text"], goal["met"]
                if goal["runner"] not in runners:
                    return f"the goal of {goal['runner']!r} has no runner"
            race["title"], race["rounds"], dict(race["facts"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        columns = pd.read_csv(path, nrows=0).columns
        # by itself pandas takes a task called `nan` or `null` for a missing one, and numbers in place of names for numbers
        return pd.read_csv(
            path,
            dtype={"task": str},
            keep_default_na=False,
            na_values={name: ["", "nan"] for name in columns if name != "task"},
        )
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read ({error}): restore it with git, or delete it and run the stage again"
        ) from error


def _items(path: Path) -> pd.DataFrame:
    return checked.table(path, _read_csv(path), columns=checked.ITEMS, numeric=("score", "gold"))


def _read_base(folder: Path) -> dict:
    items, evaluate = folder / "items.csv.gz", folder / "evaluate.json"
    return {
        "scores": read_json(folder / "scores.json"),
        "items": _items(items) if items.exists() else pd.DataFrame(),
        "evaluate": read_json(evaluate) if evaluate.exists() else {},
    }


def _how_far(root: Path, name: str) -> str:
    """What there is of a cell that has no metrics and no recorded failure."""
    run = root / "runs" / name
    if (run / "scores.json").exists():
        return "scored, but not collected yet"
    if (run / "train.json").exists():
        return "trained, but not scored yet"
    return UNBEGUN


def retention_tasks(cell: pd.Series) -> list[str]:
    """The tasks that count in `forgetting`: retention tasks whose base is above chance."""
    return [task for task in cell["forgetting_by_task"] if task not in cell["at_chance"]]
