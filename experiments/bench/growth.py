"""What a study's commands take as its finished cells grow, each in a new process: `resolve`, `plan`, `launch` (which
finds that nothing is left), `compare`, and its report in Chromium until the page is whole. The cells are copies of the
default study's results under other names, with 20 methods, 5 seeds and as many models as make up the number, in copies
of the checkout; dvc.lock says that all are finished.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import md5
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from experiments.bench.race import Goal, Race, race
from experiments.faults.command import project_of
from experiments.study import cells, config, whole
from experiments.study.params_text import read_yaml
from experiments.study.paths import HERE, Paths
from methods.errors import UserError
from methods.tools.files import read_json, write_json

TITLE = "Commands of a study at 100, 1,000 and 5,000 finished cells"
STUDY = "grown"
LIMITS = {"compare": 90.0, "report": 3.0}  # seconds at 1,000 cells
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
KEYS = ("cell", "model", "method", "seed")  # what a cell's files say of it


@dataclass(frozen=True, kw_only=True)
class Shape:
    """So many models, each with the same methods and seeds."""

    models: int
    methods: int = 20
    seeds: int = 5
    originals: list[cells.Cell] = field(default_factory=lambda: _finished(config.load()))

    @property
    def name(self) -> str:
        return f"{self.models * self.methods * self.seeds:,} cells"

    def copies(self) -> dict[str, cells.Cell]:
        """Name of a method -> the finished cell whose results it has."""
        many = islice(enumerate(cycle(self.originals)), self.methods)
        count = len(self.originals)
        return {f"{cell.method}-{number // count + 1}": cell for number, cell in many}

    def made(self) -> Iterator[tuple[cells.Cell, cells.Cell]]:
        """Each cell with the one whose results it has."""
        domain = self.originals[0].domain
        for model in self.names():
            for method, original in self.copies().items():
                for seed in range(self.seeds):
                    yield cells.Cell(model, domain, method, seed), original

    def names(self) -> list[str]:
        return [f"model-{number + 1}" for number in range(self.models)]


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    shapes = [Shape(models=models, methods=2, seeds=2) for models in (1, 2)] if small else []
    shapes = shapes or [Shape(models=models) for models in (1, 10, 50)]
    work = HERE / "work"
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix="growth-") as folder:
        projects = {shape.name: Path(folder) / str(shape.models) for shape in shapes}
        for shape in shapes:
            grow(shape, projects[shape.name])
            _python(projects[shape.name], "-m", "experiments", "pipeline", "--study", STUDY)
        commands: dict[str, Any] = {name: partial(_run, name) for name in ("resolve", "plan", "launch", "compare")}
        if browser := next(filter(None, map(shutil.which, BROWSERS)), None):
            commands["report"] = partial(_open, browser)
        else:
            print(f"  no Chromium ({', '.join(BROWSERS)}) is on PATH: the report is left out", flush=True)
        for name, call in commands.items():
            if name == "plan":  # `resolve` has run, and what it wrote has its hash
                for project in projects.values():
                    _python(project, "-m", __name__)
            runners = {shape: partial(call, project) for shape, project in projects.items()}
            _, *larger = shapes
            against, last = larger[0].name, larger[-1]
            goals = [Goal(runner=last.name, limit=1.1 * last.models / larger[0].models)] if larger[1:] else []
            timed = race(f"`{name}`", runners, against=against, rounds=rounds or 1, warm=0, goals=goals)
            if name in LIMITS and not small:
                took = min(timed.seconds[against])
                timed.facts[f"at most {LIMITS[name]:g} s at {against}"] = "met" if took <= LIMITS[name] else "missed"
            yield timed


def grow(shape: Shape, project: Path) -> None:
    """A copy of the checkout with a study of the shape's cells, whose results are copies of the default study's."""
    project_of(project)
    for name in ("params.yaml", "results/bench", "results/settled"):
        copy = shutil.copytree if Path(name).is_dir() else shutil.copyfile
        copy(HERE / name, project / name)
    first, copies = shape.originals[0], shape.copies()
    grid = {"models": shape.names(), "domains": [first.domain], "methods": list(copies), "seeds": [*range(shape.seeds)]}
    stated = read_yaml(HERE / "params.yaml")
    made_of = stated["models"][first.model].get("settle", {}).get("from", first.model)
    params = stated | {
        "title": shape.name,
        "grid": grid,
        "controls": {},
        "models": stated["models"] | dict.fromkeys(grid["models"], stated["models"][made_of]),
        "methods": stated["methods"] | {name: {"like": cell.method} for name, cell in copies.items()},
    }
    ours, theirs = Paths(), Paths(study=STUDY, root=project)
    theirs.folder.mkdir(parents=True)
    whole.write_text(theirs.params, json.dumps(params))
    for model in grid["models"]:
        shutil.copytree(ours.base(first.model), theirs.base(model))
    for cell, original in shape.made():
        write_json(
            theirs.prepare_costs(model=cell.model, method=cell.method, seed=cell.seed),
            read_json(ours.prepare_costs(model=original.model, method=original.method, seed=original.seed)),
        )
        theirs.run(cell).mkdir(parents=True)
        for path in ours.run(original).iterdir():
            copy = theirs.run(cell) / path.name
            if path.suffix == ".json":
                about = {"cell": cell.name, "model": cell.model, "method": cell.method, "seed": cell.seed}
                content = read_json(path)
                write_json(copy, content | {key: about[key] for key in KEYS if key in content})
            else:
                os.link(path, copy)


def lock() -> None:
    """Write the dvc.lock of a study in the working directory of which everything is finished.

    A file that is not there, as weights and rows are not, has a hash of its path.
    """
    from dvc.stage.serialize import to_lockfile
    from dvc.utils.serialize import dumps_yaml
    from dvc_data.hashfile.hash_info import HashInfo

    from experiments.launch import dvc_stages

    path = f"experiments/studies/{STUDY}/dvc.yaml"
    with dvc_stages.opened(path) as stages:
        entries: dict[str, Any] = {}
        for name in stages.after:
            stage = stages[name]
            for out in stage.outs:  # `plan` takes a stage for done if its outputs are there
                if out.use_cache:
                    Path(out.fs_path).mkdir(parents=True, exist_ok=True)
            for item in (*stage.deps, *stage.outs):
                if item.exists:
                    item.save()
                else:
                    item.hash_info = HashInfo("md5", md5(item.fs_path.encode()).hexdigest())
            entries |= to_lockfile(stage)
        whole.write_text(stages.lock_file, dumps_yaml({"schema": "2.0", "stages": entries}))


def _finished(study) -> list[cells.Cell]:
    found = [cell for cell in cells.grid(study) if (study.paths.run(cell) / "metrics.json").is_file()]
    if not found:
        raise UserError("the default study has no finished cell to make copies of: run `make repro` first")
    return found


def _run(name: str, project: Path) -> None:
    said = _python(project, "-m", "experiments", name, "--study", STUDY)
    if name == "launch" and "up to date" not in said:
        raise UserError(f"`launch` does not find that all is finished: {said}")


def _python(project: Path, *words: str) -> str:
    ended = subprocess.run([sys.executable, *words], cwd=project, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"{' '.join(words)} fails on copies of the results: {(ended.stdout + ended.stderr)[-3000:]}")
    return ended.stdout


def _open(browser: str, project: Path) -> None:
    """Chromium from its start until it has written the page as it stands, drawn and with its scripts run."""
    page = Paths(study=STUDY, root=project).summary / "report.html"
    options = ["--headless=new", "--disable-gpu", "--no-first-run", *(["--no-sandbox"] if os.getuid() == 0 else [])]
    own = [f"--user-data-dir={project / 'profile'}", "--dump-dom", page.as_uri()]
    if "</html>" not in subprocess.run([browser, *options, *own], capture_output=True, text=True).stdout:
        raise UserError(f"{browser} does not show {page}")


if __name__ == "__main__":
    lock()
