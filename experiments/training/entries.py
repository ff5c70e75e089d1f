"""Counts a model's weights by what its memory depends on."""

import functools
from collections.abc import Iterable

from torch import Tensor

from experiments.model.shape import Shape
from experiments.training.activations import Unknown
from methods.errors import UserError
from methods.part import Part
from methods.tools import architecture
from methods.tools.costs import Entries
from methods.tools.effective import adapted_names, adapter_names, base_parameters, lora_layers


@functools.cache
def entries(shape: Shape, parts: tuple[Part, ...]) -> Entries:
    """The counts of a model as `parts` adapt it. Raises Unknown where its blocks or its head are not found."""
    model = shape.build(parts=parts)
    everything, base = dict(model.named_parameters()), base_parameters(model)
    trained = {name: p.numel() for name, p in everything.items() if p.requires_grad}
    regularised = [base[name].numel() for name in adapted_names(model)]
    adapted = [layer.base_layer.weight.numel() for _, layer in lora_layers(model)]
    squares = [layer.in_features**2 for _, layer in lora_layers(model)]
    try:
        blocks = [list(block.parameters()) for _, block in architecture.blocks(model)]
        head = architecture.head(model).weight
    except UserError as error:
        raise Unknown from error
    inside = {id(p) for block in blocks for p in block}
    root = [p for p in everything.values() if id(p) not in inside]
    matrices = [p.numel() for block in blocks for p in block if p.requires_grad and p.dim() == 2]
    adapters = sum(trained.get(name, 0) for name in adapter_names(model))
    return Entries(
        all=sum(p.numel() for p in everything.values()),
        base=sum(p.numel() for p in base.values()),
        trained=sum(trained.values()),
        trained_base=sum(trained.values()) - adapters,
        adapters=adapters,
        adapted=sum(adapted),
        regularised=sum(regularised),
        largest_base=max(p.numel() for p in base.values()),
        largest_trained=max(trained.values(), default=0),
        largest_adapted=max(adapted, default=0),
        largest_regularised=max(regularised, default=0),
        squares=sum(squares),
        largest_square=max(squares, default=0),
        root=_entries(root),
        block=max(map(_entries, blocks)),
        root_trained=_entries(p for p in root if p.requires_grad),
        block_trained=max(_entries(p for p in block if p.requires_grad) for block in blocks),
        matrices=sum(matrices),
        largest_matrix=max(matrices, default=0),
        head_trained=head.numel() if head.requires_grad else 0,
        vocabulary=head.shape[0],
        width=head.shape[1],
    )


def _entries(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
