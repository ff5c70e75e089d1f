"""params.yaml to a checked `Study`: every knob of a study, unknown keys refused by name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from experiments.study import blocks, clashes
from experiments.study.paths import Paths
from experiments.training.settings import TrainSettings
from methods import registry
from methods.errors import UserError
from methods.part import Part
from methods.settings import refuse
from methods.tools.names import checked, unknown

EVALUATE = {"scorer": "shared-prefix", "batch_size": 16}
ROLES = ("retention", "transfer", "probes")  # what a domain uses tasks for


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

    def written(self, setting: str, *, model: str, domain: str, method: str) -> str:
        """The path of the `train` block that a cell's training setting is taken from."""
        named = {
            f"methods.{method}.train": self.methods[method].train,
            f"models.{model}.train": self.models[model].get("train") or {},
            f"domains.{domain}.train": self.domains[domain].get("train") or {},
        }
        return next((path for path, block in named.items() if setting in block), "train")

    def compute_dtype(self, model: str, checkpoint: "torch.dtype", where: "torch.device") -> "torch.dtype":
        """The dtype forward and backward run in: the model block's `compute_dtype`, else what suits checkpoint and device."""
        from experiments.model.weights import as_dtype
        from experiments.training import hardware

        chosen = self.models[model].get("compute_dtype")
        return as_dtype(chosen) if chosen else hardware.compute_dtype(checkpoint, where)

    def prepare_settings(self, *, model: str, method: str) -> TrainSettings:
        """Settings of training inside `prepare`, which never sees the domain: train < model < method."""
        merged = dict(self.train) | (self.models[model].get("train") or {})
        return TrainSettings(**(merged | dict(self.methods[method].train)))


def load(name: str = "", *, root: Path | None = None) -> Study:
    """Read and check the params.yaml of the study `name` ('' is the default study in the root)."""
    if name:
        clashes.refuse_study(checked("--study", name))
    paths = Paths(study=name, **({"root": root} if root else {}))
    studies = paths.root / "experiments" / "studies"
    if name and not paths.folder.is_dir():
        raise unknown("study", name, [found.parent.name for found in studies.glob("*/params.yaml")])
    return build(read_yaml(paths.params), paths=paths)


def build(raw: Mapping[str, Any], *, paths: Paths) -> Study:
    """The study of the blocks of a params.yaml. Raises UserError naming the path of the first thing that is wrong."""
    blocks.refuse_odd(raw)
    blocks.check(raw, blocks.TOP, where="")
    named = {
        kind: {name: block or {} for name, block in (raw.get(kind) or {}).items()}
        for kind in ("models", "tasks", "domains")
    }
    for kind, found in named.items():
        for name, block in found.items():
            checked(f"{kind}:", name)
            blocks.check(block, blocks.NAMED[kind], where=f"{kind}.{name}")
    models, tasks, domains = named.values()
    for name, block in models.items():
        if block["source"].startswith("pypi:") and "sha256" not in block:
            raise UserError(
                f"models.{name} has no `sha256`: a pypi source states that of the file it takes out of the wheel"
            )
        if beside := {"seed", "dtype", "architecture"} & (block.get("config") or {}).keys():
            raise UserError(
                f"models.{name}.config names `{min(beside)}`: write it in the block beside `config`, which takes transformers' own names"
            )
    for name, block in domains.items():
        _roles(name, block, tasks)
    packages = raw.get("packages") or {}
    for spec, sha256 in packages.items():
        if not re.fullmatch(blocks.PACKAGE["matches"], spec):
            raise UserError(f"packages names {spec!r}: it must be {blocks.PACKAGE['form']}")
        blocks.check({spec: sha256}, {spec: blocks.Key(**blocks.SHA256)}, where="packages")
    methods = _methods(raw["methods"])
    _tune(raw.get("tune") or {}, methods)
    grid = _grid(raw["grid"], models, domains, raw["methods"])
    clashes.refuse(grid=grid, domains=domains, tasks=tasks, tune=raw.get("tune") or {})
    return Study(
        name=paths.study,
        title=raw.get("title") or paths.study or "default study",
        device=raw.get("device", "auto"),
        not_a_result=raw.get("not_a_result", False),
        grid=grid,
        data=raw.get("data") or {"source": "pypi"},
        packages=packages,
        models=models,
        tasks=tasks,
        domains=domains,
        general=raw["general"],
        methods=methods,
        train=raw["train"],
        evaluate=EVALUATE | (raw.get("evaluate") or {}),
        tune=raw.get("tune") or {},
        paths=paths,
        archive=raw.get("archive"),
    )


def read_yaml(path: Path) -> dict:
    """A YAML 1.2 mapping as plain Python (`1e-3` is a number here, as it is to DVC)."""
    if not path.is_file():
        raise UserError(
            f"{path.name} not found at {path}: copy one of another study there, or correct the study's name"
        )
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path.name} line {line} holds bytes that are not UTF-8: save the file as UTF-8") from error
    except DuplicateKeyError as error:
        key = error.problem.removeprefix("found duplicate ").partition(" with value")[0]
        raise UserError(
            f"{path.name} line {error.problem_mark.line + 1}: the {key} stands there already: keep one of the two"
        ) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(text for text in (error.problem, error.context) if text)
        if "mapping values are not allowed" in said:
            said = "a second colon: put a text that holds one in quotes"
        if r"character '\t'" in said:
            said = "a tab: indent with spaces"
        if "unhashable key" in said or "that cannot start any token" in said:
            said = "a text that begins with one of { [ % @ ` stands in quotes"
        raise UserError(
            f"{path.name} is not valid YAML: line {mark.line + 1}, column {mark.column + 1}: {said}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path.name} is not valid YAML: it nests lists or mappings without end") from error
    except (
        YAMLError,
        ValueError,
        LookupError,
    ) as error:  # ValueError: a date that does not exist; LookupError: `!!bool maybe`
        raise UserError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(
            f"{path.name} {'is empty' if raw is None else 'must be a mapping of blocks'}: it needs at least grid, models, domains, "
            "general, methods and train"
        )
    return raw


def _roles(domain: str, block: Mapping[str, Any], tasks: Mapping[str, dict]) -> None:
    for role in ROLES:
        named = block.get(role) or []
        for task in named:
            if task not in tasks:
                raise unknown("task", task, tasks, where=f"domains.{domain}.{role}")
            if named.count(task) > 1:
                raise UserError(f"domains.{domain}.{role} names {task!r} twice: name it once")
            if role == "probes" and not tasks[task].get("probe"):
                raise UserError(
                    f"domains.{domain}.probes names {task!r}, but tasks.{task}.probe is 0: say how many probe rows it has, or leave it out"
                )


def _grid(grid: dict, models: dict, domains: dict, methods: dict) -> dict[str, list]:
    for kind, named in (("models", models), ("domains", domains), ("methods", methods)):
        for name in grid[kind]:
            if name not in named:
                raise unknown(kind[:-1], name, named, where=f"grid.{kind}")
    if min(grid["seeds"]) < 0 or max(grid["seeds"]) >= 2**63:
        raise UserError(f"grid.seeds is {grid['seeds']}: it must list whole numbers from 0 to {2**63 - 1}")
    for kind, values in grid.items():
        if len(set(values)) != len(values):
            raise UserError(f"grid.{kind} names one entry twice: {values}")
    return grid


def _tune(tune: Mapping[str, Any], methods: Mapping[str, Method]) -> None:
    """Every trial's block is built once, so that a wrong knob or value is said before the first trial."""
    for name, knobs in (tune.get("methods") or {}).items():
        where = f"tune.methods.{name}"
        if name not in methods:
            raise unknown("method", name, methods, where="tune.methods")
        refuse(knobs, dict, where=where)
        if len(knobs) != 1:
            raise UserError(
                f"{where}: name one knob, such as `train.learning_rate: [1.0e-4, 3.0e-4]`, not {list(knobs)}"
            )
        ((knob, values),) = knobs.items()
        part, dot, setting = str(knob).partition(".")
        if not dot or not isinstance(values, list) or not values:
            raise UserError(f"{where}.{knob}: write PART.SETTING or train.SETTING with a list of values")
        block = methods[name].block
        if part != "train" and part not in block:
            raise unknown("part", part, block, where=where)
        for value in values:
            build_method(
                name,
                {**block, part: {**(block.get(part) or {}), setting: value}},
                where=f"{where}: with {knob} {value}, methods.{name}",
            )


def _methods(methods: Mapping[str, Any]) -> dict[str, Method]:
    for name in methods:
        checked("methods:", name)
    return {name: build_method(name, _inherited(name, methods, ())) for name in methods}


def build_method(name: str, block: Mapping[str, Any], *, where: str = "") -> Method:
    """The method of one block without `like:`; its parts are checked by their own rules. `where` is its path in messages."""
    where = where or f"methods.{name}"
    train = block.get("train") or {}
    blocks.check(train, blocks.TRAIN, where=f"{where}.train")
    if "moments" in train:
        raise UserError(
            f"{where}.train.moments: Adam's precision is one for all methods, or it is part of what is compared; "
            "set it under `train:` or in a model's block"
        )
    parts = {key: value for key, value in block.items() if key != "train"}
    return Method(name=name, parts=registry.build(parts, where=where), train=train, block=block)


def _inherited(name: str, methods: Mapping[str, Any], seen: tuple[str, ...]) -> dict:
    """The block with what `like:` takes over from another one; its own settings win."""
    if name in seen:
        raise UserError(f"methods.{name}: `like` goes round in a circle: {' -> '.join((*seen, name))}")
    block = {} if methods[name] is None else methods[name]
    refuse(block, dict, where=f"methods.{name}")
    for key, value in block.items():
        if key != "like":
            refuse({} if value is None else value, dict, where=f"methods.{name}.{key}")
    if "like" not in block:
        return dict(block)
    refuse(block["like"], str, where=f"methods.{name}.like")
    if block["like"] not in methods:
        raise unknown("method", block["like"], methods, where=f"methods.{name}.like")
    merged = _inherited(block["like"], methods, (*seen, name))
    for key, value in block.items():
        if key != "like":
            merged[key] = {**(merged.get(key) or {}), **(value or {})}
    return merged
