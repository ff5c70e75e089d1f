"""A cell's tuned weights on the disk: what rebuilds them bit for bit from the base, and nothing that the base has.

    adapter/            in peft's layout; enough where base + merged adapter are the weights, else kept beside
    delta.safetensors   the difference from the base (experiments/model/delta.py)
    weights.json        which of the two it is, and hashes: of the tuned weights, the base's and the base's other files

Config and tokenizer are the base's. Rebuilt weights are compared with their hash before they are used.
"""

import functools
import hashlib
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from experiments.model import delta, weights
from experiments.model.base import Lazy, load_tensors
from experiments.model.shape import Shape
from experiments.training import memory
from experiments.training.log import TrainingFailed
from methods.errors import UserError
from methods.part import Part, overrides
from methods.tools import model_folder
from methods.tools.adapter import merged, read_adapter, saved_entries
from methods.tools.effective import adapter_names
from methods.tools.files import need_room, read_json, sha256, write_json

VERSION = 1
BITS = 4.0  # bits for the difference of a weight trained in bf16 that moved by 1 %: the estimate before it is known


def keep(out: Path, *, folder: Path, base: Mapping[str, Tensor], final: Mapping[str, Tensor]) -> str:
    """Keep `final`, rounded once to each base tensor's dtype, in the folder `out`; returns the hash of the weights.

    out      may contain the adapter/ that a part has saved
    folder   the folder of the base model; `base` are its tensors, which take the place of those that `final` lacks
    Raises UserError for a tensor that the base lacks or has in another shape, and TrainingFailed for a value that is
    not finite.
    """
    if unknown := sorted(set(final) - set(base)):
        raise UserError(f"{unknown[0]} is no tensor of the base model: it cannot be kept beside it")
    out.mkdir(parents=True, exist_ok=True)
    info, tuned = read_json(folder / "base.json", "sha256"), rounded(base, final)
    remedy = "lower train.learning_rate or a part's strength"
    model_folder.refuse_not_finite(tuned, "the weights after the last step", then=remedy, kind=TrainingFailed)
    adapted = (out / "adapter").is_dir() and _equal(_merged(base, out / "adapter"), tuned)
    if adapted:
        digest = delta.sha256_of(tuned)
    else:
        digest = delta.write(out / "delta.safetensors", base=base, tuned=tuned, base_sha256=info["sha256"])
    hashes = {"weights_sha256": digest, "base_sha256": info["sha256"], "base_files_sha256": files_sha256(folder)}
    write_json(out / "weights.json", {"version": VERSION, "kind": "adapter" if adapted else "delta"} | hashes)
    return digest


def kept_bytes(out: Path) -> int:
    """Bytes of all files that are kept."""
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def expected_bytes(*, shape: Shape, parts: Sequence[Part], checkpoint: torch.dtype) -> int:
    """Bytes that a cell will keep: its adapter's tensors, or the difference of every trained weight, or both.

    Both where a part beside the adapter's changes the finished weights, which the adapter alone does not give then.
    A weight in bf16 takes `BITS` bits where it changed by 1 % (1 bit for 0.1 %, 7.3 for 10 %), and one more for each
    further bit of mantissa.
    """
    trained, adapted = _trained(shape, memory.adapting(parts))
    bits = 64 if checkpoint == torch.float64 else BITS - 7 - math.log2(torch.finfo(checkpoint).eps)
    adapter = trained * (8 if checkpoint == torch.float64 else 4) if adapted else 0
    if adapted and all("adapts" in part.capabilities for part in parts if overrides(part, "finish")):
        return adapter
    return adapter + int((adapted or trained) * bits / 8)


@functools.cache
def _trained(shape: Shape, adapting: tuple[Part, ...]) -> tuple[int, int]:
    """Entries that are trained and 0, or, where adapters alone are trained, theirs and those of the matrices below."""
    model = shape.build(parts=adapting)
    parameters, adapters = dict(model.named_parameters()), adapter_names(model)
    trained = {name: p.numel() for name, p in parameters.items() if p.requires_grad}
    if not adapters or not trained.keys() <= adapters:
        return sum(trained.values()), 0
    return saved_entries(model), sum(p.numel() for name, p in parameters.items() if ".base_layer." in name)


def load(
    out: Path, *, folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, str]:
    """The tuned model in `dtype`, in evaluation mode, and the hash of its weights; memory holds two further tensors.

    Raises UserError where the files do not fit the base in `folder`, or are damaged.
    """
    kept, digest = tensors(out, folder=folder)
    model = weights.load_model(folder, dtype=dtype, device=device)
    state = model.state_dict()
    if unknown := sorted(set(kept) - set(state)):
        raise UserError(f"{folder}: {unknown[0]} is no tensor of the model that its config describes")
    fill(model, delta.verified(kept, sha256=digest, what=out))
    return model, digest


@torch.no_grad()
def fill(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors, such as those of `rounded`, into a model by name.

    What is equal bit for bit is not written: a model on the CPU is mapped from its files, and whatever is written to
    it takes memory of its own.
    """
    state = model.state_dict()
    for name, tensor in tensors:
        own = state[name]
        if own.dtype != tensor.dtype or own.device != tensor.device or not delta.same(own, tensor):
            own.copy_(tensor)


def loaded(
    folder: Path, *, base: Mapping[str, Tensor], final: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The base of `folder` with the weights `final`, rounded as they are kept, to compute in `dtype`."""
    model = weights.load_model(folder, dtype=dtype, device=device)
    fill(model, rounded(base, final).items())
    return model


def write_folder(out: Path, *, folder: Path, target: Path) -> str:
    """Write the tuned model as an ordinary Hugging Face folder; returns the hash of its weights.

    Its files are divided like the base's, and written tensor by tensor. `target` appears when what was written has been
    read again and has the hash of the weights. Raises UserError like `load`, and for lack of room.
    """
    kept, digest = tensors(out, folder=folder)
    needed = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    need_room(target.parent.resolve(), needed, str(target))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as fresh:
        made = Path(fresh) / target.name
        made.mkdir()
        for file in model_folder.weight_files(folder):
            write_like(file, kept, made / file.name)
        for path in [*other_files(folder), *folder.glob("*.index.json")]:
            shutil.copyfile(path, made / path.name)
        for _ in delta.verified(load_tensors(made), sha256=digest, what=out):
            pass
        made.replace(target)
    return digest


def write_like(file: Path, tensors: Mapping[str, Tensor], target: Path) -> None:
    """Write a safetensors file with the header of `file`, and `tensors` in the place of its own: one at a time."""
    with file.open("rb") as source, target.open("wb") as made:
        size = source.read(8)
        text = source.read(struct.unpack("<Q", size)[0])
        made.write(size + text)
        header = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
            made.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())


def weights_sha256(out: Path) -> str:
    """The hash of the weights that the folder `out` stands for."""
    return _about(out)["weights_sha256"]


def tensors(out: Path, *, folder: Path) -> tuple[Lazy, str]:
    """The tuned tensors by name, each rebuilt when it is read, and their hash, which the caller has to compare."""
    about, info = _about(out), read_json(folder / "base.json", "sha256")
    for key, own in (("base_sha256", info["sha256"]), ("base_files_sha256", files_sha256(folder))):
        if about[key] != own:
            raise UserError(
                f"{out} was made beside a base with {key} {about[key][:12]}, that of {folder} is {own[:12]}: "
                f"{_again(out)}"
            )
    base = load_tensors(folder)
    if about["kind"] == "adapter":
        return _merged(base, out / "adapter"), about["weights_sha256"]
    return delta.Delta(out / "delta.safetensors", base=base, base_sha256=info["sha256"]), about["weights_sha256"]


def factors(out: Path) -> dict[str, dict[str, Tensor]]:
    """{"a": A, "b": B} of each weight that an adapter's s·B·A alone has moved; DoRA's update is no such product."""
    if _about(out)["kind"] != "adapter":
        return {}
    return {name: found for name, found in _adapter(out / "adapter")[0].items() if "magnitude" not in found}


def _again(out: Path) -> str:
    """The command that trains the cell of a weights folder again, even where DVC takes it for finished."""
    model, domain, method, seed = out.parts[-5:-1] if len(out.parts) > 4 else ("MODEL", "DOMAIN", "METHOD", "seedN")
    return f"run `dvc repro --force --single-item train@{model}-{domain}-{method}-{seed.removeprefix('seed')}`"


def _about(out: Path) -> dict:
    again = _again(out)
    if not (out / "weights.json").is_file():
        raise UserError(f"{out} holds no weights.json: it is no cell's, or an earlier version's; {again}")
    about = read_json(out / "weights.json", "version", "kind", "weights_sha256", "base_sha256", "base_files_sha256")
    if about["version"] != VERSION:
        raise UserError(f"{out} is of version {about['version']}, this program reads {VERSION}; {again}")
    return about


def rounded(base: Mapping[str, Tensor], final: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`final`, each tensor in the base's dtype when it is read; what it lacks is the base's."""

    def round_once(name: str) -> Tensor:
        tensor = base[name]
        if name not in final:
            return tensor
        rounded_tensor = final[name].to(tensor.dtype).cpu().contiguous()
        if rounded_tensor.shape != tensor.shape:
            raise UserError(
                f"{name} is {list(rounded_tensor.shape)}, the base's is {list(tensor.shape)}: it cannot be kept with it"
            )
        return rounded_tensor

    return Lazy(base, round_once)


def _adapter(folder: Path) -> tuple[dict[str, dict[str, Tensor]], float, bool]:
    """As `read_adapter`. Raises UserError for files that are damaged."""
    try:
        return read_adapter(folder)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{folder} is damaged or no adapter ({error}): {delta.AGAIN}") from error


def _merged(base: Mapping[str, Tensor], adapter: Path) -> Lazy:
    factors_of, scale, transposed = _adapter(adapter)

    def merge(name: str) -> Tensor:
        tensor = base[name]
        if name not in factors_of:
            return tensor
        a, b = (factors_of[name][part] for part in ("a", "b"))
        shape = (a.shape[-1], len(b)) if transposed else (len(b), a.shape[-1])
        lengths = factors_of[name].get("magnitude", b[..., 0])
        odd = a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or lengths.shape != b.shape[:1]
        if tensor.ndim != 2 or shape != tensor.shape or odd:
            raise UserError(
                f"{adapter} has factors {list(b.shape)} and {list(a.shape)} for {name} of shape {list(tensor.shape)}: "
                f"{delta.AGAIN}"
            )
        return merged(tensor, **factors_of[name], scale=scale, transposed=transposed).to(tensor.dtype)

    return Lazy(base, merge, changed=factors_of.keys())


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(delta.same(one[name], other[name]) for name in one)


def other_files(folder: Path) -> list[Path]:
    """Config and tokenizer of a model's folder."""
    others = ("base.json", ".safetensors", ".index.json")
    return [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.endswith(others)]


def files_sha256(folder: Path) -> str:
    return hashlib.sha256("".join(f"{path.name} {sha256(path)}\n" for path in other_files(folder)).encode()).hexdigest()
