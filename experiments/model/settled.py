"""A settled model: another model and a committed adapter, merged to the same bits on every machine.

    results/settled/NAME/adapter.safetensors   factors A (rank × in) and B (out × rank) of each weight, and s
    W' = W + s·B·A                             ranks added one after the other in float64, then rounded to W's dtype

`python -m experiments settle` makes the adapter, and only the stage `model` merges it. Another processor would train
other bits, and every cell would be trained again; merging gives the same ones everywhere.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiments.model import delta, tuned
from experiments.model.base import Lazy, load_tensors
from methods.errors import UserError
from methods.tools import model_folder
from methods.tools.adapter import merged
from methods.tools.files import need_room, read_json, sha256, write_json, writing

MOST_BYTES = 10_000_000  # of an adapter, which is committed to git
FORMAT = "holdfast-settled-1"


def refuse_size(size: int) -> None:
    """Raise UserError for an adapter of more than `MOST_BYTES`."""
    if size > MOST_BYTES:
        raise UserError(
            f"the adapter has {size / 1e6:.1f} MB, and {MOST_BYTES / 1e6:.0f} MB may be committed: lower "
            "settle.lora.rank"
        )


def save_adapter(
    path: Path, *, updates: Mapping[str, Mapping[str, Tensor]], scale: float, transposed: bool, base_sha256: str
) -> str:
    """Write an adapter's factors in bf16; returns the sha256 of the file.

    updates      {base name of a weight: {"a": A, "b": B}}
    transposed   the model stores its weights in × out
    base_sha256  of the weights that the adapter belongs to

    Raises UserError for more than `MOST_BYTES`.
    """
    tensors = {
        f"{name}.{part}": factor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, update in updates.items()
        for part, factor in update.items()
    }
    refuse_size(sum(tensor.nbytes for tensor in tensors.values()))
    about = {"format": FORMAT, "scale": scale, "transposed": transposed, "base_sha256": base_sha256}
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):  # one entry of metadata, for safetensors writes several in an order of its own
        save_file(tensors, path, metadata={"holdfast": json.dumps(about, sort_keys=True)})
    path.chmod(0o644)
    return sha256(path)


def starts(adapter: Path) -> dict[str, Tensor]:
    """The factors of an adapter by the names that they have in training, from which it can be trained on."""
    factors, _ = _read(adapter)
    names = {"a": "lora_A.default.weight", "b": "lora_B.default.weight"}
    return {
        f"base_model.model.{name.removesuffix('weight')}{names[part]}": tensor.float()
        for name, update in factors.items()
        for part, tensor in update.items()
    }


def candidate(folder: Path, adapter: Path) -> Mapping[str, Tensor]:
    """The tensors of the model in `folder` with the adapter merged into them, each made when it is read.

    Raises UserError for an adapter that is missing, damaged, or of another model.
    """
    factors, about = _read(adapter)
    base, own = load_tensors(folder), read_json(folder / "base.json", "sha256")["sha256"]
    if about["base_sha256"] != own:
        raise UserError(
            f"{adapter} belongs to the weights {about['base_sha256'][:12]}, and those of {folder} are {own[:12]}: "
            f"{_again(adapter)}"
        )

    def merge(name: str) -> Tensor:
        weight = base[name]
        if name not in factors:
            return weight
        return merged(weight.double(), **factors[name], scale=about["scale"], transposed=about["transposed"]).to(
            weight.dtype
        )

    return Lazy(base, merge)


def _read(adapter: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """{base name of a weight: {"a": A, "b": B}}, and the metadata. Raises UserError for a missing or damaged file."""
    try:
        file = safe_open(adapter, framework="pt")
        about = json.loads((file.metadata() or {})["holdfast"])
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}")
        named = {name.rpartition(".")[0] for name in file.keys()}  # noqa: SIM118 (no mapping)
        factors = {name: {part: file.get_tensor(f"{name}.{part}") for part in ("a", "b")} for name in named}
    except FileNotFoundError:
        raise UserError(f"{adapter} is missing: {_again(adapter)}") from None
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{adapter} is damaged or no adapter of a settled model ({error}): {_again(adapter)}"
        ) from error
    return factors, about


def write(out: Path, *, folder: Path, adapter: Path, stated: Any) -> dict[str, Any]:
    """Write the settled model to the empty folder `out`; returns the content of its base.json.

    folder   the model that it is made of, whose config and tokenizer it has
    stated   the block `settle:`, whose hashes must be those of the adapter and of the merged tensors

    Raises UserError where they are not, and for lack of room.
    """
    _refuse_other(adapter, stated.adapter_sha256)
    tensors, about = candidate(folder, adapter), read_json(folder / "base.json", "sha256")
    need_room(out.parent, sum(path.stat().st_size for path in folder.iterdir()), "the settled weights")
    whole = {name: tensors[name] for name in tensors}
    model_folder.refuse_not_finite(whole, f"{adapter}: the merged weights", then=_again(adapter))
    digest = delta.sha256_of(whole)
    if digest != str(stated.sha256).lower():
        raise UserError(
            f"the merged weights have the sha256 {digest}, and settle.sha256 is {stated.sha256 or 'missing'}: write "
            f"this one if {adapter.parent.name} was just settled; otherwise restore params.yaml and {adapter} with git"
        )
    with writing(out / "model.safetensors"):
        save_file(whole, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    for path in tuned.other_files(folder):
        shutil.copyfile(path, out / path.name)
    settled = {"from": getattr(stated, "from"), "from_sha256": about["sha256"], "adapter_sha256": sha256(adapter)}
    base = about | {"sha256": digest, "settled": settled}
    write_json(out / "base.json", base)
    return base


def _refuse_other(adapter: Path, stated: str | None) -> None:
    """Refuse an adapter that is missing, or another one than params.yaml states."""
    if not adapter.is_file():
        raise UserError(f"{adapter} is missing: {_again(adapter)}")
    if (own := sha256(adapter)) != str(stated).lower():
        raise UserError(
            f"{adapter} has the sha256 {own}, and settle.adapter_sha256 is {stated or 'missing'}: write this one if "
            f"{adapter.parent.name} was just settled; otherwise {_again(adapter)}"
        )


def _again(adapter: Path) -> str:
    return f"restore it with git, or run `python -m experiments settle {adapter.parent.name}`"
