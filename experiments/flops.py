"""Matrix FLOPs that a step of training executes, and the share of a device's peak they reach (MFU).

Forward: 2 FLOPs a weight of every matrix for each token that is no padding; the head only where there is a label; looking
up an embedding is no product (a head tied to it is). Backward: the same once more where the weight is trained, and once
more where the matrix's input leads back to anything trained. Attention: scores and their product with the values over the
causal half, 2·T²·heads·head width FLOPs a layer and example of T tokens; backward twice that wherever queries, keys or
values need a gradient, for kernels compute their three gradients together. Norms, activations and what is computed a
second time are not counted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from experiments import architecture
from experiments.errors import UserError


class Flops:
    """FLOPs of optimizer steps of `model`, adapters included, with those tensors trained that require a gradient now.

    What needs an input's gradient is asked of autograd: the model runs once on two tokens of the meta device, which
    computes nothing and leaves the model as it is. Raises UserError for a model in whose blocks no attention is found
    (a module with `head_dim`).
    """

    def __init__(self, model: nn.Module):
        self._token = self._label = self._square = 0  # FLOPs a token, a labelled token, and T² of an example
        head = architecture.head(model)
        handles = [module.register_forward_hook(self._matrix(is_head=module is head))
                   for module in model.modules() if _is_matrix(module)]  # fmt: skip
        for _, block in architecture.blocks(model):
            handles += self._attention(model, block)
        try:
            _run_on_meta(model)
        finally:
            for handle in handles:
                handle.remove()

    def step(self, *, lengths: Sequence[int], labelled: int) -> float:
        """FLOPs of one optimizer step on examples of these lengths (tokens, without padding), `labelled` tokens of them labelled."""
        return float(sum(lengths) * self._token + labelled * self._label + sum(n * n for n in lengths) * self._square)

    def _matrix(self, *, is_head: bool):
        def count(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            flops = 2 * module.weight.numel() * (1 + module.weight.requires_grad + arguments[0].requires_grad)
            if is_head:
                self._label += flops
            else:
                self._token += flops

        return count

    def _attention(self, model: nn.Module, block: nn.Module) -> list:
        """Hooks on the parts of a block's attention: what all but the last put out goes into the scores."""
        attention = next((m for m in block.modules() if isinstance(getattr(m, "head_dim", None), int)), None)
        parts = [m for m in attention.children() if any(map(_is_matrix, m.modules()))] if attention is not None else []
        if len(parts) < 2:
            raise UserError(f"the attention of {type(architecture.plain(model)).__name__} is not found: "
                            "FLOPs are counted of models whose attention is one module with `head_dim` and its matrices")  # fmt: skip
        forward = 2 * architecture.plain(model).config.num_attention_heads * attention.head_dim
        needed: list[bool] = []  # of each part, in the order of their calls

        def note(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            needed.append(output.requires_grad)
            if len(needed) == len(parts):
                self._square += forward * (3 if any(needed[:-1]) else 1)

        return [part.register_forward_hook(note) for part in parts]


def mfu(flops: float, seconds: float, peak: float | None) -> float | None:
    """Share of `peak` (FLOP/s) that `flops` in `seconds` reach; None where the peak is unknown or no time has passed."""
    return flops / seconds / peak if peak and seconds else None


def _is_matrix(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")  # its own: an adapter shows the weight beneath it, too
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _run_on_meta(model: nn.Module) -> None:
    """One forward pass of two tokens in which every tensor of the model is replaced by a meta tensor like it."""
    tensors = {name: p.detach().to("meta").requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    tensors |= {name: buffer.to("meta") for name, buffer in model.named_buffers()}
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    # with a mask of four dimensions transformers does not look for packed rows, whose positions a meta tensor has not
    mask = torch.zeros(1, 1, 2, 2, dtype=next(model.parameters()).dtype, device="meta")
    with torch.enable_grad():
        functional_call(model, tensors, kwargs={"input_ids": ids, "attention_mask": mask, "use_cache": False})
