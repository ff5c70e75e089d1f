"""Count the matrix FLOPs of training steps, and the share of a device's peak rate that they reach (MFU).

torch's own formulas (torch.utils.flop_counter) count the products of a forward and a backward pass on tensors without
numbers. Forward: 2 FLOPs for every entry of every matrix and each token that is no padding; in a mixture of experts,
for the experts that a token is sent to; in the head, only for labelled tokens. Looking up an embedding is no product,
a head tied to the embedding is. Backward: what autograd computes, which is the same once more where the weight is
trained, and once more where the matrix's input depends on anything trained. Attention's products grow with the square
of an example's length T; half of them are counted, the causal half, also where a window leaves out more. Norms,
activation functions and recomputation are not counted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from methods.tools import architecture
from methods.tools.costs import Pass

# Tokens of the pass that is counted, fewer where the model has fewer positions: primes, of which no size is a multiple.
LENGTHS = (251, 127, 61)

_counted: dict[tuple, tuple[float, ...] | None] = {}


class Flops:
    """FLOPs of passes of a model, adapters included, whose trained tensors are those that require a gradient now.

    Count before activation checkpointing is enabled, because its recomputation would be counted. The model stays as it
    is. A model that does not run on tensors without numbers has no count (None).
    """

    def __init__(self, model: nn.Module):
        config = architecture.plain(model).config
        key = (
            type(architecture.plain(model)),
            config.to_json_string(),
            config._attn_implementation,
            tuple((name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()),
            tuple((name, tuple(buffer.shape)) for name, buffer in model.named_buffers()),  # such as an adapter's start
        )
        if key not in _counted:
            try:
                _counted[key] = _whole(model)
            except Exception:  # whatever fails here, the model may still train
                _counted[key] = None
        self._each = _counted[key]

    def step(self, *, lengths: Sequence[int], labelled: int) -> float | None:
        """FLOPs of one optimizer step on examples of these lengths in tokens without padding; None: not known.

        labelled   how many of their tokens are labelled
        """
        return None if self._each is None else self._sum(self._each[:3], lengths, labelled)

    def forward(self, *, lengths: Sequence[int], predicted: int) -> float | None:
        """FLOPs of a forward pass alone, with logits for `predicted` tokens; None: not known."""
        return None if self._each is None else self._sum(self._each[3:], lengths, predicted)

    def _sum(self, each: tuple[float, ...], lengths: Sequence[int], labelled: int) -> float:
        token, label, square = each
        return float(sum(lengths) * token + labelled * label + sum(n * n for n in lengths) * square)


def of_pass(made: Pass, counter: Flops, lengths: Sequence[int]) -> float | None:
    """FLOPs of a pass in which a part prepares, over documents of these lengths, which it may cut."""
    read = made.cut(lengths)
    if made.generated:
        return counter.forward(lengths=read, predicted=made.generated * len(read))
    if made.gradients == "none":
        return counter.forward(lengths=read, predicted=0)
    return counter.step(lengths=read, labelled=sum(read))


def _whole(model: nn.Module) -> tuple[float, ...]:
    """FLOPs for a token, a labelled token and T² of an example: of forward and backward, then of forward alone.

    Where all blocks but the first are equal, each block from the third on costs what the third does.
    """
    blocks = [block for _, block in architecture.blocks(model)]
    if len(blocks) <= 3 or not architecture.alike(blocks[1:]):
        return _count(model, None)
    two, three = (_count(model, blocks=count) for count in (2, 3))
    return tuple(a + (len(blocks) - 2) * (b - a) for a, b in zip(two, three))


def _count(model: nn.Module, blocks: int | None) -> tuple[float, ...]:
    """The same for the first `blocks` blocks; None: all of them.

    Every tensor of the model is replaced by one on the meta device, in bfloat16, where experts have no other dtype.
    """

    def meta(tensor: Tensor) -> Tensor:
        return tensor.detach().to("meta", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)

    with torch.enable_grad(), architecture.numberless(), architecture.first_blocks(model, blocks):
        tensors = {f"model.{name}": meta(p).requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
        tensors |= {f"model.{name}": meta(buffer) for name, buffer in model.named_buffers()}
        return functional_call(_Passes(model), tensors, ())


class _Passes(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self) -> tuple[float, ...]:
        positions = getattr(architecture.plain(self.model).config, "max_position_embeddings", None) or LENGTHS[0]
        length = next((n for n in LENGTHS if n <= positions), LENGTHS[-1])
        ids = torch.zeros(1, length, dtype=torch.long, device="meta")
        with _Counter(length) as decoder:
            hidden = architecture.hidden_states(self.model, ids, None)
            linear, square = decoder.linear, decoder.square
            _backward(hidden)
        with _Counter(length) as head:
            # a leaf, so that the head's backward pass does not continue into the decoder
            row = hidden[0, :1].detach().requires_grad_(hidden.requires_grad)
            logits = architecture.logits_of(self.model)(row)
            label = head.linear
            _backward(logits)
        if not decoder.linear:
            raise ValueError("no matrix product was counted")
        both = decoder.linear / length, head.linear, decoder.square / 2 / length**2
        return (*both, linear / length, label, square / 2 / length**2)


def _backward(output: Tensor) -> None:
    if output.requires_grad:
        output.backward(torch.empty_like(output))


class _Counter(TorchDispatchMode):
    """FLOPs of the products that are executed in this mode: `square` of tokens with tokens, `linear` of all others."""

    def __init__(self, length: int):
        super().__init__()
        self.linear = self.square = 0.0
        self._length = length

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        operation = function._overloadpacket
        formula = _grouped if operation is torch.ops.aten._grouped_mm else flop_registry.get(operation)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=made)
            if "scaled_dot_product" in str(operation):
                self.square += flops
                return made
            if operation in _BATCHED:
                left, right = args[-2:]
                rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
                if inner == 1:  # rotary angles: an outer product, which sums nothing
                    flops = 0
                elif sum(size % self._length == 0 for size in (rows, inner, columns)) > 1:
                    self.square += flops
                    return made
            self.linear += flops
        return made


_BATCHED = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)


def _grouped(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of a grouped product, in which each group of rows has its own matrix; torch has no formula for it."""
    return 2 * left.numel() * right.shape[-1]
