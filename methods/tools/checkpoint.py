"""Weights made elsewhere from the same base: a checkpoint's folder or a peft adapter's, checked before it is read.

`where` is the setting that names the folder, for messages: "given.path".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers  # whose classes are imported where they are first used: that takes seconds
from safetensors.torch import load_file

from methods.errors import UserError
from methods.part import Run
from methods.tools import model_folder, peft_adapter
from methods.tools.rebuilt import rebuilt

EXTRA = "has tensors that the base does not have:"
AUDIT = "compare it with its base by `python -m experiments audit`, which takes such models"


def read(path: str, run: Run, *, where: str) -> dict[str, torch.Tensor]:
    """The folder's weights by base parameter name, as `load` gives them, or `merged` those of an adapter."""
    return (merged if peft_adapter.is_adapter(path) else load)(path, run, where=where)


def merged(path: str, run: Run, *, where: str) -> dict[str, torch.Tensor]:
    """The base's tensors with the folder's adapter merged in by peft, by base parameter name, at the first process.

    They are in float32 (float64 where the base is). Raises UserError like `load`, and for an adapter that peft cannot
    merge.
    """
    if not run.shards.first:
        return {}
    fits(path, _shapes(run.base), where=where)
    dtype = torch.promote_types(next(iter(run.base.values())).dtype, torch.float32)
    model = peft_adapter.merged(rebuilt(run.model, run.base, dtype=dtype), Path(path), f"{where}: {path}")
    return _whole(f"{where}: {path}", {name: p.detach() for name, p in model.named_parameters()}, run.base)


def load(path: str, run: Run, *, where: str) -> dict[str, torch.Tensor]:
    """The folder's tensors by base parameter name, in float32 (float64 ones stay float64).

    Raises UserError unless the folder has exactly the tensors of the base, with their shapes and without NaN and
    infinity. A tied head saved beside its embedding and the attention buffers of older files are ignored.
    """
    shapes = _shapes(run.base)
    fits(path, shapes, where=where)
    tensors: dict[str, torch.Tensor] = {}
    for file in files(path, where=where):
        tensors |= load_file(file)
    if set(shapes) - set(tensors):
        tensors = _loaded_by_transformers(path, where=where)
    return _whole(f"{where}: {path}", tensors, run.base)


def _whole(given: str, tensors: dict[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that the base has, in float32 or float64. Raises UserError for others, NaN and infinity."""
    extra = [
        name
        for name in tensors
        if name not in base and not name.endswith(model_folder.BUFFERS) and not _is_copy(name, tensors, base)
    ]
    _refuse(given, EXTRA, extra)
    tensors = {name: tensors[name] for name in base}
    model_folder.refuse_not_finite(tensors, given, then="fetch it again, or give another checkpoint")
    return {name: tensor if tensor.dtype == torch.float64 else tensor.float() for name, tensor in tensors.items()}


def fits(path: str, shapes: Mapping[str, Sequence[int]], *, where: str) -> None:
    """Raises UserError unless the folder is a checkpoint, or an adapter, of a base whose tensors have these shapes.

    No tensor is read.
    """
    given = f"{where}: {path}"
    if peft_adapter.is_adapter(path):
        _adapter_fits(path, shapes, given)
        return
    headers = model_folder.headers(files(path, where=where), given)
    model_folder.refuse_codes(headers, given)
    wanted = {name: list(shape) for name, shape in shapes.items()}
    missing = [name for name in wanted if name not in headers]
    if missing and wanted.items() <= _shapes_by_transformers(path).items():
        return
    _refuse(given, "lacks", missing)
    for name, shape in wanted.items():
        if headers[name][1] != shape:
            raise _other_shape(given, name, headers[name][1], shape)


def _adapter_fits(path: str, shapes: Mapping[str, Sequence[int]], given: str) -> None:
    folder = Path(path)
    peft_adapter.read_config(folder, given)
    model_folder.refuse_codes(model_folder.headers([folder / peft_adapter.WEIGHTS], given), given)
    if not shapes:
        return
    brought = peft_adapter.brought(folder, given, shapes)
    _refuse(given, EXTRA, [name for name in brought if name not in shapes])
    for name, shape in brought.items():
        if shape != list(shapes[name]):
            raise _other_shape(given, name, shape, shapes[name])
    peft_adapter.refuse_other_shapes(folder, given, shapes, "the base")


def _shapes(base: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in base.items()}


def _shapes_by_transformers(path: str) -> dict[str, list[int]]:
    """Shapes by parameter name of the model in the folder's config: other versions of transformers used other names."""
    if not (Path(path) / "config.json").is_file():
        return {}
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _loaded_by_transformers(path: str, *, where: str) -> dict[str, torch.Tensor]:
    """The folder's tensors as transformers renames and joins them. Raises UserError where it leaves any out."""
    model, about = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype="auto",
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    _refuse(f"{where}: {path}", "lacks", sorted(about["missing_keys"]))
    _refuse(f"{where}: {path}", EXTRA, sorted(about["unexpected_keys"]))
    return model.state_dict()


def _refuse(given: str, kind: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        hint = f"; if it is the head, {AUDIT}" if kind == EXTRA and not more else ""
        raise UserError(f"{given} {kind} {sorted(names)[0]}{more}: it is not a checkpoint of this base model{hint}")


def _other_shape(given: str, name: str, shape: Sequence[int], wanted: Sequence[int]) -> UserError:
    hint = f"; if its vocabulary was resized, {AUDIT}" if list(shape[1:]) == list(wanted[1:]) else ""
    return UserError(
        f"{given}: {name} has shape {list(shape)}, the base's is {list(wanted)}: it is not a checkpoint of this base "
        f"model{hint}"
    )


def files(path: str, *, where: str) -> list[Path]:
    """The safetensors of a checkpoint folder, whole or sharded. Raises UserError where there are none."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{where} is {path!r}: no such folder; give one with model.safetensors, or an adapter's")
    index = folder / "model.safetensors.index.json"
    if (folder / "config.json").is_file():
        model_folder.refuse_quantised(folder, f"{where}: {path}")
    if index.is_file():
        names = model_folder.shards(index, f"{where}: {path}")
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"{where}: {path} lacks {absent[0]}, which its index names")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if message := model_folder.elsewhere(folder):
        raise UserError(f"{where}: {message}")
    raise UserError(
        f"{where}: {path} has no model.safetensors; nothing else is read, because .bin files can run code: "
        "load the model where it was made and save it with safe_serialization"
    )


def _is_copy(name: str, tensors: dict[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> bool:
    """Whether an extra tensor equals one of the base's, as a tied head that is saved in full does."""
    return any(
        other in base and other != name and torch.equal(tensor, tensors[name]) for other, tensor in tensors.items()
    )
