"""launch: run a study's unfinished stages on Ray, many cells at once, with the results of `dvc repro`.

    python -m experiments launch                        # on this machine's GPUs or cores
    python -m experiments launch '*/lora/seed0'         # some cells
    python -m experiments launch --address auto         # on a Ray cluster
    python -m experiments launch --slurm job.sh         # writes array jobs for a cluster without Ray

The driver decides by DVC's own rules what has to run, as `dvc repro` does, and commits every stage that ends well to
DVC; workers run the stages' commands and nothing else. At the end the results are copied into MLflow's database.
"""

import fcntl
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from analysis import numbers
from experiments.commands import plan as planning
from experiments.commands import repro, track
from experiments.launch import dvc_stages, on_ray, simulate, slurm, tasks
from experiments.launch.display import Display
from experiments.launch.driver import Launch
from experiments.launch.estimate import Estimate
from experiments.launch.here import Here
from experiments.launch.schedule import Schedule, Task
from experiments.study import cells, missing, pipeline
from experiments.training import hardware
from methods.errors import UserError

MOST = 1_000_000  # workers, and cells of a simulation


def main(
    study,
    *,
    patterns: Sequence[str],
    address: str,
    workers: int | None,
    template: str,
    submit: bool,
    gather: bool,
    simulated: int | None,
) -> int:
    """Run the cells that match; the exit status is 1 if one was set aside."""
    if submit and not template:
        raise UserError("--submit goes with --slurm TEMPLATE: it submits what that writes")
    for option, number in (("--workers", workers), ("--simulate", simulated)):
        if number is not None and not 1 <= number <= MOST:
            raise UserError(f"{option} {number}: it must be a whole number from 1 to {MOST:,}")
    for number in (signal.SIGTERM, signal.SIGHUP):  # the end of a terminal, too, but not below nohup
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    chosen = cells.matching(study, patterns)
    pipeline.main(study)
    if simulated is not None:
        return _simulate(study, cells_wanted=simulated, workers=workers or 256)
    path = os.path.relpath(study.paths.folder / "dvc.yaml")
    if study.name and not patterns and repro.committed(path):
        print(f"study {study.name} is up to date: the committed results are those of this code and these settings")
        return 0
    if any(not (study.paths.model(name) / "base.json").is_file() for name in study.grid.models):
        planning.refuse_models(study)
    with _alone(study):
        if study.name:
            missing.begin(path)
        with dvc_stages.opened(path) as stages:
            plan = planning.make(study, patterns=patterns)
            made = _Made(study, chosen, stages, plan=plan, workers=workers)
            if study.name:  # the default study is for everybody to run, as with `repro`
                stages.restore_for(task.name for task in made.tasks)
            if template:
                launch, scripts = _array_jobs(made, Path(template))
            elif not any(stages.changed(task.name) for task in made.tasks):
                track.main(study)  # an earlier launch may have been stopped before that
                print("nothing is left to run: the results are those of this code and these settings")
                return 0
            elif gather:
                launch = made.launch(Here(str(study.paths.root)), records_from=0.0)
                launch.run()
            else:
                memory = hardware.available_memory(torch.device("cpu"))
                on_ray.start(address=address, cores=made.all_cores, gpus=made.gpus, memory=memory)
                launch = made.launch(on_ray.RayWorkers(study=study, names=tasks.names(study), cached=stages.outputs))
                launch.run()
        if not template or launch.reasons:
            return _finish(study, launch)
    if submit:  # now that this launch is over, beside which the last job would be refused
        print(f"submitted as {', '.join(slurm.submit(scripts))}; the last one takes over what the others made")
    else:
        print("submit them in this order, each after the ones before it has ended (or all with --submit)")
    return 0


def _stop(number: int, frame: Any) -> None:
    """Stop as Ctrl-C does, once: a second signal would end the stages' own stop."""
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def _alone(study) -> Iterator[None]:
    """Refuse a second launch of the study beside one at work: it would remove what that one is writing."""
    path = study.paths.local / "launch" / (study.name or "default") / "driver"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                "another `launch` of this study is at work: wait until it ends, or stop it with Ctrl-C where it was "
                "started"
            ) from error
        except OSError:  # a disk without locks
            pass
        yield


class _Made:
    """What a launch is made of: the study's tasks, and what they need of a machine."""

    def __init__(self, study, chosen: list, stages: dvc_stages.Stages, *, plan: Mapping, workers: int | None):
        self.study, self.chosen, self.stages = study, chosen, stages
        cores = os.cpu_count() or 1
        self.gpus = torch.cuda.device_count() if study.device != "cpu" else 0
        self.needs = tasks.needs(study, plan, cores=max(1, cores // (workers or 1)), gpus=self.gpus)
        self.all_cores = max(cores, (workers or 0) * max(int(needs.cores) for needs in self.needs.values()))
        needed = tasks.needed(stages.after, tasks.targets(study, chosen))
        self.tasks = tasks.build(study, after=stages.after, needed=needed, plan=plan, needs=self.needs)
        self.threads = _threads(study, self.needs, workers)

    def launch(self, to: Any, *, only: Sequence[Task] | None = None, **settings: Any) -> Launch:
        """A launch of the tasks on the workers `to`."""
        chosen = self.tasks if only is None else only
        return Launch(
            study=self.study,
            stages=self.stages,
            schedule=Schedule(chosen),
            estimate=Estimate({task.name: task.seconds for task in self.tasks}),
            names=tasks.names(self.study),
            workers=to,
            show=Display(self.study, self.chosen if only is None else []),
            environment={name: os.environ[name] for name in on_ray.PASSED if name in os.environ},
            threads=self.threads,
            **settings,
        )


def _threads(study, needs: Mapping, workers: int | None) -> dict[str, int | None]:
    """OMP_NUM_THREADS of each model's cells; None, as in a serial run, where nobody has said how many cores they take.

    The number of threads decides how sums are rounded on a CPU.
    """
    said = workers or os.environ.get("OMP_NUM_THREADS")
    return {name: int(taken.cores) if said or study.models[name].needs.cores else None for name, taken in needs.items()}


def _finish(study, launch: Launch) -> int:
    """Copy what has run into MLflow's database, and say what was set aside."""
    pipeline.main(study)
    if launch.ran:
        track.main(study)
    aside = {name for name in launch.schedule.aside if name.startswith("collect@")}
    for name, reason in launch.reasons.items():
        print(f"set aside: {name}: {reason}", file=sys.stderr)
    if aside:
        print(f"{len(aside)} cells have no result; the next `launch` tries them again", file=sys.stderr)
    return int(bool(launch.reasons))


def _array_jobs(made: _Made, template: Path) -> tuple[Launch, list[slurm.Script]]:
    """Run what belongs to this machine (models and rows), then write the array jobs, if that went well."""
    study = made.study
    first = [task for task in made.tasks if task.name.partition("@")[0] in ("resolve", "model", "data")]
    launch = made.launch(Here(str(study.paths.root)), only=first)
    launch.run()
    if launch.reasons:
        return launch, []
    jobs = launch.unfinished(made.tasks)
    found = slurm.lines(made.tasks, jobs, cell_of=lambda name: launch.names.cells[name])
    folder = study.paths.root / launch.folder / "slurm"
    scripts = slurm.write(study, template=template, folder=folder, found=found)
    for script in scripts:
        print(f"{os.path.relpath(script.path)}: {script.tasks} task{'s' if script.tasks > 1 else ''}")
    return launch, scripts


def _simulate(study, *, cells_wanted: int, workers: int) -> int:
    """Print the makespan of so many cells of this study by the plan's costs, against the lower bound."""
    plan = planning.make(study, patterns=[f"*/seed{study.grid.seeds[0]}"], anew=True)
    with dvc_stages.opened(os.path.relpath(study.paths.folder / "dvc.yaml")) as stages:
        made, count = simulate.with_seeds(study, after=stages.after, plan=plan, cells=cells_wanted)
    for spread, words in ((0.0, "as long as planned"), (simulate.SPREAD, "each stage off by a fifth")):
        found = simulate.simulate(made, workers=workers, spread=spread)
        print(
            f"{count} cells, {found.stages} stages, {workers} workers, {words}: makespan "
            f"{numbers.seconds(found.makespan)}, lower bound {numbers.seconds(found.bound)}, ratio "
            f"{found.makespan / found.bound:.4f}"
        )
    return 0
