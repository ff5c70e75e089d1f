"""base and evaluate: scores of the base's or a cell's weights on the rows of a domain (or of all, for the base)."""

import gc
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from evaluation import harness
from experiments.data.damage import refuse_damaged
from experiments.model import reference as references
from experiments.model import tuned, weights
from experiments.model.base import dtype_of
from experiments.model.shape import shape_of
from experiments.stages import resolve
from experiments.stages.model import folder_of
from experiments.study import ahead, chat_templates, ledger, provenance, whole
from experiments.study.distrust import distrusted
from experiments.study.failures import recorded
from experiments.training import hardware, improvable
from methods.errors import UserError
from methods.tools.files import read_json, sha256, write_json


def base(study, *, model: str) -> None:
    """Score the bare model once, on the tasks of every domain of the grid."""
    folder, (dtype, where) = study.paths.model(model), _computing(study, model)
    with distrusted(folder, study.paths.data):
        refuse_damaged(study.paths.data, "evaluate")
        weights.verified(folder)
    # the first stage that has both rows and tokenizer: refuse now, and not after hours of preparation
    known = {
        "shape": shape_of(model, study.models[model], folder),
        "tokenizer": weights.load_tokenizer(folder),
        "data": study.paths.data,
    }
    ahead.refuse_long(study, model=model, **known)
    ahead.refuse_encoding(study, model=model, **known)
    for line in chat_templates.look(study, model=model, tokenizer=known["tokenizer"]):
        print(line)
    with tempfile.TemporaryDirectory() as together:
        entries = merged([study.paths.data / "evaluate" / domain for domain in study.grid.domains])
        (Path(together) / "tasks.json").write_text(json.dumps(entries))
        digest, loaded = weights.tensor_sha256(folder), weights.load_model(folder, dtype=dtype, device=where)
        out = study.paths.base(model)
        _score(study, model, loaded, digest, tasks=Path(together), out=out, reference=loaded)
        start = {"unsettled": _unsettled(study, model, tasks=Path(together), settled=loaded), "improvable": None}
    del loaded  # the test loads one of its own
    gc.collect()
    if test := improvable.settings(study, model):
        general = study.paths.data / "general"
        start["improvable"] = improvable.improvable(folder, general, steps=test["steps"], dtype=dtype, device=where)
    write_json(out / "start.json", start)


def _unsettled(study, model: str, *, tasks: Path, settled: torch.nn.Module) -> dict[str, Any] | None:
    """The scores of the model that a settled one is made of, with the KL on general text from the settled one."""
    if (block := study.models[model].settle) is None:
        return None
    name, (dtype, where) = getattr(block, "from"), _computing(study, model)
    with folder_of(study, name) as folder:
        digest = weights.tensor_sha256(folder)
        unsettled = weights.load_model(folder, dtype=dtype, device=where)
        scores, _ = _scores(study, model, unsettled, digest, tasks=tasks, reference=settled)
    return {"model": name, "scores": scores}


def merged(folders: Sequence[Path]) -> list[dict]:
    """The entries of several tasks.json, with absolute paths of their rows; a task that domains share is there once.

    Raises UserError where two entries of one name differ in rows, prompt, metric or chance.
    """
    entries: dict[str, dict] = {}
    for folder in folders:
        for entry in harness.entries(folder):
            file = (folder / entry["file"]).resolve()
            template = {"template": str((folder / entry["template"]).resolve())} if entry.get("template") else {}
            known = entries.setdefault(entry["name"], entry | {"file": str(file)} | template)
            differ = [key for key in ("task", "metric", "chance") if known[key] != entry[key]]
            if sha256(Path(known["file"])) != sha256(file):
                differ.insert(0, "rows")
            if differ:
                raise UserError(
                    f"{entry['name']} names two things: {known['file']} and {file} differ in {', '.join(differ)}. "
                    "Run the `data` stage again; if that does not help, rename one of the blocks in params.yaml"
                )
    return list(entries.values())


def main(study, cell) -> None:
    with recorded(study, cell, "evaluate"):
        dtype, where = _computing(study, cell.model)
        paths = study.paths
        folder, tasks = paths.model(cell.model), paths.data / "evaluate" / cell.domain
        with distrusted(folder, paths.data, paths.weights(cell)):
            refuse_damaged(paths.data, f"evaluate/{cell.domain}")
            base = _reference(study, folder, tasks=tasks, dtype=dtype, device=where)
            model, digest = tuned.load(paths.weights(cell), folder=folder, dtype=dtype, device=where)
        if digest == read_json(folder / "base.json", "sha256")["sha256"]:
            base = model  # nothing was changed, which is to be 0 and not a rounding error
        _score(study, cell.model, model, digest, tasks=tasks, out=paths.run(cell), reference=base)
        ledger.note(study, stage="evaluate", cell=cell.name, weights=digest)


def _computing(study, model_name: str) -> tuple[torch.dtype, torch.device]:
    """The dtype and the device that the model is scored in and on."""
    where = hardware.device(study.device)
    checkpoint = dtype_of(read_json(study.paths.model(model_name) / "base.json", "dtype"))
    return study.compute_dtype(model_name, checkpoint, where), where


def _reference(study, folder: Path, *, tasks: Path, dtype: torch.dtype, device: torch.device):
    """The base of `folder` on the general passages of `tasks`, as `harness.score` takes it."""
    return references.reference(
        folder,
        key=(read_json(folder / "base.json", "sha256")["sha256"], tuned.files_sha256(folder)),
        sequences=harness.general_passages(tasks, weights.load_tokenizer(folder)),
        tokens=harness.pass_tokens(study.evaluate.batch_size),
        dtype=dtype,
        device=device,
        kept=study.paths.local / "reference",
    )


def _scores(study, model_name: str, model: torch.nn.Module, digest: str, *, tasks: Path, reference: Any):
    return harness.score(
        model=model,
        tokenizer=weights.load_tokenizer(study.paths.model(model_name)),
        tasks_dir=tasks,
        weights_sha256=digest,
        kept=study.paths.local / "tokens",
        reference=reference,
        **resolve.evaluation_settings(study),
    )


def _score(
    study, model_name: str, model: torch.nn.Module, digest: str, *, tasks: Path, out: Path, reference: Any
) -> None:
    """Score a model whose weights have the hash `digest`, and write scores, items and costs to `out`."""
    files = ("items.csv.gz", "evaluate.json", "scores.json")
    for name in files:  # what there is belongs together, also where this is an evaluation by hand that is killed
        (out / name).unlink(missing_ok=True)
    where = hardware.device(study.device)
    hardware.reset_peak(where)
    began = perf_counter()
    scores, items = _scores(study, model_name, model, digest, tasks=tasks, reference=reference)
    seconds = perf_counter() - began
    with whole.beside(out) as made:
        harness.save(scores, items, made)
        write_json(
            made / "evaluate.json",
            {
                "seconds_evaluate": seconds,
                "peak_memory_bytes": hardware.peak_memory_bytes(where),
                "hardware": hardware.describe(where),
                "versions": provenance.versions(),
                "git": provenance.git(study.paths.root),
                "when": provenance.now(),
            },
        )
        out.mkdir(exist_ok=True)
        for name in files:  # the scores last: with them the others are there
            (made / name).replace(out / name)
