"""A peft adapter's folder: its config is read and checked, and peft merges it into its base."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from methods.errors import UserError, out_of_memory, shortened
from methods.tools import model_folder
from methods.tools.architecture import base_name

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_FACTORS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
_WRAPPERS = re.compile(r"\.(modules_to_save|original_module|base_layer|token_adapter)(?=\.)")
_TOKENS = ".trainable_tokens_delta"
_SHOWN = ("r", "lora_alpha", "use_dora", "use_rslora")


def is_adapter(folder: Path | str) -> bool:
    """Whether a folder holds an adapter, and no whole model beside it."""
    whole = ("model.safetensors", "model.safetensors.index.json")
    return (Path(folder) / CONFIG).is_file() and not any((Path(folder) / name).is_file() for name in whole)


def read_config(folder: Path, given: str) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises UserError for an adapter that is no language model's, cannot be merged, or is pickled.
    """
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, base = str(config["peft_type"]), config.get("base_model_name_or_path")
        if not isinstance(base, str | None):
            raise TypeError(f"base_model_name_or_path is {base!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{given}: {CONFIG} is no adapter's config ({shortened(error)}): save the adapter again"
        ) from error
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{given} is an adapter for {task}, and only those of causal language models are read: give one that was "
            "made with the task type CAUSAL_LM"
        )
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(kind), "merge_and_unload"):
        raise UserError(
            f"{given} is a {kind} adapter, which peft cannot merge into a model's weights: give an adapter of another "
            "kind, such as LORA"
        )
    if not (folder / WEIGHTS).is_file():
        why = "its adapter_model.bin can run code and is not read: save the adapter again, with safetensors"
        raise UserError(
            f"{given} is a {kind} adapter without {WEIGHTS}"
            + (f"; {why}" if (folder / "adapter_model.bin").is_file() else ": fetch the folder again, whole")
        )
    return config


def described(config: Mapping[str, Any]) -> str:
    """An adapter in a few words: "LORA, r 8, lora_alpha 16"."""
    shown = [f"{key} {config[key]}" for key in _SHOWN if config.get(key) not in (None, False)]
    return ", ".join([str(config["peft_type"]), *shown])


def base_of(folder: Path) -> str | None:
    """The name of an adapter's base, if its config gives one."""
    named = read_config(folder, str(folder)).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def alike(one: str, other: str) -> bool:
    """Whether two names of models may be of the same: a copy has another owner or folder, and the same last part."""
    last = [re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower() for name in (one, other)]
    return last[0] == last[1]


def brought(folder: Path, given: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Shapes of the tensors that an adapter puts in place of the base's, by their names there.

    An embedding of which some tokens are trained counts with all rows that these tokens need.

    shapes   of the base's tensors by name. What else LoRA's adapters bring is named, too; the tensors of other kinds of
             adapters that have no name in the base are their own
    """
    config, found = read_config(folder, given), {}
    trained = _indices(config.get("trainable_token_indices"))
    for name, (_, shape) in model_folder.headers([folder / WEIGHTS], given).items():
        plain = _plain(name)
        if name.endswith(_TOKENS) and plain in shapes:
            rows, *others = shapes[plain]
            found[plain] = [max([rows, *(index + 1 for index in trained)]), *others]
        elif "lora_" not in name and (plain in shapes or config["peft_type"] == "LORA"):
            found.setdefault(plain, shape)
    return found


def refuse_other_shapes(folder: Path, given: str, shapes: Mapping[str, Sequence[int]], base: str) -> None:
    """Raise UserError where LoRA's factors do not fit the base's matrices, before anything is loaded.

    shapes   of the base's tensors by name
    base     what a message calls the base
    """
    headers = model_folder.headers([folder / WEIGHTS], given)
    targets = read_config(folder, given).get("target_parameters")
    fitting = {**shapes, **brought(folder, given, shapes)}
    for name, (_, shape) in headers.items():
        a = next((end for end in _FACTORS if name.endswith(end)), None)
        if a is None:
            continue
        of = _plain(name.removesuffix(a) + ".weight")
        if (other := name.removesuffix(a) + _FACTORS[a]) not in headers:
            raise UserError(f"{given} lacks {other}: fetch the folder again, whole")
        update = [*headers[other][1][:1], *shape[1:2]]
        if of not in fitting and targets:
            continue  # a matrix that is no layer of its own, as those of experts: peft knows its name
        if of not in fitting:
            raise UserError(f"{given} is an adapter of another model: {base} has no {of}, which it adapts")
        if sorted(fitting[of]) != sorted(update):
            raise UserError(
                f"{given} is an adapter of another model: its update of {of} is {update}, and that of {base} is "
                f"{list(fitting[of])}"
            )


@torch.no_grad()
def merged(model: nn.Module, folder: Path, given: str) -> nn.Module:
    """A model with the adapter merged in by peft, in the model's dtype; the model itself is used up.

    Raises UserError for an adapter that does not fit, or that cannot be merged.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    inside = model.state_dict().keys()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what its warnings tell is checked below
            adapted = PeftModel.from_pretrained(
                model, folder, config=PeftConfig.from_pretrained(folder), autocast_adapter_dtype=False
            )
            # otherwise peft may ask the hub for the base that the config names
            made = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
            there = model_folder.headers([folder / WEIGHTS], given).keys()
            strange = {name for name in there - made if _plain(name) not in inside}
            if wrong := sorted(made - there) or sorted(strange):
                raise UserError(
                    f"{given} is an adapter of another model: adapting the base as its {CONFIG} says makes {len(made)} "
                    f"tensors, and it has {len(there)}; {wrong[0]} is only in one of the two"
                )
            before = _logits(adapted.eval())
            model = adapted.merge_and_unload(safe_merge=True)
        if not torch.allclose(_logits(model), before, rtol=1e-2, atol=1e-2):
            raise UserError(
                f"{given} cannot be merged into its base: the merged model predicts something else than the base with "
                "the adapter beside it, as where the embedding is adapted and is also the head; save the merged model "
                "where it was made, with tie_word_embeddings=False"
            )
    except UserError:
        raise
    except Exception as error:  # the adapter's config and tensors decide how peft fails
        if out_of_memory(error):
            raise
        raise UserError(f"{given} cannot be merged into its base by peft: {shortened(error)}") from error
    return model


def _logits(model: nn.Module) -> torch.Tensor:
    """What a model predicts of a few tokens."""
    return model(torch.arange(1, 13)[None]).logits


def _indices(value: Any) -> list[int]:
    """All numbers in lists and dicts of them."""
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, int) else [index for one in inside for index in _indices(one)]


def _plain(name: str) -> str:
    """A tensor's name in the base, from its name in an adapter's file."""
    return _WRAPPERS.sub("", base_name(name)).replace(_TOKENS, ".weight")
