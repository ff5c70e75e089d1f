"""The tiny study that is disturbed: its stages, what each of them makes, and what must be as in the undisturbed run.

Compared bit for bit are models, rows, preparations, weights, scores, items, drift and the numbers of metrics.json.
Costs, times, hosts and commits are exempt by name. There may also be no file that the undisturbed run does not have.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.load import load_cells
from experiments.faults.warm import Ended, Inside, Started, Warm
from experiments.study import cells, config, failures
from methods.errors import UserError

EXEMPT = (
    "seconds peak_memory when git hardware mfu peak_flops tokens_per_second memory steps_resumed reused training_reused"
).split()
FOLDERS = ("work", "results")
# files of the local store: what is in them is compared through the results; hashes and ids are of this machine's files
UNCOMPARED = ("work/local/", "results/summary/", "results/metrics/")


class Lost(AssertionError):
    """A result was lost or halved, a zero stood for a failure, or nobody said what went wrong."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage: the words of its command, what it makes, and how long and in how many changes of the disk it does that.

    cell   of which it records a failure
    """

    words: tuple[str, ...]
    makes: tuple[str, ...]
    cell: str = ""
    seconds: float = 0.0
    changes: int = 0

    @property
    def name(self) -> str:
        return self.words[0]

    @property
    def marker(self) -> Path:
        """The file that is locked while it runs."""
        names = "+".join(self.words[1:]).replace("/", "+")
        names = re.sub(r"\+(\d+)$", r"+seed\1", names)
        return Path("work/local/running/default") / f"{self.name}@{names}"


def stages(study) -> list[Stage]:
    """All stages of the study in an order in which they can run."""
    (model,) = study.grid.models
    base = [f"results/base/{model}/{name}" for name in ("scores.json", "items.csv.gz", "evaluate.json", "start.json")]
    found = [
        Stage(words=("resolve",), makes=("work/resolved",)),
        Stage(words=("model", model), makes=(f"work/models/{model}",)),
        Stage(words=("data",), makes=("work/data",)),
        Stage(words=("base", model), makes=tuple(base)),
    ]
    for cell in cells.grid(study):
        method, seed, run = cell.method, cell.seed, f"results/runs/{cell.name}"
        prepared = f"prepared/{model}/{method}/seed{seed}"
        scored = ("scores.json", "items.csv.gz", "evaluate.json")
        found += [
            Stage(
                words=("prepare", model, method, str(seed)),
                makes=(f"work/{prepared}", f"results/{prepared}/prepare.json"),
                cell=cell.name,
            ),
            Stage(
                words=("train", cell.name),
                makes=(f"work/cells/{cell.name}/weights", f"{run}/train.json", f"{run}/curve.csv"),
                cell=cell.name,
            ),
            Stage(words=("evaluate", cell.name), makes=tuple(f"{run}/{n}" for n in scored), cell=cell.name),
            Stage(words=("collect", cell.name), makes=(f"{run}/metrics.json", f"{run}/details.json")),
            Stage(words=("drift", cell.name), makes=(f"{run}/drift.json",)),
        ]
    return [*found, Stage(words=("compare",), makes=("results/summary", "results/metrics"))]


class World:
    """The project in the working directory and its undisturbed run, kept in `kept`."""

    def __init__(self, warm: Warm, kept: Path):
        self.warm, self.kept, self.study = warm, kept, config.load()
        self.stages: list[Stage] = []

    def undisturbed(self) -> None:
        """Run every stage, count its changes of the disk and its seconds, and keep what it has made."""
        for stage in stages(self.study):
            ended = self.warm.run(*stage.words, inside=Inside(at=0))
            expect(ended.status == 0, f"{' '.join(stage.words)} fails undisturbed: {ended.text[-2000:]}")
            self.stages.append(replace(stage, seconds=ended.seconds, changes=ended.changes))
        self.params = Path("params.yaml").read_text()
        for folder in FOLDERS:
            shutil.copytree(folder, self.kept / folder, symlinks=True)
        self.facts = facts(self.kept)

    def stage(self, name: str, *, cell: str = "") -> Stage:
        """A stage by its name, of a cell if it has one."""
        return next(s for s in self.stages if s.name == name and (not cell or cell in (s.cell, s.words[-1])))

    def finished(self) -> None:
        """Everything as the undisturbed run has left it."""
        Path("params.yaml").write_text(self.params)
        for folder in FOLDERS:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.kept / folder, folder, symlinks=True)

    def before(self, stage: Stage) -> None:
        """Everything as it was, without what the stage makes and without the local store."""
        self.finished()
        for made in map(Path, stage.makes):
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        shutil.rmtree("work/local")

    def start(self, stage: Stage, inside: Inside = Inside()) -> Started:
        return self.warm.start(*stage.words, inside=inside)

    def run(self, stage: Stage, inside: Inside = Inside()) -> Ended:
        return self.start(stage, inside).wait()

    def look(self) -> dict[str, str]:
        """What the next command sees of each cell: "whole", or the kind of its failure.

        Raises `Lost` for a cell that is taken for whole and has other numbers than in the undisturbed run.
        """
        failures.find_killed(self.study)
        names = [cell.name for cell in cells.grid(self.study)]
        try:
            loaded = load_cells("results", names)
        except UserError as error:
            return {"": f"named: {error}"}
        kinds = {row["cell"]: row["kind"] for row in loaded.failures.to_dict("records")}
        for row in loaded.failures.to_dict("records"):
            expect(row["reason"], f"{row['cell']} failed without a reason")
        for name in loaded.cells.index if len(loaded.cells) else ():
            path = f"results/runs/{name}/metrics.json"
            now = _digest(Path(path), path)
            expect(now == self.facts.get(path), f"{name} is taken for whole, with other numbers")
            kinds[name] = "whole"
        return kinds

    def made_equal(self, stage: Stage) -> None:
        """Raise `Lost` unless a stage has made what it had made undisturbed; of `compare`, tables and numbers."""
        for made in stage.makes:
            kept = self.kept / made
            for path in sorted(kept.rglob("*")) if kept.is_dir() else [kept]:
                name = path.relative_to(self.kept).as_posix()
                drawn = name.startswith("results/summary/") and path.suffix != ".csv"
                if path.is_file() and not drawn:
                    now = Path(name)
                    expect(now.is_file(), f"{name} is missing")
                    expect(_digest(now, name) == _digest(path, name), f"{name} is another one, and nobody said why")

    def equal(self) -> None:
        """Raise `Lost` unless everything is as in the undisturbed run."""
        now = facts(Path("."))
        for path in sorted(self.facts.keys() | now.keys()):
            if path not in now:
                raise Lost(f"{path} is missing")
            if path not in self.facts:
                raise Lost(f"{path} was left behind")
            expect(now[path] == self.facts[path], f"{path} differs from the undisturbed run{_where(self.kept, path)}")


def _where(kept: Path, path: str) -> str:
    """The first entry in which a JSON file differs, with both values; '' for others."""
    try:
        then, now = (_flat(_lasting(json.loads((root / path).read_text()))) for root in (kept, Path(".")))
    except ValueError:
        return ""
    odd = next((key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)), "")
    return f": {odd} was {then.get(odd)} and is {now.get(odd)}"


def _flat(value, key: str = "") -> dict:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {name: leaf for own, entry in entries for name, leaf in _flat(entry, f"{key}.{own}").items()}
    return found or {key: value}


def expect(holds: object, otherwise: str) -> None:
    if not holds:
        raise Lost(otherwise)


def facts(root: Path) -> dict[str, str]:
    """A digest of every file below work/ and results/ by its path; of those that are not compared, only that it is
    there if it was not left by a killed writer.
    """
    return {name: _digest(path, name) for path, name in _files(root)}


def _files(root: Path) -> Iterator[tuple[Path, str]]:
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            name = path.relative_to(root).as_posix()
            if name.startswith(UNCOMPARED) and ".part" not in name:
                continue
            if path.is_file():
                yield path, name


def _digest(path: Path, name: str) -> str:
    if path.suffix == ".json" and name.startswith("results/"):
        try:
            content = json.dumps(_lasting(json.loads(path.read_text())), sort_keys=True).encode()
        except ValueError:
            content = path.read_bytes()
    elif path.name == "curve.csv":
        head, *rows = (line.split(",") for line in path.read_text().splitlines())
        kept = [i for i, name in enumerate(head) if name not in EXEMPT]
        content = json.dumps([[row[i] for i in kept] for row in (head, *rows)]).encode()
    else:
        content = path.read_bytes()
    return hashlib.sha256(content).hexdigest()


def _lasting(value):
    """A result without what may differ from run to run: an entry is exempt by its name."""
    if isinstance(value, dict):
        return {
            key: _lasting(entry)
            for key, entry in value.items()
            if not any(key == word or key.startswith(f"{word}_") for word in EXEMPT)
        }
    return [_lasting(entry) for entry in value] if isinstance(value, list) else value
