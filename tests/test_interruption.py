"""Stages that are killed with SIGKILL and run again from the command line give the weights of an uninterrupted run."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from experiments.study.paths import HERE

CELL = "llama-tiny/sums/{}/seed0"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def stage(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments", *arguments], cwd=folder, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-3000:]


def killed(folder: Path, *arguments: str) -> None:
    """Start a stage, and kill it and what it started as soon as it has left a checkpoint."""
    at_work = subprocess.Popen(
        [sys.executable, "-m", "experiments", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    saved = folder / "work" / "local" / "resume"
    until = time.monotonic() + 120
    while not list(saved.glob("**/save-????????/manifest.json")):
        assert at_work.poll() is None and time.monotonic() < until, "it ended before it left a checkpoint"
        time.sleep(0.002)
    for process in [*psutil.Process(at_work.pid).children(recursive=True), psutil.Process(at_work.pid)]:
        process.kill()
    at_work.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo as a default study with longer phases, a checkpoint after every step, and two processes."""
    folder = tmp_path_factory.mktemp("study")
    for name in ("experiments", "methods", "evaluation", "analysis"):
        shutil.copytree(HERE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(HERE / "dvc.yaml", folder / "dvc.yaml")
    raw = YAML(typ="safe").load(HERE / "experiments/studies/demo/params.yaml")
    raw["train"] |= {"epochs": 4.0, "checkpoint_seconds": 0.0}
    raw["methods"] = {"full": {}, "hierarchical": {"hierarchical": {"epochs": 4.0}}}
    raw["grid"]["methods"] = list(raw["methods"])
    raw["models"]["llama-tiny"]["processes"] = 2
    raw.pop("tune", None)
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(raw, file)
    for command in (["resolve"], ["model", "llama-tiny"], ["data"]):
        stage(folder, *command)
    return folder


@pytest.mark.thorough
def test_a_cell_on_two_processes(folder):
    cell = CELL.format("full")
    stage(folder, "prepare", "llama-tiny", "full", "0")
    stage(folder, "train", cell)
    record = folder / "results/runs" / cell / "train.json"
    whole = json.loads(record.read_text())
    assert whole["processes"] == 2 and whole["sharded"] and whole["steps_resumed"] == 0
    assert not list((folder / "work/local/resume").glob("**/save-*")), "a finished run leaves no checkpoint"
    killed(folder, "train", cell)
    stage(folder, "train", cell)
    again = json.loads(record.read_text())
    assert again["steps_resumed"] > 0
    assert again["weights_sha256"] == whole["weights_sha256"]


def test_a_preparation_on_one_process(folder):
    path = folder / "params.yaml"
    path.write_text(path.read_text().replace("processes: 2", "processes: 1"))
    command = ("prepare", "llama-tiny", "hierarchical", "0")
    stage(folder, *command)
    out = folder / "work/prepared/llama-tiny/hierarchical/seed0"
    whole = {file.name: file.read_bytes() for file in out.iterdir()}
    assert len(whole) > 1
    shutil.rmtree(folder / "work/local/prepared")
    shutil.rmtree(out)
    killed(folder, *command)
    assert not out.exists()
    stage(folder, *command)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == whole
    assert not list((folder / "work/local/resume").glob("**/save-*"))
