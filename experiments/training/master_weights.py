"""Float32-exact updates in one process: a float32 master of every trained tensor of a module in fewer bits.

A bf16 weight loses every update smaller than 1/256 of itself; the master keeps them. Where the module
already computes in float32 or float64 the master is the parameter itself and nothing is copied.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from methods.tools.architecture import base_name


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model to the dtype it computes in.

    Buffers, and parameters that transformers keeps in another dtype than the first one's, stay in it.
    """
    loaded = next(model.parameters()).dtype
    for parameter in model.parameters():
        if parameter.dtype == loaded:
            parameter.data = parameter.data.to(dtype)


class MasterWeights:
    """The trained tensors of `model`, by parameter name, in `weights`: leaf tensors with `.grad`.

    A master starts as the base's own value, which a module in fewer bits may not be able to represent. In bf16 a weight
    takes 2 bytes in the module, 4 in the master and 4 for the master's gradient; a gradient in bf16 exists for one
    tensor at a time.
    """

    def __init__(self, model: nn.Module, *, base: Mapping[str, Tensor]):
        self._model = model
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {
            name: p
            if p.dtype in (torch.float32, torch.float64)
            else base.get(base_name(name), p.detach()).to(p.device, torch.float32, copy=True).requires_grad_()
            for name, p in trained.items()
        }
        self.shapes = {name: p.shape for name, p in trained.items()}
        self._copies = [(p, self.weights[name]) for name, p in trained.items() if self.weights[name] is not p]
        self._reached: set[int] = set()  # masters whose buffer holds a gradient of this step
        self._hooks = [p.register_post_accumulate_grad_hook(self._adder(master)) for p, master in self._copies]
        self._hooks += [master.register_hook(self._reacher(master)) for _, master in self._copies]

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(model, *arguments)."""
        return function(self._model, *arguments)

    def _adder(self, master: Tensor) -> Callable[[Tensor], None]:
        """A hook that adds a parameter's complete gradient to its master's, in float32, and frees it."""

        @torch.no_grad()
        def add(parameter: Tensor) -> None:
            if master.grad is None:
                master.grad = parameter.grad.float()
            elif id(master) in self._reached:
                master.grad += parameter.grad
            else:
                master.grad.copy_(parameter.grad)
            self._reached.add(id(master))
            parameter.grad = None

        return add

    def _reacher(self, master: Tensor) -> Callable[[Tensor], None]:
        """A hook for a loss of the master itself: autograd would add to the last step's gradient in the buffer."""

        def reach(gradient: Tensor) -> None:
            if id(master) not in self._reached:
                master.grad = None
                self._reached.add(id(master))

        return reach

    @torch.no_grad()
    def complete(self) -> None:
        """Give tensors that the step did not reach a gradient of zero, so that every hook can read one."""
        for master in self.weights.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        for _, master in self._copies:
            if id(master) not in self._reached:
                master.grad.zero_()
                self._reached.add(id(master))

    @contextmanager
    def exact(self) -> Iterator[None]:
        """The module computes with the masters themselves for a time: in float32, and nothing is rounded.

        A gradient then reaches the masters without the module's own parameters. What is not trained is copied to
        float32, which has all values that fewer bits have.
        """
        wide: dict[int, Tensor] = {id(parameter): master for parameter, master in self._copies}
        put: list[tuple[dict, str, Tensor]] = []
        for module in self._model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16):
                        if id(tensor) not in wide:
                            wide[id(tensor)] = tensor.detach().float()
                        put.append((held, name, tensor))
                        held[name] = wide[id(tensor)]
        try:
            yield
        finally:
            for held, name, tensor in put:
                held[name] = tensor

    @torch.no_grad()
    def update_model(self) -> None:
        """Copy the masters into the module, rounded once to its own dtype."""
        for parameter, master in self._copies:
            parameter.copy_(master)

    def zero(self) -> None:
        self._reached.clear()
        copied = {id(master) for _, master in self._copies}
        for weight in self.weights.values():
            # a new buffer costs a page fault per page on the CPU, so it is kept; a GPU needs its memory for activations
            if weight.is_cuda or id(weight) not in copied:
                weight.grad = None

    def release(self) -> None:
        """Leave the model as it was given, except for its weights."""
        for hook in self._hooks:
            hook.remove()
