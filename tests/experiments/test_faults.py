"""`make faults`: what it compares, where it looks for what a killed stage has left, and a few faults of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import __main__ as command
from experiments.faults import driver, world
from experiments.study import cells, config
from experiments.study.paths import HERE, Paths
from methods.errors import UserError
from methods.tools.files import read_json


def test_costs_are_exempt_by_name_and_nothing_else(tmp_path):
    def digest(**content):
        path = tmp_path / "metrics.json"
        path.write_text(json.dumps(content))
        return world._digest(path, "results/metrics.json")

    one = digest(general_kl=0.1, seconds_train=1.0, parts={"ewc": {"peak_memory_bytes": 7}}, when="now")
    assert one == digest(general_kl=0.1, seconds_train=2.0, parts={"ewc": {}}, when="then")
    assert one != digest(general_kl=0.2, parts={"ewc": {}}) and one != digest(general_kl=0.1, parts={})
    curve = tmp_path / "curve.csv"
    curve.write_text("step,seconds,loss\n1,0.5,2.0\n")
    one = world._digest(curve, "results/curve.csv")
    curve.write_text("step,seconds,loss\n1,0.9,2.0\n")
    assert world._digest(curve, "results/curve.csv") == one
    curve.write_text("step,seconds,loss\n1,0.9,2.1\n")
    assert world._digest(curve, "results/curve.csv") != one


def test_the_file_of_a_stage_that_runs_is_where_it_is_looked_for(tmp_path):
    study = config.load("demo").model_copy(update={"paths": Paths(root=tmp_path)})
    for stage in world.stages(study):
        options = vars(command.parser().parse_args(stage.words))
        arguments = {name: value for name, value in options.items() if name not in ("command", "study")}
        if "cell" in arguments:
            arguments["cell"] = cells.parse(arguments["cell"], study)
        with command._stage(study, stage.name, arguments):
            assert (tmp_path / stage.marker).is_file(), stage.words


def test_a_stage_that_ends_well_with_other_numbers_is_lost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = world.World(None, Path("kept"))
    stage = world.Stage(words=("compare",), makes=("results/metrics", "results/summary", "work/data"))
    for root in ("kept", "."):
        for name in ("results/metrics/full.json", "results/summary/table.csv", "work/data/rows.jsonl"):
            path = Path(root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"kl": 0.1, "seconds_train": 1.0}')
        Path(root, "results/summary/report.html").write_text(root)
    here.made_equal(stage)
    for name, text in {"results/summary/table.csv": "", "results/metrics/full.json": '{"kl": 0.0}'}.items():
        before = Path(name).read_text()
        Path(name).write_text(text)
        with pytest.raises(world.Lost, match=f"{name} is another one, and nobody said why"):
            here.made_equal(stage)
        Path(name).write_text(before)
    Path("work/data/rows.jsonl").unlink()
    with pytest.raises(world.Lost, match="rows.jsonl is missing"):
        here.made_equal(stage)


def test_every_second_fault_is_a_stop_and_each_kind_has_its_turn(tmp_path):
    order = driver.order()
    assert set(order) == set(driver.KINDS) and len(driver.KINDS) >= 15
    assert all((name in driver.STOPS) == (place % 2 == 0) for place, name in enumerate(order))
    known = {"minutes": 1.0, "count": 1, "seed": 0, "first": 0}
    with pytest.raises(UserError, match="unknown kind 'sigkil'.*did you mean 'sigkill'"):
        driver.main(tmp_path / "report.json", kinds="sigkil", **known)


def test_the_report_has_no_folder_of_the_machine():
    line = f'File "{os.getcwd()}/methods/part.py", File "{os.__file__}", File "{pytest.__file__}"'
    assert driver._without_folders(line).startswith('File "methods/part.py", File "lib')
    assert os.getcwd() not in driver._without_folders(line) and sys.prefix not in driver._without_folders(line)


@pytest.mark.thorough
def test_faults_are_survived(tmp_path):
    report = HERE / "results" / "faults.json"
    before = report.read_bytes() if report.is_file() else None
    words = [sys.executable, "-m", "experiments", "faults", "--count", "6", "--seed", "1"]
    try:
        done = subprocess.run(
            [*words, "--kinds", "sigkill,sigterm,nan,cut,twice,lock"],
            cwd=HERE,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found = read_json(report)
    finally:
        report.unlink(missing_ok=True)
        if before is not None:
            report.write_bytes(before)
    assert found["faults"] == found["survived"] == 6 and not found["lost"]
