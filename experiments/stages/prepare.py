"""prepare: what a method computes before it sees the domain, such as importance or a start, with its costs.

A preparation is computed once for a model and kept in a local store, by the hash of everything that it depends on.
Cells with another seed, domain or strength reuse it, and their records say so.
"""

import shutil
from pathlib import Path

from experiments.study.failures import recorded
from experiments.training import processes
from methods.part import TENSORS, prepares
from methods.tools.files import read_json, write_json

GENERAL = "general.jsonl"  # a copy of general text, for parts that read it while they train


def main(study, *, model: str, method: str, seed: int, cell) -> None:
    needed = any(map(prepares, study.methods[method].parts))
    if needed and (count := processes.to_start(study.models[model])):
        processes.start(count, ["prepare", model, method, str(seed), "--study", study.name])
        return
    with recorded(study, cell, "prepare"):
        _prepare(study, model, method, seed)
    processes.leave()


def _prepare(study, model: str, method: str, seed: int) -> None:
    out = study.paths.prepared(model=model, method=method, seed=seed)
    costs_file = study.paths.prepare_costs(model=model, method=method, seed=seed)
    if not any(map(prepares, study.methods[method].parts)):
        shutil.rmtree(out, ignore_errors=True)
        write_json(out / "prepared.json", {})
        nothing = {"seconds_prepare": 0.0, "tokens_prepare": 0, "peak_memory_bytes": 0, "added": {}, "reused": False}
        write_json(costs_file, nothing | {f"bytes_{kind}": 0 for kind in TENSORS})
        _copy_general(study, method, out)
        return
    # a method that prepares nothing needs neither transformers nor lm-eval, which take seconds to import
    from experiments.training import prepared

    store, reused = prepared.stored(study, model, method, seed)
    if processes.first():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(store / "out", out)
        write_json(costs_file, read_json(store / "costs.json") | {"reused": reused})
        _copy_general(study, method, out)


def _copy_general(study, method: str, out: Path) -> None:
    """Copy general text beside the preparation where a part reads it in training, which then depends on it."""
    if any("general" in part.capabilities for part in study.methods[method].parts):
        shutil.copyfile(study.paths.data / "general" / "replay.jsonl", out / GENERAL)
