"""SDPA attention for GPT-J, which transformers does not have, and faster attention by matrix products on the CPU.

    softmax(Q·Kᵀ/√(head width) + mask)·V

Eager attention keeps a float32 score for every pair of tokens for the backward pass; torch's fused kernels keep none,
and on a GPU they are faster too. On the CPU the fused kernel takes four to six times as long as the two matrix products
and the softmax, provided that the scores fit into the cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gptj.modeling_gptj import GPTJAttention

Model = TypeVar("Model", bound=nn.Module)

LONGEST = 512  # tokens; scores of longer texts do not fit into the cache and take much memory
BLOCK = 256  # queries of a longer text that are computed at once


def with_sdpa(model: Model) -> Model:
    """Replace eager GPT-J attention in `model` by SDPA, in place, and return the model.

    Logits equal those of eager attention up to rounding (of float32 also in a float64 model, because eager
    attention computes scores in float32). Weights, names and saved files are unchanged. As with SDPA in Llama, no
    attention weights are returned. A new model that is made from this model's `config` object, and not from a saved
    one, needs `attn_implementation="eager"` and `with_sdpa` again. Other attention is unchanged.
    """
    for module in model.modules():
        if type(module) is GPTJAttention:
            # change the class of the module instead of binding a method to it, so that copies keep the change
            module.__class__ = GPTJSdpaAttention
            # the model makes its masks for this implementation; transformers does not save it
            module.config._attn_implementation = "sdpa"
    return model


def products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention with the arguments that transformers gives to SDPA.

    Queries are (batch, heads, tokens, width); keys and values have as many heads or a divisor of them; masks are
    additive or boolean, None for causal attention. Returns (batch, tokens, heads, width).

    Scores are rounded to the model's dtype before the softmax, which is computed in float32, as in transformers' eager
    attention. Texts longer than LONGEST are computed in blocks of queries without a gradient, and by SDPA with one.
    SDPA also computes attention on a GPU, with dropout, without causality, and with a cache but no mask.
    """
    tokens, keys = query.shape[2], key.shape[2]
    long = max(tokens, keys) > LONGEST
    unknown = _only_sdpa or any(
        others.get(name) is not None for name in ("softcap", "position_bias", "cache", "is_causal", "s_aux")
    )
    alone = attention_mask is None and tokens > 1 and (tokens != keys or not getattr(module, "is_causal", True))
    if query.device.type != "cpu" or dropout or unknown or alone or (long and torch.is_grad_enabled()):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if not long:
        return _mixed(query, key, value, attention_mask).transpose(1, 2).contiguous(), None
    blocks = []
    for start in range(0, tokens, BLOCK):
        end = min(start + BLOCK, tokens)
        seen = end if attention_mask is None and tokens > 1 else keys
        mask = attention_mask
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., start:end, :]
        blocks.append(_mixed(query[:, :, start:end], key[:, :, :seen], value[:, :, :seen], mask))
    return torch.cat(blocks, 2).transpose(1, 2).contiguous(), None


def _mixed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of scaled queries, (batch, heads, tokens, width); without a mask the last query sees every key.

    Queries that share keys form one matrix, so that a group of heads takes one product.
    """
    (batch, heads, tokens, width), (groups, keys) = query.shape, key.shape[1:3]
    scores = query.reshape(batch * groups, -1, width) @ key.reshape(batch * groups, keys, width).transpose(1, 2)
    by_head = scores.view(batch, heads, tokens, keys)
    if mask is None and tokens > 1:
        later = torch.full((tokens, keys), -torch.inf, dtype=scores.dtype, device=query.device)
        by_head.add_(later.triu_(1 + keys - tokens))
    elif mask is not None and mask.dtype == torch.bool:
        by_head.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        by_head.add_(mask)
    return (scores.softmax(-1) @ value.reshape(batch * groups, keys, -1)).view(batch, heads, tokens, -1)


# Registered under the name of SDPA, because some models choose their masks or code path by that name.
AttentionInterface.register("sdpa", products)

_only_sdpa = False


@contextmanager
def only_sdpa() -> Iterator[None]:
    """Use only SDPA, also on the CPU: meta tensors do not show whether they stand for a GPU."""
    global _only_sdpa
    _only_sdpa = True
    try:
        yield
    finally:
        _only_sdpa = False


class GPTJSdpaAttention(GPTJAttention):
    """GPT-J's attention through transformers' own SDPA call, whose treatment of a missing mask fits its masks."""

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Attention of queries (batch, heads, tokens, head width), in their shape; keys and values may be longer."""
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(query.dtype)
        dropout = self.attn_dropout.p if self.training else 0.0
        attend = AttentionInterface()[self.config._attn_implementation]
        mixed, _ = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=1 / self.scale_attn)
        return mixed.transpose(1, 2), None
