"""Runs the pieces of a GPU check one after the other, within the minutes it is given, each written down as it ends."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any

# before CUDA starts: without it torch has no deterministic matrix products to compare bit for bit
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers would look there for attention kernels

import torch

from experiments.gpu_check import checks, comparison, running, speed
from experiments.gpu_check.record import Record, file_of
from experiments.gpu_check.sizes import Skipped
from experiments.gpu_check.waiting import short_path
from experiments.training import hardware
from methods.errors import UserError
from methods.tools.process_group import Shards

EXPECTED = {"checks": 10.0, "speed": 60.0, "comparison": 90.0}  # seconds of a piece of a part, before one was timed
COMPILING = 120.0  # of one that compiles
EXPECTED_TINY = 2.0


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Something that is measured in one go: `name` begins with its part."""

    name: str
    measure: Callable[[], dict]
    compiles: bool = False

    @property
    def part(self) -> str:
        return self.name.partition("/")[0]


def main(options: argparse.Namespace) -> int:
    """Exit status: 1 if a check failed or a piece broke, else 0. Raises UserError for what cannot be asked of this machine."""
    device = hardware.device("auto")
    if device.type != "cuda" and not options.tiny:
        raise UserError(
            "gpu-check: torch finds no CUDA GPU here, and full sizes take one: use --tiny, which measures nothing and shows "
            "that the command works, or run it on a machine with a GPU"
        )
    parts = options.parts or (("comparison",) if options.weights else ("checks", "speed"))
    given = (
        comparison.find(
            weights=options.weights,
            data=options.data,
            domain=options.domain,
            rows=options.rows,
            learning_rate=options.learning_rate,
        )
        if "comparison" in parts
        else None
    )
    record = Record(options.out or file_of(device, tiny=options.tiny), device=device, tiny=options.tiny)
    clock = _Clock(options.minutes)
    with _group(device) as shards:
        pieces = [
            piece for piece in _pieces(options, parts, given, record, device, shards) if options.only in piece.name
        ]
        todo = [piece for piece in pieces if options.again or not record.done(piece.name)]
        _say(
            f"{len(todo)} pieces to do, {len(pieces) - len(todo)} done before, on {hardware.describe(device)['gpu'] or 'the CPU'}; "
            f"into {record.path}",
            clock,
        )
        for number, piece in enumerate(todo, start=1):
            outcome = _done(piece, record, clock, device, tiny=options.tiny)
            _say(f"{number}/{len(todo)} {piece.name}: {_short(outcome)}", clock)
    wrong = [piece.name for piece in pieces if record.pieces.get(piece.name, {}).get("status") in ("failed", "broken")]
    print(_table(record, [piece.name for piece in pieces]))
    print(f"{len(wrong)} failed: {', '.join(wrong)}" if wrong else "nothing failed")
    return 1 if wrong else 0


def _pieces(
    options: argparse.Namespace, parts, given, record: Record, device: torch.device, shards: Shards
) -> Iterator[Piece]:
    if "checks" in parts:
        for name, check in checks.checks(tiny=options.tiny, shards=shards).items():
            yield Piece(name=f"checks/{name}", measure=lambda check=check: check(device), compiles="flex" in name)
    if "speed" in parts:
        rows, length = options.shape or ((2, 32) if options.tiny else (4, 2048))
        for model in options.models:
            size = speed.Size(model=model, tiny=options.tiny, rows=rows, length=length, compile=options.compile)
            yield Piece(
                name=f"speed/{model}/optimizers", measure=lambda size=size: speed.optimizers(size, device=device)
            )
            ending = f"{rows}x{length}{'-compiled' if options.compile else ''}"
            for method in options.methods:
                for layout in options.layouts:
                    run = lambda size=size, method=method, layout=layout: speed.measure(
                        size, method=method, layout=layout, device=device, shards=shards
                    )
                    yield Piece(name=f"speed/{model}/{method}/{layout}/{ending}", measure=run, compiles=options.compile)
    if given is not None:
        first = f"comparison/{given.name}/base"
        yield Piece(name=first, measure=lambda: comparison.base(given, device=device))
        for method in options.methods:
            run = lambda method=method: comparison.method(
                given, method=method, before=_probes(record, first), device=device, shards=shards
            )
            yield Piece(
                name=f"comparison/{given.name}/{method}/{given.rows}-rows-rate-{given.learning_rate:g}", measure=run
            )


def _probes(record: Record, name: str) -> dict[str, float]:
    found = record.pieces.get(name, {}).get("probes")
    if not found:
        raise Skipped(f"{name} has no probe scores yet")
    return found


def _done(piece: Piece, record: Record, clock: "_Clock", device: torch.device, *, tiny: bool) -> dict:
    """The piece's outcome, measured and written down; whatever happens in it, the next one can go on."""
    if not clock.enough_for(piece, tiny=tiny):
        outcome = {
            "status": "skipped",
            "reason": "not begun: its time would not have been enough; call again, and it goes on here",
        }
        record.add(piece.name, outcome)
        return outcome
    record.begin(piece.name)
    began = monotonic()
    try:
        running.forget(device)
        outcome = piece.measure()
    except Skipped as reason:
        outcome = {"status": "skipped", "reason": str(reason)}
    except torch.OutOfMemoryError as error:
        outcome = {"status": "out of memory", "reason": str(error).split("\n")[0]}
    except Exception as error:  # one broken piece must not cost the others
        outcome = {"status": "broken", "reason": f"{type(error).__name__}: {error}", "where": _where(error)}
    seconds = monotonic() - began
    if outcome["status"] != "skipped":
        clock.took(piece, seconds)
    outcome = outcome | {"seconds": seconds}
    record.add(piece.name, outcome)
    return outcome


@contextlib.contextmanager
def _group(device: torch.device) -> Iterator[Shards]:
    """A process group of one, or none where it cannot be started: what needs it is then skipped, and says so."""
    with contextlib.ExitStack() as stack:
        try:
            shards = stack.enter_context(running.process_group(device))
        except (RuntimeError, ValueError, OSError) as error:
            print(f"no process group: {error}", file=sys.stderr)
            shards = Shards()
        yield shards


class _Clock:
    def __init__(self, minutes: float):
        self._end = monotonic() + 60 * minutes
        self._longest: dict[str, float] = {}

    def left(self) -> float:
        return max(0.0, self._end - monotonic())

    def took(self, piece: Piece, seconds: float) -> None:
        if not piece.compiles:
            self._longest[piece.part] = max(seconds, self._longest.get(piece.part, 0.0))

    def enough_for(self, piece: Piece, *, tiny: bool) -> bool:
        """Whether a piece of the part is expected to end in time: it may take a fifth longer than the longest so far."""
        expected = EXPECTED_TINY if tiny else COMPILING if piece.compiles else EXPECTED[piece.part]
        return self.left() >= max(1.2 * self._longest.get(piece.part, 0.0), expected)


def _say(text: str, clock: _Clock) -> None:
    minutes, seconds = divmod(round(clock.left()), 60)
    print(f"gpu-check: {text} ({minutes} min {seconds:02d} s left)", flush=True)


def _short(outcome: dict[str, Any]) -> str:
    said = [outcome["status"]]
    if outcome.get("reason"):
        said.append(outcome["reason"][:160])
    if outcome.get("tokens_per_second"):
        said.append(f"{outcome['tokens_per_second']:,.0f} tokens/s")
    if outcome.get("mfu"):
        said.append(f"MFU {outcome['mfu']:.1%}")
    if "seconds" in outcome:
        said.append(f"took {outcome['seconds']:.1f} s")
    return ", ".join(said)


def _table(record: Record, names: list[str]) -> str:
    """A line a piece, goals behind the number they are for."""
    lines = []
    for name in names:
        outcome = record.pieces.get(name, {"status": "not measured"})
        goals = [
            f"{goal['what']} {goal['value']:.3g} (goal {goal['goal']}: {'met' if goal['met'] else 'missed'})"
            for goal in outcome.get("goals", [])
            if goal["value"] is not None
        ]
        lines.append(f"{name:<52} {'; '.join([_short(outcome), *goals])}")
    return "\n".join(lines)


def _where(error: Exception) -> list[str]:
    return [
        f"{short_path(frame.filename)}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)[-6:]
    ]
