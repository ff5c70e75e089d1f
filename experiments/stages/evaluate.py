"""base and evaluate: scores of one folder of weights on the rows of a domain (or of all, for the base)."""

import gzip
import io
from pathlib import Path
from time import perf_counter

import pandas as pd

from evaluation import harness
from experiments import hardware, ledger, provenance, weights
from experiments.failures import recorded
from experiments.files import read_json, write_json


def base(study, *, model: str) -> None:
    """Score the bare model once, on the tasks of every domain of the grid."""
    folders = [study.paths.data / "evaluate" / domain for domain in study.grid["domains"]]
    _score(study, study.paths.model(model), model, folders, study.paths.base(model))


def main(study, cell) -> None:
    with recorded(study, cell, "evaluate"):
        folder = study.paths.data / "evaluate" / cell.domain
        _score(study, study.paths.weights(cell), cell.model, [folder], study.paths.run(cell))
        ledger.note(study, stage="evaluate", cell=cell.name, weights=read_json(study.paths.run(cell) / "scores.json")["weights_sha256"])


def _score(study, folder: Path, model_name: str, data: list[Path], out: Path) -> None:
    where = hardware.device(study.device)
    checkpoint = weights.dtype_of(read_json(study.paths.model(model_name) / "base.json"))
    model = weights.load_model(folder, dtype=hardware.compute_dtype(checkpoint, where), device=where)
    tokenizer = weights.load_tokenizer(folder)
    hardware.reset_peak(where)
    began = perf_counter()
    scores, items = harness.score(model=model, tokenizer=tokenizer, tasks_dir=data, **study.evaluate)
    seconds = perf_counter() - began
    write_json(out / "scores.json", scores | {"weights_sha256": weights.tensor_sha256(folder)})
    write_items(out / "items.csv.gz", items)
    write_json(out / "evaluate.json", {
        "seconds_evaluate": seconds, "peak_memory_bytes": hardware.peak_memory_bytes(where),
        "hardware": hardware.describe(where), "versions": provenance.versions(),
        "git": provenance.git(study.paths.root), "when": provenance.now(),
    })


def write_items(path: Path, items: pd.DataFrame) -> None:
    """Gzipped CSV whose bytes depend on the items alone (gzip time 0, no file name)."""
    text = io.StringIO()
    items.to_csv(text, index=False, lineterminator="\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
        file.write(text.getvalue().encode())
