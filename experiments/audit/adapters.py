"""A peft adapter as an ordinary model: its config is read and checked, and peft merges it into its base."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict

from experiments.model import weights
from experiments.model.shape import Shape
from experiments.study.failures import out_of_memory
from methods.errors import UserError, shortened
from methods.tools import model_folder
from methods.tools.architecture import base_name
from methods.tools.files import need_room

if TYPE_CHECKING:
    from experiments.audit.models import Model

VERSION = 1  # raised when the same adapter and base would give other weights
WEIGHTS = "adapter_model.safetensors"
_SHOWN = ("peft_type", "r", "lora_alpha", "use_dora", "use_rslora")


def read_config(folder: Path, given: str) -> dict[str, Any]:
    """The content of adapter_config.json; UserError for an adapter that is no language model's, or is pickled."""
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{given}: {file.name} is no adapter's config ({shortened(error)}): save the adapter again"
        ) from error
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        raise UserError(f"{given} is an adapter for {task}, and an audit is of causal language models")
    if not (folder / WEIGHTS).is_file():
        why = "its adapter_model.bin can run code and is not read: save the adapter again, with safetensors"
        raise UserError(
            f"{given} is a {kind} adapter without {WEIGHTS}"
            + (f"; {why}" if (folder / "adapter_model.bin").is_file() else ": fetch the folder again, whole")
        )
    return config


def described(config: Mapping[str, Any]) -> str:
    """An adapter in a few words: "LORA, r 8, lora_alpha 16"."""
    shown = [f"{key} {config[key]}" for key in _SHOWN[1:] if config.get(key) not in (None, False)]
    return ", ".join([str(config["peft_type"]), *shown])


def embedding_rows(folder: Path, base: "Model") -> int | None:
    """The tokens of the embedding or head that the adapter brings along, or of whose tokens it trains some."""
    names = _embedding_names(base)
    trained = read_config(folder, str(folder)).get("trainable_token_indices") or []
    listed = [index for own in trained.values() for index in own] if isinstance(trained, dict) else trained
    rows = [
        shape[0]
        for name, (_, shape) in model_folder.headers([folder / WEIGHTS], str(folder)).items()
        if _plain(name) in names and "lora_" not in name
    ]
    if listed and max(listed) >= base.rows:
        rows.append(max(listed) + 1)
    return max(rows, default=None)


def refuse_other_shapes(folder: Path, given: str, base: "Model") -> None:
    """Raise UserError where LoRA's factors do not fit the base's matrices, before anything is loaded."""
    shapes = {name: list(p.shape) for name, p in Shape(config=base.config).build().named_parameters()}
    headers = model_folder.headers([folder / WEIGHTS], given)
    for name, (_, shape) in headers.items():
        if not name.endswith(".lora_A.weight"):
            continue
        of = _plain(name.replace(".lora_A.weight", ".weight"))
        b = headers.get(name.replace(".lora_A.", ".lora_B."), ("", [None]))[1]
        if of not in shapes:
            raise UserError(f"{given} is an adapter of another model: {base.given} has no {of}, which it adapts")
        if sorted(shapes[of]) != sorted([b[0], shape[1]]):
            raise UserError(
                f"{given} is an adapter of another model: its update of {of} is {[b[0], shape[1]]}, and that of "
                f"{base.given} is {shapes[of]}"
            )


@torch.no_grad()
def merge(adapter: Path, *, base: Path, tokenizer, out: Path, given: str, rows: int | None) -> None:
    """Write the base with the adapter merged in to the folder `out`.

    peft adds the update in float32 (float64 for a float64 base) on the CPU; each tensor is then rounded once to the
    base's dtype. `rows` is the number of tokens of an embedding that the adapter brings. Raises UserError for an
    adapter that does not fit, that cannot be merged, or for lack of room.
    """
    model = weights.load_model(base, dtype="auto")
    dtype = model.dtype
    need_room(out.parent, sum(p.numel() * p.element_size() for p in model.parameters()), f"{given}, merged")
    model = model.to(torch.promote_types(dtype, torch.float32))
    if rows and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
            missing = [str(one.message) for one in said if "missing adapter keys" in str(one.message).lower()]
        count, made = len(model_folder.headers([adapter / WEIGHTS], given)), len(get_peft_model_state_dict(adapted))
        if missing or count != made:
            raise UserError(
                f"{given} is an adapter of another model: it has {count} tensors, and adapting the base as its "
                f"adapter_config.json says makes {made}"
            )
        before = _logits(adapted.eval())
        merged = adapted.merge_and_unload(safe_merge=True)
        if not torch.allclose(_logits(merged), before, rtol=1e-2, atol=1e-2):
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
    merged = merged.to(dtype)
    model_folder.refuse_not_finite(dict(merged.named_parameters()), f"{given}, merged", then="save the adapter again")
    with weights.quiet():
        weights.save(merged, tokenizer, out)


def _logits(model: torch.nn.Module) -> torch.Tensor:
    """What a model predicts of a few tokens."""
    return model(torch.arange(1, 13)[None]).logits


def _embedding_names(base: "Model") -> set[str]:
    model = Shape(config=base.config).build()
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {f"{name}.weight" for name, module in model.named_modules() if any(module is layer for layer in layers)}


def _plain(name: str) -> str:
    """A tensor's name in the base, from its name in an adapter's file."""
    return base_name(name).replace(".modules_to_save.", ".").replace(".base_layer.", ".")
