"""Scaled-dot-product attention for GPT-J, which transformers has for Llama and not for GPT-J.

    softmax(Q·Kᵀ/√(head width) + mask)·V

Eager attention holds a score for every pair of tokens, in float32, for the backward pass; torch's fused kernels hold
none of them.
"""

from typing import TypeVar

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.gptj.modeling_gptj import GPTJAttention

Model = TypeVar("Model", bound=nn.Module)


def with_sdpa(model: Model) -> Model:
    """`model` itself, its eager GPT-J attention replaced by SDPA in place; other attention is left as it is.

    Logits are eager's to rounding (of float32 in a float64 model too, whose scores eager computes in float32). Weights,
    names and saved files are unchanged. As with SDPA in Llama, there are no attention weights to return. A new model made
    from this model's `config` object, in place of a saved one, needs `attn_implementation="eager"` and `with_sdpa` again.
    """
    for module in model.modules():
        if type(module) is GPTJAttention:
            # the class of the one module, and not a bound method on it, so that copies and pickles keep it
            module.__class__ = GPTJSdpaAttention
            # what the model's masks are made for; transformers does not save it
            module.config._attn_implementation = "sdpa"
    return model


class GPTJSdpaAttention(GPTJAttention):
    """GPT-J's attention with transformers' own call of SDPA, whose rules for a missing mask fit transformers' masks."""

    def _attn(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """Queries (batch, heads, tokens, head width); keys and values may be longer. Returns values mixed, shaped like queries."""
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(query.dtype)
        dropout = self.attn_dropout.p if self.training else 0.0
        sdpa = AttentionInterface()["sdpa"]
        mixed, _ = sdpa(self, query, key, value, attention_mask, dropout=dropout, scaling=1 / self.scale_attn)
        return mixed.transpose(1, 2), None
