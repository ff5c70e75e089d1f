"""Read what the stages wrote into results/, for every planned cell, so that nothing goes missing silently."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from analysis import checked, parallel
from analysis.machines import newest_benchmarks, newest_gpu_check, shared_files
from analysis.roles import Roles
from methods.tools.files import read_json

NOT_STARTED = "has not been run"
TRAINED_AGAIN = "trained again, and its scores are of the weights before"
AT_ONCE = 25  # cells that one process reads before it hands them over
READ = ("row", "curve", "items", "failure", "prepared", "drift")  # what there may be of a cell


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One study's results.

    cells     one row per finished cell: metrics.json and details.json, with `settings`, `device`, `when`, `steps` and
              `finished` of train.json and its peak as `peak_memory_train_bytes`; the preparation's peak is in
              `prepared`
    curves    curve.csv of all finished cells, with a `cell` column
    items     items.csv.gz of all finished cells, with a `cell` column: the score of every item
    failures  one row per cell without a result: cell, stage, kind, reason, when ('not run' is the kind where nothing is
              recorded), and settings, parts, git where they are recorded
    base      model -> {"scores": scores.json, "items": DataFrame, "evaluate": evaluate.json, "start": start.json,
              "settle": settle.json of a settled model, else {}}
    tuning    (model, domain) -> the record of the tuning trials
    prepared  cell -> prepare.json
    drift     cell -> drift.json
    planned   the names of all cells, in order
    gpu       the newest GPU check (results/gpu/*.json, docs/gpu-check.md), or None
    bench     path -> benchmark record (results/bench/*.json), the newest of each name, in alphabetical order
    roles     leaders, compositions and controls, as params.yaml names them
    also      study -> results of another study that are shown beside these, never pooled or tested (analysis/also.py)
    choices   what analysis/chosen.py has found of these results, by (model, domain)
    redraws   the same of analysis/statistics/contrasts.py
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
    roles: Roles = Roles()
    also: Mapping[str, "Loaded"] = field(default_factory=dict)
    choices: dict = field(default_factory=dict, init=False, repr=False, compare=False)
    redraws: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def not_a_result(self) -> bool:
        """True if any cell is marked so: one demo cell makes the whole comparison a demo."""
        return bool(len(self.cells)) and bool(self.cells["not_a_result"].any())

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """The (model, domain) pairs with at least one finished cell, in planned order."""
        return list(dict.fromkeys(tuple(name.split("/")[:2]) for name in self.cells.index))

    def without(self, names: Collection[str]) -> "Loaded":
        """These results without anything of the cells `names`."""

        def rows(frame: pd.DataFrame) -> pd.DataFrame:
            return frame[~frame["cell"].isin(names)].reset_index(drop=True) if len(frame) else frame

        def others(records: dict) -> dict:
            return {cell: record for cell, record in records.items() if cell not in names}

        frames = {"cells": self.cells.drop(index=list(names)), "curves": rows(self.curves), "items": rows(self.items)}
        return replace(self, **frames, prepared=others(self.prepared), drift=others(self.drift))

    def of(self, model: str, domain: str) -> pd.DataFrame:
        """The finished cells of one comparison."""
        if self.cells.empty:
            return self.cells
        return self.cells[(self.cells["model"] == model) & (self.cells["domain"] == domain)]

    def base_items(self, model: str) -> pd.DataFrame:
        """The scored items of the bare model; empty if there are none."""
        return self.base.get(model, {}).get("items", pd.DataFrame())

    def items_of(self, cells: pd.DataFrame) -> pd.DataFrame:
        """The scored items of `cells`; empty if there are none."""
        return _rows_of(self.items, self._places_of_items, cells) if len(self.items) else pd.DataFrame()

    def curves_of(self, cells: pd.DataFrame) -> pd.DataFrame:
        """The curves of `cells`; empty if there are none."""
        return _rows_of(self.curves, self._places_of_curves, cells) if len(self.curves) else pd.DataFrame()

    # looked up once: a search of all rows for each of many comparisons would take the square of their number
    @cached_property
    def _places_of_items(self) -> dict[str, np.ndarray]:
        return self.items.groupby("cell", sort=False).indices

    @cached_property
    def _places_of_curves(self) -> dict[str, np.ndarray]:
        return self.curves.groupby("cell", sort=False).indices


def _rows_of(frame: pd.DataFrame, places: Mapping[str, np.ndarray], cells: pd.DataFrame) -> pd.DataFrame:
    """The rows of `cells`, in the frame's order."""
    found = [places[cell] for cell in cells.index if cell in places]
    return frame.take(np.sort(np.concatenate(found))) if found else frame.iloc[:0]


def load_cells(results_root: Path | str, cells) -> Loaded:
    """Read the results of `cells` (names `model/domain/method/seed0`, or objects with a `.name`).

    A file in failures/ takes precedence over older metrics of the same cell: the last attempt counts.
    Raises UserError for a results file that cannot be read or lacks something, by its path.
    """
    root = Path(results_root)
    names = [getattr(cell, "name", cell) for cell in cells]
    found = dict(zip(names, parallel.each(partial(_cell, root), [(name,) for name in names], at_once=AT_ONCE)))
    read = {key: {name: own[key] for name, own in found.items() if key in own} for key in READ}
    bases = {model: root / "base" / model for model in dict.fromkeys(name.split("/")[0] for name in names)}
    pairs = dict.fromkeys(tuple(name.split("/")[:2]) for name in names)
    tuning = {pair: root / "tuning" / pair[0] / f"{pair[1]}.json" for pair in pairs}
    columns = ["cell", "stage", "kind", "reason", "when", "settings", "parts", "git"]
    return Loaded(
        cells=pd.DataFrame(read["row"].values(), index=list(read["row"])) if read["row"] else pd.DataFrame(),
        curves=_joined(read["curve"].values()),
        items=_joined(read["items"].values()),
        failures=pd.DataFrame(read["failure"].values(), columns=columns),
        base={model: _read_base(root, folder) for model, folder in bases.items() if (folder / "scores.json").exists()},
        tuning={pair: read_json(path) for pair, path in tuning.items() if path.exists()},
        prepared=read["prepared"],
        drift=read["drift"],
        planned=tuple(names),
        gpu=newest_gpu_check(root),
        bench=newest_benchmarks(root),
    )


def _joined(frames: Collection[pd.DataFrame]) -> pd.DataFrame:
    """The rows of all frames, in order; empty if there are none.

    Text columns are made one piece: `concat` leaves one for each cell, and taking some rows would copy all the pieces.
    """
    if not frames:
        return pd.DataFrame()
    joined = pd.concat(frames, ignore_index=True)
    for name, column in joined.select_dtypes("str").items():
        if isinstance(pieces := pa.array(column), pa.ChunkedArray):
            joined[name] = pd.array(pieces.combine_chunks(), dtype=column.dtype)
    return joined


def _cell(root: Path, name: str) -> dict[str, Any]:
    """What is there of READ of one cell: either its failure or its row and what goes with it."""
    model, _, method, seed = name.split("/")
    run, failure = root / "runs" / name, root / "failures" / f"{name}.json"
    if failure.exists():
        return {"failure": checked.dated(failure, checked.mapping(failure, checked.FAILURE)) | {"cell": name}}
    not_run = {"cell": name, "stage": "", "kind": "not run", "when": ""}
    if (found := record(run)) is None:
        return {"failure": not_run | {"reason": _progress(run)}}
    train = _train(run / "train.json")
    scored = found.get("weights_sha256")
    if scored is not None and train.get("weights_sha256", scored) != scored:
        return {"failure": not_run | {"reason": TRAINED_AGAIN}}
    trained = {key: train[key] for key in ("settings", "device", "when", "steps", "finished") if key in train}
    trained["peak_memory_train_bytes"] = train.get("peak_memory_bytes")
    read: dict[str, Any] = {"row": checked.complete(run, found) | {"cell": name} | trained}
    if (path := run / "curve.csv").exists():
        curve = checked.table(path, columns=checked.CURVE)
        last = int(curve["step"].max()) if len(curve) else 0
        if last != train.get("steps", last):  # cut off between two lines, where CSV does not show it
            raise checked.damaged(path, f"it ends at step {last}, and train.json at {train['steps']}")
        read["curve"] = curve.assign(cell=name)
    if (path := run / "items.csv.gz").exists():
        # of the base's items alone it matters what there was to choose from
        read["items"] = checked.items(path, without=("choices",)).assign(cell=name)
    if (path := root / "prepared" / model / method / seed / "prepare.json").exists():
        read["prepared"] = read_json(path)
    if (path := run / "drift.json").exists():
        read["drift"] = read_json(path)
    return read


def record(run: Path) -> dict | None:
    """What `collect` wrote of a cell: details.json and metrics.json together; None without a metrics.json.

    Results from before there was a details.json have all in metrics.json.
    """
    metrics, details = run / "metrics.json", run / "details.json"
    if not metrics.is_file():
        return None
    return (read_json(details) if details.is_file() else {}) | read_json(metrics)


def retention_tasks(cell: pd.Series) -> list[str]:
    """The tasks that `forgetting` averages: retention tasks on which the base is above chance."""
    return [task for task in cell["forgetting_by_task"] if task not in cell["at_chance"]]


def score_tasks(cell: pd.Series) -> list[str]:
    """The tasks that score the domain beside its own score (`score:` of its block), whose change is a gain."""
    return [task for task, about in cell["scores_by_task"].items() if about["role"] == "score"]


def _read_base(root: Path, folder: Path) -> dict:
    items, evaluate, start = (folder / name for name in ("items.csv.gz", "evaluate.json", "start.json"))
    return {
        "scores": read_json(folder / "scores.json"),
        "items": checked.items(items) if items.exists() else pd.DataFrame(),
        "evaluate": read_json(evaluate) if evaluate.exists() else {},
        "start": read_json(start) if start.exists() else {},
        "settle": next((read_json(path) for path in shared_files(root, f"settled/{folder.name}")), {}),
    }


def _progress(run: Path) -> str:
    """How far a cell without metrics and without a recorded failure has come."""
    if (run / "scores.json").exists():
        return "scored, but not collected yet"
    return "trained, but not scored yet" if (run / "train.json").exists() else NOT_STARTED


def _train(path: Path) -> dict:
    if not path.exists():
        return {}
    return checked.dated(path, checked.mapping(path, {}))
