"""Where an interrupted run goes on from: tensors by torch.distributed.checkpoint (DCP), the position as JSON beside them.

    FOLDER/save-00000003/manifest.json      format, identity, processes, torch, size and sha256 of every file
    FOLDER/save-00000003/process-0/         what process 0 saved: DCP's .metadata and *.distcp, and position.json

DCP pickles its metadata, and unpickling runs what the file says. So a checkpoint is opened only where this user alone can
have written it, and where its manifest, written last, says that it is this run's and every byte is as it was written.
Every process keeps a DCP checkpoint of its own: DCP would take tensors of the same name in two processes for one tensor.
"""

import json
import math
import os
import re
import shutil
import sys
import uuid
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp

from experiments.training.contents import local
from methods.errors import UserError
from methods.tools.files import exposed, need_room, sha256

FORMAT = 2
MANIFEST = "manifest.json"
POSITION = "position.json"
THREADS = 4
NAME = re.compile(r"save-\d{8}")
FRAME = 4096  # bytes DCP may add to a tensor


class Resume:
    """The checkpoints of one run in `folder`, which is the run's alone.

    identity    what the run is, as JSON: another identity's checkpoint is not gone on from
    every       seconds between checkpoints: 0 after each step, math.inf never
    rank, world this process and how many there are; above one, torch's default process group is used, and every
                process calls `load`, `due` and `save` equally often
    """

    def __init__(self, folder: Path, *, identity: dict, every: float = 900.0, rank: int = 0, world: int = 1) -> None:
        self.folder = Path(folder)
        self.identity = json.loads(json.dumps(identity))
        self.every, self.rank, self.world = every, rank, world
        self._last = monotonic()
        self._warned = False
        if rank == 0 and os.path.lexists(self.folder) and not exposed(self.folder):
            for part in self.folder.glob("*.part"):  # of saves that were killed
                _remove(part)

    def within(self, name: str) -> "Resume":
        """The checkpoints of a part of this run, in a folder of their own."""
        return Resume(
            self.folder / name,
            identity=self.identity | {"within": name},
            every=self.every,
            rank=self.rank,
            world=self.world,
        )

    def load(
        self, into: Mapping[str, Tensor], device: torch.device | str = "cpu", *, room: Mapping[str, Tensor] = {}
    ) -> tuple[dict[str, Tensor], dict] | None:
        """The newest whole checkpoint of this run: (all tensors by key, position), or None where there is none.

        Tensors of `into` are read in place, and those of `room` where the checkpoint has one of that key, shape and dtype; all others
        are allocated on `device`. A checkpoint that may not or cannot be used is named on stderr with the reason, and neither
        unpickled nor read into any tensor.
        """
        used, refused = None, []
        for path, reason in self._from_first(self._candidates):
            reason = reason or next(filter(None, self._gather(self._refusal(path, into))), None)
            if not reason:
                used = path
                break
            refused.append((path, reason))
        if self.rank == 0:
            then = f"using the older {used.name}" if used else "starting from the beginning"
            for path, reason in refused:
                print(f"checkpoint {path} is not used: {reason}; {then}", file=sys.stderr)
        return self._read(used, into, room, device) if used else None

    def due(self) -> bool:
        """Whether `every` seconds have passed since the last save; process 0's clock decides for all."""
        if math.isinf(self.every):
            return False
        return self._from_first(lambda: monotonic() - self._last >= self.every)

    def save(self, tensors: Mapping[str, Tensor], position: dict, *, problem: str | None = None) -> None:
        """Write this process's `tensors` and `position` (JSON: floats come back exactly, tuples as lists), then drop the
        older checkpoint. What the disk does not take, or a `problem` that one of the processes has, is named once on stderr,
        and the run goes on without."""
        text = json.dumps(position)
        sizes, problems = zip(
            *self._gather((sum(t.nbytes + FRAME for t in map(local, tensors.values())) + len(text), problem))
        )
        fresh = self._from_first(lambda: self._fresh(sum(sizes), next(filter(None, problems), None)))
        if fresh:
            outcomes = self._gather(self._write(fresh / f"process-{self.rank}", tensors, text))
            self._from_first(lambda: self._finish(fresh, outcomes))
        self._last = monotonic()

    def clear(self) -> None:
        """The run is finished: remove the folder."""
        if self.rank == 0:
            _remove(self.folder)

    def _candidates(self) -> list[tuple[Path, str | None]]:
        """The saves, newest first, each with what is wrong with it already."""
        try:
            if not os.path.lexists(self.folder):
                return []
            if why := exposed(self.folder):
                return [(self.folder, f"it {why}")]
            return [(path, None) for path in sorted(self.folder.iterdir(), reverse=True) if NAME.fullmatch(path.name)]
        except OSError as error:
            return [(self.folder, f"it cannot be read ({error})")]

    def _refusal(self, path: Path, into: Mapping[str, Tensor]) -> str | None:
        """Why this checkpoint is not to be used, or None. Nothing is unpickled before all else is in order."""
        try:
            entries = sorted(path.rglob("*"))
            for entry in (path, *entries):
                if why := exposed(entry):
                    return f"{'it' if entry == path else entry.relative_to(path)} {why}"
            if not (path / MANIFEST).is_file():
                return f"{MANIFEST} is missing"
            manifest = json.loads((path / MANIFEST).read_text())
            for key, here in (("format", FORMAT), ("torch", str(torch.__version__)), ("processes", self.world)):
                if manifest[key] != here:
                    return f"it was made with {key} {manifest[key]}, this run has {here}"
            there = manifest["identity"]
            missing = object()
            differing = [
                k for k in sorted(there | self.identity) if there.get(k, missing) != self.identity.get(k, missing)
            ]
            if differing:
                return f"it is another run's, which differs in {', '.join(differing)}"
            sizes = {entry.relative_to(path).as_posix(): entry.stat().st_size for entry in entries if entry.is_file()}
            del sizes[MANIFEST]
            for name in sorted(sizes | manifest["files"]):
                if name not in sizes:
                    return f"{name} is missing"
                if name not in manifest["files"]:
                    return f"{name} is not in its manifest"
                if sizes[name] != manifest["files"][name]["bytes"]:
                    return f"{name} has {sizes[name]} bytes, {manifest['files'][name]['bytes']} were written"
            own = [name for name in sizes if name.startswith(f"process-{self.rank}/")]
            for name, found in zip(own, _hashes([path / name for name in own])):
                if found != manifest["files"][name]["sha256"]:
                    return f"{name} is not as it was written (its sha256 differs)"
            return _misfit(_stored(path / f"process-{self.rank}"), into)
        except Exception as error:  # whatever is wrong with a checkpoint, the run can start without it
            return f"it cannot be read ({type(error).__name__}: {error})"

    def _read(
        self, path: Path, into: Mapping[str, Tensor], room: Mapping[str, Tensor], device: torch.device | str
    ) -> tuple[dict[str, Tensor], dict]:
        own = path / f"process-{self.rank}"
        stored = _stored(own)
        there = {**{key: tensor for key, tensor in room.items() if not _misfit(stored, {key: tensor})}, **into}
        tensors = {
            key: there[key] if key in there else torch.empty(kept.size, dtype=kept.properties.dtype, device=device)
            for key, kept in stored.items()
        }
        with _quiet():
            dcp.load(
                {key: local(t) for key, t in tensors.items()}, storage_reader=dcp.FileSystemReader(own), no_dist=True
            )
        return tensors, json.loads((own / POSITION).read_text())

    def _fresh(self, needed: int, problem: str | None) -> Path | None:
        """An empty folder for the next save, or None where there is no place for it or a problem with it."""
        try:
            if problem:
                raise OSError(problem)
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if why := exposed(self.folder):
                raise OSError(f"{self.folder} {why}")
            need_room(self.folder, needed, "a checkpoint")
            last = max((int(path.name[5:]) for path in self.folder.iterdir() if NAME.fullmatch(path.name)), default=0)
            fresh = self.folder / f"save-{last + 1:08d}.{uuid.uuid4().hex[:8]}.part"
            fresh.mkdir(mode=0o700)
            return fresh
        except (OSError, UserError) as error:
            self._warn(error)
            return None

    def _write(self, own: Path, tensors: Mapping[str, Tensor], text: str) -> dict[str, dict] | str:
        """Size and hash of each file written for this process, or what went wrong."""
        try:
            own.mkdir(mode=0o700)
            writer = dcp.FileSystemWriter(own, thread_count=max(1, min(THREADS, len(tensors))))
            with _quiet():
                metadata = dcp.save(
                    {key: local(t).detach() for key, t in tensors.items()}, storage_writer=writer, no_dist=True
                )
            unwritten = tensors.keys() - {index.fqn for index in metadata.storage_data}
            if unwritten:  # DCP does not pass on an error of its writing threads
                raise OSError(f"{min(unwritten)} could not be written")
            _write_synced(own / POSITION, text)
            files = sorted(own.iterdir())
            for path in files:
                path.chmod(0o600)  # whatever the umask
                _sync(path)
            _sync(own)
            return {
                f"{own.name}/{path.name}": {"bytes": path.stat().st_size, "sha256": found}
                for path, found in zip(files, _hashes(files))
            }
        except dcp.CheckpointException as error:
            return " ".join(str(cause) for cause, _ in error.failures.values())
        except Exception as error:  # the other processes wait for the outcome
            return f"{type(error).__name__}: {error}"

    def _finish(self, fresh: Path, outcomes: list[dict[str, dict] | str]) -> None:
        """Seal the save with its manifest, give it its name, remove all older ones."""
        try:
            for outcome in outcomes:
                if isinstance(outcome, str):
                    raise OSError(outcome)
            files = {name: facts for outcome in outcomes for name, facts in outcome.items()}
            _write_synced(
                fresh / MANIFEST,
                json.dumps(
                    {
                        "format": FORMAT,
                        "torch": str(torch.__version__),
                        "processes": self.world,
                        "identity": self.identity,
                        "files": files,
                    },
                    indent=1,
                ),
            )
            _sync(fresh)
            named = fresh.with_name(fresh.name.split(".")[0])
            os.rename(fresh, named)
            _sync(self.folder)
        except OSError as error:
            _remove(fresh)
            self._warn(error)
            return
        self._warned = False
        for path in self.folder.iterdir():
            if path != named and NAME.fullmatch(path.name):
                _remove(path)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            print(f"no checkpoint was written: {error}; the run goes on without", file=sys.stderr)
        self._warned = True

    def _gather(self, value: Any) -> list:
        """Every process's value, in order of rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def _from_first(self, compute) -> Any:
        """What process 0 computes, in every process."""
        value = [compute() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(value, src=0)
        return value[0]


def _stored(own: Path) -> dict:
    """Size and dtype of the tensors in one process's checkpoint, by key. Unpickles."""
    return dcp.FileSystemReader(own).read_metadata().state_dict_metadata


def _misfit(stored: dict, into: Mapping[str, Tensor]) -> str | None:
    for key, tensor in into.items():
        if key not in stored:
            return f"it has no tensor {key}"
        there, here = stored[key], local(tensor)
        if (there.size, there.properties.dtype) != (here.shape, here.dtype):
            return f"{key} in it is {list(there.size)} {there.properties.dtype}, here {list(here.shape)} {here.dtype}"
    return None


def _hashes(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(sha256, paths))


def _write_synced(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    """A file's bytes, or a folder's names, on the disk before anything that relies on them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _quiet() -> warnings.catch_warnings:
    """DCP warns that it does not use the process group: that is meant."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
