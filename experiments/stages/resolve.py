"""resolve: one small JSON file a stage with all that it depends on; an unchanged file means that it does not rerun.

A file holds settings, hashes of the code of a method's parts and of local files that are read, and versions of
packages that can change the outcome. DVC runs this stage when params.yaml, the parts or those files change. What DVC
cannot see, such as an upgraded package, is found by experiments/study/stale.py.
"""

import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

import evaluation
from experiments.model import trained
from experiments.study import cells, local_files
from experiments.study.advice import of_study
from experiments.study.clashes import ROLES
from experiments.study.schema import Domain, Rows
from experiments.training import hardware, hooks, improvable
from experiments.training.settings import NUMERICS, TrainSettings
from methods import registry
from methods.errors import UserError
from methods.part import Part, overrides, prepares
from methods.tools import source_code
from methods.tools.costs import Pass
from methods.tools.files import write_json

# raise one when the stage writes other bytes from the same settings
MODEL_FORMAT = 2
DATA_FORMAT = 3

MODEL_KEYS = ("source", "sha256", "bin_sha256", "dtype", "config", "seed")
DOMAIN_KEYS = Domain.model_fields.keys() - {"why", "train"}  # what enters its rows and their scores
DATA_PACKAGES = ("datasets", "lm_eval")  # that read and render rows


def main(study) -> None:
    """Write all of work/resolved anew, so that a cell that is no longer in the grid leaves no file.

    Raises UserError for whatever is certain to fail later (experiments/study/ahead.py).
    """
    from experiments.study import ahead  # which imports lm-eval and torch's models

    for line in ahead.look(study):
        print(line)
    shutil.rmtree(study.paths.resolved, ignore_errors=True)
    for path, content in contents(study).items():
        write_json(study.paths.resolved / path, content)
    trained.prune(study.paths.trained, used={store_of(study, cell) for cell in cells.grid(study)})
    if note := pipeline_behind(study):
        print(note)


def contents(study) -> dict[str, dict]:
    """The content of every resolved file of the study, by relative path."""
    models, domains, methods = study.grid.models, study.grid.domains, study.grid.methods
    pairs = [f"{name}/{method}" for name in models for method in methods]
    paths = ["data.json", "compare.json"]
    paths += [f"{kind}/{name}.json" for kind in ("model", "base", "evaluate") for name in models]
    paths += [f"{kind}/{pair}.json" for kind in ("prepare", "collect") for pair in pairs]
    paths += [f"train/{name}/{domain}/{method}.json" for name in models for domain in domains for method in methods]
    return {path: content(study, path) for path in paths}


def content(study, path: str) -> dict:
    """The content of the resolved file `path`, such as train/MODEL/DOMAIN/METHOD.json."""
    kind, *names = path.removesuffix(".json").split("/")
    stages = (model, data, base, evaluate, prepare, train, collect, compare)
    return {stage.__name__: stage for stage in stages}[kind](study, *names)


def model(study, name: str) -> dict:
    block = study.models[name]
    if block.settle is not None:
        stated = {key: getattr(block.settle, key) for key in ("from", "adapter_sha256", "sha256")}
        resolved = model(study, stated["from"])
        path = study.paths.adapter(name)
        found = local_files.digests([str(path)], kept=study.paths.local / "hashes")[str(path)]
        return resolved | {"settle": stated | {"file": found}}
    resolved = {key: value for key, value in block.as_written.items() if key in MODEL_KEYS} | {"format": MODEL_FORMAT}
    kind, _, rest = block.source.partition(":")
    if kind == "pypi":
        resolved["packages"] = _packages(study, [rest.partition("/")[0]])
    return resolved | _files(study, local_files.of_model(block))


def data(study) -> dict:
    domains = {}
    for name in study.grid.domains:
        block = study.domains[name]
        domains[name] = {key: value for key, value in block.as_written.items() if key in DOMAIN_KEYS}
        # names that stand for several tasks: what a suite holds may change
        domains[name] |= {
            role: getattr(block, role) for role in ROLES if getattr(block, role) != (block.as_written.get(role) or [])
        }
    tasks = {name: study.tasks[name].as_written for name in _tasks(study)}
    wheels = [rows.pypi.package for rows in _rows(study) if rows.pypi and study.data.source == "pypi"]
    return {
        "domains": domains,
        "tasks": tasks,
        "general": study.general.as_written,
        "packages": _packages(study, wheels),
        "data": study.data.model_dump(include={"source"}) | _asked(study),
        "versions": {name: version(name) for name in DATA_PACKAGES},
        "format": DATA_FORMAT,
    } | _files(study, _row_files(study))


def _tasks(study) -> list[str]:
    """Names of the tasks that the grid's domains use, and its models' mixes, whose rows `data` compares with these."""
    domains = [study.domains[name] for name in study.grid.domains]
    mixes = [made.mix for name in study.grid.models if (made := study.models[name].settle)]
    named = {task for mix in mixes for task in mix if task in study.tasks}
    return sorted(named | {task for domain in domains for role in ROLES for task in getattr(domain, role)})


def _rows(study) -> list[Rows]:
    """All `rows:` blocks that are read."""
    domains = [study.domains[name] for name in study.grid.domains]
    blocks = [study.general, *domains, *(study.tasks[name] for name in _tasks(study))]
    named = [block.rows for block in blocks if block.rows is not None]
    return named + [domain.test_rows for domain in domains]


def _asked(study) -> dict:
    """What else `data:` decides: rows of tasks whose blocks state no number, and the folder in place of the hub."""
    tasks = [study.tasks[name] for name in _tasks(study)]
    asked = {"test": study.data.test} if any(task.test is None for task in tasks) else {}
    domains = [study.domains[name] for name in study.grid.domains]
    read = any(block.rows is None for block in [*tasks, *domains])
    read = read or (study.data.source == "hub" and any(named.hub for named in _rows(study)))
    return asked | ({"hub": study.data.hub} if study.data.hub and read else {})


def _row_files(study) -> list[str]:
    """Local files that `data` reads: rows, chat templates of domains, and the folder in the hub's layout."""
    templates = [study.domains[name].chat_template for name in study.grid.domains]
    sources = [local_files.of_rows(rows, prefer=study.data.source) for rows in _rows(study)]
    return [*filter(None, [*templates, _asked(study).get("hub")]), *(path for paths in sources for path in paths)]


def base(study, model: str) -> dict:
    """What the stage `base` depends on: scoring, and the test of whether training could improve the model."""
    return evaluate(study, model) | {"improvable": improvable.settings(study, model)}


def evaluate(study, model: str) -> dict:
    """What the scores of the base and of cells depend on besides weights and rows; `collect` compares the same."""
    resolved = evaluation_settings(study) | {
        "scoring": evaluation.SCORING,
        "versions": evaluation.versions(),
        "device": study.device,
    }
    try:
        where = hardware.device(study.device)
    except UserError:  # a study on CUDA, looked at where there is none
        return resolved | _computing(study, model)
    resolved["device"] = where.type
    block = study.models[model]
    stated = block.compute_dtype or block.dtype or ("float32" if block.source.startswith("random:") else None)
    if stated is None:  # the checkpoint's own dtype, which is not known before the model was made
        return resolved | {"bf16": hardware.has_bf16(where)}
    return resolved | {"compute_dtype": str(study.compute_dtype(model, getattr(torch, stated), where))}


def evaluation_settings(study) -> dict:
    """The block `evaluate` without what is off; a template from a file is its text."""
    settings = study.evaluate.model_dump(exclude={"improve"})
    settings = {key: value for key, value in settings.items() if value not in (None, False)}
    if isinstance(file := settings.get("chat_template"), str):
        settings["chat_template"] = local_files.text(file, where="evaluate.chat_template")
    return settings


def collect(study, model: str, method: str) -> dict:
    """What details.json takes directly from params.yaml."""
    return {
        "note": study.models[model].note,
        "not_a_result": study.not_a_result,
        "method": dict(study.methods[method].block),
    }


def compare(study) -> dict:
    return {"title": study.title}


def prepare(study, model: str, method: str) -> dict:
    """What the preparation of a method depends on; {} where no part prepares or reads general text in training.

    Training settings are included only for parts that train while they prepare.
    """
    parts = study.methods[method].parts
    copied = {"general": "copied"} if any("general" in part.capabilities for part in parts) else {}
    if not any(map(prepares, parts)):
        return copied
    resolved = {"numerics": NUMERICS, "device": study.device, "parts": {}}
    on_adapted = any(overrides(part, "prepare") for part in parts)  # `calibrate` is of the bare model
    for part in parts:
        if prepares(part) or (on_adapted and "adapts" in part.capabilities):
            resolved["parts"][part.key] = _part(study, part, "prepare")
    for part in parts:
        for made in part.preparation():
            if made.training is not None:
                resolved["parts"][part.key]["train"] = _general_phase(study, made, model=model, method=method)
    return resolved | copied | _computing(study, model)


def _general_phase(study, made: Pass, *, model: str, method: str) -> dict:
    """The training settings of a part's own training on general text: the part's, and otherwise the method's.

    Left out are `length`, at which rows of a domain are cut, and `probes`, `stop` and `keep`, for this training is not
    probed.
    """
    own = {name: value for name, value in made.training.items() if value is not None}
    settings = replace(study.prepare_settings(model=model, method=method), **own).numeric()
    return {name: value for name, value in settings.items() if name not in ("length", "probes", "stop", "keep")}


def seeded(parts) -> bool:
    """Whether the preparation depends on the seed: a part trains there, and so draws."""
    return any("seeded_preparation" in part.capabilities for part in parts)


def train(study, model: str, domain: str, method: str, *, finished: bool = True) -> dict:
    """What a cell's weights depend on; without `finished` those before the parts that act in `finish` alone."""
    settings: TrainSettings = study.settings(model=model, domain=domain, method=method)
    acting = study.methods[method].parts if finished else hooks.trainers(study.methods[method].parts)
    parts = {part.key: _part(study, part, None) for part in acting}
    resolved = {"numerics": NUMERICS, "device": study.device, "train": settings.numeric(), "parts": parts}
    return resolved | _computing(study, model)


def store_of(study, cell) -> Path | None:
    """Where the training of a cell is kept; None where no method of the grid begins from it and only finishes it."""
    finishing = [name for name in {*study.grid.methods, cell.method} if hooks.finishers(study.methods[name].parts)]
    if not finishing:
        return None
    own, *others = (train(study, cell.model, cell.domain, name, finished=False) for name in (cell.method, *finishing))
    folder = study.paths.trained / cell.model / cell.domain / f"seed{cell.seed}"
    return folder / trained.name(own) if own in others else None


def _computing(study, model: str) -> dict:
    """The dtype to compute in, where the model's block names one."""
    chosen = study.models[model].compute_dtype
    return {"compute_dtype": chosen} if chosen else {}


def _part(study, part: Part, phase: str | None) -> dict:
    return {
        "settings": registry.phase_settings(part, phase),
        "sources": {path.name: source_code.digest(path) for path in registry.source_files(part)},
    } | _files(study, registry.paths(part, phase))


def _files(study, paths: list[str]) -> dict:
    """Hashes of the files that are read, if there are any."""
    return {"files": local_files.digests(paths, kept=study.paths.local / "hashes")} if paths else {}


def _packages(study, wheels: list[str]) -> dict:
    """The stated checksums of the wheels that are read."""
    return {spec: study.packages.get(spec) for spec in sorted(set(wheels))}


def local_inputs(study) -> list[str]:
    """Paths whose content is hashed: files and folders that the study reads, and code of parts outside the project."""
    parts = [part for method in study.grid.methods for part in study.methods[method].parts]
    paths = [path for name in study.grid.models for path in local_files.of_model(study.models[name])]
    paths += [str(study.paths.adapter(name)) for name in study.grid.models if study.models[name].settle]
    paths += [path for part in parts for path in registry.paths(part, None)]
    paths += [study.evaluate.chat_template] if isinstance(study.evaluate.chat_template, str) else []
    return sorted({*paths, *_row_files(study), *local_files.of_code(parts)})


def pipeline_behind(study) -> str:
    """A line for the user where dvc.yaml lists other cells or files than params.yaml, else ''."""
    from experiments.study import pipeline  # which imports this module

    if not pipeline.behind(study):
        return ""
    option = f" --study {study.name}" if study.name else ""
    return of_study(
        f"dvc.yaml does not list this grid's cells or files yet: run `python -m experiments pipeline{option}` and "
        "`dvc repro` again",
        study.name,
    )


def text(content: dict) -> str:
    """The text of a resolved file."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
