"""What a worker of a launch does with one stage: its command, its note, its end; and files between machines."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from hashlib import md5 as new_md5
from pathlib import Path

import pytest

from experiments.launch import array, exchange, work
from experiments.study import md5
from experiments.study.paths import HERE
from methods.errors import UserError

CELL = "llama-tiny/sums/full/seed0"


def job(folder: Path, code: str, **settings) -> work.Job:
    command = f"{sys.executable} -c {json.dumps(code)}"
    return work.Job(
        name="train@x", address="train@x", command=command, outs=(), folder="log", **{"deps": {}} | settings
    )


def test_a_worker_runs_a_command_and_notes_on_what_it_ran(tmp_path):
    (tmp_path / "in").write_text("1")
    code = "import os; print(os.environ['DVC_STAGE'], os.environ['OMP_NUM_THREADS']); open('out', 'w')"
    made = work.Job(
        **{**job(tmp_path, code, deps={"in": md5.of(tmp_path / "in")}, threads=3).__dict__, "outs": ("out",)}
    )
    outcome = work.run(made, str(tmp_path))
    assert (outcome.status, outcome.tail.split()) == (0, ["train@x", "3"])
    assert work.noted(array.hashed(made, str(tmp_path)), str(tmp_path))["seconds"] == outcome.seconds
    (tmp_path / "in").write_text("2")
    assert work.noted(array.hashed(made, str(tmp_path)), str(tmp_path)) is None
    assert (
        work.run(job(tmp_path, "raise SystemExit('error: it is too small')"), str(tmp_path)).tail.strip()[-5:]
        == "small"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends a process with its parent")
def test_a_stage_ends_with_its_worker_and_never_writes_beside_a_retry(tmp_path):
    code = f"import time, os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    worker = os.fork()
    if not worker:
        work.run(job(tmp_path, code), str(tmp_path))
        os._exit(0)
    while not (tmp_path / "pid").is_file() or not (text := (tmp_path / "pid").read_text()):
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    for _ in range(200):
        if not Path("/proc", text).exists() or " Z " in Path("/proc", text, "stat").read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"process {text} outlives its worker")


def test_a_stopped_worker_lets_its_stage_write_its_checkpoint(tmp_path):
    code = "import signal, time; signal.signal(15, lambda *_: (open('kept', 'w'), exit(2))); open('on', 'w')"
    code += "; time.sleep(60)"
    outcome = work.run(job(tmp_path, code), str(tmp_path), stop=lambda: (tmp_path / "on").exists())
    assert outcome.status == 2 and (tmp_path / "kept").exists() and not list((tmp_path / "log").glob("*.json"))


def test_a_stage_runs_once_at_a_time_and_its_outputs_are_left_to_the_one_that_runs_it(tmp_path):
    made = job(tmp_path, "open('out', 'w').write('new')")
    made = work.Job(**{**made.__dict__, "outs": ("out",)})
    (tmp_path / "out").write_text("written by the other one")
    with work.alone(made, str(tmp_path)) as own:
        outcome = work.run(made, str(tmp_path), stop=lambda: True, clear=True)
        assert own and outcome.lost and "another process is at work" in outcome.tail
        assert (tmp_path / "out").read_text() == "written by the other one"
    assert work.run(made, str(tmp_path), clear=True).status == 0 and (tmp_path / "out").read_text() == "new"
    (tmp_path / "log/train@x.log").unlink()
    assert work.run(made, str(tmp_path), clear=True).status == 0  # it has run meanwhile
    assert not (tmp_path / "log/train@x.log").exists()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of DVC and git with a remote in `store`, and the code in which a worker runs."""
    from dvc.repo import Repo

    root = tmp_path / "here"
    root.mkdir()
    monkeypatch.chdir(root)
    Repo.init(no_scm=True).close()
    subprocess.run(["git", "init", "-q"], check=True)
    (root / ".dvc/config").write_text(f"[core]\nremote = store\n['remote \"store\"']\nurl = {tmp_path / 'store'}\n")
    return root


def test_files_go_through_the_remote_by_their_md5(project):
    there = project.parent / "there"
    store, folder = exchange.remote(str(project)), project / "work/cell"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/weights").write_bytes(bytes(range(256)))
    (project / "one.txt").write_text("one")
    paths = {path: md5.of(project / path) for path in ("work/cell", "one.txt")}
    exchange.send(store, str(project), paths)
    exchange.fetch(store, str(there / "tree"), paths)
    assert {path: md5.of(there / "tree" / path) for path in paths} == paths
    (folder / "deep/weights").write_bytes(b"changed")
    with pytest.raises(UserError, match="work/cell was changed while it was sent"):
        exchange.send(store, str(project), paths)
    kept = Path(store.oid_to_path(paths["one.txt"]))
    kept.chmod(0o644)
    kept.write_text("two")
    with pytest.raises(UserError, match="one.txt: what the DVC remote has is not what its md5"):
        exchange.fetch(store, str(there / "other"), {"one.txt": paths["one.txt"]})
    hostile = [{"md5": paths["one.txt"], "relpath": "../../escaped"}]
    digest = new_md5(md5.listing_text(hostile)).hexdigest() + ".dir"
    store.add_bytes(digest, md5.listing_text(hostile))
    with pytest.raises(UserError, match="lies outside"):
        exchange.fetch(store, str(there / "deep/tree"), {"work/cell": digest})


def test_a_cells_weights_stay_on_a_machine_until_the_last_stage_that_uses_them_has_ended(project):
    place, there = project / "work/weights", project.parent / "there"
    place.mkdir(parents=True)
    (place / "w").write_text("weights")
    store, paths = exchange.remote(str(project)), {"work/weights": md5.of(place)}
    exchange.send(store, str(project), paths)
    with exchange.fetched(store, str(there), paths, passing=paths):
        with exchange.fetched(store, str(there), paths, passing=paths):
            assert (there / "work/weights/w").read_text() == "weights"
        assert (there / "work/weights/w").is_file()
    assert not (there / "work/weights").exists()


def test_a_machine_without_the_disk_runs_the_stage_in_a_folder_of_its_own(project, monkeypatch):
    """The worker's own process, with the project's code as it is sent; only the machine is this one."""
    there = project.parent / "there"
    asked = {"cached": ["out"], "passing": [], "records": ["failed.json"], "ledger": "ledger.jsonl", "cell": CELL}
    monkeypatch.setenv("HOLDFAST_TREE", str(there / "trees"))
    for room in ("experiments", "methods", "analysis"):
        shutil.copytree(HERE / room, project / room, ignore=shutil.ignore_patterns("__pycache__", "studies"))
    (project / "in.txt").write_text("seven")
    store = exchange.remote(str(project))
    paths = {"in.txt": md5.of(project / "in.txt")}
    exchange.send(store, str(project), paths)
    noted = {"cell": CELL}
    text = "import os; os.mkdir('out'); open('out/w', 'w').write(open('in.txt').read())\n"
    text += f"open('small.json', 'w').write('{{}}'); open('ledger.jsonl', 'w').write({json.dumps(noted)!r})"
    (project / "make.py").write_text(text)
    own = work.Job(
        name="train@x",
        address="train@x",
        command=f"{sys.executable} make.py",
        deps=paths,
        outs=("out", "small.json"),
        folder="work/local/launch/demo",
    )
    code = exchange.archive(project)
    assert work.run_anywhere(own, str(project), "absent", None, asked).apart
    outcome = work.run_anywhere(own, str(project), "absent", code, asked)
    assert outcome.status == 0, outcome.tail
    exchange.receive(store, str(project), outcome.answer, ledger=project / "ledger.jsonl")
    assert (project / "out/w").read_text() == "seven" and (project / "small.json").read_text() == "{}"
    assert json.loads((project / "ledger.jsonl").read_text())["cell"] == CELL
    assert not list((there / "trees").glob("*/out"))  # weights do not gather there


def test_an_archive_holds_code_and_settings_and_no_results(project):
    for name in ("params.yaml", "results/runs/x.json", "work/ignored", "tests/test_x.py"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(name)
    (project / ".gitignore").write_text("work/\n")
    with tarfile.open(fileobj=io.BytesIO(exchange.archive(project))) as tar:
        assert {".dvc/config", ".gitignore", "params.yaml"} <= set(tar.getnames())
        assert not [name for name in tar.getnames() if name.startswith(("results", "work", "tests"))]


def test_without_a_remote_the_message_says_how_to_add_one(project):
    (project / ".dvc/config").write_text("")
    with pytest.raises(UserError, match="dvc remote add --default"):
        exchange.remote(str(project))
