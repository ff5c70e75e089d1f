"""Whether a base is settled: would training on general text alone make it better at general text?

Where it would, what a method loses is hidden behind what any training repairs. LoRA on all linear layers trains on some
texts, and the nats of others are compared before and after, per token, with a 95 % interval over texts.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch

from experiments.training.flops import Flops
from experiments.training.settings import NUMERICS, TrainSettings

# short texts and an adapter bound the cost at any size: 30 steps read at most 31,000 tokens
SETTINGS = TrainSettings(learning_rate=5.0e-4, warmup=0.1, batch=8, micro_batch=2, length=128, probes=0)
RANK, ALPHA = 8, 16.0
TEXTS = 64  # that are compared


def applies(study, model: str) -> bool:
    """Whether the stage `base` makes the test: for models that are neither settled nor random, unless it is off."""
    block, general = study.models[model], study.general
    made = block.settle is None and not block.source.startswith("random:")
    return bool(made and study.evaluate.improve and _rows(general) > TEXTS)


def settings(study, model: str) -> dict[str, Any]:
    """What the test depends on beside model and rows; {} where there is none."""
    if not applies(study, model):
        return {}
    own = {"steps": study.evaluate.improve, "rank": RANK, "alpha": ALPHA, "texts": TEXTS, "numerics": NUMERICS}
    return own | {"train": SETTINGS.numeric()}


def flops(bare: Flops, steps: int) -> float | None:
    """FLOPs of the test, taken as those of a model without an adapter and with texts as long as they may be."""
    length, batch = SETTINGS.length, SETTINGS.batch
    trained = bare.step(lengths=[length] * batch, labelled=length * batch)
    scored = bare.forward(lengths=[length] * TEXTS, predicted=length * TEXTS)
    return None if trained is None or scored is None else steps * trained + 2 * scored


def improvable(folder: Path, general: Path, *, steps: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Nats a token by which `steps` steps improve the model in `folder` on general text that they do not read.

    general   the folder with the sets of general text: `settle`, or `importance` where that is small
    """
    # other stages ask for the settings alone, and transformers' models take seconds to import
    from experiments.model import weights
    from experiments.model.base import load_tensors
    from experiments.training import settling
    from experiments.training.engine import fit

    began, tokenizer = time.perf_counter(), weights.load_tokenizer(folder)
    sets = [(general / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("settle", "importance")]
    texts = [json.loads(line)["text"] for line in max(sets, key=len)]
    scored = settling.passages(texts[:TEXTS], tokenizer)
    rows = settling.documents([{"text": text} for text in texts[TEXTS:]], tokenizer, SETTINGS.length)
    rows = [rows[number % len(rows)] for number in range(steps * SETTINGS.batch)]
    model = weights.load_model(folder, dtype=dtype, device=device)
    before = settling.nats(model, scored, description="general text")
    result = fit(
        model=model,
        parts=[settling.adapter(model, rank=RANK, alpha=ALPHA)],
        examples=rows,
        settings=SETTINGS,
        seed=settling.SEED,
        base=load_tensors(folder),
        device=device,
        compute_dtype=dtype,
        name="is the base settled",
    )
    gained = settling.improvement(before, settling.nats(result.run.model, scored, description="general text, trained"))
    return {
        "nats": settling.per_token_of(before),
        "improvement": gained.value,
        "low": gained.low,
        "high": gained.high,
        "steps": result.steps,
        "texts": len(scored),
        "tokens": result.tokens,
        "seconds": time.perf_counter() - began,
    }


def _rows(general: Any) -> int:
    return max(general.settle, general.importance)
