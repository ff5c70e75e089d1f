"""Forms of importance on disk: what each takes, what writing and reading cost beside plain safetensors, and how far the
penalty is off.

Importance is the Fisher of 16 documents, and δ what full fine-tuning changed, where the default study's model and cell
are here; else both are drawn. Errors are against float32: relative L2 of the penalty's gradient F⊙δ, for a δ of one
size everywhere and for this one, and relative of its value ΣFδ².
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from experiments.bench.race import Race, race
from experiments.model import tuned, weights
from experiments.model.base import load_tensors
from experiments.training.prepared import encoded_text
from methods.ewc import EWC
from methods.tools.importance import decode, encode
from methods.tools.stored import load_importance, save_importance

TITLE = "importance on disk"
MODEL = Path("work/models/smollm2-135m")
CELL = Path("work/cells/smollm2-135m/science/full/seed0/weights")
TEXT = Path("work/data/general/importance.jsonl")


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    real = not small and all(path.is_file() for path in (MODEL / "base.json", CELL / "weights.json", TEXT))
    fisher, delta = _of_the_study() if real else _drawn(20_000 if small else 4_000_000)
    codes = {name: encode(values, name=name) for name, values in fisher.items()}
    plain = {"float32": fisher, "8 bits": {name: code.codes for name, code in codes.items()}}
    compressed = {"float32, zstd": fisher, "8 bits, zstd": codes}
    entries = sum(values.numel() for values in fisher.values())
    facts = {"entries": entries, "of": f"{MODEL.name}, fine-tuned" if real else "drawn numbers"}

    def read(path: Path) -> dict:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}

    with TemporaryDirectory() as folder:
        paths = {name: Path(folder, name) for name in (*plain, *compressed)}
        writers = {name: partial(save_file, tensors, paths[name]) for name, tensors in plain.items()}
        writers |= {name: partial(save_importance, form, paths[name]) for name, form in compressed.items()}
        written = race("write", writers, against="8 bits", rounds=rounds or 3, facts=facts)
        for name, path in paths.items():
            size = path.stat().st_size
            written.facts[name] = {"bytes": size, "bits_an_entry": round(8 * size / entries, 3)}
        written.facts["8 bits, zstd"] |= _errors(codes, fisher, delta)
        yield written
        readers = {name: partial(read if name in plain else load_importance, path) for name, path in paths.items()}
        yield race("read", readers, against="8 bits", rounds=rounds or 3)


def _errors(codes: dict, fisher: dict, delta: dict) -> dict[str, float]:
    off, size = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    for name, coded in codes.items():
        wanted, moved = fisher[name].double(), delta[name].double()
        difference = decode(coded.codes, low=coded.low, step=coded.step).double() - wanted
        for sums, f in ((off, difference), (size, wanted)):
            for at, term in enumerate((f.square(), (f * moved).square(), f * moved.square())):
                sums[at] += term.sum().item()
    even, along, value = (o / s for o, s in zip(off, size, strict=True))
    return {
        "gradient_even": round(math.sqrt(even), 4),
        "gradient": round(math.sqrt(along), 4),
        "value": round(value, 4),
    }


def _drawn(entries: int) -> tuple[dict, dict]:
    """As spread as a real Fisher: tensors by a factor of some 4, their entries by some 8 (standard deviations)."""
    draw = torch.Generator().manual_seed(0)
    fisher = {
        f"layer{i}": torch.randn(entries // 4, generator=draw).mul(3).add(2 * torch.randn(1, generator=draw)).exp2()
        for i in range(4)
    }
    return fisher, {name: torch.randn(values.shape, generator=draw) for name, values in fisher.items()}


def _of_the_study() -> tuple[dict, dict]:
    model = weights.load_model(MODEL, dtype=torch.float32, device="cpu")
    general = encoded_text(TEXT, weights.load_tokenizer(MODEL), 128)
    part = EWC(samples=16, length=128, bits=32)
    fisher = part.prepare(model=model, base={}, general=general, seed=0, fit=None, progress=None).importance
    base, (trained, _) = load_tensors(MODEL), tuned.tensors(CELL, folder=MODEL)
    return fisher, {name: trained[name].float() - base[name].float() for name in fisher}
