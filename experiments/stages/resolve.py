"""resolve: for each stage, the settings it depends on, as one small JSON file; a file that does not change
stops the reruns behind it. Sources of a part are hashed here, so that editing one part reruns its cells only."""

import json
import shutil
from dataclasses import replace

from experiments import blocks
from experiments.engine_settings import NUMERICS, TrainSettings
from experiments.files import write_json
from evaluation import SCORING
from methods import registry, source_code
from methods.part import Part

# raise one when the stage writes other bytes from the same settings
MODEL_FORMAT = 2
DATA_FORMAT = 2

MODEL_KEYS = ("source", "sha256", "bin_sha256", "dtype", "config", "seed", "note")
DOMAIN_KEYS = tuple(key for key in blocks.DOMAIN if key not in ("licence", "why", "train"))  # what enters its rows and their scores


def main(study) -> None:
    """Write all of work/resolved; the folder is made anew, so that a cell that left the grid leaves no file.

    Raises UserError for whatever can be known now to fail later (experiments/ahead.py).
    """
    from experiments import ahead  # which imports lm-eval and torch's models

    for line in ahead.look(study):
        print(line)
    shutil.rmtree(study.paths.resolved, ignore_errors=True)
    for path, content in contents(study).items():
        write_json(study.paths.resolved / path, content)
    note = pipeline_behind(study)
    if note:
        print(note)


def contents(study) -> dict[str, dict]:
    """Every resolved file of the study: relative path to content."""
    files = {"data.json": data(study)}
    for model in study.grid["models"]:
        files[f"model/{model}.json"] = {k: v for k, v in study.models[model].items() if k in MODEL_KEYS} | {"format": MODEL_FORMAT}
        files[f"evaluate/{model}.json"] = dict(study.evaluate) | {"scoring": SCORING, "device": study.device} | _computing(study, model)
        for method in study.grid["methods"]:
            files[f"prepare/{model}/{method}.json"] = prepare(study, model, method)
            for domain in study.grid["domains"]:
                files[f"train/{model}/{domain}/{method}.json"] = train(study, model, domain, method)
    return files


def data(study) -> dict:
    domains = {d: {k: v for k, v in study.domains[d].items() if k in DOMAIN_KEYS} for d in study.grid["domains"]}
    used = sorted({t for block in domains.values() for role in ("retention", "transfer", "probes") for t in block.get(role) or []})
    return {"domains": domains, "tasks": {t: study.tasks[t] for t in used}, "general": dict(study.general),
            "packages": dict(study.packages), "data": dict(study.data), "format": DATA_FORMAT}


def prepare(study, model: str, method: str) -> dict:
    """What the preparation of a method depends on; {} where no part of it prepares anything.

    Training settings count only for parts that train while they prepare.
    """
    parts = study.methods[method].parts
    if all(type(part).prepare is Part.prepare for part in parts):
        return {}
    resolved = {"numerics": NUMERICS, "device": study.device, "parts": {}}
    for part in parts:
        if type(part).prepare is not Part.prepare or "adapts" in part.capabilities:
            resolved["parts"][part.key] = _part(part, "prepare")
    for part in parts:
        if "seeded_preparation" in part.capabilities:
            resolved["parts"][part.key]["train"] = _general_phase(study, part, model=model, method=method)
    return resolved | _computing(study, model)


def _general_phase(study, part: Part, *, model: str, method: str) -> dict:
    """The training settings of a part's own training on general text: the method's, but for those that are the part's, that rows of
    a domain alone are cut by, and that say when a run is probed."""
    own = {name: value for name, value in part.general_phase().items() if value is not None}
    found = replace(study.prepare_settings(model=model, method=method), **own).numeric()
    return {name: value for name, value in found.items() if name not in ("length", "probes")}


def seeded(parts) -> bool:
    """Whether the seed enters the preparation: one part trains, and so draws, there."""
    return any("seeded_preparation" in part.capabilities for part in parts)


def train(study, model: str, domain: str, method: str) -> dict:
    settings: TrainSettings = study.settings(model=model, domain=domain, method=method)
    parts = {part.key: _part(part, None) for part in study.methods[method].parts}
    return {"numerics": NUMERICS, "device": study.device, "train": settings.numeric(), "parts": parts} | _computing(study, model)


def _computing(study, model: str) -> dict:
    """The dtype to compute in where the model's block names one."""
    return {"compute_dtype": study.models[model]["compute_dtype"]} if "compute_dtype" in study.models[model] else {}


def _part(part: Part, phase: str | None) -> dict:
    return {"settings": registry.phase_settings(part, phase),
            "sources": {path.name: source_code.digest(path) for path in registry.source_files(part)}}


def pipeline_behind(study) -> str:
    """A line where dvc.yaml's lists are not those of params.yaml, for DVC cannot make such lists itself."""
    from experiments import pipeline  # which imports this module

    if not pipeline.behind(study):
        return ""
    return ("dvc.yaml does not list this grid's cells or rows yet: "
            f"run `python -m experiments pipeline{' --study ' + study.name if study.name else ''}` and `dvc repro` again")


def text(content: dict) -> str:
    """The file's text, for a look ahead without writing it."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
