"""What a worker does: run the command of one stage as `dvc repro` would, and note that it ended well.

Only the standard library is imported: the functions travel to Ray's workers by value. A worker never writes dvc.lock;
the note of a finished stage (its command, and the md5 of what it read) lets the driver take the stage over later, also
after the driver itself was killed, or where a job of Slurm ran it.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds that a stopped stage has to write its checkpoint and its record
TAIL = 4000  # bytes of a stage's output that are shown
LOST = "the worker was lost"
# run by Python before the stage's command: the stage ends when its worker is killed, and so never writes beside a retry
TIED = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]): sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage to run.

    name     of the stage, such as train@MODEL-DOMAIN-METHOD-SEED
    address  as DVC names it in DVC_STAGE; empty where the stage shall not compare its settings with `resolve`'s files
    deps     md5 of what it reads, by path from the root
    folder   where its log and its note lie, from the root
    threads  OMP_NUM_THREADS of its process; None leaves it unset
    """

    name: str
    address: str
    command: str
    deps: Mapping[str, str]
    outs: tuple[str, ...]
    folder: str
    threads: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a stage ended: its exit status (0 for well, negative for a signal), seconds, host, and last lines.

    answer  of a machine without the driver's disk: what it sends back (experiments/launch/exchange.py)
    apart   that the stage has not run, because such a machine was not sent its inputs
    lost    that it did not end by itself: its machine or its worker went away, or another process is at work on it
    """

    status: int
    seconds: float = 0.0
    host: str = ""
    tail: str = ""
    answer: Mapping[str, Any] | None = None
    apart: bool = False
    lost: bool = False


@contextlib.contextmanager
def alone(job: Job, root: str, *, stop: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Whether no other process that sees this disk is at work on the stage. Waits for it until `stop`, at most
    PATIENCE: where a machine has died, a network disk keeps its lock for a while."""
    path = Path(root, job.folder, f"{job.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    until, own = time.monotonic() + PATIENCE, None
    with path.open("a") as file:
        while own is None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                own = True
            except BlockingIOError:
                if stop() or time.monotonic() > until:
                    own = False
                else:
                    time.sleep(0.5)
            except OSError:  # a disk without locks
                own = True
        yield own


def run(job: Job, root: str, *, stop: Callable[[], bool] = lambda: False, clear: bool = False) -> Outcome:
    """Run the stage in the folder `root`. A KeyboardInterrupt, or `stop`, ends it as Ctrl-C ends `dvc repro`.

    clear  remove its old outputs before, as DVC does; where another process has ended it meanwhile, it does not run
    """
    with alone(job, root, stop=stop) as own:
        if not own:
            tail = f"error: another process is at work on {job.name}"
            return Outcome(status=1, host=os.uname().nodename, tail=tail, lost=True)
        if clear and (note := noted(job, root)):
            return Outcome(status=0, seconds=note["seconds"], host=note["host"])
        for path in (Path(root, out) for out in job.outs if clear):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return _run(job, root, stop)


def _run(job: Job, root: str, stop: Callable[[], bool]) -> Outcome:
    folder = Path(root, job.folder)
    log, note = folder / f"{job.name}.log", note_of(job, root)
    log.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    began = time.time()
    with log.open("wb") as output:
        command = [sys.executable, "-c", TIED, str(os.getpid()), *shlex.split(job.command)]
        process = subprocess.Popen(
            command, cwd=root, env=_environment(job, root), stdout=output, stderr=output, start_new_session=True
        )
        status = _wait(process, stop)
    seconds = time.time() - began
    if status == 0:
        made = {"outs": _sizes(job, root), "seconds": seconds, "host": os.uname().nodename}
        with contextlib.suppress(OSError):  # a full disk: the stage has ended all the same
            write(note, {"command": job.command, "deps": dict(job.deps)} | made)
    tail = log.read_bytes()[-TAIL:].decode(errors="replace")
    return Outcome(status=status, seconds=seconds, host=os.uname().nodename, tail=tail)


def run_anywhere(job: Job, root: str, token: str, code: bytes | None, asked: Mapping[str, Any]) -> Outcome:
    """Run the stage in `root` on a machine that sees the file `token` there, else in a folder of its own.

    code   an archive of the project; None where inputs do not lie in the DVC remote yet
    asked  what the driver wants to have back
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a launch in the background of a script: Ray's stop needs it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if Path(root, token).is_file() and "HOLDFAST_TREE" not in os.environ:
        return run(job, root, clear=True)  # the driver leaves them where a worker that it has lost may still write
    if code is None:
        return Outcome(status=1, host=os.uname().nodename, apart=True)
    tree = _unpacked(code)
    folder = Path(tree, job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{job.name}.asked.json"
    answer = Path(f"{file}.answer")
    answer.unlink(missing_ok=True)
    write(file, {"job": asdict(replace(job, address="")), **asked})
    command = f"python -m experiments.launch.exchange {shlex.quote(str(file))}"
    outcome = run(replace(job, name=f"{job.name}.exchange", address="", command=command), tree)
    return replace(outcome, answer=json.loads(answer.read_text()) if answer.is_file() else None)


def _unpacked(code: bytes) -> str:
    """The folder with the code, unpacked once on each machine."""
    above = Path(os.environ.get("HOLDFAST_TREE") or Path(tempfile.gettempdir(), f"holdfast-{os.getuid()}"))
    above.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = above.lstat()
    others = about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if "HOLDFAST_TREE" not in os.environ and (others or not stat.S_ISDIR(about.st_mode)):
        raise PermissionError(
            f"{above} is not a folder that only you can write to, and the code in it would be run: remove it, or set "
            "HOLDFAST_TREE"
        )
    tree = above / hashlib.sha256(code).hexdigest()[:16]
    if not tree.is_dir():
        fresh = tempfile.mkdtemp(dir=above)
        with tarfile.open(fileobj=io.BytesIO(code)) as tar:
            tar.extractall(fresh, filter="data")
        try:
            os.replace(fresh, tree)
        except OSError:  # another worker of this machine was faster
            shutil.rmtree(fresh, ignore_errors=True)
    return str(tree)


def _environment(job: Job, root: str) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "OMP_NUM_THREADS"))}
    environment |= {"DVC_ROOT": root, **job.environment}
    if job.address:
        environment["DVC_STAGE"] = job.address
    if job.threads:
        environment["OMP_NUM_THREADS"] = str(job.threads)
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    return environment


def _wait(process: subprocess.Popen, stop: Callable[[], bool]) -> int:
    """The exit status. The process is looked at again and again, for Ray's interrupts do not end a system call."""
    stopped = None  # when the process was asked to end
    while True:
        try:
            return process.wait(0.2)
        except subprocess.TimeoutExpired:
            wanted = stop()
        except KeyboardInterrupt:
            wanted = True
        if wanted and stopped is None:
            stopped = time.monotonic()
            process.terminate()
        if stopped is not None and time.monotonic() > stopped + PATIENCE:
            os.killpg(process.pid, signal.SIGKILL)


def note_of(job: Job, root: str) -> Path:
    """The file that says that the stage ended well."""
    return Path(root, job.folder, f"{job.name}.json")


def noted(job: Job, root: str) -> dict | None:
    """The note of a stage that ended well on the files that are there now, and whose outputs are whole, else None."""
    try:
        note = json.loads(note_of(job, root).read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(note, dict) and note.get("command") == job.command and note.get("deps") == dict(job.deps)
    return note if same and note.get("outs") == _sizes(job, root) else None


def _sizes(job: Job, root: str) -> dict[str, int]:
    """Bytes of each file of the outputs: DVC puts a folder in place file by file, and may be killed over it."""
    places = [Path(root, out) for out in job.outs]
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file()]
    return {os.path.relpath(file, root): file.stat().st_size for file in files}


def write(path: Path, value: object) -> None:
    """Write JSON and move it into place, so that the file is whole or not there."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, sort_keys=True) + "\n")
    part.replace(path)
