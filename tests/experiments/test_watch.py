"""watch: a line for each cell as it finishes, how long the rest takes, and when the command ends."""

import json
import os
import time

import pytest
from ruamel.yaml import YAML

from analysis import numbers
from experiments.commands import watch
from experiments.study import cells, config, environment, outcome
from experiments.study.paths import Paths
from methods.tools.files import read_json
from tests.analysis.fixtures import write_json, write_results

METHODS = ("full", "lora", "ewc", "mofo", "hierarchical")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The demo in an empty project."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    made = config.load("demo").model_copy(update={"paths": Paths(study="demo", root=tmp_path)})
    made.paths.folder.mkdir(parents=True)
    return made


def finish(study, *methods: str) -> None:
    """As if these cells had run: their results, and the stages of dvc.lock up to theirs."""
    write_results(study.paths.results, methods=methods, model="llama-tiny", domain="sums")
    for method in methods:
        metrics = study.paths.results / f"runs/llama-tiny/sums/{method}/seed0/metrics.json"
        write_json(metrics, read_json(metrics) | {"domain_unit": "share"})
    path = study.paths.folder / "dvc.lock"
    names = ["data", "model@llama-tiny"]
    for method in methods:
        names += [
            f"prepare@llama-tiny-{method}-0",
            *(f"{kind}@llama-tiny-sums-{method}-0" for kind in ("train", "evaluate")),
        ]
    there = YAML(typ="safe").load(path)["stages"] if path.exists() else {}
    YAML().dump({"stages": there | {name: {"cmd": "true"} for name in names}}, path)


def ledger(study, *minutes: int) -> None:
    """As if the first cells had been scored here, at these minutes of an hour."""
    lines = [
        {"stage": "evaluate", "cell": cell.name, "weights": "", "when": f"2030-01-02T03:{minute:02}:00+00:00"}
        for cell, minute in zip(cells.grid(study), minutes)
    ]
    study.paths.local.mkdir(parents=True, exist_ok=True)
    (study.paths.local / "ledger-demo.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_time_left_is_that_of_a_cell_for_each_that_is_not_scored(study):
    assert outcome.left(study) == "0 of 5 cells are scored; how long a cell takes is known after the first"
    finish(study, "full")
    cost = read_json(study.paths.run(cells.grid(study)[0]) / "metrics.json")
    seconds = sum(cost[f"seconds_{stage}"] for stage in ("prepare", "train", "evaluate"))
    left = f"about {numbers.seconds(4 * seconds)} to go, {numbers.seconds(seconds)} a cell"
    assert outcome.left(study) == f"1 of 5 cells are scored; {left}"
    finish(study, "lora", "ewc")
    ledger(study, 10, 12, 17)  # two and five minutes between cells: 3.5 a cell
    assert outcome.left(study) == "3 of 5 cells are scored; about 7 min 00 s to go, 3 min 30 s a cell"
    finish(study, "mofo", "hierarchical")
    assert outcome.left(study) == outcome.complete(5)


def test_a_finished_study_is_printed_and_the_command_ends(study, capsys):
    finish(study, *METHODS)
    watch.main(study)
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [cell.name for cell in cells.grid(study)]
    assert all("gain " in line and "lost: general text " in line for line in lines)
    assert last == "all 5 cells are scored"


def test_cells_are_printed_as_they_finish_until_the_run_ends(study, capsys, monkeypatch):
    """One cell is there, one finishes, one fails, and then DVC ends; another method is never run."""
    finish(study, "full")
    held = study.paths.root / environment.LOCK
    path = str(study.paths.results / "runs/x")
    write_json(held, {"write": {path: {"pid": os.getpid(), "cmd": "dvc repro"}}})
    failure = study.paths.failure(cells.grid(study)[2])
    steps = [
        lambda: finish(study, "lora"),
        lambda: write_json(failure, {"reason": "the loss is nan"}),
        lambda: held.write_text(json.dumps({"write": {}})),
    ]
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if steps:
            steps.pop(0)()

    monkeypatch.setattr(time, "sleep", sleep)
    watch.main(study)
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if line.startswith("llama-tiny/")]
    assert [line.split("/")[2] for line in lines] == ["full", "lora", "ewc"]
    assert lines[2].endswith("FAILED: the loss is nan") and not any("nothing runs" in line for line in said)
    assert [line[:6] for line in said if " cells are scored" in line] == ["1 of 5", "2 of 5", "2 of 5"]
    assert len(slept) == 2 + watch.IDLE


def test_before_it_runs_the_command_says_what_would_run_it(study, capsys, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        watch.main(study)
    assert "`make study NAME=demo` does; Ctrl-C ends this command" in capsys.readouterr().out
