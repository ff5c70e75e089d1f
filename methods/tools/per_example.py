"""Squares of each example's gradient, summed over a batch, from one forward and one backward pass of it.

    Σ_b (Σ_t g_bt a_btᵀ)²        a linear layer: its input a, its output's gradient g, an example b's tokens t

Autograd computes no weight's gradient, and goes back no further than the lowest layer whose gradient is wanted. The
output gradients g that it computes are multiplied by the inputs a for each example, in pieces that stay in the cache
together with their piece of the sum, so there is never a gradient of a whole tensor. Norms, biases and embeddings are
summed over an example's tokens in the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

# entries of a product computed at once: few enough for a shared cache, enough for a matrix product
CPU_PIECE = 1 << 20
CUDA_PIECE = 1 << 26


class Squares:
    """Adds the squared gradients of a batch's examples to `totals`, by parameter name.

    sites   names of the parameters by module and by their name in it
    """

    def __init__(
        self,
        sites: Mapping[nn.Module, Mapping[str, str]],
        parameters: Mapping[str, nn.Parameter],
        totals: Mapping[str, Tensor],
    ):
        self._sites, self._parameters, self._totals = sites, parameters, totals
        uses = Counter(name for names in sites.values() for name in names.values())
        self._tied = {name for name, count in uses.items() if count == 2}
        self._usable = True
        self._ids: Tensor  # of the current batch, as the next two
        self._heads: dict[str, list[Tensor]]  # gradients of a tied head in the rows of each example's own tokens
        self._scratch: dict[torch.dtype, Tensor]

    @classmethod
    def of(
        cls, model: nn.Module, parameters: Mapping[str, nn.Parameter], totals: Mapping[str, Tensor]
    ) -> Squares | None:
        """None where a module is of an unknown kind, or where others than embedding and head share a parameter."""
        names = {id(p): name for name, p in parameters.items()}
        sites: dict[nn.Module, dict[str, str]] = {}
        users: dict[str, list[str]] = {name: [] for name in parameters}
        for module in model.modules():
            own = {
                key: names[id(p)]
                for key, p in module.named_parameters(recurse=False, remove_duplicate=False)
                if id(p) in names
            }
            if own:
                sites[module] = own
                for name in own.values():
                    users[name].append(_kind(module))
        known = all(
            kinds in (["linear"], ["embedding"], ["norm"]) or sorted(kinds) == ["embedding", "linear"]
            for kinds in users.values()
        )
        return cls(sites, parameters, totals) if known else None

    def add(self, ids: Tensor, loss: Callable[[], Tensor]) -> bool:
        """Add the squares for `loss()`, a sum over the examples of `ids` (examples, tokens) without their padding.

        Returns False and adds nothing where a module is not called exactly once with the whole batch, and from then on.
        """
        if not self._usable:
            return False
        self._ids, self._heads, self._scratch = ids, {}, {}
        calls: Counter[nn.Module] = Counter()
        # the output of a module needs a gradient even where nothing below it requires one
        start = torch.zeros((), device=ids.device, requires_grad=True)

        def tap(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
            given = arguments[0] if len(arguments) == 1 else None
            if (
                given is not None
                and isinstance(module, nn.Embedding)
                and given.dim() == 2
                and len(given) == 1 < len(ids)
            ):
                # position embeddings that all examples share: a copy for each example
                given, output = given.expand(len(ids), -1), output.expand(len(ids), -1, -1)
            whole = given is not None and output.dim() == 3 and len(output) == len(ids)
            calls[module] += 1 if whole else 2
            return (
                _Tap.apply(start, output, given.detach(), lambda *tensors: self._square(module, *tensors))
                if whole
                else output
            )

        handles = [module.register_forward_hook(tap) for module in self._sites]
        required = {name: p.requires_grad for name, p in self._parameters.items()}
        try:
            for p in self._parameters.values():
                p.requires_grad_(False)
            value = loss()
            for handle in handles:
                handle.remove()  # the backward pass calls norms again
            self._usable = all(calls[module] == 1 for module in self._sites)
            if self._usable:
                value.backward()
            return self._usable
        finally:
            for handle in handles:
                handle.remove()
            for name, p in self._parameters.items():
                p.requires_grad_(required[name])
            self._heads, self._scratch = {}, {}  # freed before the next batch's logits are computed

    def _square(self, module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        """Add the squares of a module's parameters from its input and its output's gradient, (examples, tokens, …)."""
        names = self._sites[module]
        weight, bias = names.get("weight"), names.get("bias")
        if bias:
            total = self._totals[bias]
            total += gradient.sum(1, dtype=total.dtype).square_().sum(0)
        if not weight:
            return
        total = self._totals[weight]
        if isinstance(module, nn.Embedding):
            self._embedding(module, weight, inputs, gradient)
        elif isinstance(module, Conv1D):  # its weight is in × out
            self._linear(total, gradient, inputs)
        elif isinstance(module, nn.Linear):
            if weight in self._tied:
                self._head(weight, inputs, gradient)
            else:
                self._linear(total, inputs, gradient)
        else:
            total += (gradient.to(total.dtype) * _normed(module, inputs)).sum(1).square_().sum(0)

    def _linear(self, total: Tensor, inputs: Tensor, gradient: Tensor) -> None:
        width = inputs.shape[-1]
        rows = max(1, (CPU_PIECE if total.device.type == "cpu" else CUDA_PIECE) // width)
        for top in range(0, len(total), rows):
            piece = total[top : top + rows]
            product = self._room(inputs.dtype, piece)
            wide = product if product.dtype == piece.dtype else self._room(piece.dtype, piece)
            for g, a in zip(gradient[..., top : top + rows].mT.unbind(), inputs.unbind(), strict=True):
                torch.mm(g, a, out=product)
                if wide is not product:
                    wide.copy_(product)
                piece.addcmul_(wide, wide)

    def _room(self, dtype: torch.dtype, like: Tensor) -> Tensor:
        """Scratch of `dtype` in the shape of `like`; there is one for each dtype."""
        if dtype not in self._scratch or self._scratch[dtype].numel() < like.numel():
            self._scratch[dtype] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return self._scratch[dtype][: like.numel()].view(like.shape)

    def _head(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        """All rows except those of an example's own tokens, to which the embedding adds before they are squared."""
        total = self._totals[name]
        self._heads[name], columns = [], []
        for example, ids in enumerate(self._ids):
            tokens = ids.unique()
            column = gradient[example][:, tokens]
            self._heads[name].append(column.T.to(total.dtype) @ inputs[example].to(total.dtype))
            gradient[example].index_fill_(1, tokens, 0)
            columns.append((tokens, column))
        self._linear(total, inputs, gradient)
        for example, (tokens, column) in enumerate(columns):  # autograd continues with this gradient
            gradient[example][:, tokens] = column

    def _embedding(self, module: nn.Embedding, name: str, inputs: Tensor, gradient: Tensor) -> None:
        total = self._totals[name]
        for example, ids in enumerate(inputs):
            tokens, which = ids.unique(return_inverse=True)
            rows = total.new_zeros(len(tokens), total.shape[1])
            rows.index_put_((which,), gradient[example].to(total.dtype), accumulate=True)
            if module.padding_idx is not None:
                rows[tokens == module.padding_idx] = 0
            if name in self._tied:
                rows += self._heads[name][example]
            total[tokens] += rows.square_()


class _Tap(torch.autograd.Function):
    """The identity on `output`; in the backward pass `use` is called with the saved input and the gradient."""

    @staticmethod
    def forward(ctx, start: Tensor, output: Tensor, inputs: Tensor, use: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.use = use
        return output.data  # autograd forbids a model to change a view of it in place

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.use(*ctx.saved_tensors, gradient)
        return None, gradient, None, None


def _kind(module: nn.Module) -> str:
    """The kind of a module: linear, embedding, norm (a scale and a bias on what depends on neither) or unknown."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return "linear"
    if isinstance(module, Conv1D) and type(module).forward is Conv1D.forward:
        return "linear"
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
        return "unknown" if module.max_norm or module.scale_grad_by_freq or module.sparse else "embedding"
    return "norm" if _scales(module) else "unknown"


@torch.no_grad()
def _scales(module: nn.Module) -> bool:
    """Whether module(x) = weight·h(x) + bias, tried on random numbers: norms are many classes under various names."""
    own = dict(module.named_parameters())
    if (
        "weight" not in own
        or own.keys() - {"weight", "bias"}
        or any(p.dim() != 1 or p.shape != own["weight"].shape for p in own.values())
    ):
        return False
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, len(own["weight"]), generator=draw).to(own["weight"].device)
    drawn = {key: torch.randn(p.shape, generator=draw).to(p.device) for key, p in own.items()}
    try:
        whole = functional_call(module, drawn, (x,))
        return torch.allclose(whole, drawn["weight"] * _normed(module, x) + drawn.get("bias", 0), rtol=1e-4, atol=1e-5)
    except Exception:
        return False


@torch.no_grad()
def _normed(module: nn.Module, inputs: Tensor) -> Tensor:
    """The tensor that the module multiplies by its weight."""
    plain = {key: torch.full_like(p, key == "weight", dtype=inputs.dtype) for key, p in module.named_parameters()}
    return functional_call(module, plain, (inputs,))
