"""The cells of a study before they run: what is cached, and what the rest will cost in time, memory and disk.

Estimates, each with its basis: training 6 FLOPs and scoring 2 FLOPs a parameter and token, over the rate this
machine reaches (from its own earlier runs of the model where there are any, else from a short matrix product);
memory 2 bytes a parameter for the weights, 4 for the float32 masters, 4 to 6 for gradients, 8 for Adam's moments,
and what a method's importance and anchor add; disk the weights of a cell.
"""

import json
import time

import torch

from experiments import cells, hardware
from experiments.errors import UserError
from experiments.lock import Lock
from methods.part import Part

CHARACTERS_A_TOKEN = 4.0
REACHED = 0.4  # share of a matrix product's rate that training reaches
ACTIVATION_BYTES = 34  # a token, layer and unit of width, without recomputation


def main(study, *, as_json: bool) -> None:
    plan = make(study)
    print(json.dumps(plan, indent=1) if as_json else text(plan))


def make(study) -> dict:
    """{"cells": [...], "total": {...}} with seconds, bytes and what they rest on."""
    lock = Lock(study)
    rates: dict[str, dict] = {}
    planned = []
    for cell in cells.grid(study):
        if cell.model not in rates:
            rates[cell.model] = _rate(study, cell.model)
        planned.append(_cell(study, cell, rates[cell.model], lock.cell(cell)))
    todo = [c for c in planned if not c["cached"]["scored"]]
    return {
        "study": study.title, "cells": planned,
        "total": {
            "cells": len(planned), "to_run": len(todo),
            "seconds": sum(c["seconds"] for c in todo), "disk_bytes": sum(c["disk_bytes"] for c in todo),
            "peak_memory_bytes": max((c["memory_bytes"] for c in planned), default=0),
        },
        "basis": {model: rate["basis"] for model, rate in rates.items()},
    }


def _cell(study, cell, rate: dict, cached: dict) -> dict:
    settings = study.settings(model=cell.model, domain=cell.domain, method=cell.method)
    parts = study.methods[cell.method].parts
    n, size = rate["parameters"], rate["bytes_per_parameter"]
    tokens = _train_tokens(study, cell, settings)
    samples = [getattr(part, "samples", 0) for part in parts]  # documents of general text, about half of `length` each
    general = sum(min(n, int(study.general.get("importance", n))) for n in samples) * settings.length / 2
    prepares = any(type(part).prepare is not Part.prepare for part in parts)
    importance = any("importance" in part.capabilities for part in parts)
    adapts = any("adapts" in part.capabilities for part in parts)
    train = tokens / rate["train_tokens_per_second"]
    prepare = general / rate["train_tokens_per_second"] if prepares and not cached["prepared"] else 0.0
    evaluate = _scored_tokens(study, cell) / (3 * rate["train_tokens_per_second"])
    seconds = prepare + (0 if cached["trained"] else train) + (0 if cached["scored"] else evaluate)
    trained = 0.01 * n if adapts else n
    activations = settings.micro_batch * settings.length * rate["layers"] * rate["width"] * ACTIVATION_BYTES
    memory = n * size + trained * 16 + (4 * n + size * n if importance and not adapts else 0) + activations
    return {"cell": cell.name, "cached": cached, "tokens": tokens, "seconds": round(seconds, 1),
            "seconds_prepare": round(prepare, 1), "seconds_train": round(train, 1), "seconds_evaluate": round(evaluate, 1),
            "memory_bytes": int(memory), "disk_bytes": int(n * size)}


def _train_tokens(study, cell, settings) -> int:
    path = study.paths.data / "train" / cell.domain / "train.jsonl"
    if path.is_file():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        characters = sum(min(len(r["context"]) + len(r["choices"][r["gold"]]), CHARACTERS_A_TOKEN * settings.length) for r in rows)
        return int(settings.epochs * characters / CHARACTERS_A_TOKEN)
    return int(settings.epochs * study.domains[cell.domain]["split"]["train"] * settings.length / 2)


def _scored_tokens(study, cell) -> int:
    folder = study.paths.data / "evaluate" / cell.domain
    size = sum(p.stat().st_size for p in folder.glob("*.jsonl")) if folder.is_dir() else 1_000_000
    return int(size / CHARACTERS_A_TOKEN)


def _rate(study, model: str) -> dict:
    """Parameters and training tokens a second of a model here, and what the figure rests on."""
    shape = _shape(study, model)
    where = hardware.device(study.device)
    here = hardware.describe(where)
    measured = []
    for path in sorted((study.paths.results / "runs" / model).glob("*/*/*/train.json")):
        train = json.loads(path.read_text())
        if train["hardware"] == here and train["seconds_train"]:
            measured.append(train["tokens_trained"] / train["seconds_train"])
    if measured:
        return shape | {"train_tokens_per_second": min(measured), "basis": f"{len(measured)} earlier cells on this machine"}
    flops = _flops(where)
    return shape | {"train_tokens_per_second": REACHED * flops / (6 * shape["parameters"]),
                    "basis": f"a matrix product here: {flops / 1e12:.2f} TFLOP/s"}


def _shape(study, model: str) -> dict:
    """Parameters, layers and width: from the model's folder, else its block (`parameters:`), without fetching it."""
    folder, block = study.paths.model(model), study.models[model]
    if (folder / "base.json").is_file():
        config = json.loads((folder / "config.json").read_text())
        parameters = json.loads((folder / "base.json").read_text())["parameters"]
        layers = config.get("num_hidden_layers") or config["n_layer"]
        width = config.get("hidden_size") or config["n_embd"]
    elif block["source"].startswith("random:"):
        from experiments.random_models import build

        with torch.device("meta"):
            built = build(block["source"].removeprefix("random:"), seed=0, **(block.get("config") or {}))
        parameters = sum(p.numel() for p in built.parameters())
        layers, width = built.config.num_hidden_layers, built.config.hidden_size
    elif block.get("parameters"):
        parameters, layers, width = (int(block[k]) for k in ("parameters", "layers", "width"))
    else:
        raise UserError(f"models.{model}: not fetched yet, so its size is unknown: add `parameters:`, `layers:` and `width:` to its block")
    return {"parameters": parameters, "layers": layers, "width": width,
            "bytes_per_parameter": {"float32": 4, "float64": 8}.get(block.get("dtype", "bfloat16"), 2)}


def _flops(where: torch.device) -> float:
    """Matrix-product FLOP/s in the dtype training would compute in, best of three short ones."""
    size = 8192 if where.type == "cuda" else 2048
    a = torch.randn(size, size, device=where, dtype=hardware.compute_dtype(torch.bfloat16, where))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def text(plan: dict) -> str:
    """The plan as a table for a terminal."""
    width = max(len(c["cell"]) for c in plan["cells"])
    lines = [f"{plan['study']}: {plan['total']['cells']} cells, {plan['total']['to_run']} to run", "",
             f"{'cell':<{width}}  {'cached':<24}  {'time':>7}  {'memory':>8}  {'disk':>8}"]
    for c in plan["cells"]:
        done = [stage for stage, yes in c["cached"].items() if yes]
        lines.append(f"{c['cell']:<{width}}  {', '.join(done) or '-':<24}  {_minutes(c['seconds']):>7}  "
                     f"{_gib(c['memory_bytes']):>8}  {_gib(c['disk_bytes']):>8}")
    total = plan["total"]
    lines += ["", f"to run: {_minutes(total['seconds'])}, disk {_gib(total['disk_bytes'])}, peak memory about {_gib(total['peak_memory_bytes'])}"]
    lines += [f"{model}: estimated from {basis}" for model, basis in plan["basis"].items()]
    return "\n".join(lines)


def _minutes(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.1f} min"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
