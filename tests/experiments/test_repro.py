"""A named study whose committed results are current is not run again in a clone without its weights."""

import importlib
import shutil
import subprocess
import types

import pytest
from ruamel.yaml.representer import RepresenterError

from experiments.commands import repro
from experiments.study import environment
from experiments.study.paths import Paths

PIPELINE = """
stages:
  weights: {cmd: cp source weights, deps: [source], outs: [weights]}
  scores:
    cmd: cp weights scores
    deps: [weights]
    outs: [{scores: {cache: false}}]
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A project in the state of a clone: the lock and the scores are there, weights and cache are not."""
    monkeypatch.chdir(tmp_path)
    for command in ("git init -q", "dvc init -q", "dvc repro -q"):
        (tmp_path / "dvc.yaml").write_text(PIPELINE)
        (tmp_path / "source").write_text("1")
        subprocess.run(command.split(), check=True)
    (tmp_path / "weights").unlink()
    shutil.rmtree(tmp_path / ".dvc/cache")
    return tmp_path


def test_what_is_committed_is_current_until_an_input_changes(clone):
    assert repro.committed("dvc.yaml")
    (clone / "source").write_text("2")
    assert not repro.committed("dvc.yaml")


def test_what_has_not_run_is_not_committed(clone):
    (clone / "dvc.lock").unlink()
    assert not repro.committed("dvc.yaml")
    (clone / "scores").unlink()
    assert not repro.committed("dvc.yaml")


def test_a_lock_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    common, yaml = (importlib.import_module(f"dvc.utils.serialize.{name}") for name in ("_common", "_yaml"))
    for module in (common, yaml):
        monkeypatch.setattr(module, "_dump_data", common._dump_data)  # which the test's end puts back
    repro.keep_locks_whole()
    lock = tmp_path / "dvc.lock"
    with yaml.modify_yaml(lock) as data:
        data.update(stages={"train@a": {"cmd": "true"}})
    before = lock.read_bytes()
    with pytest.raises(RepresenterError), yaml.modify_yaml(lock) as data:
        data["stages"]["train@b"] = {"cmd": object()}  # the disk is full after some bytes
    assert lock.read_bytes() == before and list(tmp_path.iterdir()) == [lock]
    with yaml.modify_yaml(lock) as data:
        data["stages"]["train@b"] = {"cmd": "true"}
    assert b"train@b" in lock.read_bytes()


def test_a_lock_file_of_dvc_that_was_cut_off_is_removed_and_a_whole_one_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "PATIENCE", 0.2)
    study = types.SimpleNamespace(paths=Paths(root=tmp_path), name="")
    lock = tmp_path / environment.LOCK
    lock.parent.mkdir(parents=True)
    for text, stays in (('{"write": {}, "read": {}}', True), ('{"write": {"a', False), ("", False)):
        lock.write_text(text)
        environment.alone(study)
        assert lock.exists() == stays
