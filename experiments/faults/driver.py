"""Runs faults in the copied project, which is the working directory, and writes the report.

python -m experiments.faults.driver REPORT OPTIONS      from experiments/faults/command.py
"""

import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

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


def main(report: Path, *, minutes: float, count: int | None, seed: int, first: int, kinds: str, **_: object) -> int:
    """Run faults until the count or the time is reached; the exit status is 1 where one was not survived."""
    names = [name for name in kinds.split(",") if name] or list(KINDS)
    for name in names:
        if name not in KINDS:
            raise unknown("kind", name, KINDS, where="--kinds")
    until = time.monotonic() + 60 * minutes
    world = World(Warm(report.parent / "logs"), Path("undisturbed"))
    print("the undisturbed run", flush=True)
    world.undisturbed()
    found: dict[str, Counter] = {name: Counter() for name in names}
    entries, skipped, number = [], {}, first
    with bar(total=count or int(60 * minutes), desc="faults", unit="fault" if count else "s") as shown:
        while time.monotonic() < until and (count is None or number < first + count) and len(skipped) < len(names):
            draw = random.Random(f"{seed} {number}")
            name = names[number % len(names)]
            number += 1
            if name in skipped:
                continue
            began = time.monotonic()
            try:
                outcome, what = "survived", KINDS[name](world, draw)
            except Skipped as reason:
                skipped[name] = str(reason)
                shown.write(f"{name} is skipped: {reason}")
                continue
            except (Lost, TimeoutError, UserError) as problem:
                outcome, what = "lost", f"{type(problem).__name__}: {problem}"
            found[name][outcome] += 1
            took = time.monotonic() - began
            entries.append(
                {"number": number - 1, "kind": name, "outcome": outcome, "what": what, "seconds": round(took, 1)}
            )
            shown.write(f"{number - 1} {name}: {outcome}, {what} ({took:.0f} s)")
            shown.update(1 if count else int(took))
    lost = [entry for entry in entries if entry["outcome"] == "lost"]
    write_json(
        report,
        {
            "faults": len(entries),
            "survived": len(entries) - len(lost),
            "kinds": {name: dict(counts) for name, counts in found.items() if name not in skipped},
            "skipped": skipped,
            "lost": lost,
            "entries": entries,
            "seed": seed,
            "first": first,
            "seconds": round(sum(entry["seconds"] for entry in entries), 1),
            "load": round(os.getloadavg()[0], 2),
            "hardware": hardware.describe(hardware.device("cpu")),
            "versions": provenance.versions(),
            "when": provenance.now(),
        },
    )
    print(
        f"{len(entries)} faults, {len(entries) - len(lost)} survived"
        + f", {len(skipped)} kinds skipped" * bool(skipped)
    )
    return int(bool(lost))


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), **json.loads(sys.argv[2])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
