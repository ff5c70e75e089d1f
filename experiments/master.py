"""Float32-exact updates: a float32 master of every trained tensor, the module computing in its own dtype.

A bf16 weight loses every update smaller than 1/256 of itself; the master keeps them. Where the module
already computes in float32 or float64 the master is the parameter itself and nothing is copied.
"""

import torch
from torch import Tensor, nn


class Masters:
    """The trained tensors of `module`, by parameter name, in `weights`: leaf tensors with `.grad`."""

    def __init__(self, module: nn.Module):
        trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.weights: dict[str, Tensor] = {
            name: p if p.dtype in (torch.float32, torch.float64) else p.detach().float().requires_grad_()
            for name, p in trained
        }
        self._copies = [(p, self.weights[name]) for name, p in trained if self.weights[name] is not p]

    @torch.no_grad()
    def gather(self) -> None:
        """Add the module's gradients of one micro-batch to the masters', in float32, and free them."""
        for parameter, master in self._copies:
            if parameter.grad is not None:
                if master.grad is None:
                    master.grad = parameter.grad.float()
                else:
                    master.grad += parameter.grad
                parameter.grad = None

    @torch.no_grad()
    def complete(self) -> None:
        """Give a zero gradient to tensors the step did not reach, so that every hook finds one."""
        for master in self.weights.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)

    @torch.no_grad()
    def push(self) -> None:
        """Round the masters once into the module's own dtype."""
        for parameter, master in self._copies:
            parameter.copy_(master)

    def zero(self) -> None:
        for master in self.weights.values():
            master.grad = None
        for parameter, _ in self._copies:
            parameter.grad = None
