"""params.yaml to a checked `Study`: every knob of a study, unknown keys refused by name."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from experiments.engine_settings import TrainSettings
from experiments.errors import UserError
from experiments.names import checked, unknown
from experiments.paths import Paths
from methods import registry
from methods.part import Part

TOP = {"title", "device", "not_a_result", "grid", "data", "packages", "models", "tasks", "domains", "general",
       "methods", "train", "evaluate", "tune", "archive"}
GRID = {"models", "domains", "methods", "seeds"}
MODEL = {"source", "sha256", "bin_sha256", "dtype", "note", "licence", "train", "config", "seed",
         "parameters", "layers", "width", "architecture", "compute_dtype", "processes"}
ROWS = {"hub", "pypi", "jsonl"}
TASK = {"task", "metric", "chance", "licence", "rows", "columns", "test", "probe", "set"}
DOMAIN = {"task", "metric", "chance", "licence", "question", "rows", "test_rows", "columns", "set", "split",
          "retention", "transfer", "probes", "why", "train"}
GENERAL = {"rows", "text", "importance", "perplexity", "probe", "max_words", "licence", "note"}
EVALUATE = {"scorer": "shared-prefix", "batch_size": 16}
TUNE = {"methods", "epochs"}
ARCHIVE = {"commit", "known"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One block under `methods:`: its parts in alphabetical order, and its overrides of `train:`."""

    name: str
    parts: tuple[Part, ...]
    train: Mapping[str, Any]
    block: Mapping[str, Any]  # as written, with what `like:` takes over


@dataclass(frozen=True, kw_only=True)
class Study:
    """One params.yaml. Blocks that belong to a stage's own module are kept as the plain dicts they are."""

    name: str
    title: str
    device: str
    not_a_result: bool
    grid: Mapping[str, list]
    data: Mapping[str, Any]
    packages: Mapping[str, str]
    models: Mapping[str, dict]
    tasks: Mapping[str, dict]
    domains: Mapping[str, dict]
    general: Mapping[str, Any]
    methods: Mapping[str, Method]
    train: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    tune: Mapping[str, Any]
    paths: Paths
    archive: Mapping[str, Any] | None = None  # the commit that made the results, and what is known against them

    def settings(self, *, model: str, domain: str, method: str) -> TrainSettings:
        """Training settings of a cell; precedence train < domain < model < method."""
        merged = dict(self.train)
        for block in (self.domains[domain], self.models[model]):
            merged |= block.get("train") or {}
        return TrainSettings(**(merged | dict(self.methods[method].train)))

    def compute_dtype(self, model: str, checkpoint: "torch.dtype", where: "torch.device") -> "torch.dtype":
        """The dtype forward and backward run in: the model block's `compute_dtype`, else what suits checkpoint and device."""
        from experiments import hardware
        from experiments.weights import as_dtype

        chosen = self.models[model].get("compute_dtype")
        return as_dtype(chosen) if chosen else hardware.compute_dtype(checkpoint, where)

    def prepare_settings(self, *, model: str, method: str) -> TrainSettings:
        """Settings of training inside `prepare`, which never sees the domain: train < model < method."""
        merged = dict(self.train) | (self.models[model].get("train") or {})
        return TrainSettings(**(merged | dict(self.methods[method].train)))


def load(name: str = "", *, root: Path | None = None) -> Study:
    """Read and check the params.yaml of the study `name` ('' is the default study in the root)."""
    if name:
        checked("--study", name)
    paths = Paths(study=name, **({"root": root} if root else {}))
    raw = read_yaml(paths.params)
    _known(raw, TOP, paths.params.name)
    for key in ("grid", "models", "domains", "methods", "train"):
        if not isinstance(raw.get(key), dict):
            raise UserError(f"{paths.params.name}: the block `{key}:` is missing or not a mapping")
    models, domains, tasks = (dict(raw.get(key) or {}) for key in ("models", "domains", "tasks"))
    for kind, blocks, keys in (("models", models, MODEL), ("domains", domains, DOMAIN), ("tasks", tasks, TASK)):
        for block_name, block in blocks.items():
            checked(f"{kind}:", block_name)
            _known(block, keys, f"{kind}.{block_name}")
            _train_keys(block.get("train"), f"{kind}.{block_name}.train")
            count = block.get("processes", 1)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise UserError(f"{kind}.{block_name}.processes is {count!r}: it must be a whole number from 1")
            for rows in ("rows", "test_rows"):
                _known(block.get(rows) or {}, ROWS, f"{kind}.{block_name}.{rows}")
    for domain, block in domains.items():
        for role in ("retention", "transfer", "probes"):
            for task in block.get(role) or []:
                if task not in tasks:
                    raise unknown("task", task, tasks, where=f"domains.{domain}.{role}")
    _known(raw.get("general") or {}, GENERAL, "general")
    _train_keys(raw["train"], "train")
    TrainSettings(**raw["train"])
    evaluate = EVALUATE | dict(raw.get("evaluate") or {})
    _known(evaluate, EVALUATE, "evaluate")
    _known(raw.get("tune") or {}, TUNE, "tune")
    _archive(raw.get("archive"))
    if raw.get("device", "auto") not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {raw['device']!r}: it must be auto, cpu or cuda")
    grid = _grid(raw["grid"], models, domains, raw["methods"])
    return Study(
        name=name, title=raw.get("title") or name or "default study", device=raw.get("device", "auto"),
        not_a_result=bool(raw.get("not_a_result", False)), grid=grid, data=raw.get("data") or {"source": "pypi"},
        packages=raw.get("packages") or {}, models=models, tasks=tasks, domains=domains,
        general=raw.get("general") or {}, methods=_methods(raw["methods"]), train=raw["train"],
        evaluate=evaluate, tune=raw.get("tune") or {}, paths=paths, archive=raw.get("archive"),
    )


def read_yaml(path: Path) -> dict:
    """A YAML 1.2 mapping as plain Python (`1e-3` is a number here, as it is to DVC)."""
    if not path.is_file():
        raise UserError(f"{path.name} not found at {path}: run from the project's root, or name an existing study")
    try:
        raw = YAML(typ="safe", pure=True).load(path)
    except YAMLError as error:
        raise UserError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path.name} must be a mapping of blocks")
    return raw


def _known(block: Any, keys, where: str) -> None:
    if not isinstance(block, Mapping):
        raise UserError(f"{where} must be a mapping, not {block!r}")
    for key in block:
        if key not in keys:
            raise unknown("key", key, keys, where=where)


def _archive(block: Any) -> None:
    if block is None:
        return
    _known(block, ARCHIVE, "archive")
    commit, known = block.get("commit"), block.get("known")
    if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{40}", commit):
        raise UserError(f"archive.commit is {commit!r}: it must be the 40 hexadecimal digits of the commit that made the results")
    if not isinstance(known, list) or not known or not all(isinstance(line, str) for line in known):
        raise UserError(f"archive.known is {known!r}: it must list, in sentences, what is known against the results")


def _train_keys(block: Any, where: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(TrainSettings)}
    _known(block or {}, fields, where)
    for key, value in (block or {}).items():
        kind = fields[key].type
        right = isinstance(value, bool) if kind is bool else isinstance(value, kind | int if kind is float else kind)
        if not right or (kind is not bool and isinstance(value, bool)):
            raise UserError(f"{where}.{key} is {value!r}: it must be of type {kind.__name__}")


def _grid(grid: dict, models: dict, domains: dict, methods: dict) -> dict[str, list]:
    _known(grid, GRID, "grid")
    for kind, blocks in (("models", models), ("domains", domains), ("methods", methods)):
        if not grid.get(kind):
            raise UserError(f"grid.{kind} is empty: name at least one")
        for name in grid[kind]:
            if name not in blocks:
                raise unknown(kind[:-1], name, blocks, where=f"grid.{kind}")
    seeds = grid.get("seeds") or []
    if not seeds or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in seeds):
        raise UserError(f"grid.seeds is {seeds!r}: it must list whole numbers from 0")
    for kind, values in grid.items():
        if len(set(values)) != len(values):
            raise UserError(f"grid.{kind} names one entry twice: {values}")
    return grid


def _methods(blocks: dict) -> dict[str, Method]:
    for name in blocks:
        checked("methods:", name)
    return {name: build_method(name, _inherited(name, blocks, ())) for name in blocks}


def build_method(name: str, block: Mapping[str, Any]) -> Method:
    """The method of one block without `like:`; its parts are checked by their own rules."""
    _train_keys(block.get("train"), f"methods.{name}.train")
    if "moments" in (block.get("train") or {}):
        raise UserError(f"methods.{name}.train.moments: Adam's precision is one for all methods, or it is part of what is compared; "
                        "set it under `train:` or in a model's block")
    parts = {key: value for key, value in block.items() if key != "train"}
    try:
        return Method(name=name, parts=registry.build(parts), train=block.get("train") or {}, block=block)
    except UserError as error:
        raise UserError(f"methods.{name}: {error}") from error


def _inherited(name: str, blocks: dict, seen: tuple[str, ...]) -> dict:
    """The block with what `like:` takes over from another one; its own settings win."""
    if name not in blocks:
        raise unknown("method", name, blocks, where=f"methods.{seen[-1]}.like")
    if name in seen:
        raise UserError(f"methods.{name}: `like` goes round in a circle: {' -> '.join((*seen, name))}")
    block = blocks[name] or {}
    if not isinstance(block, Mapping):
        raise UserError(f"methods.{name} must be a mapping of parts, not {block!r}")
    if "like" not in block:
        return dict(block)
    merged = _inherited(block["like"], blocks, (*seen, name))
    for key, value in block.items():
        if key != "like":
            merged[key] = {**(merged.get(key) or {}), **(value or {})}
    return merged
