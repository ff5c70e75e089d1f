"""How far the tuned model's weights moved from the base's, and where."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.progress import Bar
from experiments.audit import kept
from experiments.audit.models import Model
from experiments.audit.scoring import Folders
from experiments.model import drift, weights
from experiments.model.base import Lazy, load_tensors
from experiments.model.shape import Shape
from methods.tools.files import read_json, write_json

VERSION = 1  # raised when the same two models would give other numbers


def measure(base: Model, tuned: Model, *, folders: Folders, work: Path, where: torch.device) -> dict[str, Any]:
    """What experiments/model/drift.py measures, kept by the weights of both models, and beside it:

    only_base, only_tuned   parameters that one of the two models has
    rows                    [name, the base's rows, the tuned model's] of a tensor whose shared rows alone are compared
    """
    key = {"base": base.weights, "tuned": tuned.weights, "version": VERSION}
    file = kept.folder_of(work / "movement", key) / "drift.json"
    if not file.is_file():
        write_json(file, _measured(base, tuned, folders=folders, where=where))
    return read_json(file)


def _measured(base: Model, tuned: Model, *, folders: Folders, where: torch.device) -> dict[str, Any]:
    shape = Shape(config=base.config).build()
    before, after = _parameters(base, folders.of(base)), _parameters(tuned, folders.of(tuned))
    both = [name for name in before if name in after]
    rows: list[list] = []

    def shared() -> Iterator[tuple[str, Tensor]]:
        entries = {name: before[name].numel() for name in both}
        bar = {"unit": "weight", "unit_scale": True, "disable": None}  # hidden if stderr is no terminal
        with Bar(total=sum(entries.values()), desc="movement of the weights", **bar) as progress:
            for name in both:
                old, new = before[name], after[name]
                if old.shape != new.shape:
                    rows.append([name, len(old), len(new)])
                    new = new[: len(old)]
                yield name, new
                progress.update(entries[name])

    shorter = Lazy(both, lambda name: before[name][: len(after[name])] if before[name].dim() else before[name])
    measured = drift.measure(base=shorter, tuned=shared(), roles=drift.roles(shape), device=where)
    beside = {"only_base": sorted(set(before) - set(after)), "only_tuned": sorted(set(after) - set(before))}
    return measured | beside | {"rows": rows, "rank_limit": drift.LARGEST}


def _parameters(model: Model, folder: Path) -> Mapping[str, Tensor]:
    """The model's parameters by the names that this version of transformers gives them, read one at a time."""
    names = [name for name, _ in Shape(config=model.config).build().named_parameters()]
    tensors = load_tensors(folder)
    if set(names) <= set(tensors):
        return Lazy(names, tensors.__getitem__)
    loaded = dict(weights.load_model(folder, dtype="auto").named_parameters())  # a file with older names
    return Lazy(list(loaded), lambda name: loaded[name].detach())
