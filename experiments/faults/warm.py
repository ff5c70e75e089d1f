"""Commands of `python -m experiments` in processes forked from one that has imported everything.

A fresh Python takes seconds to import torch; a fork takes milliseconds, and from there on runs what a command runs.
What a fault needs of the process is done in it before the command begins.
"""

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMPORTED = (
    "experiments.__main__ experiments.stages.train experiments.stages.evaluate experiments.stages.collect "
    "experiments.stages.drift experiments.stages.compare experiments.stages.data experiments.stages.model "
    "experiments.training.prepared experiments.commands.track experiments.commands.summary experiments.study.ahead "
    "experiments.faults.inside lm_eval.models.huggingface mlflow mlflow.store.tracking.sqlalchemy_store"
).split()
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")


@dataclass(frozen=True, kw_only=True)
class Inside:
    """What happens in the process itself, before the command begins or while it runs.

    at       number of the change of the disk before which `signal` is sent to the process; 0: changes are counted
    room     bytes of memory that it may still take
    call     a function of experiments/faults/inside.py, called first
    """

    at: int | None = None
    signal: int = signal.SIGKILL
    room: int | None = None
    call: Callable[[], None] | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended: its exit status (negative: by that signal), what it printed, and seconds."""

    status: int
    text: str
    seconds: float
    changes: int = 0  # of the disk, where they were counted

    @property
    def said(self) -> str:
        """Its last line, without where it ran."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return (lines or [""])[-1].replace(f"{Path.cwd()}/", "")[:400]


class Started:
    """A command at work."""

    def __init__(self, process, log: Path):
        self._process, self._log, self._began = process, log, time.monotonic()
        self.pid = process.pid

    def send(self, number: int) -> None:
        """Send a signal, if it is still running."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def wait(self, seconds: float = 300.0) -> Ended:
        self._process.join(seconds)
        if self._process.is_alive():
            self.send(signal.SIGKILL)
            self._process.join()
            raise TimeoutError(f"it was still running after {seconds:.0f} s: {self._log.read_text()[-1000:]}")
        took = time.monotonic() - self._began
        tally = self._log.with_suffix(".count")
        changes = int(tally.read_text() or 0) if tally.is_file() else 0
        text = self._log.read_text(errors="replace")
        return Ended(status=self._process.exitcode, text=text, seconds=took, changes=changes)


class Warm:
    """Starts commands; `logs` is the folder of what they print."""

    def __init__(self, logs: Path):
        self._logs, self._number = logs, 0
        self._logs.mkdir(exist_ok=True)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(IMPORTED))

    def start(self, *words: str, inside: Inside = Inside()) -> Started:
        self._number += 1
        log = self._logs / f"{self._number}.txt"
        log.touch()
        process = self._context.Process(target=_run, args=(words, log, inside))
        process.start()
        return Started(process, log)

    def run(self, *words: str, inside: Inside = Inside()) -> Ended:
        return self.start(*words, inside=inside).wait()


def _run(words: tuple[str, ...], log: Path, inside: Inside) -> None:
    """The forked process: print into the log, let the fault happen, run the command."""
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    os.environ.update(inside.environment)
    if words[0] == "dvc":
        from dvc.cli import main
    else:
        from experiments.__main__ import main
    sys.argv = ["python -m experiments", *words]
    if inside.at is not None:
        sys.addaudithook(_counting(inside, log))
    if inside.call:
        inside.call()
    if inside.room is not None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + inside.room, resource.RLIM_INFINITY))
    sys.exit(main(list(words[1:])) if words[0] == "dvc" else main())


def _counting(inside: Inside, log: Path) -> Callable[[str, tuple], None]:
    """An audit hook that counts the changes of the disk below the working directory, and stops at one of them."""
    root, count = f"{os.getcwd()}{os.sep}", [0]
    tally = os.open(log.with_suffix(".count"), os.O_WRONLY | os.O_CREAT)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            changes = bool((flags or 0) & WRITING) or (isinstance(mode, str) and not set("wax+").isdisjoint(mode))
        elif event in CHANGES:
            path, changes = arguments[0], True
        else:
            return
        if not changes or not isinstance(path, str | os.PathLike):
            return
        if not os.path.abspath(path).startswith(root) or "/local/running/" in os.fspath(path):
            return
        count[0] += 1
        os.pwrite(tally, f"{count[0]}\n".encode(), 0)
        if count[0] == inside.at:
            os.kill(os.getpid(), inside.signal)

    return hook
