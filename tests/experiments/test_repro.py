"""A named study whose committed results are current is not run again in a clone without its weights."""

import shutil
import subprocess

import pytest

from experiments.commands import repro

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
