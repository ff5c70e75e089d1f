"""drift: one drift.json a cell, with how far its weights moved, in which directions, and how important these are.

Importance is what the reference method (experiments/model/drift.py) prepares, from the local store, or computed into it
where it is not there yet. It is no dependency in DVC, because another processor computes other last digits: a cell that
is added to a finished study would make the drift of every other cell out of date. drift.json names what it used.
"""

from hashlib import sha256 as new_sha256
from time import perf_counter

from experiments.data.damage import refuse_damaged
from experiments.model import drift, tuned, weights
from experiments.model.base import load_tensors
from experiments.model.delta import verified
from experiments.model.shape import shape_of
from experiments.stages import resolve
from experiments.study.distrust import distrusted
from experiments.training import hardware, prepared, processes
from methods.tools.files import read_json, sha256, write_json
from methods.tools.importance import totals
from methods.tools.stored import load_importance


def main(study, cell) -> None:
    method, part = drift.reference(study) or (None, None)
    if method and (count := processes.to_start(study.models[cell.model])):
        if not prepared.in_store(study, cell.model, method, cell.seed):
            processes.start(count, ["drift", cell.name, "--study", study.name])
            return
    against, importance = _importance(study, cell, method, part) if method else (None, None)
    if processes.first():
        _measure(study, cell, against, importance)
    processes.leave()


def _measure(study, cell, against: dict | None, importance: dict | None) -> None:
    began = perf_counter()
    folder, out = study.paths.model(cell.model), study.paths.weights(cell)
    with distrusted(folder, out):
        tensors, digest = tuned.tensors(out, folder=folder)
        base = load_tensors(folder)
        measured = drift.measure(
            base=base,
            tuned=verified(tensors, sha256=digest, what=out),
            roles=drift.roles(shape_of(cell.model, study.models[cell.model], folder).build()),
            importance=importance,
            factors=tuned.factors(out),
            still=base.keys() - set(tensors.changed),
            device=hardware.device(study.device),
        )
    write_json(
        study.paths.run(cell) / "drift.json",
        {
            "cell": cell.name,
            "weights_sha256": digest,
            "base_sha256": read_json(folder / "base.json", "sha256")["sha256"],
            "reference": against,
            "top": drift.TOP,
            "rank_limit": drift.EXACT,
        }
        | measured,
    )
    seconds, record = perf_counter() - began, study.paths.run(cell) / "train.json"
    trained = read_json(record).get("seconds_train") if record.is_file() else None
    share = f", {seconds / trained:.1%} of the training" if trained else ""
    print(f"{cell.name}: drift in {seconds:.1f} s{share}", flush=True)


def _importance(study, cell, method: str, part: str) -> tuple[dict, dict]:
    """What the reference method prepares for this model and seed: a description, and importance by weight."""
    folder, data = study.paths.model(cell.model), study.paths.data
    with distrusted(folder, data):
        refuse_damaged(data, "general/importance.jsonl", "general/replay.jsonl")
        weights.verified(folder)
    store, _ = prepared.stored(study, cell.model, method, cell.seed)
    path = store / "out" / f"{part}.importance.safetensors"
    importance = load_importance(path)
    entries = sum(values.numel() for values in importance.values())
    mean = sum(totals(values)[0] for values in importance.values()) / entries
    settings = resolve.text(resolve.prepare(study, cell.model, method))
    described = {
        "method": method,
        "part": part,
        "entries": entries,
        "mean": float(f"{mean:.4g}"),
        "sha256": sha256(path),
        "settings_sha256": new_sha256(settings.encode()).hexdigest(),
    }
    return described, importance
