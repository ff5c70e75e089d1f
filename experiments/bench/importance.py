"""Forms of importance on disk: what each takes, what writing and reading cost beside plain safetensors, and how far the
penalty is off.

Importance is the Fisher of 16 documents, and δ what full fine-tuning changed, where the default study's model and cell
are here; else both are drawn. Errors are against float32: relative L2 of the penalty's gradient F⊙δ, for a δ of one
size everywhere and for this one, and relative of its value ΣFδ².
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.bench.race import Race, race

TITLE = "importance on disk"
MODEL = Path("work/models/smollm2-135m")
CELL = Path("work/cells/smollm2-135m/science/full/seed0/weights")
TEXT = Path("work/data/general/importance.jsonl")


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    from safetensors.torch import load_file, save_file

    from methods.tools.importance import encode
    from methods.tools.stored import load_importance, save_importance

    real = not small and all(path.is_file() for path in (MODEL / "base.json", CELL / "weights.json", TEXT))
    fisher, delta = _of_the_study() if real else _drawn(20_000 if small else 4_000_000)
    codes = {name: encode(values, name=name) for name, values in fisher.items()}
    plain, forms, errors = {"float32": fisher, "8 bits": codes}, {"float32, zstd": fisher, "8 bits, zstd": codes}, {}
    errors["8 bits, zstd"] = _errors(codes, fisher, delta)

    with TemporaryDirectory() as folder:
        writers = {
            name: lambda name=name: save_file(
                {n: getattr(v, "codes", v) for n, v in plain[name].items()}, Path(folder, name)
            )
            for name in plain
        }
        writers |= {name: lambda name=name: save_importance(forms[name], Path(folder, name)) for name in forms}
        written = race("write", writers, against="8 bits", rounds=rounds or 3)
        entries = sum(values.numel() for values in fisher.values())
        sizes = {name: Path(folder, name).stat().st_size for name in writers}
        facts = {"entries": entries, "of": f"{MODEL.name}, fine-tuned" if real else "drawn numbers"}
        facts |= {
            name: {"bytes": size, "bits_an_entry": round(8 * size / entries, 3)} | errors.get(name, {})
            for name, size in sizes.items()
        }
        yield replace(written, facts=facts)
        readers = {
            name: lambda name=name: {n: t.clone() for n, t in load_file(Path(folder, name)).items()} for name in plain
        }
        readers |= {name: lambda name=name: load_importance(Path(folder, name)) for name in forms}
        yield race("read", readers, against="8 bits", rounds=rounds or 3)


def _errors(found: dict, fisher: dict, delta: dict) -> dict[str, float]:
    from methods.tools.importance import decode

    off, size = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    for name, codes in found.items():
        wanted, moved = fisher[name].double(), delta[name].double()
        difference = decode(codes.codes, low=codes.low, step=codes.step).double() - wanted
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
    import torch

    draw = torch.Generator().manual_seed(0)
    fisher = {
        f"layer{i}": torch.randn(entries // 4, generator=draw).mul(3).add(2 * torch.randn(1, generator=draw)).exp2()
        for i in range(4)
    }
    return fisher, {name: torch.randn(values.shape, generator=draw) for name, values in fisher.items()}


def _of_the_study() -> tuple[dict, dict]:
    import torch

    from experiments.model import tuned, weights
    from experiments.model.base import load_tensors
    from experiments.stages.prepare import encoded_text
    from methods.ewc import EWC

    model = weights.load_model(MODEL, dtype=torch.float32, device="cpu")
    general = encoded_text(TEXT, weights.load_tokenizer(MODEL), 128)
    part = EWC(samples=16, length=128, bits=32)
    fisher = part.prepare(model=model, base={}, general=general, seed=0, fit=None, progress=None).importance
    base, (found, _) = load_tensors(MODEL), tuned.tensors(CELL, folder=MODEL)
    return fisher, {name: found[name].float() - base[name].float() for name in fisher}
