"""A failure is a record with its reason; room on the disk is asked for before work starts."""

import contextlib
import errno
import json
import os
import resource
import signal
import sys
import time
import weakref

import pytest
import torch

from evaluation.kept import KeptTokens
from experiments.model import delta, weights
from experiments.model.random_models import byte_tokenizer
from experiments.study import cells, config, stops
from experiments.study.failures import recorded
from experiments.study.paths import HERE, Paths
from experiments.study.provenance import git
from experiments.study.schema import Model
from experiments.training.engine import TrainingFailed
from methods.errors import UserError
from methods.tools.files import need_room, read_json, write_json
from methods.tools.stored import save_importance

CELL = cells.Cell("llama-tiny", "sums", "full", 0)


@pytest.fixture
def study(tmp_path):
    return config.load("demo").model_copy(update={"paths": Paths(study="demo", root=tmp_path)})


def fail(study, error, stage="train"):
    with pytest.raises(UserError) as raised, recorded(study, CELL, stage):
        error()
    return read_json(study.paths.failure(CELL)), str(raised.value)


def raiser(error):
    def act():
        raise error

    return act


def test_out_of_memory_names_what_would_help(study):
    record, message = fail(study, lambda: torch.empty(2**55))  # torch's own allocator refuses
    assert record["kind"] == "out of memory"
    assert "train.micro_batch" in record["reason"] and "checkpointing" in message


def test_not_a_number(study):
    record, message = fail(study, raiser(TrainingFailed("train x: the loss is nan at step 3 of 9")))
    assert (
        record["settings"]["learning_rate"]
        == study.settings(model="llama-tiny", domain="sums", method="full").learning_rate
    )
    assert set(record["git"]) == {"commit", "dirty"} and record["parts"] == {}
    assert (record["kind"], record["stage"]) == ("nan", "train")
    assert message.startswith("llama-tiny/sums/full/seed0: ")


def test_interrupted_by_keyboard_or_by_the_system(study):
    assert fail(study, raiser(KeyboardInterrupt()))[0]["kind"] == "interrupted"
    record, message = fail(study, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert record["kind"] == "interrupted"
    assert "dvc repro" in message


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def sent(request):
    """A signal that is not ignored, as SIGINT is in what a shell started in the background."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_stop_that_a_library_answers_with_an_error_of_its_own_is_a_stop(study, sent):
    def library():
        try:
            os.kill(os.getpid(), sent)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None

    record, message = fail(study, library)
    assert record["kind"] == "interrupted" and "stopped during train" in message
    assert signal.getsignal(sent) is signal.default_int_handler


def test_a_stop_that_meets_a_finalizer_comes_again(study, sent, capfd):
    """Python prints the error of a finalizer with its traceback, and goes on."""
    met = []

    def library():
        last = set()
        weakref.finalize(last, lambda: (met.append(sent), os.kill(os.getpid(), sent), time.sleep(5)))
        del last
        time.sleep(5)
        raise AssertionError("it went on")

    shown = sys.unraisablehook
    record, message = fail(study, library)
    assert met and record["kind"] == "interrupted" and "stopped during train" in message
    assert "Traceback" not in capfd.readouterr().err and sys.unraisablehook is shown


def test_another_error_of_a_finalizer_is_shown_as_ever(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: shown.append(error.exc_type))
    with stops.heeded():
        weakref.finalize(set(), lambda: 1 / 0)
    assert shown == [ZeroDivisionError]


def test_a_stop_leaves_what_a_person_can_correct(study):
    with pytest.raises(UserError, match="as it was"), stops.heeded():
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        raise UserError("as it was")


def test_our_own_mistake_is_recorded_and_still_shown(study):
    with pytest.raises(ZeroDivisionError), recorded(study, CELL, "train"):
        1 / 0  # noqa: B018
    assert read_json(study.paths.failure(CELL))["reason"].startswith("ZeroDivisionError")


def test_a_missing_input_leaves_no_record_and_the_results_of_an_earlier_run_stand(study):
    with (
        pytest.raises(UserError, match="llama-tiny/sums/full/seed0: .*base.json is missing: run `dvc repro`"),
        recorded(study, CELL, "evaluate"),
    ):
        read_json(study.paths.root / "base.json")
    assert not study.paths.failure(CELL).exists()


def test_an_experiment_of_dvc_is_named_in_what_its_stages_write(tmp_path, monkeypatch):
    assert "experiment" not in git(tmp_path)
    monkeypatch.setenv("DVC_EXP_NAME", "high-lr")
    assert git(tmp_path)["experiment"] == "high-lr"


def test_only_the_stage_that_failed_clears_the_record(study):
    fail(study, raiser(UserError("no")), stage="evaluate")
    with recorded(study, CELL, "train"):
        pass
    assert study.paths.failure(CELL).exists()
    with recorded(study, CELL, "evaluate"):
        pass
    assert not study.paths.failure(CELL).exists()


def test_too_little_disk_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"too little disk for the weights: .* GiB needed .* GiB free"):
        need_room(tmp_path, 10**18, "the weights")


def test_a_result_file_is_whole_or_not_there(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})  # JSON has none
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    with pytest.raises(UserError, match="b.json is missing: run `dvc repro`"):
        read_json(tmp_path / "b.json")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match="b.json is not JSON .*restore it with git"):
        read_json(tmp_path / "b.json")


@contextlib.contextmanager
def full_disk(room):
    """No file can grow beyond `room` bytes: what writes meets the error of a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_importance(folder):
    save_importance({"a": torch.rand(1000)}, folder / "a.importance.safetensors")


def write_delta(folder):
    delta.write(
        folder / "delta.safetensors", base={"a": torch.zeros(1000)}, tuned={"a": torch.rand(1000)}, base_sha256="0"
    )


def write_tokens(folder):
    KeptTokens(folder, byte_tokenizer(), {}).save([("a", "b")], [(list(range(999)), [1])])


@pytest.mark.parametrize(
    "write", [write_importance, write_delta, write_tokens, lambda folder: write_json(folder / "a.json", ["x" * 999])]
)
def test_a_disk_that_takes_no_more_is_a_line_and_a_record(study, tmp_path, write):
    with full_disk(500), pytest.raises(OSError) as raised:
        write(tmp_path)
    assert raised.value.errno == errno.EFBIG
    record, message = fail(study, raiser(raised.value))
    assert record["reason"].startswith("the disk is full") and "None" not in message


def test_a_model_that_the_disk_does_not_take_is_told_by_name(tmp_path):
    with full_disk(20_000), pytest.raises(UserError, match="model 'm': cannot be read or written: .*File too large"):
        weights.materialise(name="m", block=Model(source="random:llama"), packages={}, out_dir=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_root_is_the_checkout():
    assert (HERE / "dvc.yaml").is_file()
