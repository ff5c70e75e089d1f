"""plan: what each cell of a study will cost in time, memory and disk, before anything runs.

Time: the matrix FLOPs of the cell (experiments/training/flops.py, on the model without its weights), divided by the
rate that earlier cells of the model reached on this machine, or else by a share of the device's peak rate. Tokens of
rows that are not here yet are assumed (experiments/data/expected.py). Parts say themselves what they read while they
prepare and what they add to each step (`Part.preparation`, `Part.added`).
Memory: experiments/training/memory.py, by kind, for both phases, with examples as long as `length` allows. A cell that
does not fit into the memory that is free here is marked.
Disk: models and preparations that are not here yet (experiments/study/room.py), and what is kept of a cell's weights
(experiments/model/tuned.py): an adapter, or the difference from the base. Cells that
differ in `finish` alone share one training, which is counted once, with its trained weights in full precision. A plan
that the disk has no room for is refused.
Nothing is loaded or fetched.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments.data import expected
from experiments.model import tuned
from experiments.model.base import as_dtype
from experiments.model.positions import refuse_long_documents
from experiments.model.shape import Shape, shape_of
from experiments.stages import resolve
from experiments.study import ahead, cells, room
from experiments.study.lock import Lock
from experiments.study.room import Room
from experiments.study.schema import Model
from experiments.training import batches, hardware, improvable, memory
from experiments.training.flops import Flops, of_pass
from methods.errors import UserError
from methods.part import Part
from methods.tools.files import read_json

UNKNOWN_LENGTH = 512  # tokens at which a part cuts documents, where it states no length
STAGES = ("prepared", "trained", "scored")  # what may be cached of a cell
REACHED = 0.4  # share of a device's peak rate that training reaches
REFERENCE = "NVIDIA H200"  # the device whose time is predicted for a study on CUDA, on a machine without such a device


def main(study, *, as_json: bool, patterns: Sequence[str] = ()) -> None:
    """Print the plan. Raises UserError afterwards where the disk has too little room for it."""
    plan = make(study, patterns=patterns)
    print(json.dumps(plan, indent=1) if as_json else text(plan), flush=True)
    if _is_here(_device(study)):  # else it is a plan for another machine, with another disk
        Room(**plan["disk"]).refuse()


def make(study, *, patterns: Sequence[str] = (), anew: bool = False) -> dict:
    """{"cells": [...], "total": {...}, "basis": {...}, "warnings": [...]}: seconds, bytes, and what they rest on.

    Only the cells whose names match one of `patterns`, if there are any (see `cells.matching`, which raises UserError);
    with `anew` as if none of their stages had run.
    None stands for FLOPs and memory of an architecture that are not known, and for totals that include them.
    """
    warnings = ahead.look(study)
    lock = Lock(study)
    chosen = cells.matching(study, patterns)
    models = {name: _Model(study=study, name=name) for name in study.grid.models}
    device = _device(study)
    available = hardware.available_memory(device) if _is_here(device) else None
    begun: set[Path] = set()
    cached = {cell: dict.fromkeys(STAGES, False) if anew else lock.cell(cell) for cell in chosen}
    planned = [_cell(study, cell, models[cell.model], cached[cell], available, begun) for cell in chosen]
    to_run = [cell for cell in planned if not cell["cached"]["scored"]]
    chosen_models = list(dict.fromkeys(cell.model for cell in chosen))
    preparations = {
        (cell.model, cell.method, cell.seed): made["prepared_bytes"]
        for cell, made in zip(chosen, planned, strict=True)
        if not made["cached"]["prepared"]
    }
    stores = {  # the local store has a copy of each, which seeds share where the preparation draws no random numbers
        (model, method, seed if resolve.seeded(study.methods[method].parts) else None): size
        for (model, method, seed), size in preparations.items()
    }
    bases = {
        name: 0.0 if lock.done(f"base@{name}") and not anew else _base(study, models[name]) for name in chosen_models
    }
    needed = room.of(
        study,
        models={name: models[name].bytes for name in chosen_models},
        prepared=sum(preparations.values()) + sum(stores.values()),
        cells=sum(cell["disk_bytes"] for cell in to_run),
    )
    return {
        "study": study.title,
        "cells": planned,
        "total": {
            "cells": len(planned),
            "to_run": len(to_run),
            "seconds": _sum([*(cell["seconds"] for cell in to_run), *bases.values()]),
            "disk_bytes": sum(cell["disk_bytes"] for cell in to_run),
            "disk_bytes_all": sum(cell["disk_bytes"] for cell in planned),
            "peak_memory_bytes": _largest(cell["memory_bytes"] for cell in planned),
            "resident_bytes": max((cell["resident_bytes"] or 0 for cell in planned), default=0) or None,
            "available_memory_bytes": available,
            "too_large": sum(cell["fits"] is False for cell in planned),
        },
        "disk": dataclasses.asdict(needed),
        "basis": {name: model.rate[1] for name, model in models.items()},
        "seconds_base": bases,
        "seconds_improvable": {
            name: _known(_improvable(study, models[name]) / models[name].rate[0])
            for name in chosen_models
            if improvable.applies(study, name)
        },
        "warnings": warnings,
    }


def refuse_models(study) -> None:
    """Refuse a study whose models, as far as their sizes are known, have no room on the disk."""
    known = [name for name in study.grid.models if ahead.known_shape(study, name)]
    room.of(study, models={name: _Model(study=study, name=name).bytes for name in known}, prepared=0, cells=0).refuse()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Model:
    """A model of the grid without its weights: its FLOPs and bytes, and the rate at which it trains."""

    study: Any
    name: str

    @functools.cached_property
    def block(self) -> Model:
        return self.study.models[self.name]

    @functools.cached_property
    def device(self) -> torch.device:
        return _device(self.study)

    @functools.cached_property
    def shape(self) -> Shape:
        return shape_of(self.name, self.block, self.study.paths.model(self.name))

    @functools.cached_property
    def checkpoint(self) -> torch.dtype:
        """The base's dtype: as it was made, else as its block says, else bfloat16 (random models: float32)."""
        made = self.study.paths.model(self.name) / "base.json"
        if made.is_file():
            return as_dtype(read_json(made, "dtype")["dtype"])
        default = "float32" if self.block.source.startswith("random:") else "bfloat16"
        return as_dtype(self.block.dtype or default)

    @functools.cached_property
    def bytes(self) -> int:
        """Of its weights on the disk; of a settled one with those of the model that it is made of."""
        return self.shape.parameters * self.checkpoint.itemsize * (2 if self.block.settle else 1)

    @functools.cached_property
    def characters(self) -> float:
        return expected.characters_per_token(self.block)

    @functools.cached_property
    def compute(self) -> torch.dtype:
        if _is_here(self.device):
            return self.study.compute_dtype(self.name, self.checkpoint, self.device)
        chosen = self.block.compute_dtype
        return as_dtype(chosen) if chosen else torch.promote_types(self.checkpoint, torch.bfloat16)

    @functools.cached_property
    def rate(self) -> tuple[float, str]:
        """FLOP/s that training reaches, and what that rests on."""
        here = hardware.describe(self.device) if _is_here(self.device) else None
        reached = []
        for path in sorted((self.study.paths.results / "runs" / self.name).glob("*/*/*/train.json")):
            try:
                train = read_json(path, "cell", "hardware", "seconds_train", "tokens_trained")
            except UserError:  # a damaged record: `compare` names it, and the estimate does without
                continue
            method = train["cell"].split("/")[2]
            if train["hardware"] == here and train["seconds_train"] and method in self.study.methods:
                # earlier records have no FLOPs; their rows were short, so attention's share of the FLOPs is small
                each = _number(self.flops(method).step(lengths=[1], labelled=0))
                flops = train.get("flops") or train["tokens_trained"] * each
                flops += sum(costs["flops"] or 0 for costs in (train.get("added") or {}).values())
                reached += [] if math.isnan(flops) else [flops / train["seconds_train"]]
        if reached:
            return min(reached), f"{len(reached)} earlier cells on this machine"
        if here:
            peak, basis = hardware.dense_peak(self.device, self.compute)
        else:
            peak = hardware.data_sheet_peak(REFERENCE, self.compute)
            basis = f"data sheet of {REFERENCE}; there is no CUDA device here"
        devices = self.block.processes or 1 if self.device.type == "cuda" else 1
        many = f"{devices} times " if devices > 1 else ""
        return REACHED * peak * devices, f"{REACHED:.0%} of {many}{peak / 1e12:.2f} TFLOP/s ({basis})"

    @property
    def bare(self) -> Flops:
        """FLOPs of the base, which no part has adapted."""
        return _flops_of(self.shape, ())

    def flops(self, method: str) -> Flops:
        return _flops_of(self.shape, memory.adapting(self.study.methods[method].parts))


@functools.cache
def _flops_of(shape: Shape, adapters: tuple[Part, ...]) -> Flops:
    return Flops(shape.build(parts=adapters))


def _cell(study, cell, model: _Model, cached: dict, available: int | None, begun: set[Path]) -> dict:
    """The plan of one cell; a training that it makes and keeps for other cells is added to `begun`."""
    settings = study.settings(model=cell.model, domain=cell.domain, method=cell.method)
    preparing = study.prepare_settings(model=cell.model, method=cell.method)
    parts = study.methods[cell.method].parts
    refuse_long_documents(study, model=cell.model, method=cell.method, shape=model.shape)
    rate, _ = model.rate
    trained, added, train = _training(study, cell, model, settings)
    disk = tuned.expected_bytes(shape=model.shape, parts=parts, checkpoint=model.checkpoint)
    store = resolve.store_of(study, cell)
    reused = store is not None and (store in begun or (store / "manifest.json").is_file())
    if reused:
        train = 0.0
    elif store is not None and not cached["trained"]:
        begun.add(store)
        disk += model.shape.parameters * max(4, model.checkpoint.itemsize)
    prepare_tokens, prepare = _preparation(study, cell, model, preparing)
    scored, evaluate = _scoring(study, cell.domain, model)
    stages = {"prepared": ("prepare", prepare), "trained": ("train", train), "scored": ("evaluate", evaluate)}
    seconds = {name: 0.0 if cached[done] else _known(flops / rate) for done, (name, flops) in stages.items()}
    about = {
        "shape": model.shape,
        "parts": parts,
        "checkpoint_dtype": model.checkpoint,
        "compute_dtype": model.compute,
        "device_type": model.device.type,
    }
    kinds = {
        phase: memory.predict(phase=phase, settings=of_phase, processes=model.block.processes, **about)
        for phase, of_phase in (("prepare", preparing), ("train", settings))
    }
    peak = _largest(phase["total"] for phase in kinds.values())
    together = model.block.processes or 1 if model.device.type == "cpu" else 1  # processes on a CPU share its memory
    return {
        "cell": cell.name,
        "cached": cached,
        "tokens": trained,
        "tokens_added": added,
        "tokens_prepare": prepare_tokens,
        "tokens_score": scored,
        "seconds": _sum(seconds.values()),
        **{f"seconds_{stage}": value for stage, value in seconds.items()},
        "memory_bytes": peak,
        "resident_bytes": _largest(map(memory.resident, kinds.values())) if model.device.type == "cpu" else None,
        "memory": kinds,
        "fits": None if None in (available, peak) else together * peak <= available,
        "disk_bytes": disk,
        "prepared_bytes": memory.stored(**about),
        "training_reused": reused,
    }


def _scoring(study, domain: str, model: _Model) -> tuple[int, float]:
    """Tokens that are scored for a cell of the domain, and their FLOPs; NaN where these are unknown."""
    tokens = expected.scored(study, domain, characters=model.characters)
    return tokens, _number(model.bare.forward(lengths=[*[256] * (tokens // 256), tokens % 256], predicted=tokens))


def _improvable(study, model: _Model) -> float:
    """FLOPs of the test whether training on general text alone would improve the base; NaN where they are unknown."""
    return _number(improvable.flops(model.bare, study.evaluate.improve))


def _base(study, model: _Model) -> float | None:
    """Seconds of the base's scores, on the tasks of every domain."""
    flops = sum(_scoring(study, domain, model)[1] for domain in study.grid.domains)
    more = _improvable(study, model) if improvable.applies(study, model.name) else 0.0
    return _known((flops + more) / model.rate[0])


def _training(study, cell, model: _Model, settings) -> tuple[int, int, float]:
    """Tokens of the domain, tokens that the parts add to them, and the FLOPs of both; NaN where these are unknown."""
    parts = study.methods[cell.method].parts
    if any("provides_weights" in part.capabilities for part in parts):
        return 0, 0, 0.0
    lengths, labelled = expected.train_rows(study, cell.domain, length=settings.length, characters=model.characters)
    epochs = _epochs(len(lengths), settings, settings.epochs)
    kinds = ("trained", "read", "pooled", "replaced", "begin")
    trained, read, pooled, replaced, begin = (sum(getattr(part.added(), kind) for part in parts) for kind in kinds)
    read += pooled * settings.cut(model.block.processes)
    flops = (1 + trained - replaced) * _number(model.flops(cell.method).step(lengths=lengths, labelled=labelled))
    if read:
        flops += read * _number(model.bare.forward(lengths=lengths, predicted=labelled))
    once = begin * _number(model.flops(cell.method).forward(lengths=lengths, predicted=labelled)) if begin else 0.0
    tokens = epochs * sum(lengths)
    added = tokens * (trained + read) + begin * sum(lengths)
    return int(tokens * (1 - replaced)), int(added), epochs * flops + once


def _preparation(study, cell, model: _Model, settings) -> tuple[int, float]:
    """Tokens and FLOPs of every pass over general text in which the parts prepare; NaN where FLOPs are unknown."""
    tokens, flops = 0.0, 0.0
    documents = expected.general_text(study, characters=model.characters)
    for made in (made for part in study.methods[cell.method].parts for made in part.preparation()):
        count = study.general.importance
        lengths = documents or [(made.length or UNKNOWN_LENGTH) // 2] * count
        read = made.cut(lengths)
        epochs = (made.training or {}).get("epochs")
        passes = _epochs(len(read), settings, epochs) if epochs else 1.0
        flops += passes * _number(of_pass(made, model.bare if made.bare else model.flops(cell.method), lengths))
        tokens += passes * sum(read)
    return int(tokens), flops


def _number(flops: float | None) -> float:
    return math.nan if flops is None else flops


def _known(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds, 1)


def _sum(values: Iterable[float | None]) -> float | None:
    values = list(values)
    return None if None in values else round(sum(values), 1)


def _largest(values: Iterable[int | None]) -> int | None:
    values = list(values)
    return None if None in values else max(values, default=0)


def _epochs(rows: int, settings, epochs: float) -> float:
    """The epochs that the loop trains, which takes whole batches."""
    return batches.steps(rows, settings.batch, epochs) / max(1, batches.epoch_steps(rows, settings.batch))


def _device(study) -> torch.device:
    return torch.device("cuda") if study.device == "cuda" else hardware.device(study.device)


def _is_here(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.is_available()


def text(plan: dict) -> str:
    """The plan as a table for a terminal."""
    total = plan["total"]
    table = pd.DataFrame(
        {
            "cell": cell["cell"],
            "cached": ", ".join(stage for stage, yes in cell["cached"].items() if yes) or "-",
            "time": _minutes(cell["seconds"]),
            "by parts": f"{cell['tokens_prepare'] + cell['tokens_added']:,}",
            "memory": _gib(cell["memory_bytes"]),
            "disk": _gib(cell["disk_bytes"]),
            "": "does not fit" if cell["fits"] is False else "",
        }
        for cell in plan["cells"]
    )
    lines = [f"{plan['study']}: {total['cells']} cells, {total['to_run']} to run", ""]
    lines += table.to_string(index=False).splitlines()
    peak, free = total["peak_memory_bytes"], total["available_memory_bytes"]
    lines += [
        "",
        f"to run: {_minutes(total['seconds'])}, disk {_gib(total['disk_bytes'])}, peak memory "
        f"{'' if peak is None else 'about '}{_gib(peak)}{'' if free is None else f' of {_gib(free)} free here'}",
    ]
    if total["resident_bytes"]:
        lines[-1] += f"; in all, a process on the CPU takes about {_gib(total['resident_bytes'])}"
    if total["too_large"]:
        lines.append(
            f"{total['too_large']} cells do not fit here; --json shows the kinds of memory, "
            "and a run says what would help"
        )
    lines += [
        "in these times: the base's scores, and each cell's preparation, training and scores. `drift` takes at most a "
        "tenth of a training more, unless that is very short, and models are read, written and hashed in between",
        "by parts: tokens that the parts of a method read, while they prepare and beside the domain's in training",
        f"models that are not here yet: {_gib(plan['disk']['needed']['models'])} of disk, preparations at most "
        f"{_gib(plan['disk']['needed']['preparations'])}, with the copy of the local store; "
        f"{_gib(plan['disk']['free'])} are free. Checkpoints are not counted: a training that has no room for one says "
        "so and goes on",
        f"disk of all {total['cells']} cells: {_gib(total['disk_bytes_all'])}. An adapter is kept as it is, other "
        f"weights as their difference from the base: about {tuned.BITS:g} bits a weight in bf16, one more for each "
        "further bit of mantissa",
    ]
    lines += [f"{model}: time estimated from {basis}" for model, basis in plan["basis"].items()]
    lines += [
        f"{model}: of these `base` takes {_minutes(seconds)} to test whether training on general text alone would "
        "improve it (evaluate.improve: 0 switches that off)"
        for model, seconds in plan["seconds_improvable"].items()
    ]
    return "\n".join(lines + plan["warnings"])


def _minutes(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.1f} min"


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"
