"""A study's stages in DVC: which are out of date, and how a stage that a worker ran gets into the cache and dvc.lock.

The steps are those of `dvc repro` (dvc.stage.Stage.run), taken apart: outputs are removed and inputs hashed, then
another process runs the command, then outputs are hashed and put into the cache, and the entry is written. All of it
happens in the driver's one thread. Entries are written together, at most a tenth of the time, because dvc.lock is
written as a whole; until then the workers' notes keep what has ended (experiments/launch/work.py).
"""

import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments.study import missing, whole
from methods.errors import UserError

SHARE = 0.1  # of the time, spent on writing dvc.lock


class Stages:
    """The stages of a study's dvc.yaml, by name."""

    def __init__(self, repo: Any, path: str):
        from dvc.repo.graph import build_graph

        self.repo = repo
        self.lock_file = Path(path).with_suffix(".lock").absolute()
        self._stages = {stage.name: stage for stage in repo.stage.load_all(path)}
        self._graph = build_graph(list(self._stages.values()))
        self.after = {stage.name: frozenset(maker.name for maker in self._makers(stage)) for stage in self._graph}
        self._restored: set[str] | None = None  # finished stages that run again; None: all whose outputs are missing
        self._before: dict[str, tuple] = {}  # of finished stages that run again, what they had made
        self._pending: dict[str, dict] = {}
        self._busy: dict[str, ExitStack] = {}
        self._next = 0.0
        self.patience = math.inf  # seconds that another `dvc` command is waited for

    def __getitem__(self, name: str) -> Any:
        return self._stages[name]

    def _makers(self, stage: Any) -> list:
        """The stages that it reads from."""
        return list(self._graph.successors(stage))

    def restore_for(self, names: Iterable[str]) -> None:
        """Let finished stages run again only where one of these stages will run and reads what is missing of theirs."""
        with self._locked():
            self._restored = missing.to_restore(self._graph.subgraph([self._stages[name] for name in names]))

    def changed(self, name: str) -> bool:
        """Whether the stage is to run, or to be restored from DVC's cache of runs, now that its inputs are there."""
        stage = self._stages[name]
        finished = self._restored is not None and name not in self._restored
        with self._locked():
            return stage.changed(allow_missing=finished, upstream=self._makers(stage))

    def inputs(self, name: str, *, hashed: bool = True) -> dict[str, str]:
        """The md5 of each input by path from the root, or '' for each. Raises DvcException where one is missing.

        The stage itself keeps the hashes of dvc.lock, by which DVC finds earlier runs in its cache.
        """
        root = self.repo.root_dir
        with self._locked():
            return {
                os.path.relpath(dep.fs_path, root): dep.get_hash().value if hashed else ""
                for dep in self._stages[name].deps
            }

    def outputs(self, name: str) -> dict[str, bool]:
        """Paths of the outputs from the root, and whether each is kept in DVC's cache."""
        root = self.repo.root_dir
        return {os.path.relpath(out.fs_path, root): out.use_cache for out in self._stages[name].outs}

    def restored(self, name: str) -> bool:
        """Remove the outputs, and take them from DVC's cache of runs if the same run is in it."""
        from dvc.stage.cache import RunCacheNotFoundError

        stage = self._stages[name]
        with self._locked():
            stage.remove_outs(ignore_remove=False, force=False)
            try:
                self.repo.stage_cache.restore(stage)
            except RunCacheNotFoundError:
                return False
        return True

    def hold(self, name: str) -> None:
        """Mark inputs as read and outputs as written by this process, as a running `dvc repro` does."""
        from dvc.rwlock import rwlock

        stage = self._stages[name]
        if name in (self._restored or ()) and name not in self._before:
            with self._locked():
                if not stage.changed(allow_missing=True, upstream=self._makers(stage)):
                    self._before[name] = missing.results_of(stage), missing.made_by(stage)
        read, written = ([item.fs_path for item in items] for items in (stage.deps, stage.outs))
        hardlink = self.repo.config["core"].get("hardlink_lock", False)
        held = ExitStack()
        command = " ".join(sys.argv)  # by which DVC tells its own locks from those of other commands
        held.enter_context(rwlock(self.repo.tmp_dir, self.repo.fs, command, read, written, hardlink))
        self._busy[name] = held

    def let_go(self, name: str) -> None:
        from dvc.exceptions import DvcException

        if held := self._busy.pop(name, None):
            with suppress(DvcException, OSError):  # a full disk: DVC passes over marks of processes that have ended
                held.close()

    def commit(self, name: str) -> None:
        """Hash the outputs and put them into the cache; the entry is written by the next `write`."""
        from dvc.stage.serialize import to_lockfile

        stage = self._stages[name]
        kept = all(out.use_cache for out in stage.outs if not (out.is_metric or out.is_plot))
        with self._locked():
            if name in self._before:
                missing.put_back(stage, *self._before[name])
            stage.save(run_cache=kept)
            stage.commit()
        self._pending |= to_lockfile(stage)

    def write(self, *, now: bool = False) -> list[str]:
        """Write the entries that have gathered into dvc.lock, if it is time; the names of the stages that it has now.

        dvc.lock is replaced as a whole, so that a full disk or a kill leaves the old one.
        """
        from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

        if not self._pending or not (now or time.monotonic() >= self._next):
            return []
        began, self._next = time.monotonic(), time.monotonic() + 30  # if it fails
        with self._locked():
            text = self.lock_file.read_text() if self.lock_file.is_file() else ""
            data = parse_yaml_for_update(text, str(self.lock_file)) or {"schema": "2.0"}
            data.setdefault("stages", {}).update(self._pending)
            whole.write_text(self.lock_file, dumps_yaml(data))
        written, self._pending = list(self._pending), {}
        self._next = time.monotonic() + (time.monotonic() - began) / SHARE
        return written

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """DVC's lock of the repository, for a moment only: other `dvc` commands may run beside a launch."""
        from dvc.lock import LockError

        until = time.monotonic() + self.patience
        try:
            while not self.repo.lock.is_locked:
                try:
                    self.repo.lock.lock()
                except LockError as error:  # after three seconds, in which another command had it
                    if time.monotonic() > until:
                        raise UserError(
                            "another `dvc` command is at work: the next `launch` takes over what has ended here"
                        ) from error
            with self.repo.scm_context(quiet=True):
                yield
        finally:
            if self.repo.lock.is_locked:
                self.repo.lock.unlock()


@contextmanager
def opened(path: str) -> Iterator[Stages]:
    """The stages of the dvc.yaml at `path`; what they held is let go at the end, and all entries are written."""
    from dvc.repo import Repo

    logger = logging.getLogger("dvc")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with Repo() as repo:
            stages = Stages(repo, path)
            try:
                yield stages
            finally:
                for name in list(stages._busy):
                    stages.let_go(name)
                stages.write(now=True)
    finally:
        logger.setLevel(level)
