"""Attention that transformers' models compute otherwise or not at all: SDPA for GPT-J, and matrix products on the CPU.

    softmax(Q·Kᵀ/√(head width) + mask)·V

Eager attention holds a score for every pair of tokens, in float32, for the backward pass; torch's fused kernels hold
none of them. On a GPU they are the faster too. On the CPU torch's fused kernel takes four to six times as long as the
two products and the softmax that it stands for, as long as their scores stay in its cache.
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

LONGEST = 512  # tokens; beyond, the scores of a layer no longer stay in the cache and are many bytes to keep
BLOCK = 256  # queries of a longer text that attend at once


def with_sdpa(model: Model) -> Model:
    """`model` itself, its eager GPT-J attention replaced by SDPA in place.

    Logits are eager's to rounding (of float32 in a float64 model too, whose scores eager computes in float32). Weights,
    names and saved files are unchanged. As with SDPA in Llama, there are no attention weights to return. A new model made
    from this model's `config` object, in place of a saved one, needs `attn_implementation="eager"` and `with_sdpa` again.
    Other attention is left as it is.
    """
    for module in model.modules():
        if type(module) is GPTJAttention:
            # the class of the one module, and not a bound method on it, so that copies and pickles keep it
            module.__class__ = GPTJSdpaAttention
            # what the model's masks are made for; transformers does not save it
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
    """Attention as transformers asks SDPA for it: queries (batch, heads, tokens, width), keys and values of as many heads or
    of a divisor's, masks additive or boolean, None for causal. Returns (batch, tokens, heads, width).

    Scores are rounded to the model's dtype before the softmax, which is taken in float32, as in transformers' eager
    attention. A text longer than LONGEST is worked on in blocks of queries where no gradient is asked for, and is
    SDPA's where one is. What is on a GPU, drops out, is not causal, or continues a cache without a mask is SDPA's too.
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
        mask = (
            None
            if attention_mask is None
            else attention_mask[..., start:end, :]
            if attention_mask.shape[-2] > 1
            else attention_mask
        )
        blocks.append(_mixed(query[:, :, start:end], key[:, :, :seen], value[:, :, :seen], mask))
    return torch.cat(blocks, 2).transpose(1, 2).contiguous(), None


def _mixed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Values mixed for scaled queries, (batch, heads, tokens, width); without a mask the last query sees every key.

    Queries that share keys are one matrix, so that a group of heads costs one product.
    """
    (batch, heads, tokens, width), (groups, keys) = query.shape, key.shape[1:3]
    scores = query.reshape(batch * groups, -1, width) @ key.reshape(batch * groups, keys, width).transpose(1, 2)
    by_head = scores.view(batch, heads, tokens, keys)
    if mask is None and tokens > 1:
        by_head.add_(
            torch.full((tokens, keys), -torch.inf, dtype=scores.dtype, device=query.device).triu_(1 + keys - tokens)
        )
    elif mask is not None and mask.dtype == torch.bool:
        by_head.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        by_head.add_(mask)
    return (scores.softmax(-1) @ value.reshape(batch * groups, keys, -1)).view(batch, heads, tokens, -1)


# In SDPA's own name: some models ask by that name which masks to make or which path to take, and do something else under another.
AttentionInterface.register("sdpa", products)

_only_sdpa = False


@contextmanager
def only_sdpa() -> Iterator[None]:
    """SDPA alone on the CPU, too: tensors without numbers have no device to tell a GPU by."""
    global _only_sdpa
    _only_sdpa = True
    try:
        yield
    finally:
        _only_sdpa = False


class GPTJSdpaAttention(GPTJAttention):
    """GPT-J's attention with transformers' own call of SDPA, whose rules for a missing mask fit transformers' masks."""

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Queries (batch, heads, tokens, head width); keys and values may be longer. Returns values mixed, shaped like queries."""
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(query.dtype)
        dropout = self.attn_dropout.p if self.training else 0.0
        attend = AttentionInterface()[self.config._attn_implementation]
        mixed, _ = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=1 / self.scale_attn)
        return mixed.transpose(1, 2), None
