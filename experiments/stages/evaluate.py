"""base and evaluate: scores of one folder of weights on the rows of a domain (or of all, for the base)."""

import json
import tempfile
from pathlib import Path
from time import perf_counter

from evaluation import harness
from experiments import hardware, ledger, provenance, weights
from experiments.base import dtype_of
from experiments.failures import recorded
from experiments.files import read_json, write_json


def base(study, *, model: str) -> None:
    """Score the bare model once, on the tasks of every domain of the grid."""
    folders = [study.paths.data / "evaluate" / domain for domain in study.grid["domains"]]
    with tempfile.TemporaryDirectory() as together:
        # tasks that domains share are scored once
        entries = {e["name"]: e | {"file": str((f / e["file"]).resolve())} for f in folders for e in read_json(f / "tasks.json")}
        (Path(together) / "tasks.json").write_text(json.dumps(list(entries.values())))
        _score(study, study.paths.model(model), model, Path(together), study.paths.base(model))


def main(study, cell) -> None:
    with recorded(study, cell, "evaluate"):
        folder = study.paths.weights(cell)
        digest = _score(study, folder, cell.model, study.paths.data / "evaluate" / cell.domain, study.paths.run(cell))
        ledger.note(study, stage="evaluate", cell=cell.name, weights=digest)


def _score(study, folder: Path, model_name: str, tasks: Path, out: Path) -> str:
    """Score the weights in `folder`; writes scores, items and costs to `out`, returns the weights' hash."""
    where = hardware.device(study.device)
    checkpoint = dtype_of(read_json(study.paths.model(model_name) / "base.json"))
    model = weights.load_model(folder, dtype=study.compute_dtype(model_name, checkpoint, where), device=where)
    digest = weights.tensor_sha256(folder)
    hardware.reset_peak(where)
    began = perf_counter()
    scores, items = harness.score(model=model, tokenizer=weights.load_tokenizer(folder), tasks_dir=tasks,
                                  weights_sha256=digest, **study.evaluate)
    seconds = perf_counter() - began
    harness.save(scores, items, out)
    write_json(out / "evaluate.json", {
        "seconds_evaluate": seconds, "peak_memory_bytes": hardware.peak_memory_bytes(where),
        "hardware": hardware.describe(where), "versions": provenance.versions(),
        "git": provenance.git(study.paths.root), "when": provenance.now(),
    })
    return digest
