"""The loop of a launch: give ready tasks to workers, commit what ends well, retry or set aside what does not."""

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from experiments.launch import work
from experiments.launch.dvc_stages import Stages
from experiments.launch.estimate import Estimate
from experiments.launch.schedule import Needs, Schedule, Task
from experiments.launch.tasks import Names
from experiments.study import failures
from methods.errors import UserError
from methods.tools.files import read_json

TRIES = 2
LOSSES = 5  # times that a stage is given again because its machine went away, which is no failure of its own
CERTAIN = ("nan",)  # kinds of failure that another try would only repeat
INTERVAL = 0.5  # seconds between two looks at the workers


class Elsewhere(UserError):
    """No machine here can take a stage: no failure of its cell, which another machine may be at work on."""


class Gone(UserError):
    """There are no workers any more."""


class Workers(Protocol):
    """Where stages run."""

    def fits(self, needs: Needs) -> bool:
        """Whether a task with these needs may be given now."""

    def never(self, needs: Needs) -> str:
        """Why no machine can ever take a task with these needs; '' if one can."""

    def give(self, job: work.Job, needs: Needs) -> None: ...

    def ended(self, seconds: float) -> dict[str, work.Outcome]:
        """Outcomes of jobs that have ended, by name; waits for so many seconds at most."""

    def stop(self) -> None:
        """Stop all jobs, each with its checkpoint, and wait for that."""

    def close(self) -> None:
        """Let go of the machines."""

    def slots(self, needs: Needs) -> float:
        """How many tasks with these needs run at once."""


@dataclass(kw_only=True, eq=False)
class Launch:
    """One launch of a study."""

    study: Any
    stages: Stages
    schedule: Schedule
    estimate: Estimate
    names: Names
    workers: Workers
    show: Any
    environment: Mapping[str, str] = field(default_factory=dict)
    threads: Mapping[str, int | None] = field(default_factory=dict)  # OMP_NUM_THREADS by model
    records_from: float = math.inf  # records of stages that did not run here are read from this time of day on
    began: dict[str, float] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    losses: dict[str, int] = field(default_factory=dict)
    jobs: dict[str, work.Job] = field(default_factory=dict)
    looked: set[str] = field(default_factory=set)  # stages that were ready, and looked at
    reasons: dict[str, str] = field(default_factory=dict)  # of stages that were set aside
    ran: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Run until every task is done or set aside. On Ctrl-C everything is stopped, and what has ended is kept.

        Raises Gone where the workers have gone as a whole.
        """
        try:
            while not self.schedule.ended:
                self._begin()
                if self.schedule.ended:
                    break
                for name, outcome in self.workers.ended(INTERVAL).items():
                    self._end(name, outcome)
                self._write()
                self.show.update(self)
        except Gone:
            raise
        except BaseException:
            self.stages.patience = 10.0
            self.show.stopping(self)
            self.workers.stop()  # what ended well meanwhile has its note, by which the next launch takes it over
            raise
        finally:
            with ExitStack() as last:  # the last one first, and each of them whatever the others raise
                last.callback(self.workers.close)
                last.callback(self.show.close, self)
                last.callback(self._write, now=True)

    def _begin(self) -> None:
        """Give workers all that is ready and fits; stages that are up to date are done without."""
        self._pass_over_finished()
        while (name := self.schedule.take(self.workers.fits)) is not None:
            try:
                if job := self._prepared(name):
                    self.began[name] = time.monotonic()
                    self.workers.give(job, self.schedule.tasks[name].needs)
            except Gone:
                raise
            except Elsewhere as error:
                self._set_aside(name, str(error), recorded=False)
            except UserError as error:
                record = self._record(name)
                self._set_aside(name, record["reason"] if record else str(error))
            except Exception as error:
                from dvc.exceptions import DvcException
                from dvc.lock import LockError

                if not isinstance(error, DvcException | OSError):
                    raise
                # a `dvc` that is at work on the same files may finish them
                self._set_aside(name, str(error), recorded=not isinstance(error, LockError))
            self.show.update(self)

    def _pass_over_finished(self) -> None:
        """Let stages that are up to date be done, each looked at once: the display and the time left count them."""
        while new := [name for name in self.schedule.ready() if name not in self.looked]:
            self.looked.update(new)
            for name in new:
                if not self.stages.changed(name):
                    self.schedule.finish(name, ran=False)

    def _prepared(self, name: str) -> work.Job | None:
        """The job of a stage, its old outputs removed; None if the stage is done without it."""
        if not self.stages.changed(name):
            self.schedule.finish(name, ran=False)
            return None
        self.jobs[name] = job = self._job(name)
        if note := work.noted(job, self.study.paths.root):  # it has run, and its driver ended before it was committed
            self._commit(name)
            self._done(name, note["seconds"])
            return None
        if why := self.workers.never(self.schedule.tasks[name].needs):
            raise Elsewhere(why)
        with work.alone(job, self.study.paths.root, stop=lambda: True) as alone:
            if not alone and name not in self.began:
                raise Elsewhere("another process is at work on it")
            self.stages.hold(name)  # before its old outputs are removed
            if not alone or not self.stages.restored(name):  # a worker removes them once it is alone
                return job
        self._commit(name)
        self.stages.let_go(name)
        self._done(name, 0.0)
        return None

    def unfinished(self, tasks: Iterable[Task]) -> dict[str, work.Job]:
        """The jobs of stages that are out of date, or will be once those before them have run; in DVC's order.

        Their inputs have no md5 yet.
        """
        found: dict[str, work.Job] = {}
        for task in Schedule(tasks).in_order():
            if any(other in found for other in task.after) or self.stages.changed(task.name):
                found[task.name] = self._job(task.name, hashed=False)
        return found

    def _job(self, name: str, *, hashed: bool = True) -> work.Job:
        stage = self.stages[name]
        also = self.names.computes.get(name)
        also = self.stages.inputs(also, hashed=hashed) if also else {}
        return work.Job(
            name=name,
            address=stage.addressing,
            command=stage.cmd,
            deps=also | self.stages.inputs(name, hashed=hashed),
            outs=tuple(self.stages.outputs(name)),
            folder=self.folder,
            threads=self.threads.get(self.names.model(name) or ""),
            environment=self.environment,
        )

    @property
    def folder(self) -> str:
        return f"work/local/launch/{self.study.name or 'default'}"

    def _commit(self, name: str) -> None:
        """Put the outputs into DVC's cache. Raises UserError where that fails, as on a full disk."""
        from dvc.exceptions import DvcException

        try:
            self.stages.commit(name)
        except (OSError, DvcException) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"its outputs cannot be kept: {reason}") from error

    def _done(self, name: str, seconds: float) -> None:
        self.schedule.finish(name)
        self.ran.append(name)
        if seconds:
            self.estimate.measured(name, seconds)
        self.show.done(self, name)

    def _end(self, name: str, outcome: work.Outcome) -> None:
        """Commit a stage that ended well; try one that did not once more, or set it aside."""
        if outcome.status == 0:
            try:
                self._commit(name)
            except UserError as error:
                return self._failed(name, str(error), kind="error")
            self.stages.let_go(name)
            return self._done(name, outcome.seconds)
        record = self._record(name)
        last = next((line for line in reversed(outcome.tail.splitlines()) if line.strip()), work.LOST)
        reason = record["reason"] if record else last.removeprefix("error: ")
        if outcome.status < 0 and not record:
            told = f"killed by signal {-outcome.status}" if outcome.host else outcome.tail
            reason = f"{told} during {name.partition('@')[0]}"
        if outcome.lost and self.losses.get(name, 0) < LOSSES:
            self.losses[name] = self.losses.get(name, 0) + 1
            self.stages.let_go(name)
            self.show.say(f"{name}: {reason}; it is given to another worker")
            return self.schedule.again(name)
        self._failed(name, reason, kind=record["kind"] if record else "killed" if outcome.status < 0 else "error")

    def _failed(self, name: str, reason: str, *, kind: str) -> None:
        self.stages.let_go(name)
        shared = self.schedule.tasks[name].once or name  # what fails for one fails for all that share it
        self.tries[shared] = self.tries.get(shared, 0) + 1
        if self.tries[shared] < TRIES and kind not in CERTAIN:
            self.show.say(f"{name}: {reason}; it is tried once more")
            return self.schedule.again(name)
        self._set_aside(name, reason, kind=kind)

    def _record(self, name: str) -> dict | None:
        """The record of a failure that the stage itself has written."""
        cell = self.names.cells.get(name) or self.names.prepared.get(name)
        path = self.study.paths.failure(cell) if cell else None
        if path is None or not path.is_file() or path.stat().st_mtime < self._since(name):
            return None
        found = read_json(path)
        return found if {"kind", "reason"} <= found.keys() else None

    def _since(self, name: str) -> float:
        """The time of day from which a record is of this try."""
        if name not in self.began:
            return self.records_from
        return time.time() - (time.monotonic() - self.began[name]) - 1.0

    def _set_aside(self, name: str, reason: str, *, kind: str = "error", recorded: bool = True) -> None:
        """Leave a stage, and all that needs it, to the next launch.

        Each cell that has no result for it has a record of the reason. One whose drift alone is missing has its result.
        """
        self.stages.let_go(name)
        self.reasons[name] = reason
        lost = self.schedule.set_aside(name)
        self.show.say(f"{name}: set aside: {reason}")
        told = {self.names.cells.get(name) or self.names.prepared.get(name)} if self._record(name) else set()
        for other in [name, *lost] if recorded else ():
            cell = self.names.cells.get(other)
            result = cell and f"collect@{cell.stage}"
            lacks = result in self.schedule.aside or result not in self.schedule.tasks
            if cell and cell not in told and lacks:
                told.add(cell)
                why = reason if other == name else f"{name} failed: {reason}"
                try:
                    failures.keep(self.study, cell, stage=name.partition("@")[0], kind=kind, reason=why)
                except OSError as error:
                    self.show.say(f"{cell.name}: its failure cannot be recorded: {error.strerror}")

    def _write(self, *, now: bool = False) -> None:
        """Write dvc.lock if it is time; then the notes of the stages in it have done their service."""
        try:
            written = self.stages.write(now=now)
        except OSError as error:  # a full disk: the notes stay, and the entries are written later
            if now:
                raise
            return self.show.say(f"dvc.lock cannot be written now: {error.strerror}")
        for name in written:
            if job := self.jobs.get(name):
                work.note_of(job, self.study.paths.root).unlink(missing_ok=True)
