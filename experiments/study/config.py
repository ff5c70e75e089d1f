"""Read and check a params.yaml: the result is a `Study`, or one UserError that names what is wrong."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import InstanceOf

from experiments.study import clashes, inheritance, names_of_tasks
from experiments.study.params_text import read_yaml, refuse_odd
from experiments.study.paths import Paths
from experiments.study.schema import MethodTrain, Params
from experiments.study.validation import check_models, validate, with_sources
from experiments.training.settings import TrainSettings
from methods import registry
from methods.errors import UserError
from methods.part import Part
from methods.settings import refuse
from methods.tools.names import checked, unknown

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Method:
    """One block under `methods:`: its parts in the order of their hooks, and its overrides of `train:`."""

    name: str
    parts: tuple[Part, ...]
    train: Mapping[str, Any]
    block: Mapping[str, Any]  # as it is written, merged with the block that `like:` names


class Study(Params):
    """A checked params.yaml with its methods built, and the paths of the study's files."""

    methods: dict[str, InstanceOf[Method]]
    paths: InstanceOf[Paths]

    @property
    def name(self) -> str:
        """The study's folder under experiments/studies; '' for the default study."""
        return self.paths.study

    def settings(self, *, model: str, domain: str, method: str) -> TrainSettings:
        """Training settings of a cell; precedence train < domain < model < method."""
        blocks = (self.train, self.domains[domain].train, self.models[model].train)
        return _settings(*(block.as_written for block in blocks), self.methods[method].train)

    def prepare_settings(self, *, model: str, method: str) -> TrainSettings:
        """Settings of training inside `prepare`, which never sees the domain: train < model < method."""
        return _settings(self.train.as_written, self.models[model].train.as_written, self.methods[method].train)

    def written(self, setting: str, *, model: str, domain: str, method: str) -> str:
        """The path of the `train` block from which a cell takes a training setting."""
        blocks = {
            f"methods.{method}.train": self.methods[method].train,
            f"models.{model}.train": self.models[model].train.as_written,
            f"domains.{domain}.train": self.domains[domain].train.as_written,
        }
        return next((path for path, block in blocks.items() if setting in block), "train")

    def rule_written(self, cell) -> str:
        """The path of the `train` block from which a cell takes its rule on probes: that of `stop` if it is written."""
        names = {"model": cell.model, "domain": cell.domain, "method": cell.method}
        setting = "stop" if self.settings(**names).stop else "keep"
        return self.written(setting, **names)

    def compute_dtype(self, model: str, checkpoint: "torch.dtype", where: "torch.device") -> "torch.dtype":
        """The dtype of forward and backward: the model's `compute_dtype`, else what suits checkpoint and device."""
        from experiments.model.base import as_dtype
        from experiments.training import hardware

        chosen = self.models[model].compute_dtype
        return as_dtype(chosen) if chosen else hardware.compute_dtype(checkpoint, where)


def _settings(*blocks: Mapping[str, Any]) -> TrainSettings:
    return TrainSettings(**{name: value for block in blocks for name, value in block.items()})


def load(name: str = "", *, root: Path | None = None) -> Study:
    """Read and check the params.yaml of the study `name` ('' is the default study in the root)."""
    if name:
        clashes.refuse_study(checked("--study", name))
    paths = Paths(study=name, **({"root": root} if root else {}))
    studies = paths.root / "experiments" / "studies"
    if name and not paths.folder.is_dir():
        raise unknown("study", name, [path.parent.name for path in studies.glob("*/params.yaml")])
    return build(read_yaml(paths.params), paths=paths)


def build(raw: Mapping[str, Any], *, paths: Paths) -> Study:
    """Build the study from the blocks of a params.yaml and those that it takes over from the root's.

    Raises UserError that names the path of the first mistake.
    """
    refuse_odd(raw)
    params = names_of_tasks.expanded(validate(Params, inheritance.completed(raw, paths=paths)))
    check_models(params.models)
    _roles(params)
    methods = _methods(params, own=raw.get("methods") or {})
    _tune(params.tune.methods, methods)
    _grid(params)
    _named(params)
    clashes.refuse(params)
    written = {name: getattr(params, name) for name in params.model_fields_set}
    title = params.title or paths.study or "default study"
    models = with_sources(params.models)
    return Study(**written | {"title": title, "methods": methods, "models": models, "paths": paths})


def _methods(params: Params, *, own: Mapping[str, Any]) -> dict[str, Method]:
    """Build the methods, of which those not in `own` are the root's.

    A method of the root that the study does not use is left out if it cannot be built: by name, its `like` may lead to
    a block that the study has in place of the root's.
    """
    methods, used = {}, {*own, *params.grid.methods, *params.tune.methods}
    for name in params.methods:
        try:
            methods[name] = build_method(name, _inherited(name, params.methods, ()))
        except UserError as error:
            if name in own:
                raise
            if name in used:
                raise UserError(f"{error}{inheritance.FROM_ROOT}") from error
    return methods


def _roles(params: Params) -> None:
    """Refuse repeated tasks of a domain, and probes without rows."""
    for domain, block in params.domains.items():
        for role in clashes.ROLES:
            names = getattr(block, role)
            for task in names:
                if names.count(task) > 1:
                    raise UserError(f"domains.{domain}.{role} names {task!r} twice: name it once")
                if role == "probes" and not params.tasks[task].probe:
                    raise UserError(
                        f"domains.{domain}.probes names {task!r}, but tasks.{task}.probe is 0: give it probe rows, or "
                        "leave it out"
                    )


def _grid(params: Params) -> None:
    """Refuse unknown and repeated names in the grid."""
    for kind, names in params.grid:
        for name in names if kind != "seeds" else ():
            if name not in getattr(params, kind):
                raise unknown(kind[:-1], name, getattr(params, kind), where=f"grid.{kind}")
        if len(set(names)) != len(names):
            raise UserError(f"grid.{kind} names one entry twice: {names}")


def _named(params: Params) -> None:
    """Refuse leaders, compositions and controls that are no methods of the grid."""
    kinds = {"leaders": params.leaders, "compositions": params.compositions}
    for where, names in (kinds | {"controls": [*params.controls, *params.controls.values()]}).items():
        for name in names:
            if name not in params.grid.methods:
                raise unknown("method", name, params.grid.methods, where=where)


def also(study: Study) -> dict[str, Study]:
    """The studies whose finished cells are shown beside those of `study`, by name.

    Raises UserError if there is no such study, or if it is the study itself.
    """
    if study.name in study.also:
        raise UserError(f"also names the study {study.name} itself: leave it out")
    return {name: load(name, root=study.paths.root) for name in study.also}


def _tune(tune: Mapping[str, Any], methods: Mapping[str, Method]) -> None:
    """Build the method of every trial, so that a wrong setting or value is refused before the first trial."""
    for name, knobs in tune.items():
        where = f"tune.methods.{name}"
        if name not in methods:
            raise unknown("method", name, methods, where="tune.methods")
        refuse(knobs, dict, where=where)
        if len(knobs) != 1:
            raise UserError(
                f"{where}: name one setting, such as `train.learning_rate: [1.0e-4, 3.0e-4]`, not {list(knobs)}"
            )
        ((knob, values),) = knobs.items()
        part, dot, _ = str(knob).partition(".")
        if not dot or not isinstance(values, list) or not values:
            raise UserError(f"{where}.{knob}: write PART.SETTING or train.SETTING with a list of values")
        block = methods[name].block
        if part != "train" and part not in block:
            raise unknown("part", part, block, where=where)
        for value in values:
            changed = with_setting(block, knob, value)
            build_method(name, changed, where=f"{where}: with {knob} {value}, methods.{name}")


def with_setting(block: Mapping[str, Any], knob: str, value: Any) -> dict[str, Any]:
    """A method's block with another value of the setting `knob`, such as ewc.strength."""
    part, setting = knob.split(".", 1)
    return {**block, part: {**(block.get(part) or {}), setting: value}}


def build_method(name: str, block: Mapping[str, Any], *, where: str = "") -> Method:
    """Build the method of a block in which `like:` is merged; messages begin with the path `where`."""
    where = where or f"methods.{name}"
    train = block.get("train") or {}
    if "moments" in train:
        raise UserError(
            f"{where}.train.moments: Adam's precision is one for all methods, or it would be part of the comparison; "
            "set it under `train:` or in a model's block"
        )
    validate(MethodTrain, train, where=f"{where}.train")
    parts = {key: value for key, value in block.items() if key != "train"}
    return Method(name=name, parts=registry.build(parts, where=where), train=train, block=block)


def _inherited(name: str, methods: Mapping[str, Any], seen: tuple[str, ...]) -> dict:
    """The block merged with the one that `like:` names; its own settings take precedence."""
    if name in seen:
        raise UserError(f"methods.{name}: `like` leads back to itself: {' -> '.join((*seen, name))}")
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
    own = {key: value for key, value in block.items() if key != "like"}
    return inheritance.laid_over(_inherited(block["like"], methods, (*seen, name)), own)
