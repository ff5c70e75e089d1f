"""Golden weights: tiny cells of every method, float64, as inner products of each final tensor with fixed directions.

python -m tests.goldens      writes tests/goldens.json anew; raise NUMERICS in the same commit
"""

import json
from pathlib import Path

import torch

from experiments.laws.trial import texts
from experiments.model.random_models import build
from experiments.training.engine import final_weights, fit
from experiments.training.preparation import Fitting
from experiments.training.settings import NUMERICS, TrainSettings
from methods import registry

FILE = Path(__file__).with_name("goldens.json")
SETTINGS = TrainSettings(learning_rate=2e-3, batch=4, micro_batch=2, length=48, probes=0, warmup=0.2, epochs=1.5)
LORA = {"rank": 2, "targets": ["q_proj", "v_proj"], "dropout": 0.1}
METHODS = {
    "full": {},
    "lora": {"lora": LORA},
    "ewc": {"ewc": {"strength": 10.0, "samples": 6, "length": 32}},
    "ewc-lora": {
        "lora": LORA,
        "ewc": {
            "strength": 10.0,
            "samples": 6,
            "length": 32,
            "scope": "whole-model",
            "estimator": "batched",
            "batch_size": 3,
        },
    },
    "mofo": {"mofo": {"fraction": 0.1}},
    "hierarchical": {"lora": LORA, "hierarchical": {"strength": 1.0e-3, "samples": 6, "length": 32}},
    "hierarchical-full": {"hierarchical": {"strength": 1.0e-3, "samples": 6, "length": 32}},
}
ARCHITECTURES = ("gptj", "llama")


def final(
    architecture: str, blocks: dict, *, settings: TrainSettings = SETTINGS, seed: int = 5
) -> dict[str, torch.Tensor]:
    """Final weights of one tiny cell, prepared and trained as the stages do it."""
    base = {n: p.detach().clone() for n, p in build(architecture, seed=1, dtype=torch.float64).named_parameters()}
    parts, states = registry.build(blocks), {}
    for part in parts:
        model = build(architecture, seed=1, dtype=torch.float64)
        for other in parts:
            model = other.adapt(model, seed=seed)
        prepared = part.prepare(
            model=model,
            base=base,
            general=texts(8, seed=11, labelled=False),
            seed=seed,
            progress=None,
            fit=Fitting(None, settings=settings, base=base, device="cpu", name="golden"),
        )
        if prepared:
            states[part.key] = {
                k: getattr(prepared, k) for k in ("importance", "start", "carry") if getattr(prepared, k)
            }
    result = fit(
        model=build(architecture, seed=1, dtype=torch.float64),
        parts=parts,
        examples=texts(18, seed=12, labelled=True),
        settings=settings,
        seed=seed,
        base=base,
        states=states,
    )
    changed = final_weights(result, parts)
    return {name: changed.get(name, tensor) for name, tensor in base.items()}


def signature(tensors: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Three inner products a tensor with directions drawn from its shape alone, over its norm's scale."""
    found = {}
    for name, tensor in tensors.items():
        directions = torch.randn(
            3, tensor.numel(), generator=torch.Generator().manual_seed(tensor.numel()), dtype=torch.float64
        )
        found[name] = (directions @ tensor.double().flatten()).tolist()
    return found


def main() -> None:
    goldens = {f"{a}/{m}": signature(final(a, blocks)) for a in ARCHITECTURES for m, blocks in METHODS.items()}
    FILE.write_text(json.dumps({"numerics": NUMERICS, "cells": goldens}, indent=0, sort_keys=True) + "\n")
    print(f"wrote {FILE.name}: {len(goldens)} cells")


if __name__ == "__main__":
    main()
