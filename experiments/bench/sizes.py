"""Models with random weights made on the device itself, methods and random tokens: for cost and checks, not scores."""

from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from experiments.model import random_models
from experiments.model.shape import Shape
from methods import registry
from methods.part import Part

Example = dict[str, torch.Tensor]

# architecture, its real sizes, and sizes of the same kind that a CPU can take
_MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gptj-6b": (
        "gptj",
        {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "vocab_size": 50400, "n_positions": 2048},
        {},
    ),
    "llama3-8b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
        },
        {"tie_word_embeddings": False},
    ),
}

# the parts of methods that are not named like their only part
METHODS: dict[str, tuple[str, ...]] = {"full": (), "hierarchical-lora": ("hierarchical", "lora")}
BLOCKS = {"gptj": "n_layer", "llama": "num_hidden_layers"}  # what each architecture calls their number


class Skipped(Exception):
    """A piece cannot be done here; the message says why."""


def build(architecture: str, *, device: torch.device, dtype: torch.dtype, **config: Any) -> PreTrainedModel:
    """A random model whose weights are drawn on `device`, and whose buffers (rotary frequencies) are computed there."""
    with device:
        return random_models.build(architecture, seed=0, dtype=dtype, **config)


def build_named(
    name: str, *, tiny: bool, device: torch.device, dtype: torch.dtype, blocks: int | None = None
) -> PreTrainedModel:
    """The model, or its first `blocks` blocks with its real width and vocabulary."""
    architecture, full, small = _MODELS[name]
    config = (small if tiny else full) | ({BLOCKS[architecture]: blocks} if blocks else {})
    return build(architecture, device=device, dtype=dtype, **config)


@cache
def shape_named(name: str, *, tiny: bool, blocks: int | None = None) -> Shape:
    meta = torch.device("meta")
    return Shape(config=build_named(name, tiny=tiny, device=meta, dtype=torch.float32, blocks=blocks).config)


def parts_of(method: str, *, documents: int | None = None) -> tuple[Part, ...]:
    """The parts of a method, or the part of that name, with default settings but for the `documents` they prepare on.

    Raises Skipped where peft is needed and not installed.
    """
    samples = {"samples": documents} if documents else {}
    block = {part: samples if part in ("ewc", "hierarchical") else {} for part in METHODS.get(method, (method,))}
    if "lora" in block:
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise Skipped(f"peft cannot be imported here: {error}") from error
    return registry.build(block)


def random_examples(count: int, length: int, *, vocabulary: int, seed: int = 0) -> list[Example]:
    """`count` examples of `length` random tokens, every one of them labelled."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (count, length), generator=draw)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]
