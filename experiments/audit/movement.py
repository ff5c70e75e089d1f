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

VERSION = 2  # raised when the same two models would give other numbers


def measure(base: Model, tuned: Model, *, folders: Folders, work: Path, where: torch.device) -> dict[str, Any]:
    """What experiments/model/drift.py measures, kept by the weights of both models, and beside it:

    only_base, only_tuned   heads that one of the two models has apart from its embedding; the other's embedding, which
                            is its head, is what they are compared with
    rows                    [name, the base's rows, the tuned model's] of a tensor whose shared rows alone are compared
    """
    key = {"base": base.weights, "tuned": tuned.weights, "version": VERSION}
    file = kept.folder_of(work / "movement", key) / "drift.json"
    if not file.is_file():
        write_json(file, _measured(base, tuned, folders=folders, where=where))
    return read_json(file)


def _measured(base: Model, tuned: Model, *, folders: Folders, where: torch.device) -> dict[str, Any]:
    built = [Shape(config=model.config).build() for model in (base, tuned)]
    own, others = ([name for name, _ in shape.named_parameters()] for shape in built)
    before, after = _parameters(base, folders.of(base)), _parameters(tuned, folders.of(tuned))
    both = list(dict.fromkeys([*own, *others]))
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
    roles = drift.roles(built[1]) | drift.roles(built[0])
    measured = drift.measure(base=shorter, tuned=shared(), roles=roles, device=where)
    beside = {"only_base": sorted(set(own) - set(others)), "only_tuned": sorted(set(others) - set(own))}
    return measured | beside | {"rows": rows, "rank_limit": drift.EXACT}


def _parameters(model: Model, folder: Path) -> Mapping[str, Tensor]:
    """The model's parameters by the names that this version of transformers gives them, read one at a time.

    A head that is the embedding is there under both names.
    """
    stored = _stored(Shape(config=model.config).build())
    tensors = load_tensors(folder)
    if set(stored.values()) <= set(tensors):
        return Lazy(stored, lambda name: tensors[stored[name]])
    loaded = weights.load_model(folder, dtype="auto")  # a file with older names
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    return Lazy(parameters, lambda name: parameters[name].detach())


def _stored(model: torch.nn.Module) -> dict[str, str]:
    """The name under which a file holds each parameter: the first of those that share it."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
