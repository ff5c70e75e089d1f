"""One task of an array job: `python -m experiments.launch.array FILE` runs the line of FILE that Slurm names.

A line is a list of chains, each the stages of one cell in order, or one preparation. A stage that fails is run once
more; then the rest of its chain is left out. DVC is not used: the notes of what ended well are taken over at the end by
`python -m experiments launch --gather`.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from experiments.launch import work
from experiments.study import md5
from experiments.study.screen import Screen

VARIABLE = "SLURM_ARRAY_TASK_ID"


def line(chains: list[list[work.Job]]) -> str:
    """The text of a line."""
    return json.dumps([[asdict(job) for job in chain] for chain in chains])


def read(text: str) -> list[list[work.Job]]:
    return [[work.Job(**job | {"outs": tuple(job["outs"])}) for job in chain] for chain in json.loads(text)]


def hashed(job: work.Job, root: str) -> work.Job:
    """The job with the md5 of its inputs as they are now; an input that is missing has none."""
    paths = {path: Path(root, path) for path in job.deps}
    return replace(job, deps={path: md5.of(file) if file.exists() else "" for path, file in paths.items()})


def run_line(chains: list[list[work.Job]], root: str, stop: Callable[[], bool] = lambda: False) -> bool:
    """Run the chains one after another until `stop`; whether all stages ended well."""
    well = True
    for chain in chains:
        for job in chain:
            if stop() or not _run(hashed(job, root), root, stop):
                well = False
                break
    return well


def _run(job: work.Job, root: str, stop: Callable[[], bool]) -> bool:
    if missing := [path for path, digest in job.deps.items() if not digest]:
        print(f"{job.name}: {missing[0]} is missing: what makes it has failed", flush=True)
        return False
    if work.noted(job, root):
        print(f"{job.name}: has run", flush=True)
        return True
    for left in (1, 0):
        outcome = work.run(job, root, stop=stop, clear=True)
        print(f"{job.name}: status {outcome.status} after {outcome.seconds:.0f} s", flush=True)
        if outcome.status == 0:
            return True
        print(outcome.tail, file=sys.stderr, flush=True)
        if outcome.lost or stop():
            return False
        if left:
            print(f"{job.name}: is tried once more", flush=True)
    return False


def main() -> int:
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())  # Slurm's sign that the time is over: write a checkpoint
    lines = Path(sys.argv[1]).read_text().splitlines()
    return 0 if run_line(read(lines[int(os.environ[VARIABLE])]), os.getcwd(), stopped.is_set) else 1


if __name__ == "__main__":
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
    sys.exit(main())
