"""pipeline: write the parts of dvc.yaml that DVC's own language cannot express.

These are the cell files that `compare` depends on, the local files that `resolve` hashes and what `dvc metrics` and
`dvc plots` show. A study's dvc.yaml is the root's with the study's folders.
"""

import io
import os
from pathlib import Path

from ruamel.yaml import YAML

from experiments.stages import resolve
from experiments.study import cells, inheritance, stale, whole
from experiments.study.advice import of_study
from experiments.study.config import also
from experiments.study.paths import Paths

OUTPUTS = ("metrics.json", "details.json", "curve.csv", "train.json", "items.csv.gz", "drift.json")
BASE = ("scores.json", "items.csv.gz", "start.json")
# the code that `resolve` hashes, and the files with the numbers that it writes: SCORING, NUMERICS and its own formats
CODE = ("methods", "evaluation/__init__.py", "experiments/training/settings.py", "experiments/stages/resolve.py")


def compare_inputs(study) -> list[str]:
    """The files of exactly the grid's cells, their preparations, bases and trials, relative to the root.

    Of the measurements of machines (GPU checks, benchmarks) and of the trials those that exist.
    """
    grid = cells.grid(study)
    files = [study.paths.run(cell) / name for cell in grid for name in OUTPUTS]
    files += [study.paths.prepare_costs(model=cell.model, method=cell.method, seed=cell.seed) for cell in grid]
    files += [study.paths.base(model) / name for model in study.grid.models for name in BASE]
    files += [
        study.paths.adapter(model).with_name("settle.json") for model in study.grid.models if study.models[model].settle
    ]
    trials = [study.paths.tuning(model, domain) for model in study.grid.models for domain in study.grid.domains]
    files += [path for path in trials if path.is_file()]
    files += [path for other in also(study).values() for path in _finished(other)]
    machines = [study.paths.root / "results" / kind for kind in ("gpu", "bench")]
    files += [path for folder in machines for path in sorted(folder.glob("*.json"))]
    return list(dict.fromkeys(path.relative_to(study.paths.root).as_posix() for path in files))


def _finished(study) -> list[Path]:
    """The files of a study shown beside another, of its cells that have a result."""
    scored = [cell for cell in cells.grid(study) if (study.paths.run(cell) / "metrics.json").is_file()]
    files = [study.paths.run(cell) / name for cell in scored for name in OUTPUTS]
    files += [study.paths.base(model) / name for model in dict.fromkeys(cell.model for cell in scored) for name in BASE]
    return [path for path in files if path.is_file()]


def local_inputs(study) -> list[str]:
    """The user's own files and folders that the study reads and that exist; relative to the root where they are within
    it.

    What a pipeline writes is no input of its first stage.
    """
    root, inputs = study.paths.root.resolve(), []
    for path in resolve.local_inputs(study):
        place = (root / Path(path).expanduser()).resolve()
        inside = place.relative_to(root).parts if place.is_relative_to(root) else None
        if place.exists() and not root.is_relative_to(place) and not _made(inside):
            inputs.append("/".join(inside) if inside else place.as_posix())
    return sorted(set(inputs))


def _made(inside: tuple[str, ...] | None) -> bool:
    """Whether stages write to a path of the root or below it: results/, and folders of work/ and work/STUDY/."""
    if not inside or inside[0] not in ("work", "results") or inside[:2] == ("results", "settled"):
        return False
    made = {"resolved", "models", "data", "prepared", "cells"}
    return inside[0] == "results" or len(inside) == 1 or not made.isdisjoint(inside[1:3])


def metrics(study) -> list[str]:
    """What `dvc metrics` shows, relative to dvc.yaml: the folder that `compare` writes, once it is there; of a demo
    nothing.
    """
    folder = study.paths.results / "metrics"
    return [os.path.relpath(folder, study.paths.folder)] if folder.is_dir() and not study.not_a_result else []


def plots(study) -> list:
    """What `dvc plots` shows, relative to dvc.yaml: the figures that exist, and the loss of the grid's cells over
    tokens.

    A demo has no plots: its dvc.yaml is in git, and its results are not.
    """
    if study.not_a_result:
        return []
    folder = study.paths.folder
    shown: list = [os.path.relpath(path, folder) for path in sorted((study.paths.summary / "figures").glob("*.png"))]
    curves: dict[str, dict[str, str]] = {}
    for cell in cells.grid(study):
        path = os.path.relpath(study.paths.run(cell) / "curve.csv", folder)
        curves.setdefault(f"loss, {cell.model}, {cell.domain}", {})[path] = "loss"
    return shown + [{title: {"x": "tokens", "y": own}} for title, own in curves.items()]


def behind(study) -> bool:
    """Whether the study has no dvc.yaml, or one that lists other cells or files than its params.yaml."""
    path = study.paths.folder / "dvc.yaml"
    return not path.is_file() or path.read_text() != rendered(study)


def main(study) -> None:
    """Rewrite the study's dvc.yaml: the root's stages with the study's folders, and `compare` on its own cells."""
    path = study.paths.folder / "dvc.yaml"
    text = rendered(study)
    if not path.is_file() or path.read_text() != text:
        whole.write_text(path, text)
        print(f"wrote {path.relative_to(study.paths.root)}")
    if difference := stale.forget(study):
        print(of_study(f"{difference}: `dvc repro` looks at all settings again", study.name))


def rendered(study) -> str:
    """The text of the study's dvc.yaml."""
    root = Paths(root=study.paths.root)
    document = _yaml().load(root.folder / "dvc.yaml")
    if study.name:
        document = _moved(document, study.name)
        for stage in document["stages"].values():
            stage["wdir"] = "../../.."
    deps = document["stages"]["compare"]["deps"]
    deps[:] = compare_inputs(study) + [path for path in deps if not path.startswith("results/")]
    deps = document["stages"]["resolve"]["deps"]
    params = [
        study.paths.params.relative_to(study.paths.root).as_posix(),
        *filter(None, [inheritance.file(study.paths)]),
    ]
    deps[:] = [*params, *CODE, *local_inputs(study)]
    document.pop("metrics", None)
    if shown := metrics(study):
        document["metrics"] = shown
    document.pop("plots", None)
    if shown := plots(study):
        document["plots"] = shown
    out = io.StringIO()
    _yaml().dump(document, out)
    return out.getvalue()


def _moved(value, study: str):
    """The default study's pipeline with every path and command changed to those of the study."""
    if isinstance(value, dict):
        for key in list(value):
            value[key] = _moved(value[key], study)
            if isinstance(key, str) and key.startswith(("results/", "work/")):
                value[_moved(key, study)] = value.pop(key)
        return value
    if isinstance(value, list):
        value[:] = [_moved(entry, study) for entry in value]
        return value
    if not isinstance(value, str):
        return value
    if value.startswith("python -m experiments "):
        return f"{value} --study {study}"
    for top in ("results", "work"):
        if value.startswith(f"{top}/"):
            return f"{top}/{study}/{value.removeprefix(f'{top}/')}"
    return f"experiments/studies/{study}/params.yaml" if value == "params.yaml" else value


def _yaml() -> YAML:
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml
