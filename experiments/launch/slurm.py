"""Array jobs for a cluster without Ray, from a template of the user's.

Two arrays, one behind the other: the bases' scores and the preparations, then a task for each cell; behind both a job
that takes over what they made (`launch --gather`). Scripts, lists of stages and logs of each call lie in a folder of
their own in work/local/launch.

In the template these are filled in:

    {{command}}  what a task runs
    {{array}}    the array's range, such as 0-11
    {{name}}     the job's name
    {{log}}      the file of a task's output, with Slurm's %a
    {{cores}} {{gpus}} {{memory}}   what a task takes, memory in MiB
"""

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.launch import array, work
from experiments.launch.schedule import Needs, Task
from methods.errors import UserError

LONGEST = 1000  # tasks of an array: Slurm's own limit (MaxArraySize) is 1001
GATHER = Needs(cores=1, memory=8 * 2**30)
FIRST, SECOND = ("base", "prepare"), ("train", "evaluate", "drift")


@dataclass(frozen=True, kw_only=True)
class Script:
    """A script to submit; `phase` 1 comes before 2, and the job that gathers is 3."""

    path: Path
    phase: int
    tasks: int


def lines(tasks: Iterable[Task], jobs: Mapping[str, work.Job], *, cell_of) -> dict[tuple[int, Needs], list[str]]:
    """The lines of the arrays by phase and needs. What shares a preparation or a training is one line.

    cell_of  the cell of a stage's name
    """
    chains: dict[tuple[int, Needs, str], dict[str, list[work.Job]]] = {}
    wanted = [task for task in tasks if task.name in jobs and task.name.partition("@")[0] in FIRST + SECOND]
    own = {task.name: task.name if _phase(task.name) == 1 else cell_of(task.name).name for task in wanted}
    shared = {own[task.name]: task.once for task in wanted if task.once}
    for task in wanted:
        key = (_phase(task.name), task.needs, shared.get(own[task.name], own[task.name]))
        chains.setdefault(key, {}).setdefault(own[task.name], []).append(jobs[task.name])
    found: dict[tuple[int, Needs], list[str]] = {}
    for (phase, needs, _), by_cell in chains.items():
        ordered = [sorted(chain, key=_place) for chain in by_cell.values()]
        found.setdefault((phase, needs), []).append(array.line(ordered))
    return found


def _phase(name: str) -> int:
    return 1 if name.partition("@")[0] in FIRST else 2


def _place(job: work.Job) -> int:
    return (FIRST + SECOND).index(job.name.partition("@")[0])


def write(study, *, template: Path, folder: Path, found: Mapping[tuple[int, Needs], list[str]]) -> list[Script]:
    """Write the scripts and their lists. Raises UserError for a template that lacks what it needs."""
    try:
        text = template.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = (getattr(error, "strerror", None) or "it is not UTF-8 text").lower()
        raise UserError(f"--slurm {template}: {why}: give the path of a template") from error
    if "{{log}}" in text and re.search(r"[\s%]", place := str(folder.absolute())):
        raise UserError(f"{{{{log}}}} would be in {place}, and Slurm reads no path with a space or a % there")
    folder.mkdir(parents=True, exist_ok=True)
    earlier = [int(old.name) for old in folder.iterdir() if old.name.isdigit()]
    folder = folder / f"{max(earlier, default=0) + 1:03}"  # tasks of an earlier call may still read theirs
    folder.mkdir()
    title, option = f"holdfast-{study.name or 'default'}", f" --study {study.name}" if study.name else ""
    made = []
    for (phase, needs), every in sorted(found.items(), key=lambda item: (item[0][0], str(item[0][1]))):
        for at in range(0, len(every), LONGEST):
            some = every[at : at + LONGEST]
            script = folder / f"{len(made):02}-{('base-and-prepare', 'cells')[phase - 1]}.sh"
            listed = script.with_suffix(".jsonl")
            listed.write_text("".join(f"{one}\n" for one in some))
            command = f"-m experiments.launch.array {shlex.quote(str(listed))}"
            script.write_text(_filled(text, study, script, name=title, count=len(some), needs=needs, command=command))
            made.append(Script(path=script, phase=phase, tasks=len(some)))
    script = folder / f"{len(made):02}-gather.sh"
    command = f"-m experiments launch --gather{option}"
    script.write_text(_filled(text, study, script, name=title, count=1, needs=GATHER, command=command))
    return [*made, Script(path=script, phase=3, tasks=1)]


def _filled(text: str, study, script: Path, *, name: str, count: int, needs: Needs, command: str) -> str:
    root = shlex.quote(str(study.paths.root))
    values = {
        "command": f"cd {root} && {shlex.quote(sys.executable)} {command}",
        "array": f"0-{count - 1}",
        "name": name,
        "log": f"{script.with_suffix('')}-%a.log",
        "cores": str(max(1, math.ceil(needs.cores))),
        "gpus": str(math.ceil(needs.gpus)),
        "memory": str(max(2048, math.ceil(needs.memory / 2**20))),
    }
    used = set(re.findall(r"\{\{(\w*)\}\}", text))
    if wrong := sorted(used - values.keys()) or sorted({"command", "array"} - used):
        what = "has" if wrong[0] in used else "lacks"
        raise UserError(
            f"the template {what} {{{{{wrong[0]}}}}}: it must have {{{{command}}}} and {{{{array}}}}, and may have "
            f"{', '.join(f'{{{{{key}}}}}' for key in values if key not in ('command', 'array'))}"
        )
    for key, value in values.items():
        text = text.replace(f"{{{{{key}}}}}", value)
    return text


def submit(scripts: Iterable[Script]) -> list[str]:
    """Submit the scripts with `sbatch`, each phase behind the ones before it; the numbers of the jobs.

    Raises UserError where sbatch is missing or refuses.
    """
    numbers: dict[int, list[str]] = {}

    def others() -> str:
        ids = " ".join(number for own in numbers.values() for number in own)
        return f"; submitted already are {ids} (`scancel {ids}` takes them back)" if ids else ""

    for script in scripts:
        before = [number for phase, ids in numbers.items() if phase < script.phase for number in ids]
        behind = [f"--dependency=afterany:{':'.join(before)}"] if before else []
        try:
            done = subprocess.run(["sbatch", *behind, str(script.path)], capture_output=True, text=True, check=True)
        except FileNotFoundError as error:
            raise UserError("sbatch is not on this machine: submit where Slurm is") from error
        except subprocess.CalledProcessError as error:
            last = (error.stderr or error.stdout or "").strip().splitlines()
            raise UserError(f"sbatch refuses {script.path}: {last[-1] if last else error}{others()}") from error
        found = re.findall(r"\d+", done.stdout)
        if not found:
            raise UserError(f"sbatch has printed no job number for {script.path}: {done.stdout.strip()!r}{others()}")
        numbers.setdefault(script.phase, []).append(found[-1])
    return [number for ids in numbers.values() for number in ids]
