"""Stages that run on the machine of `launch` itself: those that fetch, and those that join or compare small files."""

import os
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from experiments.launch import work
from experiments.launch.schedule import Needs


class Here:
    """As many processes at once as the machine has cores, and no other workers."""

    def __init__(self, root: str):
        self._root = root
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        self._running: dict[str, Future] = {}

    def fits(self, needs: Needs) -> bool:
        return not needs.here or len(self._running) < (os.cpu_count() or 1)

    def never(self, needs: Needs) -> str:
        return "" if needs.here else "the array job has not made it: its log lies in work/local/launch"

    def slots(self, needs: Needs) -> float:
        return os.cpu_count() or 1

    def give(self, job: work.Job, needs: Needs) -> None:
        self._running[job.name] = self._pool.submit(work.run, job, self._root, stop=self._stop.is_set, clear=True)

    def ended(self, seconds: float) -> dict[str, work.Outcome]:
        """Outcomes of jobs that have ended; waits for so many seconds at most."""
        if not self._running:
            return {}
        done, _ = wait(self._running.values(), timeout=seconds, return_when=FIRST_COMPLETED)
        names = [name for name, future in self._running.items() if future in done]
        return {name: _outcome(self._running.pop(name)) for name in names}

    def stop(self) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        self._pool.shutdown()


def _outcome(future: Future) -> work.Outcome:
    try:
        return future.result()
    except OSError as error:  # of its log, as on a full disk
        return work.Outcome(status=1, tail=f"error: {error}")
