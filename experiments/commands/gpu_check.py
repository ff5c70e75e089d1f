"""gpu-check: does this machine's GPU compute what the CPU computes, and what do full-size models cost on it?

    python -m experiments gpu-check
    python -m experiments gpu-check --parts speed --models llama3-8b
    python -m experiments gpu-check --blocks 2 --minutes 240

The last one measures memory alone, on a CPU, too: of the first two blocks of each model, at their real width and
vocabulary, trained by each method that trains all weights; what is measured is set against what `plan` predicts.

The checks are the tests of tests/gpu, which `python -m pytest -m gpu` runs too; the speed part is
experiments/bench/full_size.py. Only torch and transformers have to be installed. Every piece is written to
results/gpu/NAME-OF-THE-GPU.json as it ends, and a later call repeats only what has no result of the same code
(docs/gpu-check.md).
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from methods.errors import UserError

PARTS = ("checks", "speed")
MODELS = ("gptj-6b", "llama3-8b")
METHODS = ("full", "mofo", "ewc", "hierarchical", "lora", "hierarchical-lora")
# those that train all weights, of which a slice is measured; each is one part with its default settings
WHOLE = ("full", "mofo", "ewc", "hierarchical", "l2_sp", "l1", "spider", "kl", "dft", "talr", "asft", "flow", "gmt")
WHOLE += ("hft", "random_mask", "ssu", "lisa", "sam", "profit", "eaft", "osf", "muon")
LAYOUTS = ("plain", "sharded")
FORMAT = 1
DONE = ("passed", "measured", "out of memory")  # not repeated while the code is the same
SECONDS = {"checks": 10.0, "speed": 60.0, "memory": 120.0}  # expected of a piece before one of its part was timed
SECONDS_COMPILING, SECONDS_TINY = 120.0, 2.0


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--parts", type=_among(PARTS), default=PARTS, metavar="LIST", help="of checks,speed")
    command.add_argument("--models", type=_among(MODELS), default=MODELS, metavar="LIST", help=f"of {','.join(MODELS)}")
    every = (*METHODS, *(name for name in WHOLE if name not in METHODS))
    text = f"of {','.join(every)} (default: {','.join(METHODS[:5])}; with --blocks those that train all weights)"
    command.add_argument("--methods", type=_among(every), metavar="LIST", help=text)
    text = "of plain,sharded (default: both; with --blocks plain)"
    command.add_argument("--layouts", type=_among(LAYOUTS), metavar="LIST", help=text)
    text = "memory alone, of the first N blocks of each model; on a CPU, too"
    command.add_argument("--blocks", type=_blocks, metavar="N", help=text)
    text = "of a micro-batch (default: 4x2048; with --blocks 1x128)"
    command.add_argument("--shape", type=_shape, metavar="ROWSxLENGTH", help=text)
    command.add_argument("--compile", action="store_true", help="torch.compile each block in the speed part")
    command.add_argument("--only", default="", metavar="TEXT", help="only pieces whose name contains TEXT")
    command.add_argument("--again", action="store_true", help="repeat pieces that have a result of this code")
    text = "do not start a piece that is not expected to end within these minutes (default: 9)"
    command.add_argument("--minutes", type=_positive, default=9.0, help=text)
    text = "tiny sizes, on the CPU too: shows that the command works and measures nothing"
    command.add_argument("--tiny", action="store_true", help=text)
    command.add_argument("--out", type=Path, metavar="FILE", help="default: results/gpu/NAME-OF-THE-GPU.json")
    command.add_argument("--weights", help=argparse.SUPPRESS)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One measurement; its name begins with its part."""

    name: str
    measure: Callable[[], dict]
    compiles: bool = False

    @property
    def part(self) -> str:
        return self.name.partition("/")[0]


def main(options: argparse.Namespace) -> int:
    """Exit status: 1 if a check failed or a piece broke, else 0. Raises UserError for what this machine cannot do."""
    if options.weights:
        raise UserError(
            "gpu-check --weights is gone: fine-tuning real weights is a study; run `make study NAME=paper`, or a study "
            "of your own with the model as `path:DIR` (docs/studies.md)"
        )
    # Before CUDA starts: torch has no deterministic matrix products without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers would look there for attention kernels
    from experiments.training import hardware

    device = hardware.device("auto")
    if device.type != "cuda" and not options.tiny and not options.blocks:
        raise UserError(
            "gpu-check: torch finds no CUDA GPU here, and full sizes need one: use --tiny, which measures nothing and "
            "shows that the command works, or run it on a machine with a GPU"
        )
    file = options.out or file_of(device, tiny=options.tiny, blocks=options.blocks)
    record = Record(file, device=device, tiny=options.tiny)
    clock = _Clock(minutes=options.minutes, tiny=options.tiny)
    with _process_group(device) as shards:
        pieces = [piece for piece in _pieces(options, device, shards) if options.only in piece.name]
        todo = [piece for piece in pieces if options.again or not record.done(piece.name)]
        where = hardware.describe(device)["gpu"] or "the CPU"
        clock.tell(f"{len(todo)} pieces to do, {len(pieces) - len(todo)} done before, on {where}; into {record.path}")
        for number, piece in enumerate(todo, start=1):
            clock.tell(f"{number}/{len(todo)} {piece.name}: {_in_short(_measured(piece, record, clock, device))}")
    failed = [piece.name for piece in pieces if record.pieces.get(piece.name, {}).get("status") in ("failed", "broken")]
    print(_table(record, [piece.name for piece in pieces]))
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0


def _pieces(options: argparse.Namespace, device, shards) -> Iterator[Piece]:
    from experiments.bench import full_size, optimizers
    from tests.gpu.checks import checks

    if options.blocks:
        yield from _slices(options, device, shards)
        return
    if "checks" in options.parts:
        for name, check in checks(tiny=options.tiny, shards=shards).items():
            yield Piece(name=f"checks/{name}", measure=functools.partial(check, device), compiles="flex" in name)
    if "speed" in options.parts:
        rows, length = options.shape or ((2, 32) if options.tiny else (4, 2048))
        ending = f"{rows}x{length}{'-compiled' if options.compile else ''}"
        for model in options.models:
            size = full_size.Size(model=model, tiny=options.tiny, rows=rows, length=length, compile=options.compile)
            measure = functools.partial(optimizers.optimizers, size, device=device)
            yield Piece(name=f"speed/{model}/optimizers", measure=measure)
            for method in options.methods or METHODS[:5]:
                for layout in options.layouts or LAYOUTS:
                    measure = functools.partial(
                        full_size.steps, size, method=method, layout=layout, device=device, shards=shards
                    )
                    name = f"speed/{model}/{method}/{layout}/{ending}"
                    yield Piece(name=name, measure=measure, compiles=options.compile)


def _slices(options: argparse.Namespace, device, shards) -> Iterator[Piece]:
    """Each method on the first blocks of each model."""
    from experiments.bench import full_size

    rows, length = options.shape or (1, 32 if options.tiny else 128)
    for model in options.models:
        size = full_size.Size(model=model, tiny=options.tiny, rows=rows, length=length, blocks=options.blocks)
        for method in options.methods or WHOLE:
            for layout in options.layouts or LAYOUTS[:1]:
                given = {"method": method, "layout": layout, "device": device, "shards": shards}
                name = f"memory/{model}/{options.blocks}-blocks/{method}/{layout}/{rows}x{length}"
                yield Piece(name=name, measure=functools.partial(full_size.steps, size, **given))


def _measured(piece: Piece, record: "Record", clock: "_Clock", device) -> dict:
    """The piece's outcome, measured and written down; whatever happens in it, the next one follows."""
    import torch

    from experiments.bench import running
    from experiments.bench.sizes import Skipped
    from tests.gpu.checks import Wrong

    if not clock.has_time_for(piece):
        outcome = {"status": "skipped", "reason": "not started, for lack of time: call again to continue here"}
        record.add(piece.name, outcome)
        return outcome
    record.begin(piece.name)
    began = monotonic()
    try:
        running.forget(device)
        outcome = {"status": "passed" if piece.part == "checks" else "measured"} | piece.measure()
    except Wrong as wrong:
        outcome = {"status": "failed"} | wrong.numbers
    except Skipped as reason:
        outcome = {"status": "skipped", "reason": str(reason)}
    except torch.OutOfMemoryError as error:
        outcome = {"status": "out of memory", "reason": str(error).split("\n")[0]}
    except Exception as error:  # one broken piece must not cost the others
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        places = [f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno} {frame.name}" for frame in frames]
        outcome = {"status": "broken", "reason": f"{type(error).__name__}: {error}", "where": places}
    outcome["seconds"] = monotonic() - began
    if outcome["status"] != "skipped":
        clock.note(piece, outcome["seconds"])
    record.add(piece.name, outcome)
    return outcome


@contextlib.contextmanager
def _process_group(device) -> Iterator:
    """A process group of one, or none where it cannot be started: what needs it is then skipped and says so."""
    from experiments.bench import running
    from methods.tools.process_group import Shards

    with contextlib.ExitStack() as stack:
        try:
            shards = stack.enter_context(running.process_group(device))
        except (RuntimeError, ValueError, OSError) as error:
            print(f"no process group: {error}", file=sys.stderr)
            shards = Shards()
        yield shards


class _Clock:
    """The minutes that are left, and whether the next piece fits into them."""

    def __init__(self, *, minutes: float, tiny: bool):
        self._end, self._tiny = monotonic() + 60 * minutes, tiny
        self._longest: dict[str, float] = {}

    def note(self, piece: Piece, seconds: float) -> None:
        if not piece.compiles:
            self._longest[piece.part] = max(seconds, self._longest.get(piece.part, 0.0))

    def has_time_for(self, piece: Piece) -> bool:
        """A piece may take a fifth longer than the longest of its part so far."""
        expected = SECONDS_TINY if self._tiny else SECONDS_COMPILING if piece.compiles else SECONDS[piece.part]
        return self._end - monotonic() >= max(1.2 * self._longest.get(piece.part, 0.0), expected)

    def tell(self, text: str) -> None:
        minutes, seconds = divmod(round(max(0.0, self._end - monotonic())), 60)
        print(f"gpu-check: {text} ({minutes} min {seconds:02d} s left)", flush=True)


class Record:
    """The JSON file of a GPU check, to which each piece is added as it ends. Raises UserError for another device's.

    format, tiny, device, hardware, versions, git   what the numbers are of
    pieces    name → {"status", "seconds", "when", "code", "commit", …}; status is passed, failed, measured, skipped,
              out of memory or broken
    running   the piece being measured: where a call was killed, the one that it was killed in
    """

    def __init__(self, path: Path, *, device, tiny: bool):
        from experiments.study import provenance
        from experiments.study.paths import HERE
        from experiments.training import hardware

        self.path, self._now = path, provenance.now
        name = hardware.describe(device)["gpu"] or "cpu"
        self._content: dict[str, Any] = {"format": FORMAT, "tiny": tiny, "device": name, "pieces": {}}
        if path.is_file():
            self._content = _read(path, expected=self._content)
        self._content |= {"hardware": facts(device), "versions": provenance.versions(), "git": provenance.git(HERE)}

    @property
    def pieces(self) -> dict[str, dict]:
        return self._content["pieces"]

    def done(self, name: str) -> bool:
        """Whether the file has a result of this piece by the code as it is now."""
        piece = self.pieces.get(name, {})
        return piece.get("status") in DONE and piece.get("code") == code()

    def begin(self, name: str) -> None:
        self._write(running=name)

    def add(self, name: str, outcome: dict) -> None:
        """Enter a piece; one that was only skipped does not replace a result."""
        if outcome["status"] != "skipped" or self.pieces.get(name, {}).get("status", "skipped") == "skipped":
            commit = self._content["git"]["commit"]
            self.pieces[name] = outcome | {"when": self._now(), "code": code(), "commit": commit}
        self._write(running=None)

    def _write(self, *, running: str | None) -> None:
        from methods.tools.files import write_json

        self._content |= {"running": running, "when": self._now()}
        # JSON has no NaN and no infinity: they are written as null
        write_json(self.path, json.loads(json.dumps(self._content), parse_constant=lambda _: None))


def file_of(device, *, tiny: bool, blocks: int | None = None) -> Path:
    """results/gpu/NAME.json, of slices results/memory/NAME.json; a tiny check measures nothing and is kept outside."""
    from experiments.study.paths import HERE
    from experiments.training import hardware

    name = re.sub(r"[^a-z0-9]+", "-", (hardware.describe(device)["gpu"] or "cpu").lower()).strip("-")
    return (
        HERE / "work" / "gpu-check" / f"{name}-tiny.json"
        if tiny
        else HERE / "results" / ("memory" if blocks else "gpu") / f"{name}.json"
    )


def facts(device) -> dict:
    """What a reader needs to judge a number: machine, device, driver and torch's libraries."""
    import torch

    from experiments.training import hardware

    known = hardware.describe(device) | {"cuda": torch.version.cuda, "driver": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known |= {
            "gpu_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "cudnn": torch.backends.cudnn.version(),
        }
    return known


@functools.cache
def code() -> str:
    """Hash of the code that computes; results of other code are measured again. It needs no git."""
    from experiments.study.paths import HERE

    whole = hashlib.sha256()
    for package in ("evaluation", "experiments", "methods", "tests/gpu"):
        for path in sorted((HERE / package).rglob("*.py")):
            whole.update(f"{path.relative_to(HERE).as_posix()}\n".encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def _driver() -> str | None:
    try:
        question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(question, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split("\n")[0].strip() or None


def _read(path: Path, *, expected: dict) -> dict:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): give another --out, or delete it") from error
    for key in ("format", "tiny", "device"):
        value = content.get(key) if isinstance(content, dict) else None
        if value != expected[key]:
            raise UserError(f"{path} has {key} {value!r}, this check has {expected[key]!r}: give another --out")
    return content


def _in_short(outcome: dict[str, Any]) -> str:
    formats = {"tokens_per_second": "{:,.0f} tokens/s", "mfu": "MFU {:.1%}", "seconds": "took {:.1f} s"}
    numbers = [text.format(outcome[key]) for key, text in formats.items() if outcome.get(key)]
    if outcome.get("blocks") and (bytes_a_weight := outcome["memory"]["bytes_a_weight"])["peak"]:
        numbers[:-1] = ["{peak:.2f} bytes a weight, {predicted:.2f} predicted".format(**bytes_a_weight)]
    return ", ".join(filter(None, [outcome["status"], outcome.get("reason", "")[:160], *numbers]))


def _table(record: Record, names: list[str]) -> str:
    """A line a piece, goals beside the number that they are for."""
    lines = []
    for name in names:
        outcome = record.pieces.get(name, {"status": "not measured"})
        goals = [
            f"{goal['what']} {goal['value']:.3g} (goal {goal['goal']}: {'met' if goal['met'] else 'missed'})"
            for goal in outcome.get("goals", [])
            if goal["value"] is not None
        ]
        lines.append(f"{name:<52} {'; '.join([_in_short(outcome), *goals])}")
    return "\n".join(lines)


def _among(known: tuple[str, ...]):
    def chosen(text: str) -> tuple[str, ...]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if "comparison" in unknown:
            raise argparse.ArgumentTypeError("'comparison' is gone: tuning real weights is a study (docs/studies.md)")
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{(unknown or [text])[0]!r} is not one of {', '.join(known)}")
        return tuple(name for name in known if name in names)

    return chosen


def _shape(text: str) -> tuple[int, int]:
    rows, _, length = text.partition("x")
    if not (rows.isdecimal() and length.isdecimal() and int(rows) > 0 and int(length) > 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxLENGTH, such as 4x2048")
    return int(rows), int(length)


def _blocks(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
