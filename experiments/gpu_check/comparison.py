"""Real weights before and after a short fine-tuning with each method: probe scores, gain, forgetting, seconds, bytes.

Settings are every part's defaults and one learning rate, untuned: it shows that methods train real weights here, and is no
comparison of methods. A study is (`dvc repro`).
"""

import dataclasses
from pathlib import Path

import torch

from evaluation.probe import load_probes, probe
from experiments.gpu_check import running, sizes
from experiments.gpu_check.sizes import Skipped
from experiments.gpu_check.speed import SPARE, held, stored
from experiments.model import weights
from experiments.model.shape import shape_of
from experiments.stages.prepare import encoded_text
from experiments.stages.train import encoded
from experiments.training import hardware, memory
from experiments.training.flops import mfu
from experiments.training.settings import TrainSettings
from methods.errors import UserError
from methods.tools.process_group import Shards

TOKENS = 8192  # of a forward pass of the probes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """Weights and data as they were asked for; `find` checks them."""

    weights: Path
    domain: Path  # train.jsonl, probe/
    general: Path
    rows: int
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.weights.resolve().name}/{self.domain.name}"


def find(*, weights: Path | None, data: Path, domain: str, rows: int, learning_rate: float) -> Given:
    """Raises UserError saying what is missing where."""
    if weights is None:
        raise UserError(
            "the comparison part needs real weights: give --weights DIR, a model in Hugging Face layout (random weights have "
            "nothing to forget), or leave it out with --parts checks,speed"
        )
    if not (weights / "config.json").is_file() or not list(weights.glob("*.safetensors")):
        raise UserError(
            f"--weights {weights}: no config.json and *.safetensors there; give a model folder in Hugging Face layout"
        )
    folders = sorted(path.parent for path in (data / "train").glob("*/train.jsonl"))
    if not folders:
        raise UserError(
            f"--data {data}: no train/DOMAIN/train.jsonl there; make a study's data with `dvc repro data`, give its folder"
        )
    chosen = [folder for folder in folders if not domain or folder.name == domain]
    if len(chosen) != 1:
        raise UserError(
            f"--domain {domain or '(not given)'}: {data / 'train'} has {', '.join(f.name for f in folders)}; give one"
        )
    return Given(
        weights=weights,
        domain=chosen[0],
        general=data / "general" / "importance.jsonl",
        rows=rows,
        learning_rate=learning_rate,
    )


def base(given: Given, *, device: torch.device) -> dict:
    """Probe scores of the weights as they are."""
    model = weights.load_model(given.weights, dtype=_computing(given, device), device=device)
    sets = load_probes(given.domain / "probe", weights.load_tokenizer(given.weights))
    return {
        "status": "measured",
        "probes": probe(model=model, sets=sets, tokens=TOKENS),
        "rows": {name: len(s) for name, s in sets.items()},
    }


def method(given: Given, *, method: str, before: dict[str, float], device: torch.device, shards: Shards) -> dict:
    """One method: preparation, one epoch, the same probes again."""
    parts = sizes.parts_of(method)
    computing = _computing(given, device)
    tokenizer = weights.load_tokenizer(given.weights)
    sets = load_probes(given.domain / "probe", tokenizer)
    examples = encoded(given.domain / "train.jsonl", tokenizer, 512)[: given.rows]
    longest = max(len(example["input_ids"]) for example in examples)
    settings = TrainSettings(
        learning_rate=given.learning_rate,
        batch=8,
        micro_batch=8,
        length=longest,
        warmup=0.1,
        moments="bfloat16",
        probes=1,
    )
    general = encoded_text(given.general, tokenizer, 512) if _prepares(parts) else []
    layout, settings, predicted = _fitting(given, parts, settings, device, shards, computing)
    among = shards if layout == "sharded" else Shards()
    load = lambda: weights.load_model(given.weights, dtype=computing, device=device)
    common = {"settings": settings, "device": device, "shards": among, "compute_dtype": computing}
    prepared = running.prepare(parts=parts, make=load, general=general, **common)
    peak = running.Peak(device)
    model = load()
    written = sum(p.nbytes for p in model.parameters())
    start = running.base_of(model, parts)
    result, _ = running.train(
        parts=parts,
        model=model,
        base=start,
        states=prepared.states,
        examples=examples,
        probe=lambda trained: probe(model=trained, sets=sets, tokens=TOKENS),
        **common,
    )
    most = peak.bytes()
    after = {key.removeprefix("probe_"): value for key, value in result.curve[-1].items() if key.startswith("probe_")}
    losses = [row["loss"] for row in result.curve if "loss" in row]
    name = given.domain.name
    kept = sorted(key for key in before if key not in (name, "perplexity") and not key.endswith("_nll"))
    return {
        "status": "measured",
        "layout": layout,
        "checkpointing": settings.checkpointing,
        "learning_rate": given.learning_rate,
        "steps": result.steps,
        "tokens": result.tokens,
        "probes": after,
        "gain": after[name] - before[name] if name in before else None,
        "forgetting": sum(before[key] - after[key] for key in kept) / len(kept) if kept else None,
        "forgetting_of": kept,
        "perplexity_ratio": after["perplexity"] / before["perplexity"] if "perplexity" in before else None,
        "seconds_prepare": prepared.seconds,
        "seconds_train": result.seconds,
        "tokens_per_second": result.tokens / result.seconds,
        "mfu": mfu(result.flops, result.seconds, result.peak_flops),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "memory": {"predicted": predicted, "held": held(result, prepared), "peak": most},
        "bytes": stored(result, prepared, written),
    }


def _computing(given: Given, device: torch.device) -> torch.dtype:
    config = shape_of("weights", {}, given.weights).config
    return hardware.compute_dtype(config.dtype or torch.float32, device)


def _prepares(parts) -> bool:
    return any("importance" in part.capabilities for part in parts)


def _fitting(
    given: Given, parts, settings: TrainSettings, device: torch.device, shards: Shards, computing: torch.dtype
):
    """The first layout that is predicted to fit: plain before sharded, without checkpointing before with."""
    shape = shape_of("weights", {}, given.weights)
    running.forget(device)
    room = torch.cuda.mem_get_info(device)[0] - SPARE if device.type == "cuda" else None
    for layout in ("plain", "sharded") if shards.active else ("plain",):
        for checkpointing in (False, True):
            chosen = dataclasses.replace(settings, checkpointing=checkpointing)
            needs = [
                memory.predict(
                    phase=phase,
                    shape=shape,
                    parts=parts,
                    settings=chosen,
                    compute_dtype=computing,
                    checkpoint_dtype=shape.config.dtype or torch.float32,
                    device_type=device.type,
                    processes=1 if layout == "sharded" else None,
                )
                for phase in ("train", "prepare")
            ]
            if room is None or max(kinds["total"] for kinds in needs) <= room:
                return layout, chosen, needs[0]
    raise Skipped(
        f"predicted to take {max(kinds['total'] for kinds in needs) / 2**30:.1f} GiB at least, {room / 2**30:.1f} GiB are free"
    )
