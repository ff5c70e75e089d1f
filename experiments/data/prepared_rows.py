"""Write the domains, tasks and general text of a study as files, split once and the same for every cell.

data/train/<domain>/train.jsonl, probe/<name>.jsonl     questions as the task renders them, or rows of other formats
data/general/{settle,importance,replay}.jsonl           text that is settled, prepared and trained on
data/evaluate/<domain>/<task>.jsonl, tasks.json         rows that lm-eval scores, and the role of each file
data/data.json                                          sources, counts, dropped duplicates, checksums
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.data import domain as domains
from experiments.data import general_text, settling_rows
from experiments.data.overlaps import Held
from experiments.data.reader import Reader, Row
from methods.tools.files import sha256

PARTS = ("train", "evaluate", "general")


def write_data(study, out_dir: Path) -> dict[str, Any]:
    """Write the data of the domains in `study.grid` to the folder `out_dir` and return the content of data.json.

    Raises a UserError that names the block for a missing source or column, a wrong gold answer, or an empty split.
    """
    out = Path(out_dir)
    for part in PARTS:
        shutil.rmtree(out / part, ignore_errors=True)
    (out / "data.json").unlink(missing_ok=True)  # DVC's cache may have a hard link to it
    reader = Reader(study=study)
    general, facts = general_text.write(study.general, reader, out)
    held = _held(study, general, reader)
    report: dict[str, Any] = {"general": facts, "domains": {}}
    for domain in study.grid.domains:
        report["domains"][domain] = domains.write(
            domain, study.domains[domain], reader, out, general=general, held=held
        )
    if reader.left_out:
        report["left_out"] = reader.left_out
    files = [path for part in PARTS for path in sorted((out / part).rglob("*")) if path.is_file()]
    report["files"] = {str(path.relative_to(out)): sha256(path) for path in files}
    for domain, facts in report["domains"].items():
        facts["sha256"] = {part: _digest(report["files"], f"{part}/{domain}/") for part in ("train", "evaluate")}
    (out / "data.json").write_text(json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return report


def _held(study, general: Mapping[str, list[Row]], reader: Reader) -> Held:
    """General text, and what the grid's models are settled on. Raises UserError for a row in both."""
    held = Held()
    for name, rows in general.items():
        held.hold(f"general.{name}", rows)
    mixed: dict[str, list[Row]] = {}
    for model in study.grid.models:
        if made := study.models[model].settle:
            sources = settling_rows.of(made.mix, reader)
            record = study.paths.adapter(model).with_name("settle.json")
            settling_rows.refuse_others(sources, record, where=f"models.{model}")
            mixed |= sources
    for name in sorted(mixed.keys() - {settling_rows.GENERAL}):
        held.refuse(f"tasks.{name} (settle)", mixed[name], remedy="take other rows for the mix")
        held.hold(f"tasks.{name} (settle)", mixed[name])
    return held


def _digest(files: Mapping[str, str], prefix: str) -> str:
    listed = "".join(f"{name} {sha}\n" for name, sha in sorted(files.items()) if name.startswith(prefix))
    return hashlib.sha256(listed.encode()).hexdigest()
