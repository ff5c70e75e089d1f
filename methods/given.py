"""A checkpoint made elsewhere, put on the track: nothing is trained, everything is evaluated, its cost is unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from methods.errors import UserError
from methods.part import Part, register, setting
from methods.tools import model_folder


@register(
    title="Given checkpoint",
    paper="",
    line="Evaluate weights made elsewhere from the same base; their cost is unknown.",
    phase="merge",
    capabilities=frozenset({"provides_weights"}),
)
@dataclass(frozen=True, kw_only=True)
class Given(Part):
    neutral = "none: nothing is trained"
    frozen = "its weights are made elsewhere"
    trial = {"path": "{checkpoint}"}

    path: str = setting(
        "", path=True, help="folder with the checkpoint's safetensors; a relative one starts at the project's root"
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.path:
            raise UserError("given.path is missing: name the folder of the checkpoint to evaluate")

    def look(self, *, shapes):
        fits(self.path, shapes)

    def begin(self, *, run, state, examples, general=()):
        fits(self.path, {})  # a wrong path is said before anything else is done

    def finish(self, *, run, state, final, measure=None):
        return load(self.path, run.base)

    def report(self, *, run, state):
        return {"path": self.path}


def load(path: str, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The folder's tensors by base parameter name, float32 (float64 where they are). Raises UserError where they do not fit.

    Every tensor of the base must be there with its shape, and no other; a tied head saved beside its embedding and the
    attention buffers of older files are passed over. No value may be NaN or infinite.
    """
    shapes = {name: list(tensor.shape) for name, tensor in base.items()}
    fits(path, shapes)
    found: dict[str, torch.Tensor] = {}
    for file in files(path):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    if set(shapes) - set(found):
        found = _by_its_own_names(path)
    extra = [
        n for n in found if n not in base and not n.endswith(model_folder.BUFFERS) and not _tied_copy(n, found, base)
    ]
    _refuse(path, "has what the base has not:", extra)
    model_folder.refuse_not_finite(
        {name: found[name] for name in base}, f"given.path: {path}", then="fetch it again, or give another checkpoint"
    )
    return {name: found[name] if found[name].dtype == torch.float64 else found[name].float() for name in base}


def fits(path: str, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises UserError for a folder that is no checkpoint, or not one of a base with tensors of these shapes. No tensor is read."""
    found = model_folder.headers(files(path), f"given.path: {path}")
    model_folder.refuse_codes(found, f"given.path: {path}")
    missing = [name for name in shapes if name not in found]
    if (
        missing
        and (own := _shapes_by_its_own_names(path))
        and all(own.get(name) == list(shape) for name, shape in shapes.items())
    ):
        return  # as transformers reads it
    _refuse(path, "lacks", missing)
    for name, shape in shapes.items():
        if found[name][1] != list(shape):
            raise UserError(
                f"given.path: {name} in {path} has shape {found[name][1]}, the base's is {list(shape)}: "
                "it is not a checkpoint of this base model"
            )


def _shapes_by_its_own_names(path: str) -> dict[str, list[int]] | None:
    """Shapes by parameter name of the model that the folder's config describes, whose tensors other versions of transformers named otherwise."""
    if not (Path(path) / "config.json").is_file():
        return None
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _by_its_own_names(path: str) -> dict[str, torch.Tensor]:
    """The folder's tensors, renamed and put together as transformers does it. Raises UserError where that leaves any out."""
    model, about = AutoModelForCausalLM.from_pretrained(
        path,
        dtype="auto",
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    _refuse(path, "lacks", sorted(about["missing_keys"]))
    _refuse(path, "has what the base has not:", sorted(about["unexpected_keys"]))
    return model.state_dict()


def _refuse(path: str, kind: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(
            f"given.path: {path} {kind} {sorted(names)[0]}{more}: it is not a checkpoint of this base model"
        )


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
    raise UserError(
        f"given.path: {path} has no model.safetensors; nothing else is read, for .bin files can run code: "
        "load it where it was made and save it with safe_serialization"
    )


def _tied_copy(name: str, found: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> bool:
    """Whether an extra tensor only repeats one of the base's, as a tied head saved in full does."""
    return any(
        other in base and other != name and tensor.shape == found[name].shape and torch.equal(tensor, found[name])
        for other, tensor in found.items()
    )
