"""Undo a part of a linear layer's change, and let the entries that are left make up for it (Frantar & Alistarh 2023).

For W (out × in), inputs X (in × tokens) and H = XXᵀ, an entry that is set to q changes the layer's output by
(w − q)·x_j. The entries of later columns in its row can take up most of that: with the upper Cholesky factor U of H⁻¹

    e = (w_j − q) / U_jj        W[:, j+1:] ← W[:, j+1:] − e·U[j, j+1:]

is the least-squares answer for the columns that are left (SparseGPT, arXiv 2301.00774). Columns are worked through from
left to right, in blocks, whose entries are chosen together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from methods.part import Row, Run
from methods.tools.architecture import base_name, plain

GROUP = 1 << 30  # bytes of H that are held at once; each group of layers takes a pass over the rows


@torch.no_grad()
def patched(
    base: Tensor,
    tuned: Tensor,
    moments: Tensor,
    *,
    choose: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    damp: float,
    block: int,
    sign: float = -1.0,
) -> Tensor:
    """The layer's weights (out × in, float64): chosen entries tuned and compensated, the others exactly the base's.

    moments  H (in × in), of any scale
    choose   choose(W − W₀, W, d, may) → which entries of a block (out × columns) stay tuned, of the block as the blocks
             before it have left it. d (columns,) is U's diagonal: w²/d² is what it costs to undo a change of w. `may`
             is false where W = W₀ from the beginning: such an entry stays the base's, whatever is chosen
    damp     share of H's mean diagonal that is added to it
    sign     of the compensation: −1 lowers the error of the layer's output, 0 is none
    """
    weight, base = tuned.double().clone(memory_format=torch.contiguous_format), base.double()
    upper, may = _factor(moments.double(), damp), weight != base
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        part, old, u = weight[:, start:end], base[:, start:end], upper[start:end, start:end]
        kept = choose(part - old, part, u.diagonal(), may[:, start:end]) & may[:, start:end]
        errors = torch.empty_like(part)
        for j in range(end - start):
            new = torch.where(kept[:, j], part[:, j], old[:, j])
            errors[:, j] = (part[:, j] - new) / u[j, j]
            part[:, j] = new
            part[:, j + 1 :].addr_(errors[:, j], u[j, j + 1 :], alpha=sign)
        weight[:, end:].addmm_(errors, upper[start:end, end:], alpha=sign)
    return weight


def _factor(moments: Tensor, damp: float) -> Tensor:
    """U, upper triangular, with H⁻¹ = UᵀU."""
    mean = moments.diagonal().mean()
    moments.diagonal().add_(damp * mean if mean else 1.0)  # a layer that reads nothing but zeros
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)


def linear_layers(model: nn.Module, names: set[str]) -> dict[str, nn.Module]:
    """Linear layers other than the head, by the base names of their weights, which are among `names`."""
    head = plain(model).get_output_embeddings()
    modules = {base_name(f"{path}.weight"): module for path, module in model.named_modules() if module is not head}
    return {name: m for name, m in modules.items() if name in names and isinstance(m, nn.Linear | Conv1D)}


def groups(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """The layers in groups whose H together take at most GROUP bytes, or one by one."""
    group, size = {}, 0
    for name, layer in layers.items():
        if group and size + 4 * _inputs(layer) ** 2 > GROUP:
            yield group
            group, size = {}, 0
        group, size = group | {name: layer}, size + 4 * _inputs(layer) ** 2
    yield group


def _inputs(layer: nn.Module) -> int:
    return layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]


def moments_of(run: Run, rows: Sequence[Row], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """H of the layers' inputs over all tokens of the rows, summed over the processes, which take the rows in turn."""
    wide = torch.promote_types(next(iter(run.weights.values())).dtype, torch.float32)
    sums = {
        name: torch.zeros(_inputs(layer), _inputs(layer), dtype=wide, device=run.device)
        for name, layer in layers.items()
    }
    counts, hooks = [False], []
    for name, layer in layers.items():

        def add(module: nn.Module, arguments: tuple[Tensor, ...], total: Tensor = sums[name]) -> None:
            if counts[0]:
                x = arguments[0].flatten(0, -2).to(total.dtype)
                total.addmm_(x.T, x)

        hooks.append(layer.register_forward_pre_hook(add))
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled block would not call the hooks
            # a row a process at a time: there is no padding, and each knows whether its row counts
            for at in range(0, len(rows), run.shards.world):
                together = rows[at : at + run.shards.world]
                counts[0] = run.shards.rank < len(together)
                run.score(together)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: run.shards.sum(total) for name, total in sums.items()}
