"""Checks of a model folder in Hugging Face layout: of its config, of its files and of what was loaded."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers  # whose classes are imported where they are first used: that takes seconds
from safetensors import SafetensorError, safe_open
from torch import Tensor

from methods.errors import UserError, shortened

_CLOSER = (
    "choose a causal language model that transformers has (config.json with its model_type, model.safetensors, "
    "tokenizer.json)"
)

# buffers that older versions of transformers saved among the weights
BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
    ".embed_positions",
)


def config_of(folder: Path, name: str) -> "transformers.PreTrainedConfig":
    """transformers' config of the folder. Raises UserError naming `name` unless it is a causal language model.

    An adapter, quantised weights, an encoder-decoder and an architecture that transformers does not have are refused.
    """
    config = _json(folder / "config.json", name)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{name} {_adapter(folder)}, so it is not clear which of the two is meant: remove adapter_config.json to "
            "take the model as it is, or save the merged model"
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        if "auto_map" in config:
            raise UserError(
                f"{name} needs code of its own (auto_map in config.json), which is never run: choose a model of an "
                "architecture that transformers has"
            )
        raise UserError(
            f"{name}: config.json names the model_type {kind!r}, which transformers {transformers.__version__} "
            f"does not have: {_CLOSER}"
        )
    refuse_quantised(folder, name)
    if config.get("is_encoder_decoder"):
        raise UserError(f"{name} is an encoder and decoder ({kind}), no causal language model: {_CLOSER}")
    if kind not in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{name}: {kind} has no causal language model in transformers {transformers.__version__}: {_CLOSER}"
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each architecture checks its settings in its own way
        raise UserError(f"{name}: transformers cannot use its config.json ({shortened(error)})") from error


def no_config(folder: Path) -> str:
    """The message for a folder without config.json."""
    if any(folder.glob("*.gguf")):
        return f"{folder} holds a GGUF file and no config.json: give the folder in Hugging Face layout it was made from"
    return elsewhere(folder) or f"{folder} is not a model folder (no config.json): give a folder in Hugging Face layout"


def elsewhere(folder: Path) -> str | None:
    """Where the model is that a folder was given for, if it is inside it or has to be written first."""
    if (folder / "weights.json").is_file() and (folder / "delta.safetensors").is_file():
        return f"{folder} holds the kept weights of a cell: write them as a model with `python -m experiments export`"
    if inside := sorted(file.parent for file in folder.glob("snapshots/*/config.json")):
        kind, at = "a folder of the hub's cache, and no model folder", inside[0]
    elif inside := [f.parent for name in ("config.json", "adapter_config.json") for f in folder.glob(f"*/{name}")]:
        kind = "not a model folder (no config.json)"
        at = max(inside, key=lambda one: ([int(number) for number in re.findall(r"\d+", one.name)], one.name))
    return f"{folder} is {kind}: give the one inside it, such as {at}" if inside else None


def refuse_quantised(folder: Path, name: str) -> None:
    """Refuse weights that are quantised according to config.json, by whatever method (bitsandbytes, GPTQ, AWQ, …)."""
    config = _json(folder / "config.json", name)
    # the second key is an older name, the third is MLX's
    keys = ("quantization_config", "compression_config", "quantization")
    for block in (config, config.get("text_config")):
        for key in keys:
            if isinstance(block, dict) and (settings := block.get(key)):
                method = settings.get("quant_method") if isinstance(settings, dict) else None
                raise UserError(
                    f"{name} is quantised ({method or 'by a method without a name'}: {key} in config.json), and its "
                    "weights cannot be trained or compared as they are: name the checkpoint it was made from, or load "
                    "it where its library is installed, call model.dequantize() and save_pretrained, and name that "
                    "folder"
                )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads of a folder: `model.safetensors`, else those of the index.

    A copy that lies beside them, such as a backup or the shards of an earlier save, is none of the model's weights. A
    folder with neither gives all files; they are no model that transformers would load.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        return [folder / file for file in shards(index, str(folder))]
    return sorted(folder.glob("*.safetensors"))


def no_weights(folder: Path, name: str) -> str:
    """The message for a folder without safetensors: what it holds instead, and what to do."""
    if any(folder.glob("*.bin")):
        return (
            f"{name} holds no safetensors. Its .bin files can run code and are not read: save the model with "
            "safetensors, or write a block under `models:` in params.yaml with `bin_sha256` and give that block's name"
        )
    if any(folder.glob("*.gguf")):
        return (
            f"{name} holds no safetensors, and a GGUF file is not read: give the folder in Hugging Face layout that it "
            "was made from"
        )
    return f"{name} holds no safetensors: give a folder with the model's weights, or save or fetch it again"


def refuse_incomplete(folder: Path, name: str) -> None:
    """Refuse a folder whose index names files that are missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        absent = [file for file in shards(index, name) if not (folder / file).is_file()]
        if absent:
            raise UserError(
                f"{name} lacks {absent[0]}{f' and {len(absent) - 1} more files' if len(absent) > 1 else ''}, which its "
                "model.safetensors.index.json names: fetch the folder again, whole"
            )


def headers(files: Iterable[Path], name: str) -> dict[str, tuple[str, list[int]]]:
    """(dtype as safetensors writes it, shape) of every tensor; reads no tensor. Raises UserError for a damaged file."""
    tensors_of = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for tensor in tensors.keys():  # noqa: SIM118 (no mapping)
                    about = tensors.get_slice(tensor)
                    tensors_of[tensor] = (about.get_dtype(), about.get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{name}: {file.name} is no safetensors file, or damaged or cut off ({error}): fetch it again"
            ) from error
    return tensors_of


def refuse_codes(headers: Mapping[str, tuple[str, list[int]]], name: str) -> None:
    """Refuse weights that are no floating-point numbers of 16 bits or more: transformers would read codes as values."""
    codes = [
        tensor
        for tensor, (dtype, _) in headers.items()
        if tensor.endswith(".weight") and dtype not in ("F64", "F32", "F16", "BF16")
    ]
    if codes:
        more = f" (and {len(codes) - 1} more such)" if len(codes) > 1 else ""
        raise UserError(
            f"{name} is quantised or damaged: {codes[0]} is stored as {headers[codes[0]][0]}{more}: "
            "name the checkpoint it was made from, or save it in bfloat16, float16 or float32"
        )


def shards(index: Path, name: str) -> list[str]:
    """The files of a sharded checkpoint, as its index names them."""
    named = _json(index, name).get("weight_map")
    named = list(named.values()) if isinstance(named, dict) else []
    files = sorted(set(named)) if all(isinstance(file, str) for file in named) else []
    if not files or any(Path(file).name != file for file in files):
        raise UserError(
            f"{name}: {index.name} names no files beside it as `weight_map`: fetch the folder again, or save the model "
            "again"
        )
    return files


def refuse_partial(folder: Path, model: "transformers.PreTrainedModel", about: Mapping[str, Any]) -> None:
    """Refuse a model that transformers loads in part: with random tensors for missing ones, or with too few layers.

    about   the loading info of `from_pretrained`
    """
    if missing := sorted(about["missing_keys"]):
        raise UserError(
            f"{folder} lacks {len(missing)} of the model's tensors ({missing[0]}{', …' if missing[1:] else ''}): "
            "it is no whole causal language model"
        )
    if wrong := sorted(about["mismatched_keys"]):
        name, there, wanted = wrong[0]
        raise UserError(
            f"{folder} does not fit its config.json: {name} has shape {list(there)}, the config gives {list(wanted)}"
            f"{f' (and {len(wrong) - 1} more such)' if len(wrong) > 1 else ''}: fetch the folder again"
        )
    extra = sorted(name for name in about["unexpected_keys"] if not name.endswith(BUFFERS))
    numbered = {re.sub(r"\d+", "N", name) for name in model.state_dict()}
    if more := [name for name in extra if re.sub(r"\d+", "N", name) in numbered]:
        raise UserError(
            f"{folder} does not fit its config.json: it has {more[0]}, and the config has fewer layers: "
            "fetch the folder again"
        )
    if len(extra) > len(numbered):
        raise UserError(
            f"{folder} does not fit its config.json, which gives {extra[0]} and {len(extra) - 1} more tensors no place"
        )
    if extra:
        print(
            f"{folder} has {len(extra)} tensors that its config gives no place, and which are left out "
            f"({', '.join(extra[:3])}…)",
            flush=True,
        )


def refuse_not_finite(
    tensors: Mapping[str, Tensor], what: str, *, then: str, kind: type[UserError] = UserError
) -> None:
    """Refuse weights with a NaN or an infinity, naming tensor and count: all scores of such a model would be NaN."""
    bad = {}
    for name, tensor in tensors.items():
        # the minimum and maximum need no memory; both are NaN where a value is
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            bad[name] = f"{int((~tensor.isfinite()).sum()):,} of its {tensor.numel():,} values are NaN or infinite"
    if bad:
        more = f", and {len(bad) - 1} more tensors hold such" if len(bad) > 1 else ""
        name, count = next(iter(bad.items()))
        raise kind(f"{what}: {name} is damaged, {count}{more}: {then}")


def _json(file: Path, name: str) -> dict[str, Any]:
    if file.name == "config.json" and not file.is_file() and (file.parent / "adapter_config.json").is_file():
        raise UserError(
            f"{name} {_adapter(file.parent)}, not a model: merge it into its base (peft's merge_and_unload, then "
            "save_pretrained) and name that folder; or name its base here and give the adapter as a method, "
            "`NAME: {given: {path: FOLDER}}`; without a study, `python -m experiments audit` compares the two"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).removesuffix(
            " (decode using utf-8-sig): line 1 column 1 (char 0)"
        )
        raise UserError(
            f"{name} has no {file.name} that can be read ({reason}): fetch it again, or save it as JSON in UTF-8"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{name} has no {file.name} that can be read: it holds no JSON object")
    return content


def _adapter(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    return f"holds an adapter{f' of {base}' if base else ''} (adapter_config.json)"
