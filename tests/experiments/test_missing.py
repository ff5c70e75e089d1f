"""In a clone of a named study what runs is what is not finished, and what that reads."""

import shutil
import subprocess

import pytest
from ruamel.yaml import YAML

from experiments.study import missing

STAGES = {  # name: inputs and outputs; results are in git, all others are not
    "resolve": (["params"], ["resolved-a", "resolved-b", "resolved-c"]),
    "data": (["rows"], ["trained", "scored"]),
    "train-a": (["resolved-a", "trained"], ["weights-a"]),
    "train-b": (["resolved-b", "trained"], ["weights-b"]),
    "score-a": (["weights-a", "scored"], ["results-a"]),
    "score-b": (["weights-b", "scored"], ["results-b"]),
    "summary": (["results-a", "results-b"], ["results-summary"]),
}


def made(stages: dict) -> None:
    """Write the pipeline. Each stage copies its inputs; `resolved-x` takes the line of `params` that names x.

    A second output is the time, as of a stage that says how long it took; `processor` decides on bits, and is no input.
    """
    of_resolve = "for x in a b c; do grep ^$x params > resolved-$x; done; true"
    of_data = "head -1 rows > trained; tail -1 rows > scored"
    found = {}
    for name, (deps, outs) in stages.items():
        command = {"resolve": of_resolve, "data": of_data}.get(name, f"cat {' '.join(deps)} processor > {outs[0]}")
        command += "; date +%s%N > ".join(["", *outs[1:]]) if name.startswith("train") else ""
        kept = [{out: {"cache": not out.startswith("results")}} for out in outs]
        found[name] = {"cmd": command, "deps": deps, "outs": kept}
    with open("dvc.yaml", "w") as file:
        YAML().dump({"stages": found}, file)


def begun(tmp_path, monkeypatch) -> None:
    """A clone with the results of STAGES."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params").write_text("a 1\nb 1\n")
    (tmp_path / "rows").write_text("row to train on\nrow to score\n")
    (tmp_path / "processor").touch()
    made(STAGES)
    for command in ("git init -q", "dvc init -q", "dvc repro -q"):
        subprocess.run(command.split(), check=True)
    for pattern in ("resolved-*", "weights-*", "trained", "scored"):
        for path in tmp_path.glob(pattern):
            path.unlink()
    shutil.rmtree(tmp_path / ".dvc/cache")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    begun(tmp_path, monkeypatch)
    return tmp_path


def ran() -> list[str]:
    from dvc.repo import Repo

    missing.begin("dvc.yaml")
    with Repo() as repo, missing.only_needed():
        return sorted(stage.name for stage in repo.reproduce("dvc.yaml"))


def test_a_new_cell_runs_with_what_it_reads_and_finished_ones_do_not(clone):
    (clone / "params").write_text("a 1\nb 1\nc 1\n")
    more = {"train-c": (["resolved-c", "trained"], ["weights-c"]), "score-c": (["weights-c", "scored"], ["results-c"])}
    made(STAGES | more | {"summary": (["results-a", "results-b", "results-c"], ["results-summary"])})
    assert ran() == ["data", "score-c", "summary", "train-c"]
    assert ran() == [] and not (clone / "weights-a").exists()


def test_a_cell_with_another_setting_trains_again(clone):
    (clone / "params").write_text("a 1\nb 2\n")
    assert ran() == ["data", "score-b", "summary", "train-b"]


def test_a_cell_that_is_only_scored_again_trains_again_where_its_weights_are_missing(clone):
    stages = STAGES | {"score-b": (["weights-b", "scored", "params"], ["results-b"])}
    made(stages)
    assert ran() == ["data", "score-b", "summary", "train-b"]


def test_rows_that_only_scores_read_change_every_score(clone):
    (clone / "rows").write_text("row to train on\nanother row\n")
    assert ran() == ["score-a", "score-b", "summary", "train-a", "train-b"]


def test_what_runs_for_its_weights_alone_keeps_its_results_unless_they_are_other_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(STAGES, "train-a", (["resolved-a", "trained"], ["weights-a", "results-time"]))
    monkeypatch.setitem(STAGES, "told", (["results-time"], ["results-told"]))
    begun(tmp_path, monkeypatch)
    first = (tmp_path / "results-time").read_text()
    (tmp_path / "rows").write_text("row to train on\nanother row\n")
    assert ran() == ["score-a", "score-b", "summary", "train-a", "train-b"]
    assert (tmp_path / "results-time").read_text() == first and ran() == []
    (tmp_path / "weights-a").unlink()
    (tmp_path / "processor").write_text("other bits")
    (tmp_path / "rows").write_text("row to train on\na third row\n")
    assert {"train-a", "told", "score-a"} <= set(ran())
    assert (tmp_path / "results-time").read_text() != first and ran() == []


def test_nothing_runs_where_nothing_has_changed_and_dvc_is_itself_again(clone):
    import dvc.repo.reproduce as dvc

    before = dvc.plan_repro, dvc._reproduce
    assert ran() == []
    assert (dvc.plan_repro, dvc._reproduce) == before
