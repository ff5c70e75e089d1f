"""The tasks of a study: its DVC stages with what they wait for, take of a machine and cost by the plan."""

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from experiments.launch.schedule import Needs, Task
from experiments.model import drift
from experiments.stages import resolve
from experiments.study.cells import Cell, grid
from methods.part import prepares

HERE = ("resolve", "model", "data", "collect", "compare")  # stages that run on the machine of `launch` itself
OF_CELL = ("train", "evaluate", "collect", "drift")
ENDS = ("collect", "drift")  # the last stages of a cell


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the names of a study's DVC stages stand for: they are matched against the grid, and never split."""

    cells: Mapping[str, Cell] = field(default_factory=dict)  # of stages of a cell
    prepared: Mapping[str, Cell] = field(default_factory=dict)  # the first cell that needs a preparation
    models: Mapping[str, str] = field(default_factory=dict)
    computes: Mapping[str, str] = field(default_factory=dict)  # of `drift`, the preparation that it may have to compute

    def model(self, stage: str) -> str | None:
        cell = self.cells.get(stage) or self.prepared.get(stage)
        return cell.model if cell else self.models.get(stage)


def names(study) -> Names:
    every = grid(study)
    prepared: dict[str, Cell] = {}
    for cell in every:
        prepared.setdefault(f"prepare@{cell.model}-{cell.method}-{cell.seed}", cell)
    computes = {}
    if reference := drift.reference(study):
        computes = {f"drift@{cell.stage}": f"prepare@{cell.model}-{reference[0]}-{cell.seed}" for cell in every}
    return Names(
        cells={f"{kind}@{cell.stage}": cell for cell in every for kind in OF_CELL},
        prepared=prepared,
        models={f"{kind}@{name}": name for name in study.grid.models for kind in ("model", "base")},
        computes=computes,
    )


def targets(study, chosen: Iterable[Cell]) -> list[str]:
    """The stages that finish the chosen cells; `compare` if they are the whole grid."""
    chosen = list(chosen)
    whole = len(chosen) == len(grid(study))
    return [f"{kind}@{cell.stage}" for cell in chosen for kind in ENDS] + (["compare"] if whole else [])


def needed(after: Mapping[str, frozenset[str]], ends: Iterable[str]) -> list[str]:
    """The stages `ends` and all that they need, in the order of `after`."""
    found, left = set(), list(ends)
    while left:
        if (name := left.pop()) not in found:
            found.add(name)
            left += after[name]
    return [name for name in after if name in found]


def build(
    study, *, after: Mapping[str, frozenset[str]], needed: Iterable[str], plan: Mapping, needs: Mapping[str, Needs]
) -> list[Task]:
    """The tasks of the stages `needed`.

    after  names of the stages that a stage reads from
    plan   what `plan` says of the cells
    needs  what a cell of each model takes of a machine
    """
    known, costs, shared = names(study), seconds(study, plan), _Shared(study)
    tasks, begun = [], set()
    for name in needed:
        kind, model = name.partition("@")[0], known.model(name)
        taken = Needs(here=True) if kind in HERE or model is None else needs[model]
        once = shared.preparation(known.prepared[name]) if name in known.prepared else ""
        once = shared.training(known.cells[name]) if kind == "train" else once
        cost = 0.0 if once in begun else costs.get(name, 0.0)  # another one has done the work
        begun |= {once} if once else set()
        tasks.append(Task(name=name, seconds=cost, after=after[name], needs=taken, once=once))
    return tasks


def seconds(study, plan: Mapping) -> dict[str, float]:
    """Seconds of each stage by the plan. Where the plan does not know them they are the mean of those it knows."""
    every = {cell.name: cell for cell in grid(study)}
    costs: dict[str, float | None] = {}
    for planned in plan["cells"]:
        cell = every[planned["cell"]]
        costs[f"prepare@{cell.model}-{cell.method}-{cell.seed}"] = planned["seconds_prepare"]
        costs[f"train@{cell.stage}"] = planned["seconds_train"]
        costs[f"evaluate@{cell.stage}"] = planned["seconds_evaluate"]
    costs |= {f"base@{model}": seconds for model, seconds in plan["seconds_base"].items()}
    found = [value for value in costs.values() if value]
    mean = sum(found) / len(found) if found else 1.0
    return {name: mean if value is None else value for name, value in costs.items()}


def needs(study, plan: Mapping, *, cores: int, gpus: int) -> dict[str, Needs]:
    """What a cell of each model takes of a machine: what its block says, else what the plan predicts.

    cores, gpus  of the machine of `launch`

    On a CPU a cell takes all cores if nothing else is written, as in a serial run, because the number of threads
    decides how sums are rounded.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0) if os.environ.get("OMP_NUM_THREADS", "0").isdigit() else 0
    found = {}
    for name in study.grid.models:
        block = study.models[name].needs
        on_gpu = study.device == "cuda" or (study.device == "auto" and gpus > 0)
        together = study.models[name].processes or 1
        predicted = [cell["memory_bytes"] or 0 for cell in plan["cells"] if cell["cell"].startswith(f"{name}/")]
        taken = Needs(
            gpus=block.gpus if block.gpus is not None else together if on_gpu else 0,
            cores=threads or (max(1, cores // max(1, gpus)) if on_gpu else cores),
            memory=0 if on_gpu else together * max(predicted, default=0),
        )
        taken = replace(taken, cores=block.cores) if block.cores else taken
        found[name] = replace(taken, memory=round(block.memory * 2**30)) if block.memory else taken
    return found


class _Shared:
    """The work that a stage shares with others, as a text; empty where it shares none."""

    def __init__(self, study):
        self._study = study
        self._prepared = functools.cache(lambda model, method: resolve.text(resolve.prepare(study, model, method)))
        self._store = functools.cache(lambda *names: resolve.store_of(study, Cell(*names, 0)))

    def preparation(self, cell: Cell) -> str:
        """The local store's key of a preparation, but for what all cells of the model have in common."""
        parts = self._study.methods[cell.method].parts
        if not any(map(prepares, parts)):
            return ""
        seed = cell.seed if resolve.seeded(parts) else None
        return f"prepare {cell.model} {seed} {self._prepared(cell.model, cell.method)}"

    def training(self, cell: Cell) -> str:
        """The store of a training that cells which differ in `finish` alone begin from."""
        store = self._store(cell.model, cell.domain, cell.method)
        return f"train {store} {cell.seed}" if store else ""
