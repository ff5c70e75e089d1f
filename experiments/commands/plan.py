"""The cells of a study before they run: what is cached, and what the rest will cost in time, memory and disk.

Time: the matrix FLOPs of the cell (experiments/training/flops.py, on the model without its weights) over the rate that earlier
cells of the model reached on this machine, else over a share of the device's peak. Rows that are not there yet count as
half of `length`. Memory: experiments/training/memory.py, by kind, for both phases, with examples as long as `length` allows;
a cell that cannot fit into what is free here is marked. Disk: what is kept of a cell's weights (experiments/model/tuned.py), an
adapter or a difference from the base, and once for cells that differ in `finish` alone their trained weights in full
precision; such a training is counted once, too. Nothing is loaded or fetched.
"""

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from evaluation.rendered import read_jsonl
from experiments.model import tuned
from experiments.model.positions import refuse_long_documents
from experiments.model.shape import Shape, shape_of
from experiments.model.weights import as_dtype
from experiments.stages.train import store_of
from experiments.study import ahead, cells
from experiments.study.lock import Lock
from experiments.training import batches, hardware, memory
from experiments.training.flops import Flops, of_pass
from methods.part import Part
from methods.tools.files import read_json

CHARACTERS_A_TOKEN = 4.0
UNKNOWN_ROWS = 10_000  # training rows of a domain that takes all there are, before they are here
UNKNOWN_SCORED = 250_000  # tokens to score before they are here
UNKNOWN_DOCUMENTS = 512  # of general text
UNKNOWN_LENGTH = 512  # tokens at which a part is taken to cut documents where it states no length
REACHED = 0.4  # share of a device's peak that training reaches
REFERENCE = "NVIDIA H200"  # whose time is told for a study on CUDA where there is no such device


def main(study, *, as_json: bool, patterns: Sequence[str] = ()) -> None:
    plan = make(study, patterns=patterns)
    print(json.dumps(plan, indent=1) if as_json else text(plan))


def make(study, *, patterns: Sequence[str] = ()) -> dict:
    """{"cells": [...], "total": {...}, "basis": {...}} with seconds, bytes and what they rest on.

    None where FLOPs or memory of an architecture are not known, and in totals over it.
    Only cells whose names match one of `patterns`, if there are any (see `cells.matching`, which raises UserError).
    """
    warnings = ahead.look(study)
    lock = Lock(study)
    chosen = cells.matching(study, patterns)
    planners = {model: _Model(study=study, name=model) for model in study.grid["models"]}
    available = _available(study)
    begun: set[Path] = set()
    planned = [_cell(study, cell, planners[cell.model], lock.cell(cell), available, begun) for cell in chosen]
    todo = [c for c in planned if not c["cached"]["scored"]]
    return {
        "study": study.title,
        "cells": planned,
        "total": {
            "cells": len(planned),
            "to_run": len(todo),
            "seconds": _sum(c["seconds"] for c in todo),
            "disk_bytes": sum(c["disk_bytes"] for c in todo),
            "disk_bytes_all": sum(c["disk_bytes"] for c in planned),
            "peak_memory_bytes": _most(c["memory_bytes"] for c in planned),
            "available_memory_bytes": available,
            "too_large": sum(c["fits"] is False for c in planned),
        },
        "basis": {model: planner.rate[1] for model, planner in planners.items()},
        "warnings": warnings,
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Model:
    """A model of the grid without its weights: its FLOPs and bytes, and the rate it trains at."""

    study: object
    name: str

    @functools.cached_property
    def shape(self) -> Shape:
        return shape_of(self.name, self.study.models[self.name], self.study.paths.model(self.name))

    @functools.cached_property
    def checkpoint(self) -> torch.dtype:
        """The base's dtype: as it was made, else as its block says, else bfloat16 (random models: float32)."""
        made, block = self.study.paths.model(self.name) / "base.json", self.study.models[self.name]
        if made.is_file():
            return as_dtype(read_json(made, "dtype")["dtype"])
        return as_dtype(block.get("dtype") or ("float32" if block["source"].startswith("random:") else "bfloat16"))

    @functools.cached_property
    def compute(self) -> torch.dtype:
        where = _device(self.study)
        if where.type == "cuda" and not torch.cuda.is_available():
            chosen = self.study.models[self.name].get("compute_dtype")
            return as_dtype(chosen) if chosen else torch.promote_types(self.checkpoint, torch.bfloat16)
        return self.study.compute_dtype(self.name, self.checkpoint, where)

    @property
    def processes(self) -> int | None:
        return self.study.models[self.name].get("processes")

    @functools.cached_property
    def rate(self) -> tuple[float, str]:
        """FLOP/s that training reaches, and what that rests on."""
        here = hardware.describe(_device(self.study)) if _is_here(self.study) else None
        reached = []
        for path in sorted((self.study.paths.results / "runs" / self.name).glob("*/*/*/train.json")):
            train = read_json(path, "cell", "hardware", "seconds_train", "tokens_trained")
            method = train["cell"].split("/")[2]
            if train["hardware"] == here and train["seconds_train"] and method in self.study.methods:
                # earlier records have no FLOPs; their rows were short, so that attention's share is small
                each = _number(self.flops(method).step(lengths=[1], labelled=0))
                flops = train.get("flops") or train["tokens_trained"] * each
                reached += [] if math.isnan(flops) else [flops / train["seconds_train"]]
        if reached:
            return min(reached), f"{len(reached)} earlier cells on this machine"
        if here is None:
            peak, basis = (
                hardware.data_sheet_peak(REFERENCE, self.compute),
                f"data sheet of {REFERENCE}; there is no CUDA device here",
            )
        else:
            peak, basis = hardware.dense_peak(_device(self.study), self.compute)
        devices = self.processes or 1 if _device(self.study).type == "cuda" else 1
        many = f"{devices} times " if devices > 1 else ""
        return REACHED * peak * devices, f"{REACHED:.0%} of {many}{peak / 1e12:.2f} TFLOP/s ({basis})"

    def flops(self, method: str) -> Flops:
        return _flops_of(self.shape, memory.adapting(self.study.methods[method].parts))

    @property
    def bare(self) -> Flops:
        """FLOPs of the base, which no part has adapted."""
        return _flops_of(self.shape, ())

    def memory(self, phase: memory.Phase, *, parts, settings) -> dict[str, int]:
        return memory.predict(
            phase=phase,
            shape=self.shape,
            parts=parts,
            settings=settings,
            checkpoint_dtype=self.checkpoint,
            compute_dtype=self.compute,
            device_type=_device(self.study).type,
            processes=self.processes,
        )


@functools.cache
def _flops_of(shape: Shape, adapters: tuple[Part, ...]) -> Flops:
    return Flops(shape.build(parts=adapters))


def _cell(study, cell, model: _Model, cached: dict, available: int | None, begun: set[Path]) -> dict:
    """The plan of one cell; `begun` gets the training that it makes and keeps for other cells."""
    settings = study.settings(model=cell.model, domain=cell.domain, method=cell.method)
    preparing = study.prepare_settings(model=cell.model, method=cell.method)
    parts = study.methods[cell.method].parts
    refuse_long_documents(study, model=cell.model, method=cell.method, shape=model.shape)
    rate, _ = model.rate
    trained, added, train = _training(study, cell, model, settings)
    disk = tuned.expected_bytes(shape=model.shape, parts=parts, checkpoint=model.checkpoint)
    store = store_of(study, cell)
    reused = store is not None and (store in begun or (store / "manifest.json").is_file())
    if reused:
        train = 0.0
    elif store is not None and not cached["trained"]:
        begun.add(store)
        disk += model.shape.parameters * max(4, model.checkpoint.itemsize)
    prepare_tokens, prepare = _preparation(study, cell, model, preparing)
    scored = _scored_tokens(study, cell)
    evaluate = _number(model.bare.forward(lengths=[256] * (scored // 256), predicted=scored))
    stages = {"prepared": ("prepare", prepare), "trained": ("train", train), "scored": ("evaluate", evaluate)}
    seconds = {name: 0.0 if cached[done] else _known(flops / rate) for done, (name, flops) in stages.items()}
    kinds = {
        "prepare": model.memory("prepare", parts=parts, settings=preparing),
        "train": model.memory("train", parts=parts, settings=settings),
    }
    peak = _most(phase["total"] for phase in kinds.values())
    together = model.processes or 1 if _device(study).type == "cpu" else 1  # processes on a CPU share its memory
    return {
        "cell": cell.name,
        "cached": cached,
        "tokens": trained,
        "tokens_added": added,
        "tokens_prepare": prepare_tokens,
        "seconds": _sum(seconds.values()),
        **{f"seconds_{stage}": value for stage, value in seconds.items()},
        "memory_bytes": peak,
        "memory": kinds,
        "fits": None if None in (available, peak) else together * peak <= available,
        "disk_bytes": disk,
        "training_reused": reused,
    }


def _training(study, cell, model: _Model, settings) -> tuple[int, int, float]:
    """Tokens of the domain, tokens that the parts add to them, and the FLOPs of both; NaN where these are unknown."""
    parts = study.methods[cell.method].parts
    if any("provides_weights" in part.capabilities for part in parts):
        return 0, 0, 0.0
    lengths, labelled = _train_rows(study, cell, settings)
    epochs = _epochs(len(lengths), settings, settings.epochs)
    trained, read = (sum(getattr(part.added(), kind) for part in parts) for kind in ("trained", "read"))
    flops = (1 + trained) * _number(model.flops(cell.method).step(lengths=lengths, labelled=labelled))
    if read:
        flops += read * _number(model.bare.forward(lengths=lengths, predicted=labelled))
    tokens = epochs * sum(lengths)
    return int(tokens), int(tokens * (trained + read)), epochs * flops


def _preparation(study, cell, model: _Model, settings) -> tuple[int, float]:
    """Tokens and FLOPs of every pass over general text in which the parts prepare; NaN where FLOPs are unknown."""
    tokens, flops = 0.0, 0.0
    documents = _general_tokens(study)
    for made in (made for part in study.methods[cell.method].parts for made in part.preparation()):
        count = int(study.general.get("importance", UNKNOWN_DOCUMENTS))
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


def _most(values: Iterable[int | None]) -> int | None:
    values = list(values)
    return None if None in values else max(values, default=0)


def _epochs(rows: int, settings, epochs: float) -> float:
    """The epochs that the loop trains, which takes whole batches."""
    return batches.steps(rows, settings.batch, epochs) / max(1, batches.epoch_steps(rows, settings.batch))


def _general_tokens(study) -> list[int] | None:
    """Tokens of each document that importance is learned from; None where they are not here yet."""
    path = study.paths.data / "general" / "importance.jsonl"
    return [_tokens(row["text"]) for row in read_jsonl(path)] if path.is_file() else None


def _train_rows(study, cell, settings) -> tuple[list[int], int]:
    """Tokens of each training row, and labelled tokens of all."""
    path = study.paths.data / "train" / cell.domain / "train.jsonl"
    if path.is_file():
        rows = read_jsonl(path)
        answers = [min(_tokens(r["choices"][r["gold"]]), settings.length) for r in rows]
        return [min(_tokens(r["context"]) + answer, settings.length) for r, answer in zip(rows, answers)], sum(answers)
    count = study.domains[cell.domain]["split"]["train"]
    lengths = [settings.length // 2] * (count if isinstance(count, int) else UNKNOWN_ROWS)
    return lengths, sum(lengths)


def _tokens(text: str) -> int:
    return max(1, round(len(text) / CHARACTERS_A_TOKEN))


def _scored_tokens(study, cell) -> int:
    folder = study.paths.data / "evaluate" / cell.domain
    return (
        int(sum(p.stat().st_size for p in folder.glob("*.jsonl")) / CHARACTERS_A_TOKEN)
        if folder.is_dir()
        else UNKNOWN_SCORED
    )


def _is_here(study) -> bool:
    return study.device != "cuda" or torch.cuda.is_available()


def _device(study) -> torch.device:
    return hardware.device(study.device) if _is_here(study) else torch.device("cuda")


def _available(study) -> int | None:
    return hardware.available_memory(_device(study)) if _is_here(study) else None


def text(plan: dict) -> str:
    """The plan as a table for a terminal."""
    width = max(len(c["cell"]) for c in plan["cells"])
    total = plan["total"]
    lines = [
        f"{plan['study']}: {total['cells']} cells, {total['to_run']} to run",
        "",
        f"{'cell':<{width}}  {'cached':<24}  {'time':>9}  {'memory':>10}  {'disk':>10}",
    ]
    for c in plan["cells"]:
        done = [stage for stage, yes in c["cached"].items() if yes]
        lines.append(
            f"{c['cell']:<{width}}  {', '.join(done) or '-':<24}  {_minutes(c['seconds']):>9}  "
            f"{_gib(c['memory_bytes']):>10}  {_gib(c['disk_bytes']):>10}{'  does not fit' if c['fits'] is False else ''}"
        )
    free = total["available_memory_bytes"]
    room = "" if free is None else f" of {_gib(free)} free here"
    lines += [
        "",
        f"to run: {_minutes(total['seconds'])}, disk {_gib(total['disk_bytes'])}, "
        f"peak memory {'about ' if total['peak_memory_bytes'] is not None else ''}{_gib(total['peak_memory_bytes'])}{room}",
    ]
    if total["too_large"]:
        lines.append(
            f"{total['too_large']} cells do not fit here; --json shows the kinds of memory, and a run says what would help"
        )
    lines.append(
        f"disk of all {total['cells']} cells: {_gib(total['disk_bytes_all'])}. An adapter is kept as it is, other weights as their difference "
        f"from the base: about {tuned.BITS:g} bits a weight in bf16, one more for each further bit of mantissa"
    )
    lines += [f"{model}: time estimated from {basis}" for model, basis in plan["basis"].items()]
    return "\n".join(lines + plan["warnings"])


def _minutes(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.1f} min"


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"
