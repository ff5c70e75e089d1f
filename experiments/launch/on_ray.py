"""Ray's workers: Ray finds a machine for each stage and tells of those that are lost."""

import os
import time
from pathlib import Path
from typing import Any

from experiments.launch import work
from experiments.launch.here import Here
from experiments.launch.schedule import Needs
from methods.errors import UserError

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
            "launch needs Ray, which is not installed here: `pip install -r requirements-launch.lock` adds it; without "
            "it, `make study` runs one cell after another, and `launch --slurm TEMPLATE` an array job"
        ) from error
    own = {"num_cpus": cores, "num_gpus": gpus, "object_store_memory": OBJECTS, "include_dashboard": False}
    own |= {"_memory": memory} if memory else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else own))
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({str(error).strip().splitlines()[0]}): look with `ray "
            "status` on its head node"
            if address
            else f"Ray does not start here: {error}"
        ) from error
    ray.cloudpickle.register_pickle_by_value(work)  # other machines need not have this file


class RayWorkers:
    """Jobs on Ray, and those that run here."""

    def __init__(self, *, root: Path):
        import ray

        self._ray, self._root = ray, str(root)
        self._here = Here(str(root))
        self._refs: dict[Any, str] = {}
        self._taken: dict[str, Needs] = {}
        self._looked, self._all = 0.0, {}

    def _capacity(self) -> dict[str, float]:
        """What all machines have together; looked at anew every few seconds, for machines come and go."""
        if time.monotonic() > self._looked + 5:
            self._looked, self._all = time.monotonic(), self._ray.cluster_resources()
        return self._all

    def fits(self, needs: Needs) -> bool:
        """Whether less is taken than there is of everything that the task needs.

        So one task more than fits may wait in Ray, which places it as soon as it can.
        """
        if needs.here:
            return self._here.fits(needs)
        capacity = self._capacity()
        return all(sum(_asked(n)[kind] for n in self._taken.values()) < capacity.get(kind, 0) for kind in _used(needs))

    def never(self, needs: Needs) -> str:
        if needs.here:
            return ""
        asked = {kind: _asked(needs)[kind] for kind in _used(needs)}
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if any(all(machine.get(kind, 0) >= amount for kind, amount in asked.items()) for machine in machines):
            return ""
        largest = {kind: max((machine.get(kind, 0) for machine in machines), default=0) for kind in asked}
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
        remote = self._ray.remote(work.run).options(
            num_cpus=needs.cores, num_gpus=needs.gpus, memory=needs.memory or None, max_retries=0, name=job.name
        )
        self._refs[remote.remote(job, self._root)] = job.name
        self._taken[job.name] = needs

    def ended(self, seconds: float) -> dict[str, work.Outcome]:
        outcomes = self._here.ended(0.0 if self._refs else seconds)
        if self._refs:
            done, _ = self._ray.wait(list(self._refs), timeout=0.0 if outcomes else seconds, num_returns=1)
            for ref in done:
                name = self._refs.pop(ref)
                self._taken.pop(name)
                outcomes[name] = self._outcome(ref)
        return outcomes

    def _outcome(self, ref: Any) -> work.Outcome:
        from ray.exceptions import OutOfMemoryError, RayError

        try:
            return self._ray.get(ref)
        except OutOfMemoryError:
            return work.Outcome(status=-9, tail="its machine ran out of memory, and Ray ended it")
        except RayError as error:
            told = isinstance(error, self._ray.exceptions.RayTaskError)
            return work.Outcome(status=1, tail=str(error)) if told else work.Outcome(status=-9, tail=work.LOST)

    def stop(self) -> None:
        for ref in self._refs:
            self._ray.cancel(ref, force=False)
        self._here.stop()
        self._ray.wait(
            list(self._refs), num_returns=len(self._refs), timeout=work.PATIENCE + 30
        ) if self._refs else None
        self._refs, self._taken = {}, {}


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
