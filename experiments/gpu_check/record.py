"""The file of a GPU check: one JSON that every piece is added to as soon as it is done, by this call and later ones.

format, tiny, device, hardware      of what these numbers are
pieces     name → {"status", "seconds", "when", "code", "commit", …}; status is one of STATUS
running    the piece under way: where a call was killed, the one that it was killed in
"""

import functools
import hashlib
import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from experiments.study import provenance
from experiments.study.paths import HERE
from experiments.training import hardware
from methods.errors import UserError
from methods.tools.files import write_json

FORMAT = 1
STATUS = ("passed", "failed", "measured", "skipped", "out of memory", "broken")
DONE = ("passed", "measured", "out of memory")  # not repeated while the code is the same


class Record:
    """The file `path`, begun or gone on with. Raises UserError where it is another device's, or no such file."""

    def __init__(self, path: Path, *, device: torch.device, tiny: bool):
        self.path = path
        name = hardware.describe(device)["gpu"] or "cpu"
        self._content: dict[str, Any] = {"format": FORMAT, "tiny": tiny, "device": name, "pieces": {}}
        if path.is_file():
            self._content = _read(path, expected=self._content)
        self._content |= {"hardware": facts(device), "versions": provenance.versions(), "git": provenance.git(HERE)}

    @property
    def pieces(self) -> dict[str, dict]:
        return self._content["pieces"]

    def done(self, name: str) -> bool:
        """Whether the file has this piece of the code as it is now."""
        there = self.pieces.get(name, {})
        return there.get("status") in DONE and there.get("code") == code()

    def begin(self, name: str) -> None:
        self._write(running=name)

    def add(self, name: str, outcome: dict) -> None:
        """Put a piece in; one that was only skipped takes no other's place."""
        if outcome["status"] != "skipped" or self.pieces.get(name, {}).get("status", "skipped") == "skipped":
            self.pieces[name] = outcome | {
                "when": provenance.now(),
                "code": code(),
                "commit": self._content["git"]["commit"],
            }
        self._write(running=None)

    def _write(self, *, running: str | None) -> None:
        self._content |= {"running": running, "when": provenance.now()}
        write_json(self.path, _finite(self._content))


def file_of(device: torch.device, *, tiny: bool) -> Path:
    """results/gpu/<name>.json; what measures nothing is kept away from the results."""
    name = re.sub(r"[^a-z0-9]+", "-", (hardware.describe(device)["gpu"] or "cpu").lower()).strip("-")
    return HERE / "work" / "gpu-check" / f"{name}-tiny.json" if tiny else HERE / "results" / "gpu" / f"{name}.json"


def facts(device: torch.device) -> dict:
    """What a reader needs to judge a number: machine, device, driver, torch's own libraries."""
    found = hardware.describe(device) | {"cuda": torch.version.cuda, "driver": None}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "gpu_memory_bytes": about.total_memory,
            "multiprocessors": about.multi_processor_count,
            "capability": f"{about.major}.{about.minor}",
            "driver": _driver(),
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


@functools.cache
def code() -> str:
    """Hash of the code that computes: a number of other code is measured again. It needs no git."""
    whole = hashlib.sha256()
    for package in ("evaluation", "experiments", "methods"):
        for path in sorted((HERE / package).rglob("*.py")):
            whole.update(f"{path.relative_to(HERE).as_posix()}\n".encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def _driver() -> str | None:
    try:
        question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(question, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.split("\n")[0].strip() or None


def _read(path: Path, *, expected: dict) -> dict:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): give another --out, or delete it") from error
    for key in ("format", "tiny", "device"):
        if not isinstance(found, dict) or found.get(key) != expected[key]:
            there = found.get(key) if isinstance(found, dict) else None
            raise UserError(f"{path} has {key} {there!r}, this check has {expected[key]!r}: give another --out")
    return found


def _finite(value: Any) -> Any:
    """The same, with None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def judged(right: bool, numbers: dict) -> dict:
    """A check's piece: its status by whether it is right, and its numbers."""
    return {"status": "passed" if right else "failed"} | numbers
