"""Ray's workers: Ray finds a machine for each stage and tells of those that are lost."""

import json
import math
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.launch import exchange, work
from experiments.launch.driver import Gone
from experiments.launch.here import Here
from experiments.launch.schedule import Needs
from experiments.launch.tasks import Names
from experiments.study import ledger, provenance
from methods.errors import UserError, shortened

ABSENCE = 600.0  # seconds for which tasks wait for a machine that has gone away: it may restart
OBJECTS = 100 * 2**20  # bytes of Ray's object store: nothing large passes through it
PASSED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "DVC_EXP_NAME")  # to other machines; never a token


def start(*, address: str, cores: int, gpus: int, memory: int | None) -> None:
    """Connect to the cluster at `address`, or start Ray on this machine with these resources.

    Raises UserError where Ray is not installed or the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or Ray would report to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError(
            "launch needs Ray, which is not installed here: `python -m pip install -r requirements-launch.lock`; "
            "without it, `make study` runs one cell after another, and `launch --slurm TEMPLATE` an array job"
        ) from error
    handler = signal.getsignal(signal.SIGTERM)
    own = {"num_cpus": cores, "num_gpus": gpus, "object_store_memory": OBJECTS, "include_dashboard": False}
    own |= {"_memory": memory} if memory else {}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # Ray's processes inherit it: a terminal that
    try:  # ends tells them too, and they are to go on until the trainings have written their checkpoints
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else own))
    except Exception as error:  # Ray raises what comes, also a plain Exception
        if address:
            raise UserError(
                f"--address {address}: no Ray cluster answers there ({shortened(error)}): look with `ray status` on "
                "its head node"
            ) from error
        raise UserError(f"Ray does not start here: {shortened(error)}; run the same command again") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    signal.signal(signal.SIGTERM, handler)  # Ray has put one of its own in its place
    ray.cloudpickle.register_pickle_by_value(work)  # other machines need not have this file


class RayWorkers:
    """Jobs on Ray, and those that run here."""

    def __init__(self, *, study: Any, names: Names, cached: Callable[[str], Mapping[str, bool]]):
        """cached  whether each output of a stage lies in DVC's cache"""
        import ray

        self._ray, self._study, self._names, self._cached = ray, study, names, cached
        self._root = str(study.paths.root)
        self._here = Here(self._root)
        self._refs: dict[Any, str] = {}
        self._given: dict[str, tuple[work.Job, Needs]] = {}
        self._looked, self._nodes = -math.inf, []
        self._seen: dict[frozenset, float] = {}  # when a machine with these resources was there last
        self._apart: _Apart | None = None  # known once a machine does not see this disk
        self._token = f"work/local/launch/{uuid.uuid4().hex}.seen"
        token = Path(self._root, self._token)
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()

    def _machines(self) -> list[dict[str, float]]:
        """What each machine has; looked at anew every few seconds, for machines come and go."""
        if (now := time.monotonic()) > self._looked + 5:
            nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self._looked, self._nodes = now, [{kind: node.get(kind, 0) for kind in KINDS} for node in nodes]
            self._seen |= {frozenset(node.items()): now for node in self._nodes}
        return self._nodes

    def _capacity(self) -> dict[str, float]:
        """What all machines have together."""
        return {kind: sum(node[kind] for node in self._machines()) for kind in KINDS}

    def _away(self, needs: Needs) -> float:
        """Seconds since a machine that can take the task was there: 0 if one is, infinite if none ever was."""
        asked = _asked(needs)
        if any(all(node[kind] >= asked[kind] for kind in KINDS) for node in self._machines()):
            return 0.0
        seen = [at for node, at in self._seen.items() if all(dict(node)[kind] >= asked[kind] for kind in KINDS)]
        return time.monotonic() - max(seen, default=-math.inf)

    def fits(self, needs: Needs) -> bool:
        """Whether some of everything that the task needs is still free.

        One task too many may be given: Ray starts it as soon as there is room. What no machine has at all is for
        `never` to refuse.
        """
        if needs.here:
            return self._here.fits(needs)
        if away := self._away(needs):
            return away > ABSENCE
        capacity = self._capacity()
        taken = {kind: sum(_asked(own)[kind] for _, own in self._given.values()) for kind in _used(needs)}
        return all(taken[kind] < capacity[kind] for kind in taken if capacity.get(kind))

    def never(self, needs: Needs) -> str:
        if needs.here or self._away(needs) <= ABSENCE:
            return ""
        asked = {kind: _asked(needs)[kind] for kind in _used(needs)}
        largest = {kind: max((machine[kind] for machine in self._machines()), default=0) for kind in asked}
        return (
            f"a cell needs {_words(asked)}, and no machine has that (the most of each: {_words(largest)}): see `needs` "
            "in the model's block of params.yaml"
        )

    def slots(self, needs: Needs) -> float:
        if needs.here:
            return os.cpu_count() or 1
        return min((self._capacity().get(kind, 0) / _asked(needs)[kind] for kind in _used(needs)), default=1.0)

    def give(self, job: work.Job, needs: Needs) -> None:
        if needs.here:
            self._here.give(job, needs)
            return
        code = None
        if self._apart is not None:
            try:
                exchange.send(self._apart.store, self._root, self._apart.new(job.deps))
            except Exception as error:  # a remote's library raises what it likes
                raise UserError(f"its inputs cannot be sent: {shortened(error)}") from error
            code, job = self._apart.code, replace(job, environment={**job.environment, "HOLDFAST_GIT": self._apart.git})
        remote = self._ray.remote(work.run_anywhere).options(
            num_cpus=needs.cores, num_gpus=needs.gpus, memory=needs.memory or None, max_retries=0, name=job.name
        )
        self._refs[remote.remote(job, self._root, self._token, code, self._asked(job))] = job.name
        self._given[job.name] = (job, needs)

    def _asked(self, job: work.Job) -> dict[str, Any]:
        """What a machine without this disk sends back."""
        cell = self._names.cells.get(job.name) or self._names.prepared.get(job.name)
        root = self._study.paths.root
        return {
            "cached": [out for out, kept in self._cached(job.name).items() if kept],
            "passing": [path for path in job.deps if path.endswith("/weights")],  # weights of cells
            "records": [self._study.paths.failure(cell).relative_to(root).as_posix()] if cell else [],
            "ledger": os.path.relpath(ledger.path(self._study), root),
            "cell": cell.name if cell else "",
        }

    def ended(self, seconds: float) -> dict[str, work.Outcome]:
        outcomes = self._here.ended(0.0 if self._refs else seconds)
        if self._refs:
            done, _ = self._ray.wait(list(self._refs), timeout=0.0 if outcomes else seconds, num_returns=1)
            for ref in done:
                name = self._refs.pop(ref)
                job, needs = self._given.pop(name)
                outcome = self._outcome(ref)
                outcome = self._sent(job, needs) if outcome.apart else self._taken_over(outcome)
                if outcome is not None:
                    outcomes[name] = outcome
            for ref, name in list(self._refs.items()):
                if self._away(self._given[name][1]) > ABSENCE:  # Ray itself would wait for ever
                    self._ray.cancel(ref)
                    del self._refs[ref], self._given[name]
                    outcomes[name] = work.Outcome(status=-9, tail=work.LOST, lost=True)
        return outcomes

    def _sent(self, job: work.Job, needs: Needs) -> work.Outcome | None:
        """Send a machine without this disk what the job reads, and give it the job again; an outcome if that fails."""
        try:
            self._apart = self._apart or _Apart(self._study.paths.root)
            self.give(job, needs)
        except UserError as error:
            return work.Outcome(status=1, tail=f"error: {error}")
        except (OSError, subprocess.CalledProcessError) as error:
            return work.Outcome(status=1, tail=f"error: its inputs cannot be sent: {error}")
        return None

    def _taken_over(self, outcome: work.Outcome) -> work.Outcome:
        """The outcome, with what another machine has sent on this disk."""
        if outcome.answer is None:
            return outcome
        try:
            exchange.receive(self._apart.store, self._root, outcome.answer, ledger=ledger.path(self._study))
        except Exception as error:  # a remote's library raises what it likes
            return work.Outcome(status=1, host=outcome.host, tail=f"error: its files did not arrive: {error}")
        return outcome

    def _outcome(self, ref: Any) -> work.Outcome:
        from ray.exceptions import LocalRayletDiedError, OutOfMemoryError, RayError, RayTaskError

        try:
            return self._ray.get(ref)
        except OutOfMemoryError:
            return work.Outcome(status=-9, tail="its machine ran out of memory, and Ray ended it")
        except RayTaskError as error:
            return work.Outcome(status=1, tail=str(error))
        except LocalRayletDiedError as error:
            raise Gone("Ray on this machine has ended: what has ended is kept; run the same command again") from error
        except RayError:
            return work.Outcome(status=-9, tail=work.LOST, lost=True)

    def stop(self) -> None:
        until = time.monotonic() + work.PATIENCE + 30
        for ref in self._refs:
            self._ray.cancel(ref, force=False)
        self._here.stop()
        if self._refs:
            left = max(0.0, until - time.monotonic())
            self._ray.wait(list(self._refs), num_returns=len(self._refs), timeout=left)
        self._refs, self._given = {}, {}

    def close(self) -> None:
        """Wait for the stages that run here, then leave Ray, and end it where it was started here."""
        self._here.close()
        Path(self._root, self._token).unlink(missing_ok=True)
        self._ray.shutdown()


class _Apart:
    """What machines without this disk are sent: the code once, and each input once."""

    def __init__(self, root: Path):
        self.store = exchange.remote(str(root))
        self.code = exchange.archive(root)
        self.git = json.dumps(provenance.git(root))
        self._sent: set[tuple[str, str]] = set()

    def new(self, deps: Mapping[str, str]) -> dict[str, str]:
        """Those of the inputs that were not sent yet."""
        fresh = {path: digest for path, digest in deps.items() if (path, digest) not in self._sent}
        self._sent |= set(fresh.items())
        return fresh


KINDS = ("CPU", "GPU", "memory")


def _asked(needs: Needs) -> dict[str, float]:
    return {"CPU": needs.cores, "GPU": needs.gpus, "memory": needs.memory}


def _used(needs: Needs) -> list[str]:
    return [kind for kind, amount in _asked(needs).items() if amount]


def _words(amounts: dict[str, float]) -> str:
    words = {"CPU": "{:g} cores", "GPU": "{:g} GPUs"}
    return ", ".join(
        f"{amount / 2**30:.1f} GiB of memory" if kind == "memory" else words[kind].format(amount)
        for kind, amount in amounts.items()
    )
