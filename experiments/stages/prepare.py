"""prepare: what a method computes before it sees the domain, such as importance or a start, with its costs.

A preparation is computed once for a model and kept in a local store, by the hash of everything that it depends on.
Cells with another seed, domain or strength reuse it, and their records say so.
"""

import shutil
from pathlib import Path

from experiments.data.damage import refuse_damaged
from experiments.study import whole
from experiments.study.distrust import distrusted
from experiments.study.failures import recorded
from experiments.training import processes
from methods.part import TENSORS, prepares
from methods.tools.files import read_json, write_json

GENERAL = "general.jsonl"  # a copy of general text, for parts that read it while they train


def main(study, *, model: str, method: str, seed: int, cell) -> None:
    needed = any(map(prepares, study.methods[method].parts))
    if needed and (count := processes.to_start(study.models[model])):
        with recorded(study, cell, "prepare"):
            processes.start(count, ["prepare", model, method, str(seed), "--study", study.name])
        return
    with recorded(study, cell, "prepare"):
        _prepare(study, model, method, seed)
    processes.leave()


def _prepare(study, model: str, method: str, seed: int) -> None:
    out = study.paths.prepared(model=model, method=method, seed=seed)
    with distrusted(study.paths.data):
        refuse_damaged(study.paths.data, "general/importance.jsonl", "general/replay.jsonl")
    costs_file = study.paths.prepare_costs(model=model, method=method, seed=seed)
    if processes.first():
        costs_file.unlink(missing_ok=True)  # it is there with what it describes alone
    if not any(map(prepares, study.methods[method].parts)):
        with whole.folder(out) as made:
            write_json(made / "prepared.json", {})
            _copy_general(study, method, made)
        nothing = {"seconds_prepare": 0.0, "tokens_prepare": 0, "peak_memory_bytes": 0, "added": {}, "reused": False}
        write_json(costs_file, nothing | {f"bytes_{kind}": 0 for kind in TENSORS})
        return
    # a method that prepares nothing needs neither transformers nor lm-eval, which take seconds to import
    from experiments.model import weights
    from experiments.training import prepared

    with distrusted(study.paths.model(model), study.paths.data):
        weights.verified(study.paths.model(model))
    store, reused = prepared.stored(study, model, method, seed)
    if processes.first():
        with whole.folder(out) as made:
            shutil.copytree(store / "out", made, dirs_exist_ok=True)
            _copy_general(study, method, made)
        write_json(costs_file, read_json(store / "costs.json") | {"reused": reused})


def _copy_general(study, method: str, out: Path) -> None:
    """Copy general text beside the preparation where a part reads it in training, which then depends on it."""
    if any("general" in part.capabilities for part in study.methods[method].parts):
        shutil.copyfile(study.paths.data / "general" / "replay.jsonl", out / GENERAL)
