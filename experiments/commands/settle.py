"""settle: make the adapter of a settled model, and write it with the gates' numbers to results/settled/NAME.

It runs by this command alone: the adapter is committed, and the stage `model` merges it. An interrupted run continues
where it stopped when the same command is given again.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256 as new_sha256
from pathlib import Path
from typing import Any

import evaluation
from evaluation.chance import WARNING
from experiments.data import general_text, mix, settling_rows
from experiments.data.reader import Reader
from experiments.model import delta, settled, weights
from experiments.model.base import dtype_of
from experiments.model.shape import shape_of
from experiments.stages.model import folder_of
from experiments.study import provenance, whole
from experiments.study.validation import HASHES
from experiments.training import hardware, memory, settling
from experiments.training.resume import Resume
from experiments.training.settings import NUMERICS, TrainSettings
from methods.errors import UserError
from methods.tools.files import read_json, sha256, write_json
from methods.tools.names import unknown


def main(study, *, model: str) -> None:
    if model not in study.models:
        raise unknown("model", model, study.models)
    if (block := study.models[model].settle) is None:
        raise UserError(f"models.{model} has no `settle`: say there of which model and on what it is made")
    with folder_of(study, getattr(block, "from")) as folder:
        _settle(study, model, block, folder)


def _settle(study, model: str, block: Any, folder) -> None:
    where, info = hardware.device(study.device), read_json(folder / "base.json", "sha256", "dtype")
    computing = study.compute_dtype(model, dtype_of(info), where)
    shape = shape_of(model, study.models[model], folder)
    settled.refuse_size(settling.adapter_bytes(shape.build(), rank=block.lora.rank))
    tokenizer = weights.load_tokenizer(folder)
    train = replace(TrainSettings(**block.train.as_written), epochs=1.0, probes=0)
    reader = Reader(study=study)
    probes = general_text.lines(study.general, reader)[0]["probe"]
    if len(probes) < 2:
        raise UserError("general.probe is below 2: the gate is measured on probe texts; set it to 64")
    sources = settling_rows.of(block.mix, reader)
    read = {"mix": sources, "probe": probes}
    data = new_sha256(json.dumps(read, sort_keys=True, default=str).encode()).hexdigest()
    encoded = {name: settling.documents(rows, tokenizer, train.length) for name, rows in sources.items()}
    fresh, rest = mix.reserved(encoded, block.mix, block.gate.steps * train.batch)
    rows = mix.interleaved(rest, block.mix, block.gate.most * train.batch)
    memory.refuse(
        what=f"the gate of {model}",
        available=hardware.available_memory(where),
        phase="train",
        shape=shape,
        parts=(),
        settings=replace(train, length=max(len(example["input_ids"]) for example in rows)),
        checkpoint_dtype=dtype_of(info),
        compute_dtype=computing,
        device_type=where.type,
        processes=None,
    )
    settings = {key: value for key, value in block.as_written.items() if key not in HASHES}
    identity = {
        "base": info["sha256"],
        "settings": settings,
        "data": data,
        "numerics": NUMERICS,
        "device": where.type,
        "compute_dtype": str(computing),
        "versions": evaluation.versions(),
    }
    work = study.paths.resume / "settle" / model
    resume = Resume(work, every=train.checkpoint_seconds, identity=identity)
    candidate = study.paths.local / "settle" / model / "adapter.safetensors"
    out = study.paths.adapter(model)
    begun = _begun(out, settings=settings, data=data, base=info["sha256"])
    if begun:  # another gate: the committed adapter is taken through it
        candidate.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out, candidate)
    done = settling.Settling(
        folder=folder,
        adapter=candidate,
        rows=rows,
        fresh=fresh,
        texts=settling.passages([row["text"] for row in probes], tokenizer),
        rank=block.lora.rank,
        alpha=block.lora.alpha,
        train=train,
        gate=block.gate,
        dtype=computing,
        device=where,
        resume=resume,
    ).run(lambda gate: print(f"{model}: {told(gate)}", flush=True), begun=begun)
    holds = done["gates"][-1]["holds"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole.file(out) as made:
        shutil.copyfile(candidate, made)
    hashes = {"adapter_sha256": sha256(out), "sha256": delta.sha256_of(settled.candidate(folder, out))}
    write_json(
        out.parent / "settle.json",
        done
        | hashes
        | {
            "settled": holds,
            "adapter_bytes": out.stat().st_size,
            "block": settings,
            "from_sha256": info["sha256"],
            "data_sha256": data,
            "rows": {name: len(own) for name, own in sources.items()},
            "rows_sha256": settling_rows.digests(sources),
            "texts": len(probes),
            "compute_dtype": str(computing).removeprefix("torch."),
            "device": where.type,
            "hardware": hardware.describe(where),
            "versions": provenance.versions(),
            "git": provenance.git(study.paths.root),
            "when": provenance.now(),
        },
    )
    resume.clear()
    if not holds:
        print(f"{WARNING}{model} is not settled after {done['steps']} steps: the report will say so")
    print(
        f"wrote {out.relative_to(study.paths.root)} and settle.json; commit both, and write into models.{model}.settle:"
    )
    print("\n".join(f"      {name}: {value}" for name, value in hashes.items()))


def _begun(adapter: Path, *, settings: dict, data: str, base: str) -> dict[str, Any] | None:
    """What was recorded beside an adapter that is of these settings, but for the gate, of these rows and this base."""
    path = adapter.with_name("settle.json")
    if not path.is_file() or not adapter.is_file():
        return None
    record = read_json(path, "block", "data_sha256", "from_sha256", "adapter_sha256")
    ours = [{key: value for key, value in block.items() if key != "gate"} for block in (record["block"], settings)]
    known = [record["data_sha256"], record["from_sha256"], record["adapter_sha256"]]
    if ours[0] != ours[1] or known != [data, base, sha256(adapter)]:
        return None
    return {key: record[key] for key in ("nats", "gates", "steps", "tokens", "seconds")}


def told(gate: Mapping[str, Any]) -> str:
    """A gate in a sentence."""
    return (
        f"after {gate['steps']} steps general text has {gate['nats']:.3f} nats a token; {gate['of']} steps of plain "
        f"fine-tuning at {gate['learning_rate']:g} lower that by {gate['improvement']:.4f} (95 % interval "
        f"{gate['low']:.4f} to {gate['high']:.4f}): "
        + ("settled" if gate["holds"] else f"not settled, for {gate['nats_allowed']:g} or more is possible")
    )
