"""Which stages are running: one locked file each, so that none runs twice, and one that is killed leaves a trace.

    work/local/running/STUDY/STAGE@NAMES     JSON: its process, when it began, processes that the system had ended,
                                             and which record of a failure there was

The system takes a lock back when its process ends, however it ends. So a file that can be locked is of a stage that was
killed; neither a clock nor the number of a process decides that.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from experiments.study.provenance import now
from experiments.training import processes
from methods.errors import UserError

PATIENCE = 2.0  # seconds
STARTED = "HOLDFAST_STAGE"  # in the environment of what a stage starts: the file is held already


@contextmanager
def alone(study, stage: str, *names: str, cell=None) -> Iterator[None]:
    """Run a stage on these names while no other process runs it. Raises UserError where one does.

    cell   of which a failure is recorded. Where the stage ends without a record, on a full disk for example, its file
           stays, and the next command finds it (`left`).
    """
    path = study.paths.running / f"{stage}@{'+'.join(names)}"
    if STARTED in os.environ or not processes.first():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = _locked(path)
        until = time.monotonic() + PATIENCE
        while file is None and time.monotonic() < until:  # `left` holds the file of a killed stage for a moment
            time.sleep(0.1)
            file = _locked(path)
    except OSError:  # a disk without locks, as of some clusters
        yield
        return
    if file is None:
        raise UserError(
            f"{' '.join((stage, *names))} is running already, in process {_about(path).get('process', 'unknown')}: "
            "wait until it ends, or stop it with Ctrl-C where it was started"
        )
    with file:
        file.truncate(0)
        before = cell and stamp(study.paths.failure(cell))
        about = {"process": os.getpid(), "host": os.uname().nodename, "when": now(), "ended": ended(), "record": before}
        file.write(json.dumps(about))
        file.flush()
        os.environ[STARTED] = path.name
        noted = True
        try:
            yield
        except UserError:
            raise
        except BaseException:
            noted = cell is None or stamp(study.paths.failure(cell)) != before
            raise
        finally:
            if noted:
                path.unlink()
            del os.environ[STARTED]


def left(study) -> Iterator[tuple[str, list[str], dict]]:
    """Stage, names and what `alone` noted of each stage that was killed; its file is removed after that.

    Stages of other machines that share the disk are left to these: a lock may be unknown here.
    """
    host = os.uname().nodename
    for path in sorted(study.paths.running.glob("*@*")):
        with suppress(OSError):  # a disk without locks
            if path.is_file() and _about(path).get("host", host) == host and (file := _locked(path)):
                with file:
                    stage, _, names = path.name.partition("@")
                    yield stage, names.split("+"), _about(path)
                    path.unlink()


def ended() -> int | None:
    """How many processes the system has ended for want of memory since it was started; None where it does not say."""
    try:
        counted = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(counted[1]) if counted else None


def stamp(path: Path) -> list[int] | None:
    """What changes when a file is written anew; None without the file."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return [facts.st_ino, facts.st_mtime_ns]


def _locked(path: Path) -> TextIO | None:
    """The file, made if it is not there, opened and locked; None where another process holds it."""
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass  # the process that held it has removed it meanwhile
        file.close()


def _about(path: Path) -> dict:
    """What is noted in a file; {} where its process was killed before it had written that."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
