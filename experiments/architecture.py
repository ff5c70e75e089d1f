"""Roles of a causal language model's modules and parameters, told by structure and not by names.

`ln_f` is a norm in GPT-J and `norm` is one in Llama: a rule that reads names gets one of them wrong
(`docs/decisions.md`). Everything here asks transformers for the role or looks at the module's shape.
"""

import torch
from torch import nn

from experiments.errors import UserError


def plain(model: nn.Module) -> nn.Module:
    """The transformers model itself, out of peft's wrapper if it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model: nn.Module) -> nn.Module:
    """The decoder without its head: token ids to the last hidden state (batch, tokens, width)."""
    inner = plain(model)
    return getattr(inner, inner.base_model_prefix)


def head(model: nn.Module) -> nn.Module:
    """The linear map from the last hidden state to logits over the vocabulary."""
    found = plain(model).get_output_embeddings()
    if not isinstance(found, nn.Linear):
        raise UserError(
            f"model {type(plain(model)).__name__} has no plain linear head "
            f"(found {type(found).__name__}): Holdfast trains causal language models with one"
        )
    return found


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks in order, each with its module path in `model`."""
    depth = plain(model).config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and _is_stack(module):
            return [(f"{name}.{i}", block) for i, block in enumerate(module)]
    raise UserError(
        f"model {type(plain(model)).__name__}: no list of {depth} equal blocks found "
        "(num_hidden_layers of its config)"
    )


def _is_stack(modules: nn.ModuleList) -> bool:
    return len({type(m) for m in modules}) == 1 and any(True for _ in modules[0].parameters())


def group_of(model: nn.Module, parameter: str) -> str:
    """The group a parameter counts in: `block.3`, `embedding`, `final_norm` or `head`.

    A tied embedding is one parameter and counts as the embedding.
    """
    for index, (path, _) in enumerate(blocks(model)):
        if parameter.startswith(path + "."):
            return f"block.{index}"
    inner = plain(model)
    owner = dict(model.named_parameters())[parameter]
    if any(owner is p for p in inner.get_input_embeddings().parameters()):
        return "embedding"
    if any(owner is p for p in inner.get_output_embeddings().parameters()):
        return "head"
    return "final_norm"


def hidden_states(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The backbone's last hidden state for a padded batch, without a cache. Shape (batch, tokens, width)."""
    return backbone(model)(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state
