"""A model of its own from weights: for what is computed beside the trained model, which others may wrap or share."""

from collections.abc import Mapping

import torch
import transformers  # whose classes are imported where they are first used: that takes seconds
from torch import Tensor, nn

from methods.tools.architecture import plain


def rebuilt(model: nn.Module, weights: Mapping[str, Tensor], *, dtype: torch.dtype) -> nn.Module:
    """A new transformers model on the CPU, of the architecture of `model`, with these weights by base parameter name.

    model   may be wrapped by peft, cut into shards or without numbers: only its config is read
    """
    config = plain(model).config
    config = type(config).from_dict(config.to_dict())  # a copy, because building a model changes it
    with torch.device("meta"):
        kind = type(transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    return kind.from_pretrained(None, config=config, state_dict=dict(weights), dtype=dtype)
