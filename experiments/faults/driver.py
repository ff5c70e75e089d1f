"""Runs faults in the copied project, which is the working directory, and writes the report.

python -m experiments.faults.driver REPORT OPTIONS      from experiments/faults/command.py
"""

import itertools
import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from experiments.faults import disks, pipelines, surroundings  # noqa: F401 (which register their kinds)
from experiments.faults.kinds import KINDS, Skipped
from experiments.faults.warm import Warm
from experiments.faults.world import Lost, World
from experiments.study import provenance
from experiments.training import hardware
from experiments.training.progress import bar
from methods.errors import UserError
from methods.tools.files import write_json
from methods.tools.names import unknown

STOPS = ("sigkill", "sigterm")


def main(report: Path, *, minutes: float, count: int | None, seed: int, first: int, kinds: str, **_: object) -> int:
    """Run faults until the count or the time is reached; the exit status is 1 where one was not survived."""
    names = [name for name in kinds.split(",") if name] or order()
    for name in names:
        if name not in KINDS:
            raise unknown("kind", name, KINDS, where="--kinds")
    until = time.monotonic() + 60 * minutes
    world = World(Warm(report.parent / "logs"), Path("undisturbed"))
    print("the undisturbed run", flush=True)
    world.undisturbed()
    entries: list[dict] = []
    skipped: dict[str, str] = {}
    ended = "all of --count" if count else "the minutes were up"
    with bar(total=count or int(60 * minutes), desc="faults", unit="fault" if count else "s") as shown:
        for number in itertools.count(first) if count is None else range(first, first + count):
            name = names[number % len(names)]
            if time.monotonic() > until or skipped.keys() >= set(names):
                break
            if name in skipped:
                continue
            began = time.monotonic()
            try:
                outcome, what = "survived", KINDS[name](world, random.Random(f"{seed} {number}"))
            except Skipped as reason:
                skipped[name] = str(reason)
                shown.write(f"{name} is skipped: {reason}")
                continue
            except KeyboardInterrupt:
                shown.write("stopped; the report is of what was done")
                ended = "stopped by hand"
                break
            except (Lost, TimeoutError, UserError) as problem:
                outcome, what = "lost", f"{type(problem).__name__}: {problem}"
            except Exception:  # of this program: the other faults go on, and this one counts as lost
                outcome, what = "lost", traceback.format_exc()[-3000:]
            what = _without_folders(what)
            took = round(time.monotonic() - began, 1)
            entries.append({"number": number, "kind": name, "outcome": outcome, "what": what, "seconds": took})
            shown.write(f"{number} {name}: {outcome}, {what} ({took:.0f} s)")
            shown.update(1 if count else int(took))
            _write(report, entries, skipped, seed=seed, first=first, ended="killed")
    lost = _write(report, entries, skipped, seed=seed, first=first, ended=ended)
    left_out = f", kinds that were skipped: {', '.join(skipped)}" if skipped else ""
    print(f"{len(entries)} faults, {len(entries) - len(lost)} survived{left_out}")
    return int(bool(lost))


def _write(report: Path, entries: list[dict], skipped: dict[str, str], **about: Any) -> list[dict]:
    """Write the report, with `about` how it was made; the faults that were not survived."""
    lost = [entry for entry in entries if entry["outcome"] == "lost"]
    counts = {name: Counter(entry["outcome"] for entry in entries if entry["kind"] == name) for name in KINDS}
    write_json(
        report,
        {
            "faults": len(entries),
            "survived": len(entries) - len(lost),
            "kinds": {name: dict(found) for name, found in counts.items() if found},
            "skipped": skipped,
            "lost": lost,
            "entries": entries,
            **about,
            "seconds": round(sum(entry["seconds"] for entry in entries), 1),
            "load": round(os.getloadavg()[0], 2),
            "hardware": hardware.describe(hardware.device("cpu")),
            "versions": provenance.versions(),
            "when": provenance.now(),
        },
    )
    return lost


def _without_folders(text: str) -> str:
    """A traceback, or what a command said, without where this machine keeps the project and its Python."""
    for folder in (os.getcwd(), sys.prefix, sys.base_prefix):
        text = text.replace(f"{folder}{os.sep}", "")
    return text


def order() -> list[str]:
    """The kinds in turn; every second fault is a stage that is killed or stopped."""
    others = [name for name in KINDS if name not in STOPS]
    return [name for pair in zip(itertools.cycle(STOPS), others) for name in pair]


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), **json.loads(sys.argv[2])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
