"""What the display of a launch says of a cell."""

import time
from types import SimpleNamespace

from experiments.launch.display import QUIET, Display
from experiments.launch.estimate import Estimate
from experiments.launch.here import Here
from experiments.launch.schedule import Schedule, Task
from experiments.study.cells import Cell

CELL = Cell("llama-tiny", "sums", "full", 0)
CHAIN = ("train", "evaluate", "collect")


def test_a_cell_waits_runs_is_scored_and_is_finished(tmp_path):
    stages = [f"{kind}@{CELL.stage}" for kind in CHAIN]
    tasks = [Task(name=name, seconds=1.0, after=frozenset(stages[:i][-1:])) for i, name in enumerate(stages)]
    drift = Task(name=f"drift@{CELL.stage}", after=frozenset(stages[:1]))
    schedule = Schedule([*tasks, drift])
    launch = SimpleNamespace(schedule=schedule, began={}, estimate=Estimate({}), reasons={}, workers=Here(tmp_path))
    display = Display(None, [CELL])

    def state():
        return display.state(launch, CELL)

    assert state() == ("waiting", "")
    for name in stages:
        assert schedule.take(lambda needs: True) == name  # drift is the shortest, and last
        assert state()[0] == "running" and state()[1].startswith(f"{name.partition('@')[0]} for ")
        schedule.finish(name)
    assert state() == ("scored", "drift to come")
    assert display.line(launch).startswith("1 cell: 1 scored; ")
    schedule.finish(drift.name)
    assert state() == ("finished", "")


def test_cells_wait_while_what_they_share_runs(tmp_path):
    cells = [CELL, Cell("llama-tiny", "sums", "full", 1)]
    base = Task(name=f"base@{CELL.model}", seconds=60.0)
    trains = [Task(name=f"train@{cell.stage}", seconds=60.0, after=frozenset([base.name])) for cell in cells]
    schedule = Schedule([base, *trains])
    launch = SimpleNamespace(
        schedule=schedule, began={}, estimate=Estimate({base.name: 60.0}), reasons={}, workers=Here(tmp_path)
    )
    display = Display(None, cells)
    assert schedule.take(lambda needs: True) == base.name
    for cell in cells:
        state, more = display.state(launch, cell)
        assert state == "waiting" and more.startswith("while this runs: base for ") and "1 min 00 s to go" in more
    assert display.line(launch).startswith("2 cells: 2 waiting; 1 shared stage running; ")
    schedule.finish(base.name)
    schedule.take(lambda needs: True)
    assert [display.state(launch, cell)[0] for cell in cells].count("running") == 1
    assert display.line(launch).startswith("2 cells: 1 running, 1 waiting; about ")


def test_a_scored_cell_whose_drift_fails_is_set_aside():
    collect, drift = (Task(name=f"{kind}@{CELL.stage}") for kind in ("collect", "drift"))
    schedule = Schedule([collect, drift])
    schedule.finish(collect.name)
    schedule.set_aside(drift.name)
    launch = SimpleNamespace(schedule=schedule, began={}, reasons={drift.name: "no room"})
    assert Display(None, [CELL]).state(launch, CELL) == ("set aside", "no room")


def test_a_log_says_how_far_a_launch_is_at_the_start_and_where_nothing_ends(tmp_path, monkeypatch, capsys):
    schedule = Schedule([Task(name=f"train@{CELL.stage}", seconds=60.0)])
    launch = SimpleNamespace(schedule=schedule, began={}, estimate=Estimate({}), reasons={}, workers=Here(tmp_path))
    display, now = Display(None, [CELL]), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(3):
        display.update(launch)
    assert capsys.readouterr().out == "1 cell: 1 waiting; about 1 min 00 s to go\n"
    now += QUIET
    display.update(launch)
    display.update(launch)
    assert capsys.readouterr().out.count("about 1 min 00 s to go") == 1
