"""A model's shape, from its config alone: memory, FLOPs and bytes are predicted from it before any weight exists."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from experiments.model import claims, random_models
from experiments.model.attention import with_sdpa
from methods.errors import UserError, shortened
from methods.part import Part, in_order
from methods.tools import architecture
from methods.tools.architecture import base_name

if TYPE_CHECKING:
    from experiments.study.schema import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """A model without its weights."""

    config: PreTrainedConfig

    def build(
        self, *, parts: Sequence[Part] = (), layers: int | None = None, dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """The model as `parts` adapt it, on the meta device, with all of its blocks or the first `layers` of them."""
        config = type(self.config).from_dict(self.config.to_dict())  # a copy, because building a model changes it
        if layers is not None:
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
        with torch.device("meta"):
            try:
                model: nn.Module = with_sdpa(
                    AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
                )
            except Exception as error:  # of any kind, depending on the config's sizes
                raise UserError(
                    f"transformers cannot build a {config.model_type} of its config ({shortened(error)}): "
                    "correct config.json, or `architecture:` and `config:` of the model's block"
                ) from error
            for part in in_order(parts):
                model = _adapted(model, part)
        for p in model.parameters():
            p.data = p.data.to(dtype)  # as adapters follow their base's dtype on other devices
        return model

    @functools.cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.build().parameters())

    @property
    def positions(self) -> int | None:
        """The longest text that the model takes, in tokens; None where its config names no limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)


def _adapted(model: nn.Module, part: Part) -> nn.Module:
    """The model as a part adapts it.

    Raises UserError where peft cannot adapt it, or adapts something other than a matrix, whose update is not s·B·A.
    """
    name = type(architecture.plain(model)).__name__
    try:
        model = part.adapt(model, seed=0)
    except UserError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:  # the last two: sizes beyond 64 bits
        raise UserError(f"{part.key}: {name} cannot be adapted as this block says: {shortened(error)}") from error
    for path, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        base = module.get_base_layer()
        if not _is_matrix(base):
            raise UserError(
                f"{part.key}: its adapters would adapt {base_name(path)} of {name}, a {type(base).__name__}, "
                "which is no plain linear layer: leave out the name that selects it"
            )
    return model


def _is_matrix(layer: nn.Module) -> bool:
    """Whether a layer on the meta device maps rows of its input width to rows of its output width, like a matrix."""
    if not isinstance(layer, nn.Linear | Conv1D):
        return False
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    try:
        output = layer(torch.empty(1, 2, layer.in_features, dtype=layer.weight.dtype, device="meta"))
    except Exception:  # such as a router, or several matrices in one layer
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, 2, layer.out_features)


def shape_of(name: str, block: "Model", folder: Path) -> Shape:
    """The shape of the model `name`: from its folder where that exists, else from its block, without fetching it.

    The block of a model that is not random states it under `architecture:`, transformers' config with `model_type`.
    Raises UserError where there is neither, and for a config that transformers cannot read.
    """
    if (folder / "config.json").is_file():
        return Shape(config=claims.config_of(folder, f"models.{name}: {folder}"))
    kind, _, rest = block.source.partition(":")
    if kind == "random":
        with torch.device("meta"):
            return Shape(config=random_models.build(rest, seed=0, **block.config).config)
    if kind == "path" and Path(rest).expanduser().is_dir():
        return Shape(config=claims.config_of(Path(rest).expanduser(), f"models.{name}: {rest}"))
    if "model_type" not in block.architecture:
        raise UserError(
            f"models.{name}: not fetched yet, so its size is unknown: make it with `dvc repro model@{name}`, or add to "
            "its block `architecture:` with model_type and the sizes of its config.json"
        )
    try:
        return Shape(config=AutoConfig.for_model(**block.architecture))
    except Exception as error:  # of any kind, depending on the values
        raise UserError(
            f"models.{name}.architecture: transformers cannot make a config of it: {shortened(error)}"
        ) from error
