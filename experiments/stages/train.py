"""train: one cell, from the base model and what the method prepared to weights, costs and a curve."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from evaluation.encode import answer_pair, shown
from evaluation.probe import load_probes, probe
from evaluation.rendered import read_jsonl
from experiments.model import tuned, weights
from experiments.model.base import dtype_of, load_tensors
from experiments.model.positions import refuse_long_rows
from experiments.model.shape import shape_of
from experiments.stages import resolve
from experiments.stages.prepare import load_states
from experiments.study import ledger, provenance
from experiments.study.failures import recorded
from experiments.training import hardware, hooks, memory, processes
from experiments.training.batches import Example
from experiments.training.contents import tensors_in
from experiments.training.engine import FitResult, final_weights, fit
from experiments.training.flops import mfu
from experiments.training.resume import Resume
from experiments.training.settings import NUMERICS
from methods.errors import UserError
from methods.tools.files import folder_sha256, need_room, read_json, write_json
from methods.tools.process_group import Shards

COLUMNS = ["step", "tokens", "seconds", "loss", "grad_norm", "penalty", "learning_rate", "tokens_per_second", "mfu"]


def main(study, cell) -> None:
    if count := processes.asked_for(study.models[cell.model]):
        processes.start(count, ["train", cell.name, "--study", study.name])
        return
    with recorded(study, cell, "train"):
        _train(study, cell)
    processes.leave()


def _train(study, cell) -> None:
    paths = study.paths
    settings = study.settings(model=cell.model, domain=cell.domain, method=cell.method)
    parts = study.methods[cell.method].parts
    where = hardware.device(study.device)
    shards = processes.join(where)
    folder, out = paths.model(cell.model), paths.weights(cell)
    base_info = read_json(folder / "base.json", "sha256", "dtype")
    base = load_tensors(folder)
    prepared = paths.prepared(model=cell.model, method=cell.method, seed=cell.seed)
    checkpoint = dtype_of(base_info)
    shape = shape_of(cell.model, study.models[cell.model], folder)
    need_room(
        paths.work,
        2 * tuned.expected_bytes(shape=shape, parts=parts, checkpoint=checkpoint),
        f"the weights of {cell.name}",
    )
    computing = study.compute_dtype(cell.model, checkpoint, where)
    tokenizer = weights.load_tokenizer(folder)
    examples = encoded(
        paths.data / "train" / cell.domain / "train.jsonl",
        tokenizer,
        settings.length,
        where=study.written("length", model=cell.model, domain=cell.domain, method=cell.method),
    )
    longest = max(len(e["input_ids"]) for e in examples)
    refuse_long_rows(study, model=cell.model, domain=cell.domain, method=cell.method, shape=shape, longest=longest)
    memory.refuse(
        what=f"training {cell.name}",
        available=hardware.available_memory(where),
        phase="train",
        shape=shape,
        parts=parts,
        settings=replace(settings, length=longest),
        checkpoint_dtype=checkpoint,
        compute_dtype=computing,
        device_type=where.type,
        processes=shards.world if shards.active else None,
    )
    # to be shared among processes it is cut on the CPU and moved piece by piece
    model = weights.load_model(folder, dtype=computing, device="cpu" if shards.active else where)
    asked = paths.data / "train" / cell.domain / "probe"
    sets = (
        load_probes(asked, tokenizer) if settings.probes and any(asked.glob("*.jsonl")) else {}
    )  # there may be none to ask
    data = folder_sha256(paths.data / "train" / cell.domain)
    resume = Resume(
        paths.resume / "train" / cell.name,
        every=settings.checkpoint_seconds,
        rank=shards.rank,
        world=shards.world,
        identity={
            "base": base_info["sha256"],
            "data": data,
            "settings": resolve.train(study, cell.model, cell.domain, cell.method),
            "prepared": folder_sha256(prepared),
            "seed": cell.seed,
            "device": where.type,
            "compute_dtype": str(computing),
        },
    )
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
        compute_dtype=computing,
        resume=resume,
        states=load_states(prepared, parts),
        probe=(lambda m: probe(model=m, sets=sets)) if sets else None,
        name=f"train {cell.name}",
    )
    known = not any("provides_weights" in part.capabilities for part in parts)
    final = final_weights(result, parts)
    if shards.first:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
    for part in parts:
        part.save(run=result.run, state=result.states[part.key], folder=out)
    reports = {part.key: hooks.report(part, run=result.run, state=result.states[part.key]) for part in parts}
    costs = {
        "bytes_anchor": _everywhere(shards, anchor_bytes(result)),
        "bytes_optimizer_state": _everywhere(shards, optimizer_bytes(result.optimizer)),
    }
    peaks = _everywhere(shards, hardware.peak_memory_bytes(where))
    if not shards.first:
        return
    write_curve(paths.run(cell) / "curve.csv", result.curve)
    digest = tuned.keep(out, folder=folder, base=base, final=final)
    ledger.note(study, stage="train", cell=cell.name, weights=digest)
    write_json(
        paths.run(cell) / "train.json",
        costs
        | {
            "cell": cell.name,
            "seed": cell.seed,
            "numerics": NUMERICS,
            "seconds_train": result.seconds if known else None,
            "seconds_begin": result.seconds_begin,
            "tokens_trained": result.tokens if known else None,
            "steps": result.steps,
            "steps_resumed": result.resumed,
            "flops": result.flops,
            "mfu": mfu(result.flops, result.seconds, result.peak_flops) if result.seconds else None,
            "peak_flops": result.peak_flops,
            "peak_flops_basis": hardware.dense_peak(where, computing)[1],
            "peak_memory_bytes": peaks,
            "processes": shards.world,
            "sharded": shards.active,
            "bytes_weights_delta": tuned.kept_bytes(out),
            "weights_sha256": digest,
            "base_sha256": base_info["sha256"],
            "data_sha256": data,
            "settings": settings.numeric(),
            "dtype": base_info["dtype"],
            "compute_dtype": str(computing).removeprefix("torch."),
            "device": where.type,
            "hardware": hardware.describe(where),
            "versions": provenance.versions(),
            "git": provenance.git(paths.root),
            "when": provenance.now(),
            "cost_known": known,
            "parts": reports,
        },
    )
    resume.clear()


def _everywhere(shards: Shards, count: int) -> int:
    """The sum of a number over all processes."""
    return int(shards.sum(torch.tensor(count)).item())


def encoded(path: Path, tokenizer, length: int, *, where: str = "train") -> list[Example]:
    """Training examples: the gold choice behind its context, labels on the choice alone; the context cut from the left to `length` tokens.

    A row whose answer leaves no room for a token of its prompt is left out, for it would teach the rest of an answer to no question; where
    that is more than one row in ten, `length` is wrong: UserError, as for an answer that has no token. `where` is the block that states it.
    """
    examples, cut, long, domain = [], 0, [], f"domain {path.parent.name}"
    for row in read_jsonl(path):
        what = f"training row {shown(row['context'], end=True)}"
        try:
            ids, n_context = answer_pair(
                tokenizer, row["context"], row["choices"][row["gold"]], end=row.get("end", False)
            )
        except UserError as error:
            raise UserError(f"{domain}, a training row: {error}") from error
        if len(ids) - n_context >= length:
            long.append((len(ids) - n_context, what))
            continue
        cut += len(ids) > length
        labels = [-100] * n_context + ids[n_context:]
        examples.append({"input_ids": torch.tensor(ids[-length:]), "labels": torch.tensor(labels[-length:])})
    rows = len(examples) + len(long)
    if long:
        said = (
            f"{domain}: the answers of {len(long)} of {rows} training rows leave no room for their prompts in {where}.length ({length} tokens); "
            f"the longest has {max(long)[0]} tokens: {max(long)[1]}"
        )
        if len(long) > rows / 10:
            raise UserError(f"{said}. Set `{where}.length` to {max(long)[0] + 1} or more, or train on shorter rows")
        if processes.first():
            print(f"{said}. They are left out", flush=True)
    if cut and processes.first():
        print(
            f"{domain}: {cut} of {rows} training rows are longer than {where}.length ({length} tokens): their prompts lose the beginning",
            flush=True,
        )
    return examples


def write_curve(path: Path, curve: list[dict]) -> None:
    """CSV with the loop's columns first and the probes' behind them; empty where a step was not probed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    probes = sorted({key for row in curve for key in row if key.startswith("probe_")})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS + probes, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)


def anchor_bytes(result: FitResult) -> int:
    return sum(t.nbytes for state in result.states.values() for t in tensors_in(state.get("anchor")))


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.nbytes for t in tensors_in(optimizer.state))
