"""Work on several comparisons at once."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis import parallel
from experiments.study.paths import HERE
from methods.errors import UserError

PAIRS = [(model, "math") for model in "abcde"]


@pytest.mark.parametrize("cores", [{0}, {0, 1, 2}])
def test_results_come_in_the_order_of_the_comparisons(monkeypatch, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    found = parallel.each(lambda model, domain: (f"{model}/{domain}", os.getpid()), PAIRS)
    assert [name for name, _ in found] == [f"{model}/math" for model, _ in PAIRS]
    assert (os.getpid() in {process for _, process in found}) == (len(cores) == 1 or sys.platform != "linux")
    assert parallel.each(lambda model, domain: model, []) == []


def test_bad_input_is_named_as_by_one_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)

    def refuse(model: str, domain: str) -> None:
        raise UserError(f"{model} has no items")

    with pytest.raises(UserError, match="^a has no items$"):
        parallel.each(refuse, PAIRS)


class Garbage:
    """A cycle that ends any process but its own as it is collected, as a group of torch.distributed may."""

    def __init__(self) -> None:
        self.itself, self.owner = self, os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.owner:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="there is one process")
def test_garbage_is_collected_by_its_own_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    gc.unfreeze()  # of the libraries, which the tests have frozen
    gc.collect()
    Garbage()
    assert len(parallel.each(lambda model, domain: gc.collect(), PAIRS)) == len(PAIRS)
    assert gc.get_freeze_count() == 0
    assert gc.collect() > 0


WAITING = """
import os, signal, sys, time
from pathlib import Path
from analysis import parallel

def wait(name):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)

signal.signal(signal.SIGTERM, signal.default_int_handler)  # as every command does
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell lets its background jobs ignore
os.sched_getaffinity = lambda _: {0, 1}
parallel.each(wait, [(name,) for name in "abcd"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="there is one process")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_command(tmp_path, how):
    """A process that did would hold the command's lock, so that it could not be started again."""
    command = subprocess.Popen([sys.executable, "-c", WAITING, str(tmp_path)], cwd=HERE, stderr=subprocess.PIPE)
    assert until(lambda: len(list(tmp_path.iterdir())) == 2)
    command.send_signal(how)
    said = command.communicate(timeout=30)[1].decode()
    assert until(lambda: not any(Path("/proc", path.name).exists() for path in tmp_path.iterdir()))
    assert said.count("Traceback") == (how != signal.SIGKILL) and "ForkProcess" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="there is one process")
def test_a_process_that_is_killed_is_named(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(UserError, match="was killed, perhaps by the system for want of memory"):
        parallel.each(lambda model, domain: os.kill(os.getpid(), signal.SIGKILL), PAIRS)


def until(holds, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()
