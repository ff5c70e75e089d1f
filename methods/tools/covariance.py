"""What a linear layer reads, as a matrix: C = 1/N · Σ XᵀX over N documents of general text.

X (tokens × in) is the layer's input in one document, divided by its largest magnitude, so that no document outweighs
the others. Products are rounded to multiples of 2⁻³² and added up as whole numbers: C then has the same bits in any
order and on any number of processes, which take the documents in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from methods.errors import UserError
from methods.tools import architecture
from methods.tools.process_group import Shards

UNIT = 2.0**32


@torch.no_grad()
def covariances(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    documents: Sequence[Mapping[str, Tensor]],
    *,
    progress: Callable[[int], object] | None = None,
    shards: Shards = Shards(),
) -> dict[str, Tensor]:
    """C (in × in), float64, of each of the `layers` of `model`, by their names; the model is left as it was.

    documents   rows with input_ids (tokens,); each is one forward pass
    Raises UserError where a layer reads nothing but zeros.
    """
    device = next(model.parameters()).device
    with _listening(layers) as sums, _evaluating(model):
        for document in documents[shards.rank :: shards.world]:
            architecture.hidden_states(model, document["input_ids"][None].to(device), None)
            if progress:
                progress(1)
    for name, total in sums.items():
        shards.sum(total)
        if not total.any():
            raise UserError(f"{name} reads nothing but zeros in the general text, which leaves its input undescribed")
    return {name: sums.pop(name).double().div_(UNIT * len(documents)) for name in layers}


@contextmanager
def _listening(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Σ XᵀX·2³² of the layers' inputs, as whole numbers, while the model runs one document at a time."""
    sums, undo = {}, []
    for name, layer in layers.items():
        width = layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]
        sums[name] = torch.zeros(width, width, dtype=torch.int64, device=layer.weight.device)

        def add(module: nn.Module, arguments: tuple[Tensor, ...], total: Tensor = sums[name]) -> None:
            x = arguments[0].flatten(0, -2)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            x = x / x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
            total.add_((x.T @ x).double().mul_(UNIT).round_().long())

        undo.append(layer.register_forward_pre_hook(add))
    try:
        yield sums
    finally:
        for handle in undo:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
