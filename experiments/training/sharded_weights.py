"""Weights that several processes share: torch's fully_shard under the engine's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from methods.errors import UserError
from methods.tools import architecture
from methods.tools.process_group import Shards


class _Root(nn.Module):
    """The root module of fully_shard: everything computed inside its forward has the weights it needs.

    The forward takes no arguments, because fully_shard copies, casts and moves every tensor it finds in them, at any
    depth, and a part's hooks are given the whole run. The function to compute is in `function` during a call instead.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.function: Callable[[nn.Module], Any] | None = None

    def forward(self) -> Any:
        return self.function(self.model)


def _kept_apart(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """The outermost modules whose parameters all have one dtype other than `dtype`, each with that dtype."""
    dtypes = {p.dtype for p in module.parameters()}
    if len(dtypes) > 1:
        for child in module.children():
            yield from _kept_apart(child, dtype)
    elif dtypes - {dtype}:
        yield module, dtypes.pop()


class ShardedWeights:
    """The trained tensors of `model` as this process's float32 rows; the model computes on gathered copies.

    torch's fully_shard keeps float32 shards, gathers one block at a time in `compute_dtype`, reduces gradients in
    float32 and adds them up over micro-batches: the update is exact in float32, at 4 bytes a weight and 4 a gradient
    divided by the number of processes, with no second copy. Frozen tensors stay in the model's own dtype, which is
    `compute_dtype`; a module that transformers keeps in another one (a router in float32) is gathered in that.

    weights   leaf tensors by parameter name that share storage with the shards
    shapes    whole shapes of the same tensors
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        shards: Shards,
        compute_dtype: torch.dtype,
        device: torch.device,
        base: Mapping[str, Tensor],
    ):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self._shards = shards
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        wide = torch.float64 if compute_dtype == torch.float64 else torch.float32
        mesh = init_device_mesh(device.type, (shards.world,))
        self._root = _Root(model)
        names = {id(p): name for name, p in model.named_parameters()}
        units = [
            *_kept_apart(model, compute_dtype),
            *((block, compute_dtype) for _, block in architecture.blocks(model)),
            (self._root, compute_dtype),
        ]
        for module, dtype in units:
            # one block after the other, so that the float32 copy of the whole model never exists on one device
            for parameter in module.parameters():
                if parameter.requires_grad and id(parameter) in names and parameter.dtype != wide:
                    start = base.get(architecture.base_name(names[id(parameter)]), parameter.detach())
                    parameter.data = start.to(wide)
            # inputs of a block stay in the dtypes that they have in one process
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
            fully_shard(module, mesh=mesh, mp_policy=policy)
        self._parameters = {name: p for name, p in model.named_parameters() if name in set(trained)}
        self.shapes = {name: p.shape for name, p in self._parameters.items()}
        self.weights = {name: p.to_local().detach().requires_grad_() for name, p in self._parameters.items()}

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(model, *arguments), with the weights gathered as it goes; every process must call it together.

        What is computed may call this again.
        """
        if self._root.function is not None:
            return function(self._root.model, *arguments)
        self._root.function = lambda model: function(model, *arguments)
        try:
            return self._root()
        finally:
            self._root.function = None

    @torch.no_grad()
    def complete(self) -> None:
        """Give each row its gradient. Raises UserError where a loss was computed of the rows themselves."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                raise UserError(
                    f"a part's `loss` is computed of run.weights[{name!r}] itself: where processes share the model "
                    "these are one process's rows, which its other processes' losses do not reach; add such a term in "
                    "`before_clip`"
                )
            gradient = self._parameters[name].grad
            weight.grad = torch.zeros_like(weight) if gradient is None else gradient.to_local()

    def exact(self) -> AbstractContextManager:
        """The model computes in its own dtype, which the engine refuses where it has fewer than 32 bits."""
        return nullcontext()

    def update_model(self) -> None:
        """The weights are the shards themselves; copies that a forward pass without a backward pass left are freed."""
        self._root.reshard()

    def zero(self) -> None:
        for name, weight in self.weights.items():
            weight.grad = self._parameters[name].grad = None

    def release(self) -> None:
        """The model stays sharded."""
