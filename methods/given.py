"""A checkpoint made elsewhere, put on the track: nothing is trained, everything is evaluated, its cost is unknown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from experiments import model_folder
from experiments.errors import UserError
from methods.part import Part, register, setting

@register(
    title="Given checkpoint",
    paper="",
    line="Evaluate weights made elsewhere from the same base; their cost is unknown.",
    capabilities=frozenset({"provides_weights"}),
)
@dataclass(frozen=True, kw_only=True)
class Given(Part):
    path: str = setting("", help="folder with the checkpoint's safetensors; a relative one starts at the project's root")

    def __post_init__(self):
        super().__post_init__()
        if not self.path:
            raise UserError("given.path is missing: name the folder of the checkpoint to evaluate")

    def begin(self, *, run, state, examples):
        files(self.path)  # a wrong path is said before anything else is done

    def finish(self, *, run, state, final):
        return load(self.path, run.base)

    def report(self, *, run, state):
        return {"path": self.path}


def load(path: str, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The folder's tensors by base parameter name, float32 (float64 where they are). Raises UserError where they do not fit.

    Every tensor of the base must be there with its shape, and no other; a tied head saved beside its embedding and the
    attention buffers of older files are passed over. No value may be NaN or infinite.
    """
    found: dict[str, torch.Tensor] = {}
    for file in files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise UserError(f"given.path: {file} is no safetensors file that can be read ({error}): fetch it again") from error
    extra = [n for n in found if n not in base and not n.endswith(model_folder.BUFFERS) and not _tied_copy(n, found, base)]
    missing = [name for name in base if name not in found]
    for kind, names in (("lacks", missing), ("has what the base has not:", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"given.path: {path} {kind} {sorted(names)[0]}{more}: it is not a checkpoint of this base model")
    for name, tensor in base.items():
        if found[name].shape != tensor.shape:
            raise UserError(f"given.path: {name} in {path} has shape {list(found[name].shape)}, the base's is {list(tensor.shape)}: "
                            "it is not a checkpoint of this base model")  # fmt: skip
    model_folder.refuse_not_finite({name: found[name] for name in base}, f"given.path: {path}", then="fetch it again, or give another checkpoint")
    return {name: found[name] if found[name].dtype == torch.float64 else found[name].float() for name in base}


def files(path: str) -> list[Path]:
    """The safetensors of a checkpoint folder, whole or sharded. Raises UserError where there are none."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"given.path is {path!r}: no such folder; give a Hugging Face folder with model.safetensors")
    index = folder / "model.safetensors.index.json"
    if (folder / "config.json").is_file():
        model_folder.refuse_quantised(folder, f"given.path: {path}")
    if index.is_file():
        names = model_folder.shards(index, f"given.path: {path}")
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"given.path: {path} lacks {absent[0]}, which its index names")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"given.path: {path} is an adapter; merge it into its base and save that")
    raise UserError(f"given.path: {path} has no model.safetensors; nothing else is read, for .bin files can run code: "
                    "load it where it was made and save it with safe_serialization")  # fmt: skip


def _tied_copy(name: str, found: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> bool:
    """Whether an extra tensor only repeats one of the base's, as a tied head saved in full does."""
    return any(other in base and other != name and tensor.shape == found[name].shape and torch.equal(tensor, found[name])
               for other, tensor in found.items())  # fmt: skip
