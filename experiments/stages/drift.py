"""drift: one drift.json a cell, with how far its weights moved, in which directions, and how important these are."""

from time import perf_counter

from experiments.model import drift, tuned
from experiments.model.base import load_tensors
from experiments.model.delta import verified
from experiments.model.shape import shape_of
from experiments.study.distrust import distrusted
from experiments.training import hardware
from methods.tools.files import read_json, write_json
from methods.tools.importance import totals
from methods.tools.stored import load_importance


def main(study, cell) -> None:
    began = perf_counter()
    folder, out = study.paths.model(cell.model), study.paths.weights(cell)
    against, importance = _importance(study, cell)
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


def _importance(study, cell) -> tuple[dict | None, dict | None]:
    """What the reference method prepared for this model and seed: a description and importance; None without one."""
    if (reference := drift.reference(study)) is None:
        return None, None
    method, part = reference
    path = study.paths.prepared(model=cell.model, method=method, seed=cell.seed) / f"{part}.importance.safetensors"
    if not path.is_file():
        return None, None
    importance = load_importance(path)
    entries = sum(values.numel() for values in importance.values())
    mean = sum(totals(values)[0] for values in importance.values()) / entries
    return {"method": method, "part": part, "entries": entries, "mean": float(f"{mean:.4g}")}, importance
