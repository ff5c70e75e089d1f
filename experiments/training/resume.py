"""Checkpoints of an interrupted run: one safetensors file a process, and JSON beside it.

FOLDER/save-00000003/manifest.json           format, identity, size and sha256 of every file; written last
FOLDER/save-00000003/process-0.safetensors   the tensors of process 0, as bytes
FOLDER/save-00000003/process-0.json          their dtypes and shapes, and the position
"""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from methods.errors import UserError
from methods.tools.files import need_room, sha256
from methods.tools.process_group import Shards

FORMAT = 3
MANIFEST = "manifest.json"
SAVE = re.compile(r"save-\d{8}")


class Resume:
    """The checkpoints of one run in `folder`, which belongs to this run alone.

    identity  what the run is, as JSON: a checkpoint of another identity is not used
    every     seconds between checkpoints: 0 after each step, math.inf never
    shards    the processes of the run, which call `newest`, `load`, `due` and `save` equally often
    """

    def __init__(self, folder: Path, *, identity: dict, every: float = 900.0, shards: Shards = Shards()) -> None:
        self.folder, self.every, self._shards = Path(folder), every, shards
        # another version of torch computes other bits, and another number of processes holds other rows
        here = {"torch": str(torch.__version__), "processes": shards.world}
        self.identity = json.loads(json.dumps(identity | here))
        self._last = monotonic()
        self._warned = False
        self._stop = False  # somebody asks for the end

    def within(self, name: str) -> "Resume":
        """The checkpoints of one phase of this run, in a folder of their own."""
        identity = self.identity | {"within": name}
        return Resume(self.folder / name, identity=identity, every=self.every, shards=self._shards)

    def load(self, into: Mapping[str, Tensor], device: torch.device | str = "cpu") -> tuple[dict, dict] | None:
        """The newest checkpoint as (tensors, position), or None; tensors of `into` are read in place."""
        checkpoint = self.newest(into)
        if checkpoint is None:
            return None
        checkpoint.read_into(into)
        others = {key: checkpoint.tensor(key).to(device, copy=True) for key in checkpoint.kinds if key not in into}
        return {**into, **others}, checkpoint.position

    def newest(self, into: Mapping[str, Tensor] = {}) -> "Checkpoint | None":
        """The newest whole checkpoint of this run that has every tensor of `into`; None where there is none.

        A checkpoint that cannot be used is named on stderr with the reason, and an older one is taken.
        """
        used, refused = None, []
        while used is None and (path := self._from_first(lambda: next(iter(self._saves()[len(refused) :]), None))):
            checkpoint, reason = self._opened(path, into)
            if reason := next(filter(None, self._shards.all_gather(reason)), None):
                refused.append((path, reason))
            else:
                used = checkpoint
        if self._shards.first:
            then = f"using the older {used.folder.name}" if used else "starting from the beginning"
            for path, reason in refused:
                print(f"checkpoint {path} is not used: {reason}; {then}", file=sys.stderr)
        return used

    def due(self, *, last: bool = False) -> bool:
        """Whether a checkpoint is to be written after this step; the first process decides for all.

        It is if `every` seconds have passed since the last save and the step is not the `last` one, or if a stop waits.
        """
        if math.isinf(self.every):
            return False
        return self._from_first(lambda: self._stop or not last and monotonic() - self._last >= self.every)

    @contextmanager
    def stops_after_a_step(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM wait until the step has ended and has a checkpoint. A second Ctrl-C does not wait."""
        if math.isinf(self.every) or threading.current_thread() is not threading.main_thread():
            yield
            return

        def wait(number: int, frame: Any) -> None:
            if self._stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            told, self._stop = self._stop, True
            if not told and self._shards.first:
                with suppress(OSError, RuntimeError):  # a terminal that is gone, or that is written to at this moment
                    print("stopping after this step, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr)

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        heeded = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
        for number in heeded:
            signal.signal(number, wait)
        try:
            yield
            self.end_if_asked()
        finally:
            for number, handler in heeded.items():
                signal.signal(number, handler)

    def end_if_asked(self) -> None:
        """Raises KeyboardInterrupt if a stop waits."""
        if self._from_first(lambda: self._stop):
            raise KeyboardInterrupt

    def save(self, tensors: Mapping[str, Tensor], position: dict, *, problem: str | None = None) -> None:
        """Write this process's `tensors` and `position` (JSON), then remove the older checkpoints.

        A full disk, or a `problem` of one of the processes, is reported once on stderr, and the run continues without a
        checkpoint; the older one stays.
        """
        kinds = {key: [str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in tensors.items()}
        facts = json.dumps({"position": position, "tensors": kinds}).encode()
        needs = self._shards.all_gather((sum(t.nbytes for t in tensors.values()) + 2 * len(facts), problem))
        problem = next((problem for _, problem in needs if problem), None)
        unfinished = self._from_first(self._make_folder, sum(size for size, _ in needs), problem)
        if unfinished:
            outcomes = self._shards.all_gather(self._write(unfinished, tensors, facts))
            self._from_first(self._finish, unfinished, outcomes)
        self._last = monotonic()

    def clear(self) -> None:
        """The run is finished: remove the folder."""
        if self._shards.first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _saves(self) -> list[Path]:
        """Every save, newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if SAVE.fullmatch(path.name)), reverse=True)

    def _opened(self, path: Path, into: Mapping[str, Tensor]) -> "tuple[Checkpoint | None, str | None]":
        """This process's part of a save, or why it cannot be used."""
        try:
            if not (path / MANIFEST).is_file():
                return None, f"{MANIFEST} is missing, so it was not finished"
            manifest = json.loads((path / MANIFEST).read_text())
            if manifest["format"] != FORMAT:
                return None, f"it was written by an earlier version (format {manifest['format']}, this is {FORMAT})"
            other, missing = manifest["identity"], object()
            keys = sorted(other | self.identity)
            differing = [key for key in keys if other.get(key, missing) != self.identity.get(key, missing)]
            if differing:
                return None, f"it belongs to another run, which differs in {', '.join(differing)}"
            for name in (f"process-{self._shards.rank}.json", f"process-{self._shards.rank}.safetensors"):
                written = manifest["files"][name]
                if not (path / name).is_file():
                    return None, f"{name} is missing"
                if (size := (path / name).stat().st_size) != written["bytes"]:
                    return None, f"{name} has {size} bytes, {written['bytes']} were written"
                if sha256(path / name) != written["sha256"]:
                    return None, f"{name} is damaged (its sha256 differs)"
            checkpoint = Checkpoint(path, self._shards.rank)
            return checkpoint, checkpoint.misfit(into)
        except Exception as error:  # whatever is wrong with a checkpoint, the run can start without it
            return None, f"it cannot be read ({type(error).__name__}: {error})"

    def _make_folder(self, needed: int, problem: str | None) -> Path | None:
        """An empty folder for the next save; None where there is no room for it or a problem with it."""
        try:
            if problem:
                raise OSError(problem)
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("*.part"):  # a save that was interrupted
                shutil.rmtree(path)
            need_room(self.folder, needed, "a checkpoint")
            number = max((int(path.name[5:]) for path in self._saves()), default=0) + 1
            unfinished = self.folder / f"save-{number:08d}.part"
            unfinished.mkdir()
            return unfinished
        except (OSError, UserError) as error:
            return self._warn(error)

    def _write(self, folder: Path, tensors: Mapping[str, Tensor], facts: bytes) -> dict[str, dict] | str:
        """Size and sha256 of each file that this process wrote, or what went wrong."""
        name = f"process-{self._shards.rank}"
        try:
            return {
                f"{name}.safetensors": _write(folder / f"{name}.safetensors", _safetensors(tensors)),
                f"{name}.json": _write(folder / f"{name}.json", [facts]),
            }
        except Exception as error:  # the other processes wait for the outcome
            return f"{type(error).__name__}: {error}"

    def _finish(self, unfinished: Path, outcomes: list[dict[str, dict] | str]) -> None:
        """Write the manifest, give the save its name, and remove all older ones."""
        try:
            if problem := next((outcome for outcome in outcomes if isinstance(outcome, str)), None):
                raise OSError(problem)
            files = {name: facts for outcome in outcomes for name, facts in outcome.items()}
            manifest = {"format": FORMAT, "identity": self.identity, "files": files}
            _write(unfinished / MANIFEST, [json.dumps(manifest, indent=1).encode()])
            _sync(unfinished)
            finished = unfinished.rename(unfinished.with_suffix(""))
            _sync(self.folder)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            return self._warn(error)
        self._warned = False
        for path in self._saves():
            if path != finished:
                shutil.rmtree(path, ignore_errors=True)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            print(f"no checkpoint was written: {error}; the run continues without one", file=sys.stderr)
        self._warned = True

    def _from_first(self, compute, *arguments):
        """What the first process computes, in every process."""
        return self._shards.broadcast(compute(*arguments) if self._shards.first else None)


class Checkpoint:
    """One process's part of a save: the position, and tensors that are read one at a time.

    kinds  [dtype, shape] of every tensor by its key
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        facts = json.loads((folder / f"process-{rank}.json").read_text())
        self.position, self.kinds = facts["position"], facts["tensors"]
        self._file = safe_open(folder / f"process-{rank}.safetensors", framework="pt")

    def tensor(self, key: str) -> Tensor:
        """A tensor on the CPU, which may lie in the file itself: copy it."""
        dtype, shape = self.kinds[key]
        return self._file.get_tensor(key).view(getattr(torch, dtype)).view(shape)

    @torch.no_grad()
    def read_into(self, into: Mapping[str, Tensor]) -> None:
        for key, tensor in into.items():
            tensor.copy_(self.tensor(key))

    def misfit(self, into: Mapping[str, Tensor]) -> str | None:
        """Why the tensors of `into` cannot be read from it, or None."""
        for key, tensor in into.items():
            here = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            if key not in self.kinds:
                return f"it has no tensor {key}"
            if self.kinds[key] != here:
                return f"{key} in it is {' '.join(map(str, self.kinds[key]))}, here {' '.join(map(str, here))}"
        return None


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The pieces of a safetensors file. Its library would copy all tensors of a GPU to the host's memory at once."""
    # the widest dtypes come first, so that every tensor begins at a multiple of its entries' size
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    header, end = {}, 0
    for key, tensor in tensors.items():
        header[key] = {"dtype": "U8", "shape": [tensor.nbytes], "data_offsets": [end, end := end + tensor.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> dict:
    """Write a file, and wait until the disk has it; its size and sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file, ThreadPoolExecutor(1) as pool:
        for piece in pieces:
            hashed = pool.submit(digest.update, piece)  # while the disk is at work
            file.write(piece)
            hashed.result()
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _sync(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
