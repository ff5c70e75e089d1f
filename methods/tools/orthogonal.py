"""torch's Muon where it has no answer: rows of matrices that processes share, float32, and AdamW for other tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from methods.tools.process_group import Shards


class Muon(torch.optim.Muon):
    """torch's Muon of this process's rows of matrices, with Newton-Schulz in bfloat16, as torch has it, or in float32.

    shards     the processes that share the matrices; each orthogonalises all of them, one after the other
    shapes     of the whole matrices, in the order of the parameters
    precision  "bfloat16" or "float32" (float64 for float64 matrices)
    """

    def __init__(
        self, params: Iterable[Tensor], *, shards: Shards, shapes: Sequence[torch.Size], precision: str, **settings: Any
    ):
        self._shards, self._shapes, self._precision = shards, list(shapes), precision
        super().__init__(params, **settings)

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        for weight, shape in zip(group["params"], self._shapes, strict=True):
            if weight.grad is None:  # in every process alike
                continue
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight.grad)
            momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
            update = weight.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            direction = self._orthogonal(self._shards.whole(update, shape), group)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(self._shards.local(direction), alpha=-group["lr"])

    def _orthogonal(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        """The scaled update that a whole matrix becomes."""
        if self._precision == "float32":
            return _scale(matrix.shape, group) * newton_schulz(matrix, group["ns_coefficients"], group["ns_steps"])
        moved = torch.zeros_like(matrix)
        moved.grad = matrix
        same = {name: group[name] for name in ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
        torch.optim.Muon([moved], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **same).step()
        return moved.neg_()


class Both(torch.optim.Optimizer):
    """Optimizers of different tensors as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self._optimizers = optimizers
        super().__init__([group for one in optimizers for group in one.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for one in self._optimizers:
            one.state, one.param_groups = self.state, [next(groups) for _ in one.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure=None):
        for one in self._optimizers:
            one.step()


def newton_schulz(matrix: Tensor, coefficients: Sequence[float], iterations: int) -> Tensor:
    """U·Vᵀ of a matrix U·S·Vᵀ, approximately, in its own dtype: X ← a·X + b·X·Xᵀ·X + c·(X·Xᵀ)²·X, from X of norm 1."""
    a, b, c = coefficients
    turned = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if turned else matrix) / matrix.norm().clamp_min(1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if turned else x


def flops(shape: Sequence[int], iterations: int) -> float:
    """Of `newton_schulz`: X·Xᵀ, its square, and that times X, in each iteration."""
    short, long = sorted(shape)
    return iterations * (4.0 * short * short * long + 2.0 * short**3)


def _scale(shape: Sequence[int], group: dict[str, Any]) -> float:
    """As torch adjusts the learning rate."""
    rows, columns = shape
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
