"""A peft adapter as an ordinary model: a folder of its base with the adapter merged in."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from experiments.model import weights
from experiments.model.shape import Shape
from methods.tools import model_folder, peft_adapter
from methods.tools.files import need_room

if TYPE_CHECKING:
    from experiments.audit.models import Model

VERSION = 1  # raised when the same adapter and base would give other weights


def embedding_rows(folder: Path, base: "Model") -> int | None:
    """The tokens of the embedding or head that the adapter brings along, or of whose tokens it trains some."""
    model = Shape(config=base.config).build()
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {f"{name}.weight" for name, module in model.named_modules() if any(module is layer for layer in layers)}
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}  # a tied head, too
    found = peft_adapter.brought(folder, str(folder), shapes)
    return max((shape[0] for name, shape in found.items() if name in names), default=None)


def refuse_other_shapes(folder: Path, given: str, base: "Model") -> None:
    """Raise UserError where LoRA's factors do not fit the base's matrices, before anything is loaded."""
    shapes = {name: list(tensor.shape) for name, tensor in Shape(config=base.config).build().state_dict().items()}
    peft_adapter.refuse_other_shapes(folder, given, shapes, base.given)


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
    merged = peft_adapter.merged(model, adapter, given).to(dtype)
    model_folder.refuse_not_finite(dict(merged.named_parameters()), f"{given}, merged", then="save the adapter again")
    with weights.quiet():
        weights.save(merged, tokenizer, out)
