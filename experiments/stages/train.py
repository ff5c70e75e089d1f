"""train: one cell, from the base model and what the method prepared to weights, costs and a curve."""

import csv
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import evaluation
from evaluation.probe import load_probes, probe
from experiments.data import damage
from experiments.model import trained, tuned, weights
from experiments.model.base import dtype_of
from experiments.model.measure import Measure
from experiments.model.positions import refuse_long_rows
from experiments.model.shape import shape_of
from experiments.stages import resolve
from experiments.stages.prepare import GENERAL
from experiments.study import ledger, provenance, whole
from experiments.study.distrust import distrusted
from experiments.study.failures import recorded
from experiments.training import allocator, hardware, hooks, memory, prepared, processes
from experiments.training.engine import final_weights, finish, fit
from experiments.training.examples import encoded
from experiments.training.resume import Resume
from experiments.training.settings import NUMERICS
from experiments.training.snapshot import tensors_in
from experiments.training.stopping import rule_of, told
from methods.tools.files import folder_sha256, need_room, read_json, write_json
from methods.tools.process_group import Shards

COLUMNS = ["step", "tokens", "seconds", "loss", "grad_norm", "penalty", "learning_rate", "tokens_per_second", "mfu"]


def main(study, cell) -> None:
    if count := processes.to_start(study.models[cell.model]):
        with recorded(study, cell, "train"):
            processes.start(count, ["train", cell.name, "--study", study.name])
        return
    with recorded(study, cell, "train"):
        _train(study, cell)
    processes.leave()


def _train(study, cell) -> None:
    """Train the cell, or take the training that a cell with the same one has kept, and finish its weights."""
    paths, parts = study.paths, study.methods[cell.method].parts
    where = hardware.device(study.device)
    shards = processes.join(where)
    folder, out, probes = paths.model(cell.model), paths.weights(cell), paths.data / "train" / cell.domain / "probe"
    with distrusted(folder, paths.data, paths.prepared(model=cell.model, method=cell.method, seed=cell.seed)):
        damage.refuse_damaged(paths.data, f"train/{cell.domain}")
        prepared.refuse_damaged(study, cell)
        base, info = weights.verified(folder), read_json(folder / "base.json", "sha256", "dtype")
    computing = study.compute_dtype(cell.model, dtype_of(info), where)
    measure = Measure(folder=folder, probes=probes, base=base, dtype=computing, device=where, shards=shards)
    identity = _identity(study, cell, info=info, where=where, computing=computing)
    store = resolve.store_of(study, cell)
    reused = shards.broadcast(shards.first and store is not None and trained.is_kept(store, identity=identity))
    if shards.first:
        for name in ("train.json", "curve.csv"):  # they are there with the weights that they describe alone
            (paths.run(cell) / name).unlink(missing_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
    if reused:
        final, record = trained.load(store, files=out) if shards.first else ({}, {})
    else:
        final, record = _fit(study, cell, shards=shards, base=base, identity=identity, measure=measure)
        if shards.first and store is not None:
            trained.keep(store, identity=identity, final=final, files=out, record=record)
    shape = shape_of(cell.model, study.models[cell.model], folder)
    run = {"base": base, "seed": cell.seed, "device": where, "shards": shards}
    final, reports, added = finish(parts, final=final, measure=measure, shape=shape, **run)
    if not shards.first:
        return
    finished = _finished(study, cell, final=final, measure=measure)
    write_curve(paths.run(cell) / "curve.csv", record.pop("curve"))
    digest = tuned.keep(out, folder=folder, base=base, final=final)
    ledger.note(study, stage="train", cell=cell.name, weights=digest)
    write_json(
        paths.run(cell) / "train.json",
        record
        | {
            "cell": cell.name,
            "training_reused": reused,
            "bytes_weights_delta": tuned.kept_bytes(out),
            "weights_sha256": digest,
            "git": provenance.git(paths.root),
            "when": provenance.now(),
            "parts": record["parts"] | reports,
            "added": record["added"] | added,
            "finished": finished,
        },
    )
    _resume(study, cell, shards=shards, identity=identity).clear()


def _finished(study, cell, *, final: Mapping[str, Tensor], measure: Measure) -> dict | None:
    """The parts that changed the weights after training, and the probes of what they made; None if there are none."""
    changers = hooks.changers(study.methods[cell.method].parts)
    if not changers:
        return None
    sets, folder = {}, measure.folder
    if study.settings(model=cell.model, domain=cell.domain, method=cell.method).probes:
        sets = (
            load_probes(measure.probes, weights.load_tokenizer(folder)) if any(measure.probes.glob("*.jsonl")) else {}
        )
    probed = {}
    if sets:
        made = tuned.loaded(folder, base=measure.base, final=final, dtype=measure.dtype, device=measure.device)
        probed = probe(model=made, sets=sets)
    return {"parts": [part.key for part in changers], "probe": probed}


def _identity(study, cell, *, info: dict, where: torch.device, computing: torch.dtype) -> dict:
    """Everything that the weights depend on before the parts that act in `finish` alone."""
    paths = study.paths
    return {
        "base": info["sha256"],
        "data": folder_sha256(paths.data / "train" / cell.domain),
        "settings": resolve.train(study, cell.model, cell.domain, cell.method, finished=False),
        "prepared": folder_sha256(paths.prepared(model=cell.model, method=cell.method, seed=cell.seed)),
        "seed": cell.seed,
        "device": where.type,
        "compute_dtype": str(computing),
        "versions": evaluation.versions(),
    }


def _resume(study, cell, *, shards: Shards, identity: dict) -> Resume:
    settings = study.settings(model=cell.model, domain=cell.domain, method=cell.method)
    folder = study.paths.resume / "train" / cell.name
    return Resume(folder, every=settings.checkpoint_seconds, shards=shards, identity=identity)


def _fit(
    study, cell, *, shards: Shards, base: Mapping[str, Tensor], identity: dict, measure: Measure
) -> tuple[dict[str, Tensor], dict]:
    """Train the cell; its weights before the parts that act in `finish` alone, and the content of train.json.

    What parts save beside the weights is in the cell's folder afterwards.
    """
    paths, where = study.paths, measure.device
    settings = study.settings(model=cell.model, domain=cell.domain, method=cell.method)
    parts = hooks.trainers(study.methods[cell.method].parts)
    folder, out = paths.model(cell.model), paths.weights(cell)
    info = read_json(folder / "base.json", "sha256", "dtype")
    states = paths.prepared(model=cell.model, method=cell.method, seed=cell.seed)
    checkpoint = dtype_of(info)
    shape = shape_of(cell.model, study.models[cell.model], folder)
    every = study.methods[cell.method].parts  # with those that act in `finish` alone
    needed = 2 * tuned.expected_bytes(shape=shape, parts=every, checkpoint=checkpoint)
    if resolve.store_of(study, cell):
        needed += shape.parameters * max(4, checkpoint.itemsize)
    need_room(paths.work, needed, f"the weights of {cell.name}")
    tokenizer = weights.load_tokenizer(folder)
    examples = encoded(
        paths.data / "train" / cell.domain / "train.jsonl",
        tokenizer,
        settings.length,
        where=study.written("length", model=cell.model, domain=cell.domain, method=cell.method),
    )
    longest = max(len(e["input_ids"]) for e in examples)
    refuse_long_rows(study, model=cell.model, domain=cell.domain, method=cell.method, shape=shape, longest=longest)
    predicted = memory.refuse(
        what=f"training {cell.name}",
        available=hardware.available_memory(where),
        phase="train",
        shape=shape,
        parts=parts,
        settings=replace(settings, length=longest),
        checkpoint_dtype=checkpoint,
        compute_dtype=measure.dtype,
        device_type=where.type,
        processes=shards.world if shards.active else None,
    )
    # a model that processes share is cut on the CPU and moved piece by piece
    model = weights.load_model(folder, dtype=measure.dtype, device="cpu" if shards.active else where)
    sets = load_probes(measure.probes, tokenizer) if settings.probes and any(measure.probes.glob("*.jsonl")) else {}
    hardware.reset_peak(where)
    result = fit(
        model=model,
        parts=parts,
        examples=examples,
        settings=settings,
        seed=cell.seed,
        base=base,
        device=where,
        shards=shards,
        compute_dtype=measure.dtype,
        resume=_resume(study, cell, shards=shards, identity=identity),
        states=prepared.load_states(states, parts),
        general=prepared.load_general(states / GENERAL, tokenizer),
        tokenizer=tokenizer,
        probe=(lambda m: probe(model=m, sets=sets)) if sets else None,
        rule=rule_of(settings, domain=cell.domain, where=study.rule_written(cell)),
        name=f"train {cell.name}",
    )
    if shards.first and result.stopped:
        print(f"{cell.name}: {told(result.stopped)}", flush=True)
    known = not any("provides_weights" in part.capabilities for part in parts)
    allocator.give_back()
    final = final_weights(result, parts, measure=measure)
    for part in parts:
        part.save(run=result.run, state=result.states[part.key], folder=out)
    return final, {
        "bytes_anchor": _everywhere(shards, _bytes([state.get("anchor") for state in result.states.values()])),
        "bytes_optimizer_state": _everywhere(shards, _bytes(result.optimizer.state)),
        "seed": cell.seed,
        "numerics": NUMERICS,
        "seconds_train": result.seconds if known else None,
        "seconds_begin": result.seconds_begin,
        "tokens_trained": result.tokens if known else None,
        "steps": result.steps,
        "steps_resumed": result.resumed,
        **({"stopped": result.stopped} if result.stopped else {}),
        "flops": result.flops,
        "added": result.added,
        "mfu": hardware.mfu(result.flops, result.seconds, result.peak_flops) if result.seconds else None,
        "peak_flops": result.peak_flops,
        "peak_flops_basis": hardware.dense_peak(where, measure.dtype)[1],
        "peak_memory_bytes": _everywhere(shards, hardware.peak_memory_bytes(where)),
        "predicted_memory_bytes": predicted,
        "processes": shards.world,
        "sharded": shards.active,
        "base_sha256": info["sha256"],
        "data_sha256": identity["data"],
        "settings": settings.numeric(),
        "dtype": info["dtype"],
        "compute_dtype": identity["compute_dtype"].removeprefix("torch."),
        "device": where.type,
        "hardware": hardware.describe(where),
        "versions": provenance.versions(),
        "cost_known": known,
        "parts": result.method.reports(result.run),
        "curve": result.curve,
    }


def _everywhere(shards: Shards, count: int) -> int:
    """The sum of a number over all processes."""
    return int(shards.sum(torch.tensor(count)).item())


def write_curve(path: Path, curve: list[dict]) -> None:
    """A CSV file of the loop's columns and then the probes'; a probe's field is empty where a step was not probed."""
    probes = sorted({key for row in curve for key in row if key.startswith("probe_")})
    with whole.file(path) as made, made.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS + probes, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)


def _bytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_in(value))
