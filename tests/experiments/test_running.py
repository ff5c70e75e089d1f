"""No stage runs twice at a time; one that is killed leaves a record; what is written appears whole or not at all."""

import os
import shutil
import signal
import time

import pytest
import torch

from experiments.data.damage import refuse_damaged
from experiments.model import weights
from experiments.stages.train import write_curve
from experiments.study import cells, config, failures, ledger, lock_copy, running, whole
from experiments.study.distrust import distrusted
from experiments.study.paths import Paths
from experiments.study.schema import Model
from experiments.training import processes
from experiments.training.log import Log, TrainingFailed
from experiments.training.progress import bar
from methods.errors import UserError
from methods.tools.files import read_json, sha256, write_json

CELL = cells.Cell("llama-tiny", "sums", "ewc", 0)
NAMES = ("llama-tiny", "sums", "ewc", "seed0")


@pytest.fixture
def study(tmp_path):
    return config.load("demo").model_copy(update={"paths": Paths(study="demo", root=tmp_path)})


def in_another_process(act) -> int:
    """Fork a process that does `act` until it is killed; its number, once it is at work."""
    reading, writing = os.pipe()
    if not (process := os.fork()):
        try:
            act(lambda: os.write(writing, b"."))
        finally:
            os._exit(1)
    assert os.read(reading, 1) == b"."
    return process


def running_until_killed(study, stage="train", names=NAMES):
    def act(begun):
        with running.alone(study, stage, *names, cell=CELL):
            begun()
            time.sleep(60)

    return in_another_process(act)


def end(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_stage_that_runs_is_not_started_twice_and_other_names_are(study):
    process = running_until_killed(study)
    with (
        pytest.raises(UserError, match=f"train llama-tiny sums ewc seed0 is running already, in process {process}"),
        running.alone(study, "train", *NAMES),
    ):
        raise AssertionError("it began")
    with running.alone(study, "train", "llama-tiny", "sums", "ewc", "seed1"):
        failures.find_killed(study)  # of what runs there is no record
    assert not study.paths.failure(CELL).exists()
    end(process)
    with running.alone(study, "train", *NAMES):
        assert running.STARTED in os.environ
    assert running.STARTED not in os.environ and not list(study.paths.running.iterdir())


@pytest.mark.parametrize("stage, names", [("train", NAMES), ("prepare", ("llama-tiny", "ewc", "seed0"))])
def test_the_next_command_records_what_was_killed(study, stage, names):
    end(running_until_killed(study, stage, names))
    failures.find_killed(study)
    record = read_json(study.paths.failure(CELL))
    assert (record["cell"], record["stage"], record["kind"]) == (CELL.name, stage, "killed")
    assert record["reason"].startswith(f"killed during {stage}") and "studies/demo/dvc.yaml`" in record["reason"]
    assert record["settings"]["learning_rate"] and record["parts"]["ewc"]["strength"] == 100.0
    assert not list(study.paths.running.iterdir())


def test_want_of_memory_is_named_where_the_system_counted_it(study, monkeypatch):
    monkeypatch.setattr(running, "ended", lambda: 4)
    process = running_until_killed(study)
    monkeypatch.setattr(running, "ended", lambda: 5)
    end(process)
    failures.find_killed(study)
    assert (
        "for want of memory since it began: lower train.micro_batch" in read_json(study.paths.failure(CELL))["reason"]
    )


def test_a_file_that_was_cut_off_and_a_cell_that_is_no_more(study, capsys):
    study.paths.running.mkdir(parents=True)
    (study.paths.running / "evaluate@llama-tiny+sums+ewc+seed0").write_text('{"proc')
    (study.paths.running / "train@llama-tiny+sums+gone+seed0").write_text("{}")
    (study.paths.running / "data@").write_text("{}")
    (study.paths.running / "base@llama-tiny").write_text("{}")
    failures.find_killed(study)
    said = [line.partition(" was killed")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["base llama-tiny", "data"]
    assert read_json(study.paths.failure(CELL))["stage"] == "evaluate"
    assert [path.name for path in (study.paths.results / "failures").rglob("*.json")] == ["seed0.json"]
    assert not list(study.paths.running.iterdir())


def test_a_stage_that_could_not_record_its_end_is_found(study):
    with pytest.raises(OSError), running.alone(study, "train", *NAMES, cell=CELL):
        raise OSError(28, "no space left, not even for a record")
    failures.find_killed(study)
    assert "a full disk" in read_json(study.paths.failure(CELL))["reason"]
    study.paths.failure(CELL).unlink()
    with pytest.raises(UserError), running.alone(study, "train", *NAMES, cell=CELL):
        raise UserError("a missing input leaves no record")
    failures.find_killed(study)
    assert not study.paths.failure(CELL).exists()


def test_a_killed_process_of_several_is_recorded_once(study):
    with pytest.raises(UserError, match="process 1 of 2 was killed"), failures.recorded(study, CELL, "train"):
        raise processes.Killed("process 1 of 2 was killed by signal 9")
    assert read_json(study.paths.failure(CELL))["kind"] == "killed"
    with pytest.raises(UserError), failures.recorded(study, CELL, "train"):
        write_json(study.paths.failure(CELL), {"reason": "of the first process"})
        raise processes.Killed("process 1 of 2 was killed by signal 15")
    assert read_json(study.paths.failure(CELL)) == {"reason": "of the first process"}


def test_want_of_memory_in_other_words_than_torchs():
    for error in (MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("can't start new thread")):
        assert failures.lacked_memory(error)
    assert not failures.lacked_memory(OSError(28, "No space left on device"))


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    place = tmp_path / "made"
    with whole.folder(place) as made:
        (made / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), whole.folder(place) as made:
        (made / "b").write_text("2")
        1 / 0  # noqa: B018
    whole.write_text(tmp_path / "text", "é")
    assert [path.name for path in place.iterdir()] == ["a"] and (tmp_path / "text").read_text("utf-8") == "é"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "text"]


def test_what_a_killed_writer_left_is_removed_and_that_of_a_writer_at_work_stays(tmp_path):
    place = tmp_path / "made"

    def act(begun):
        with whole.folder(place):
            begun()
            time.sleep(60)

    process = in_another_process(act)
    with whole.folder(place):
        assert len(list(tmp_path.glob(".made-*.part"))) == 2
    (left,) = tmp_path.glob(".made-*.part")
    end(process)
    with whole.folder(place):
        assert not left.exists()


def test_a_line_of_the_ledger_that_was_cut_off_costs_that_line_alone(study):
    ledger.note(study, stage="train", cell="a", weights="1")
    (path,) = study.paths.local.glob("ledger*")
    path.write_bytes(path.read_bytes() + b'{"stage": "train", "cell": "b", "wei')
    with path.open("a") as file:
        file.write('{"cell": "b", "when": "yesterday"}\n{"cell": "b", "when": 3}\n[]\n{"cell": "b"}\n')
    ledger.note(study, stage="train", cell="c", weights="3")
    assert [entry["cell"] for entry in ledger.entries(study)] == ["a", "c"]


def test_a_gradient_that_is_no_number_ends_the_run_before_its_checkpoint():
    log = Log(
        name="train x", steps=9, learning_rate=0.1, device=torch.device("cpu"), peak=None, bar=bar(total=9, desc="")
    )
    with pytest.raises(TrainingFailed, match="gradient's norm is nan at step 1 of 9; lower train.learning_rate"):
        log.step({"step": 1}, tokens=1, flops=None, read={"loss": 1.0, "grad_norm": float("nan")})


def test_rows_that_are_not_as_they_were_written_are_refused_by_name(tmp_path):
    file = tmp_path / "train" / "a" / "train.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"row": 1}\n{"row": 2}\n')
    write_json(tmp_path / "data.json", {"files": {"train/a/train.jsonl": sha256(file)}})
    refuse_damaged(tmp_path, "train/a", "train/b")
    file.write_text('{"row": 1}\n')
    with (
        pytest.raises(UserError, match="train.jsonl is not what the stage `data` wrote .* --force"),
        distrusted(tmp_path),
    ):
        file.chmod(0o444)
        refuse_damaged(tmp_path, "train/a")
    assert file.stat().st_mode & 0o200  # DVC hashes it before it takes it from its cache
    file.unlink()
    with pytest.raises(UserError, match="train.jsonl is not what"):
        refuse_damaged(tmp_path, "train")
    refuse_damaged(tmp_path / "none", "train")


def test_weights_that_are_not_those_of_their_record_are_refused(tmp_path):
    weights.materialise(name="m", block=Model(source="random:llama"), packages={}, out_dir=tmp_path / "m")
    weights.verified(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="are not those of its base.json.*--force --single-item model@m"):
        weights.verified(tmp_path / "m")


def test_a_curve_appears_whole(tmp_path):
    write_curve(tmp_path / "run" / "curve.csv", [{"step": 1, "loss": 2.0, "probe_a": 3.0}])
    assert (tmp_path / "run" / "curve.csv").read_text().splitlines()[0].startswith("step,tokens")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["curve.csv"]


LOCK = "schema: '2.0'\nstages:\n  a:\n    cmd: 'true'\n  b:\n    cmd: 'true'\n  c:\n    cmd: 'true'\n"


@pytest.mark.parametrize(
    "left, mended",
    [
        (LOCK[:-21], True),  # between two stages
        (LOCK[:-3], True),  # within one
        ("", True),
        (LOCK, False),
        (LOCK.replace("  b:", "  d:"), False),  # other stages, as of another commit
    ],
)
def test_a_dvc_lock_that_was_cut_off_is_put_back(study, left, mended):
    path = study.paths.folder / "dvc.lock"
    path.parent.mkdir(parents=True)
    path.write_text(LOCK)
    lock_copy.keep(study)
    path.write_text(left)
    lock_copy.keep(study)  # not within a minute of the first copy
    assert ("dvc.lock was cut off" in lock_copy.mend(study)) == mended
    assert path.read_text() == (LOCK if mended else left)
    path.unlink()  # a user's wish
    assert lock_copy.mend(study) == "" and not path.exists()


def test_a_copy_of_a_folder_that_the_disk_does_not_take_is_a_full_disk(study):
    with pytest.raises(UserError, match="the disk is full"), failures.recorded(study, CELL, "prepare"):
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")])
    assert read_json(study.paths.failure(CELL))["reason"].startswith("the disk is full")
