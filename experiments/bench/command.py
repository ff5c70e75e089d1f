"""Runs benchmarks, prints their ratios and keeps them in results/bench."""

import argparse
import os
import pkgutil
from importlib import import_module
from pathlib import Path

from methods.errors import UserError

FOLDER = Path("results/bench")


def names() -> list[str]:
    """Every benchmark, in alphabetical order: modules whose text has `measure`, so that none is imported."""
    here = Path(__file__).parent
    return sorted(
        m.name
        for m in pkgutil.iter_modules([str(here)])
        if "\ndef measure(" in (here / f"{m.name}.py").read_text(encoding="utf-8")
    )


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "names", nargs="*", metavar="NAME", help=f"benchmarks to run (default: all): {', '.join(names())}"
    )
    command.add_argument("--rounds", type=int, default=0, help="rounds that count (default: each benchmark's own)")
    command.add_argument("--small", action="store_true", help="tiny sizes: shows that it runs; nothing is written")


def main(options: argparse.Namespace) -> int:
    known = names()
    for name in options.names:
        if name not in known:
            raise UserError(f"benchmark {name!r} is unknown: choose among {', '.join(known)}")
    if options.rounds < 0:
        raise UserError(f"--rounds is {options.rounds}: give a whole number of at least 1")
    from experiments.bench import show
    from experiments.study import provenance
    from experiments.training import hardware
    from methods.tools.files import write_json  # imports safetensors, and help pages need nothing but Python

    missed = 0
    for name in options.names or known:
        module = import_module(f"experiments.bench.{name}")
        print(f"{name}: {module.TITLE}", flush=True)
        races = []
        for race in module.measure(small=options.small, rounds=options.rounds):
            races.append(race.record())
            print(f"  done: {race.title}", flush=True)
        record = {
            "name": name,
            "title": module.TITLE,
            "text": " ".join((module.__doc__ or "").split()),
            "races": races,
            "hardware": hardware.describe(hardware.device("cpu")),
            "load": round(os.getloadavg()[0], 2),
            "versions": provenance.versions(),
            "git": provenance.git(Path(".")),
            "when": provenance.now(),
        }
        print(show.as_text(record), flush=True)
        missed += sum(not goal["met"] for race in races for goal in race["goals"])
        if not options.small:
            write_json(FOLDER / f"{name}.json", record)
            show.draw(record, stem=FOLDER / name)
    if missed:
        print(f"{missed} goal{'s' if missed > 1 else ''} missed")
    return 0
