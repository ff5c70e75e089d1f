"""The driver of a launch against `dvc repro`, on a pipeline of small commands."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from ruamel.yaml import YAML

from experiments.launch import dvc_stages, work
from experiments.launch.driver import LOSSES, TRIES, Gone, Launch
from experiments.launch.estimate import Estimate
from experiments.launch.here import Here
from experiments.launch.schedule import Needs, Schedule, Task
from experiments.launch.tasks import Names, needed
from experiments.study import config, failures
from experiments.study.cells import Cell
from experiments.study.paths import Paths
from methods.tools.files import read_json

MAKE = "python make.py {out} {deps}"
STAGES = {  # output: inputs
    "work/data": ["rows.txt"],
    "work/a": ["work/data"],
    "work/b": ["work/data"],
    "results/a.json": ["work/a"],
    "results/b.json": ["work/b"],
    "results/summary.json": ["results/a.json", "results/b.json"],
}
SCRIPT = """
import os, pathlib, signal, sys
out, deps = pathlib.Path(sys.argv[1]), sys.argv[2:]
plan = pathlib.Path("plans", out.name)  # what goes wrong, once for each line
if plan.is_file() and (lines := plan.read_text().split()):
    plan.write_text("\\n".join(lines[1:]))
    if lines[0] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit("error: " + lines[0])
read = [path for dep in deps for path in sorted([*pathlib.Path(dep).rglob("*"), pathlib.Path(dep)])]
text = "".join(path.read_text() for path in read if path.is_file())
if out.suffix:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + out.name)
else:
    out.mkdir(parents=True)
    (out / "part.txt").write_text(text + out.name)
"""
CELL = Cell("llama-tiny", "sums", "full", 0)


class Pool(Here):
    """Workers on this machine for all tasks."""

    def never(self, needs: Needs) -> str:
        return ""


class Said:
    """What a display would show."""

    def __init__(self):
        self.lines, self.finished = [], []

    def say(self, line):
        self.lines.append(line)

    def done(self, launch, name):
        self.finished.append(name)

    def update(self, launch):
        pass

    stopping = close = update


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A DVC project with the stages."""
    from dvc.repo import Repo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    Repo.init(no_scm=True).close()
    Path("make.py").write_text(SCRIPT)
    Path("rows.txt").write_text("rows ")
    Path("plans").mkdir()
    stages = {
        ("join-" if "results/" in out else "") + Path(out).stem: {
            "cmd": MAKE.format(out=out, deps=" ".join(deps)),
            "deps": deps,
            "outs": [{out: {"cache": not out.startswith("results/")}}],
        }
        for out, deps in STAGES.items()
    }
    with Path("dvc.yaml").open("w") as file:
        YAML().dump({"stages": stages}, file)
    return tmp_path


def launched(project: Path, *targets: str, workers=None, names: Names | None = None, named: bool = False) -> Launch:
    study = config.load("demo").model_copy(update={"paths": Paths(study="demo", root=project)})
    with dvc_stages.opened("dvc.yaml") as stages:
        chosen = needed(stages.after, targets or ["join-summary"])
        if named:
            stages.restore_for(chosen)
        tasks = [Task(name=name, after=stages.after[name], needs=Needs(here=True)) for name in chosen]
        launch = Launch(
            study=study,
            stages=stages,
            schedule=Schedule(tasks),
            estimate=Estimate({}),
            names=names or Names(),
            workers=workers or Pool(str(project)),
            show=Said(),
        )
        launch.run()
    return launch


def launch_job(project: Path, name: str) -> work.Job:
    """A job by whose name the lock of a stage is found."""
    folder = "work/local/launch/demo"
    return work.Job(name=name, address="", command="", deps={}, outs=(), folder=folder)


def serial(project: Path) -> str:
    """dvc.lock after `dvc repro`."""
    from dvc.repo import Repo

    with Repo() as repo:
        repo.reproduce()
        assert repo.status() == {}
    return (project / "dvc.lock").read_text()


def status() -> dict:
    from dvc.repo import Repo

    with Repo() as repo:
        return repo.status()


def test_a_launch_leaves_the_lock_of_a_serial_run_and_a_second_one_runs_nothing(project):
    ran = launched(project).ran
    assert sorted(ran) == ["a", "b", "data", "join-a", "join-b", "join-summary"] and status() == {}
    lock = YAML(typ="safe").load(project / "dvc.lock")
    assert launched(project).ran == []
    assert not list((project / "work/local/launch/demo").glob("*.json"))  # every note has done its service
    (project / "rows.txt").write_text("other rows ")
    again = launched(project, "join-a")
    assert (again.ran, again.reasons) == (["data", "a", "join-a"], {})
    (project / "rows.txt").write_text("rows ")
    for name in ("dvc.lock", "work", "results"):
        subprocess.run(["rm", "-rf", name], check=True)
    assert YAML(typ="safe").load(serial(project)) == lock


def test_in_a_clone_of_a_named_study_finished_stages_run_only_for_what_is_read_of_them(project):
    serial(project)
    for name in ("work", ".dvc/cache"):
        shutil.rmtree(project / name)
    assert launched(project, named=True).ran == []
    (project / "results/b.json").unlink()
    assert launched(project, named=True).ran == []  # it is missing, and nothing that will run reads it
    with Path("dvc.yaml").open() as file:
        pipeline = YAML().load(file)
    pipeline["stages"]["join-summary"]["cmd"] = pipeline["stages"]["join-summary"]["cmd"].replace("python", "python -B")
    with Path("dvc.yaml").open("w") as file:
        YAML().dump(pipeline, file)
    assert launched(project, named=True).ran == ["data", "b", "join-b", "join-summary"]
    assert not (project / "work/a").exists() and launched(project).ran == ["a"]


def test_what_runs_for_its_outputs_alone_keeps_its_results_and_leaves_its_readers_current(project):
    def edited(change):
        with Path("dvc.yaml").open() as file:
            pipeline = YAML().load(file)
        change(pipeline["stages"])
        with Path("dvc.yaml").open("w") as file:
            YAML().dump(pipeline, file)

    def with_seconds(stages):
        stages["a"]["cmd"] += " && date +%s%N > results/seconds"
        stages["a"]["outs"].append({"results/seconds": {"cache": False}})
        told = {"cmd": "cp results/seconds results/told", "deps": ["results/seconds"]}
        stages["told"] = told | {"outs": [{"results/told": {"cache": False}}]}

    edited(with_seconds)
    (project / "results").mkdir()
    serial(project)
    first = (project / "results/seconds").read_text()
    for name in ("work", ".dvc/cache"):
        shutil.rmtree(project / name)
    edited(lambda stages: stages["join-a"].update(cmd=stages["join-a"]["cmd"].replace("python", "python -B")))
    assert launched(project, "join-a", named=True).ran == ["data", "a", "join-a"]
    assert (project / "results/seconds").read_text() == first and "told" not in status()


def test_a_failed_stage_is_tried_once_more_then_set_aside_and_the_others_go_on(project):
    (project / "plans/a").write_text("broken")
    (project / "plans/b").write_text("killed killed")
    names = Names(cells={"b": CELL, "join-b": CELL})
    launch = launched(project, names=names)
    assert "a: broken; it is tried once more" in launch.show.lines
    assert launch.reasons == {"b": "killed by signal 9 during b"} and "join-a" in launch.ran
    assert launch.schedule.aside == {"b", "join-b", "join-summary"}
    record = read_json(launch.study.paths.failure(CELL))
    assert (record["kind"], record["stage"], record["reason"]) == ("killed", "b", "killed by signal 9 during b")
    assert launched(project).ran == ["b", "join-b", "join-summary"] and status() == {}


def test_a_finished_cell_whose_drift_cannot_be_made_keeps_its_result(tmp_path):
    """Every cell's drift reads what one method prepares: that it fails is a failure of that method's cells alone."""
    study = config.load("demo").model_copy(update={"paths": Paths(study="demo", root=tmp_path)})
    lost = Cell("llama-tiny", "sums", "ewc", 0)
    prepared, here = f"prepare@llama-tiny-ewc-{lost.seed}", Needs(here=True)
    tasks = [Task(name=prepared, needs=here), Task(name=f"collect@{CELL.stage}", needs=here)]
    tasks += [Task(name=f"drift@{cell.stage}", after=frozenset({prepared}), needs=here) for cell in (CELL, lost)]
    tasks += [Task(name=f"train@{lost.stage}", after=frozenset({prepared}), needs=here)]
    tasks += [Task(name=f"collect@{lost.stage}", after=frozenset({f"train@{lost.stage}"}), needs=here)]
    kinds = ("train", "collect", "drift")
    launch = Launch(
        study=study,
        stages=SimpleNamespace(let_go=lambda name: None),
        schedule=Schedule(tasks),
        estimate=Estimate({}),
        names=Names(cells={f"{kind}@{c.stage}": c for c in (CELL, lost) for kind in kinds}, prepared={prepared: lost}),
        workers=Pool(str(tmp_path)),
        show=Said(),
    )
    launch._set_aside(prepared, "no memory")
    assert read_json(study.paths.failure(lost))["reason"] == f"{prepared} failed: no memory"
    assert not study.paths.failure(CELL).exists()


def test_a_diverged_training_is_not_repeated(project):
    study = config.load("demo").model_copy(update={"paths": Paths(study="demo", root=project)})
    (project / "plans/a").write_text("nan nan")

    class Recording(Pool):
        def ended(self, seconds):
            outcomes = super().ended(seconds)
            if any(outcome.status for outcome in outcomes.values()):
                failures.keep(study, CELL, stage="train", kind="nan", reason="the loss is nan at step 3 of 9")
            return outcomes

    launch = launched(project, workers=Recording(str(project)), names=Names(cells={"a": CELL}))
    assert launch.reasons == {"a": "the loss is nan at step 3 of 9"} and launch.tries == {"a": 1}


def test_what_ended_after_the_driver_was_killed_is_taken_over(project):
    launched(project, "data")
    with dvc_stages.opened("dvc.yaml") as stages:
        stage, deps = stages["a"], stages.inputs("a")
    job = work.Job(
        name="a", address="a", command=stage.cmd, deps=deps, outs=("work/a",), folder="work/local/launch/demo"
    )
    assert work.run(job, str(project)).status == 0
    made = (project / "work/a/part.txt").stat().st_mtime_ns
    (project / "plans/a").write_text("it-must-not-run-again")
    assert "a" in launched(project).ran and status() == {}
    assert (project / "work/a/part.txt").read_text() == "rows dataa" and made  # the file is the first run's
    assert (project / "plans/a").read_text() == "it-must-not-run-again"


def test_a_full_disk_sets_a_stage_aside_and_leaves_the_lock_whole(project, monkeypatch):
    commit = dvc_stages.Stages.commit

    def full(self, name):
        if name == "a":
            raise OSError(28, "No space left on device", "work/a")
        return commit(self, name)

    monkeypatch.setattr(dvc_stages.Stages, "commit", full)
    launch = launched(project)
    assert launch.reasons == {"a": "its outputs cannot be kept: No space left on device"}
    assert set(YAML(typ="safe").load(project / "dvc.lock")["stages"]) == {"data", "b", "join-b"}
    monkeypatch.setattr(dvc_stages.Stages, "commit", commit)
    launched(project)
    assert status() == {}


@pytest.mark.parametrize("times, lost", [(LOSSES, False), (LOSSES + TRIES, True)])
def test_a_machine_that_goes_away_is_no_failure_of_its_stage(project, times, lost):
    class Going(Pool):
        left = times

        def ended(self, seconds):
            outcomes = super().ended(seconds)
            if "a" in outcomes and self.left:
                self.left -= 1
                (project / "work/local/launch/demo/a.json").unlink()  # the note that it has ended
                outcomes["a"] = work.Outcome(status=-9, tail=work.LOST, lost=True)
            return outcomes

    launch = launched(project, workers=Going(str(project)))
    assert set(launch.reasons) == ({"a"} if lost else set())
    assert lost or status() == {}


def test_outputs_are_left_to_a_lost_worker_that_still_writes(project):
    """It holds the stage's lock: the driver gives the stage to another worker, which waits, and removes nothing."""
    held = ExitStack()

    class Apart(Pool):
        given = 0

        def give(self, job, needs):
            self.given += job.name == "a"
            if self.given == 2 and job.name == "a":
                assert (project / "work/a/part.txt").exists()
                held.close()
            super().give(job, needs)

        def ended(self, seconds):
            outcomes = super().ended(seconds)
            if "a" in outcomes and self.given == 1:
                (project / "work/local/launch/demo/a.json").unlink()  # its note: it has not ended yet
                held.enter_context(work.alone(launch_job(project, "a"), str(project)))
                outcomes["a"] = work.Outcome(status=-9, tail=work.LOST, lost=True)
            return outcomes

    workers = Apart(str(project))
    launch = launched(project, workers=workers)
    assert workers.given == 2 and not launch.reasons and status() == {}


def test_without_workers_a_launch_ends_and_keeps_what_has_ended(project):
    class Ended(Pool):
        def ended(self, seconds):
            if "b" in (outcomes := super().ended(seconds)):
                raise Gone("Ray on this machine has ended")
            return outcomes

    with pytest.raises(Gone):
        launched(project, workers=Ended(str(project)))
    assert "data" in YAML(typ="safe").load(project / "dvc.lock")["stages"]
    launched(project)
    assert status() == {}


def test_ctrl_c_stops_stages_and_the_next_launch_goes_on(project):
    class Interrupted(Pool):
        def ended(self, seconds):
            outcomes = super().ended(seconds)
            if "a" in outcomes:
                raise KeyboardInterrupt
            return outcomes

    with pytest.raises(KeyboardInterrupt):
        launched(project, workers=Interrupted(str(project)))
    lock = YAML(typ="safe").load(project / "dvc.lock")
    assert "data" in lock["stages"] and "join-summary" not in lock["stages"]
    assert not json.loads((project / ".dvc/tmp/rwlock").read_text()).get("write")
    launched(project)
    assert status() == {}
