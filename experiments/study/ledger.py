"""Note which stages ran on this machine, one JSON line for each.

The screen can then say which cells were trained here, and which scores are the committed ones, which DVC kept because
the weights came out equal bit for bit.
"""

import json
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from experiments.study.provenance import now
from methods.tools.files import read_json


def path(study) -> Path:
    """The file of the notes."""
    return study.paths.local / f"ledger{'-' + study.name if study.name else ''}.jsonl"


def note(study, *, stage: str, cell: str, weights: str) -> None:
    file_path = path(study)
    file_path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"stage": stage, "cell": cell, "weights": weights, "when": now()})
    with file_path.open("a") as file:
        file.write(f"\n{line}\n")  # on a line of its own, also behind one that was cut off


def entries(study) -> list[dict]:
    """What `note` wrote of this study, in order; a line that was cut off or damaged is passed over."""
    found = []
    for line in path(study).read_bytes().splitlines() if path(study).is_file() else ():
        with suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            if datetime.fromisoformat(entry["when"]).tzinfo and isinstance(entry["cell"], str):
                found.append(entry)
    return found


def verdict(study, cell, metrics: dict | None, *, notes: list[dict]) -> str:
    """How the cell's scores were obtained on this machine, in words; `notes` are the study's `entries`."""
    if study.paths.failure(cell).is_file():
        return "FAILED: " + read_json(study.paths.failure(cell)).get("reason", "no reason recorded")
    if metrics is None:
        return "not run yet"
    same = (cell.name, metrics.get("weights_sha256"))
    here = {entry.get("stage") for entry in notes if (entry.get("cell"), entry.get("weights")) == same}
    if "evaluate" in here:
        return "trained and scored here"
    if "train" in here:
        return "reproduced here bit for bit: the committed scores were kept"
    return "kept from git, not run here"
