"""watch: the results of a study as its cells finish, one line each, beside the `dvc repro` that runs it."""

import time
from pathlib import Path

from analysis.load import record
from experiments.study import cells, environment, outcome
from methods.tools.files import read_json

INTERVAL = 5.0  # seconds between two looks
IDLE = 6  # looks without a running `dvc` after which a study that ran has ended: between two stages none holds a file


def main(study) -> None:
    """Print each finished cell, and each one that finishes, until the study ends; before it begins, wait for it."""
    grid = cells.grid(study)
    width = max(len(cell.name) for cell in grid)
    seen = dict.fromkeys((cell.name for cell in grid), 0)
    state, ran, idle = "", False, 0
    while True:
        new = {cell: stamp for cell in grid if (stamp := _stamp(study, cell)) not in (0, seen[cell.name])}
        for cell, stamp in new.items():
            seen[cell.name] = stamp
            print(f"{cell.name:<{width}}  {_line(study, cell)}", flush=True)
        running = environment.running(study) is not None
        ran, idle, first = ran or running, 0 if running else idle + 1, not state
        if new or first:
            state = outcome.left(study)
            print(state, flush=True)
        if idle >= IDLE if ran else idle and state == outcome.complete(len(grid)):
            return
        if first and not running:
            make = f"make study NAME={study.name}" if study.name else "make repro"
            print(f"nothing runs this study now: `{make}` does; Ctrl-C ends this command", flush=True)
        time.sleep(INTERVAL)


def _stamp(study, cell) -> int:
    """When the cell's result, or the record of its failure, was written, in nanoseconds; 0 without either."""
    return max(_written(study.paths.failure(cell)), _written(study.paths.run(cell) / "metrics.json"))


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _line(study, cell) -> str:
    if (failure := study.paths.failure(cell)).is_file():
        return f"FAILED: {read_json(failure).get('reason', 'no reason recorded')}"
    found = record(study.paths.run(cell))
    return "is made again" if found is None else outcome.line(found)
