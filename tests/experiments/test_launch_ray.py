"""A real launch of four tiny cells on a local Ray against the serial run; what is killed, full, apart or on Slurm.

Ray is optional: `pip install -r requirements-launch.lock`. The tests on Slurm's array jobs need none.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from experiments.launch import work
from experiments.study.paths import HERE
from tests.test_pipeline import project_of, run

pytestmark = pytest.mark.thorough
with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

CELLS = [f"llama-tiny/sums/{method}/seed{seed}" for method in ("full", "ewc") for seed in (0, 1)]
SAME = ("weights", "scores.json", "items.csv.gz", "drift.json")  # outputs that are equal in every run
LAUNCH = (sys.executable, "-m", "experiments", "launch")
SBATCH = '''#!{python}
"""Slurm's sbatch, but the array runs here and at once."""
import os, pathlib, re, subprocess, sys
script = pathlib.Path(sys.argv[-1])
text = script.read_text()
first, last = map(int, re.search(r"#SBATCH --array=(\\d+)-(\\d+)", text).groups())
for index in range(first, last + 1):
    log = re.search(r"#SBATCH --output=(.+)", text)[1].replace("%a", str(index))
    with open(log, "w") as out:
        subprocess.run(["bash", script], env=os.environ | {{"SLURM_ARRAY_TASK_ID": str(index)}}, stdout=out, stderr=out)
with open("submitted", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
print("Submitted batch job", 100 + int(script.name[:2]))
'''
TEMPLATE = """#!/bin/bash
#SBATCH --job-name={{name}}
#SBATCH --array={{array}}
#SBATCH --output={{log}}
#SBATCH --gpus={{gpus}} --cpus-per-task={{cores}} --mem={{memory}}M
{{command}}
"""


def made(folder: Path) -> Path:
    """A project whose default study has the four cells; the rows and the model are there."""
    params = YAML().load(HERE / "experiments/studies/demo/params.yaml")
    params["grid"].update(methods=["full", "ewc"], seeds=[0, 1])
    project_of(folder, params)
    run(folder, sys.executable, "-m", "experiments", "pipeline")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "start")
    return folder


@pytest.fixture(scope="module")
def serial(tmp_path_factory, warm_folder):
    """The project after `dvc repro`, one cell after another."""
    folder = made(tmp_path_factory.mktemp("serial"))
    run(folder, "python", "-m", "experiments", "repro", PATH=f"{warm_folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The project after a launch of four cells at once."""
    folder = made(tmp_path_factory.mktemp("launched"))
    done = run(folder, *LAUNCH, "--workers", "4")
    assert done.stdout.count(": gain ") == len(CELLS)
    assert "4 cells: 4 finished" in done.stdout and "to go (measured" in done.stdout
    return folder


def outputs(folder: Path) -> dict[str, dict[str, str]]:
    """The hashes in dvc.lock of every output that must be equal in every run, by stage."""
    stages = YAML(typ="safe").load(folder / "dvc.lock")["stages"]
    cached = ("work/models", "work/data", "work/resolved", "work/prepared")
    return {
        name: {
            out["path"]: out["md5"]
            for out in stage["outs"]
            if out["path"].endswith(SAME) or out["path"].startswith(cached)
        }
        for name, stage in stages.items()
        if name != "compare"
    }


def check_equal(folder: Path, serial: Path) -> None:
    """The lock holds the serial run's hashes, files are equal byte for byte, and DVC finds nothing to do."""
    assert outputs(folder) == outputs(serial)
    for cell in CELLS:
        for name in ("scores.json", "items.csv.gz"):
            path = Path("results/runs", cell, name)
            assert (folder / path).read_bytes() == (serial / path).read_bytes(), path
        weights = Path("work/cells", cell, "weights")
        files = [file.relative_to(serial) for file in (serial / weights).rglob("*") if file.is_file()]
        assert files and all((folder / file).read_bytes() == (serial / file).read_bytes() for file in files)
    assert json.loads(run(folder, "dvc", "status", "--json", "dvc.yaml").stdout) == {}


def tracked(folder: Path) -> set[str]:
    """The cells in MLflow's database."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("default").experiment_id])
    return {run.data.tags["holdfast.key"] for run in runs if run.data.tags.get("row") == "cell"}


@with_ray
def test_four_cells_at_once_are_those_of_a_serial_run_byte_for_byte(launched, serial):
    check_equal(launched, serial)
    assert tracked(launched) == set(CELLS)
    reused = [
        json.loads((launched / f"results/prepared/llama-tiny/ewc/seed{seed}/prepare.json").read_text())["reused"]
        for seed in (0, 1)
    ]
    assert sorted(reused) == [False, True]  # the Fisher of one seed, for which the other has waited
    again = run(launched, *LAUNCH)
    assert "nothing is left to run" in again.stdout and ": gain " not in again.stdout


def forget(folder: Path, cell: str) -> None:
    """Delete the cell's weights, also those in DVC's cache, so that its training runs again."""
    stages = YAML(typ="safe").load(folder / "dvc.lock")["stages"]
    path = f"work/cells/{cell}/weights"
    digest = next(out["md5"] for stage in stages.values() for out in stage["outs"] if out["path"] == path)
    (folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]).unlink()
    shutil.rmtree(folder / path)


def stage_of(folder: Path, kind: str) -> int:
    """The process of a running stage, once there is one."""
    for _ in range(6000):
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes().split(b"\0")
                if command[2:4] == [b"experiments", kind.encode()] and (path / "cwd").resolve() == folder.resolve():
                    return int(path.name)
            except OSError:
                continue
        time.sleep(0.05)
    raise AssertionError(f"no {kind} runs")


def begin(folder: Path, *arguments: str, background: bool = False) -> subprocess.Popen:
    """Start a launch in a session of its own; in the background of a script it is not to heed Ctrl-C."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*(["bash", "-c", "trap '' INT; exec \"$@\"", "--"] if background else []), *LAUNCH, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


@with_ray
def test_a_worker_that_is_killed_in_the_middle_of_a_cell_is_replaced(launched, serial):
    forget(launched, CELLS[0])
    process = begin(launched)
    stage = stage_of(launched, "train")
    worker = int((Path("/proc") / str(stage) / "stat").read_text().rpartition(")")[2].split()[1])
    os.kill(worker, signal.SIGKILL)
    told, _ = process.communicate()
    assert process.returncode == 0, told
    assert "the worker was lost during train; it is given to another worker" in told
    check_equal(launched, serial)


@with_ray
@pytest.mark.parametrize(
    ("sent", "background"),
    [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGHUP, False)],
    ids=["ctrl-c", "in the background of a script", "the end of the terminal"],
)
def test_a_stop_ends_all_stages_and_the_next_launch_goes_on(launched, serial, sent, background):
    for cell in CELLS[:2]:
        forget(launched, cell)
    process = begin(launched, "--workers", "2", background=background)
    stage = stage_of(launched, "train")
    if sent == signal.SIGTERM:
        process.send_signal(sent)
    else:  # a terminal sends it to all processes
        os.killpg(process.pid, sent)
    told, _ = process.communicate(timeout=work.PATIENCE)
    assert process.returncode == 130 and "stopping" in told and "Traceback" not in told, told
    assert not Path("/proc", str(stage)).exists()
    run(launched, *LAUNCH, "--workers", "2")
    check_equal(launched, serial)


@with_ray
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small file system")
def test_a_full_disk_sets_its_cells_aside_and_leaves_the_others_whole(launched, serial):
    small = launched / "work/cells/llama-tiny/sums/ewc"
    for cell in CELLS[2:]:
        forget(launched, cell)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:
        done = run(launched, *LAUNCH, check=False)
    finally:
        subprocess.run(["umount", small], check=True)
    assert done.returncode == 1 and "2 cells have no result" in done.stderr and "Traceback" not in done.stderr
    records = [json.loads((launched / f"results/failures/{cell}.json").read_text()) for cell in CELLS[2:]]
    assert all("disk" in record["reason"] for record in records)
    assert not (launched / f"results/failures/{CELLS[0]}.json").exists()
    run(launched, *LAUNCH)
    check_equal(launched, serial)
    assert not list((launched / "results/failures").rglob("*.json"))


@with_ray
def test_machines_without_a_shared_disk_exchange_through_a_dvc_remote(tmp_path, serial):
    folder = made(tmp_path / "apart")
    run(folder, "dvc", "remote", "add", "-q", "--default", "store", str(tmp_path / "store"))
    run(folder, *LAUNCH, "--workers", "2", HOLDFAST_TREE=str(tmp_path / "trees"))
    check_equal(folder, serial)
    (tree,) = (tmp_path / "trees").iterdir()
    assert (tree / "work/models/llama-tiny").is_dir() and not list((tree / "work/cells").rglob("*.safetensors"))
    train = json.loads((folder / f"results/runs/{CELLS[0]}/train.json").read_text())
    assert re.fullmatch("[0-9a-f]{40}", train["git"]["commit"])  # of the repository that the code came from
    shown = run(folder, sys.executable, "-m", "experiments", "summary").stdout
    assert shown.count("trained and scored here") == len(CELLS)


def test_slurms_array_jobs_make_the_same_files_and_leave_dvc_nothing_to_do(tmp_path, serial):
    folder, bin = made(tmp_path / "slurm"), tmp_path / "bin"
    bin.mkdir()
    (bin / "sbatch").write_text(SBATCH.format(python=sys.executable))
    (bin / "sbatch").chmod(0o755)
    (folder / "job.sh").write_text(TEMPLATE)
    path = f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run(folder, *LAUNCH, "--slurm", "job.sh", "--submit", PATH=path)
    scripts = "work/local/launch/default/slurm"
    assert [line.split("/slurm/")[1] for line in done.stdout.splitlines() if scripts in line] == [
        "001/00-base-and-prepare.sh: 4 tasks",  # the base, two preparations of `full`, and the one that `ewc` shares
        "001/01-cells.sh: 4 tasks",
        "001/02-gather.sh: 1 task",
    ]
    submitted = (folder / "submitted").read_text().splitlines()
    assert [line.split()[0] for line in submitted[1:]] == ["--dependency=afterany:100", "--dependency=afterany:100:101"]
    check_equal(folder, serial)
    assert tracked(folder) == set(CELLS)
    again = run(folder, *LAUNCH, "--slurm", "job.sh", PATH=path)
    assert "/01-" not in again.stdout and "002/00-gather.sh" in again.stdout  # nothing is left to run
