"""Half fine-tuning (Hui et al., arXiv 2404.18466): a random half of each block's matrices and norms stays frozen.

In each transformer block, of n attention matrices, n FFN matrices and n norms, n·fraction train. At the default of 1/2
these are 2 of the 4 attention matrices, 2 of the 3 FFN matrices in half of the blocks and 1 of 3 in the other half, and
1 of 2 norms; a bias goes with its matrix. Embeddings, head and final norm always train. Roles are found by structure
(methods/tools/architecture.py): GPT-J has 2 FFN matrices and one norm in a block, so 1 of 2 and every second norm; a
fused QKV matrix is one matrix, so that GPT-2 trains it or the output matrix.

What is frozen for the run has no gradient and no optimizer state. Sources leave open whether the half is drawn once or
for each epoch; the default is once, `redraw: epoch` draws anew, and then masks hold what is frozen for the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from methods.part import Part, generator, register, setting
from methods.tools.architecture import blocks, units
from methods.tools.costs import Memory


@register(
    title="HFT",
    paper="https://arxiv.org/abs/2404.18466",
    line="Freeze a random half of each block's matrices and norms.",
    phase="adapt",
    capabilities=frozenset({"adapts", "seeded_preparation"}),
)
@dataclass(frozen=True, kw_only=True)
class HalfFineTuning(Part):
    neutral = {"fraction": 1.0}
    excludes = {"adapter": "hft freezes matrices of the base, and beside an adapter none of them trains"}

    fraction: float = setting(
        0.5, phase="prepare", within="[0, 1]", help="share of a block's matrices, and of its norms, that train"
    )
    redraw: Literal["never", "epoch"] = setting(
        "never", phase="prepare", help="the half is drawn once for the run, or anew at the beginning of each epoch"
    )

    def memory(self, *, counts, phase):
        """Where it is drawn anew, what is frozen is trained at another time, and held once more during a step."""
        again = phase == "train" and self.redraw == "epoch"
        return Memory(update=counts.share(counts.wide * counts.trained) * again)

    def adapt(self, model, *, seed, state=None):
        if self.redraw == "never":
            still = self._frozen(model, seed, 0)
            for name, parameter in model.named_parameters():
                if name in still:
                    parameter.requires_grad_(False)
        return model

    def examples(self, *, run, state, rows, step):
        epoch, place = divmod(step, run.epoch)
        if self.redraw == "epoch" and place == 0:
            still = self._frozen(run.model, run.seed, epoch)
            state["frozen"] = {name: torch.tensor(True) for name in run.weights if name in still}
        return rows

    def report(self, *, run, state):
        inside = {name: p for path, _ in blocks(run.model) for name, p in _under(run.model, path)}
        entries = sum(p.numel() for p in inside.values())
        moving = inside.keys() & run.weights.keys() - state.get("frozen", {}).keys()
        return {"trained_share_of_blocks": sum(inside[name].numel() for name in moving) / entries}

    def _frozen(self, model: nn.Module, seed: int, epoch: int) -> set[str]:
        """The parameters in the blocks that do not train in an epoch."""
        draw = generator(seed, self.key, epoch)
        frozen: set[str] = set()
        found = [(path, units(block)) for path, block in blocks(model)]
        for role in ("attention", "ffn", "norm"):
            order = _shuffled(len(found), draw)
            for (path, roles), rank in zip(found, order, strict=True):
                # n·fraction between two whole numbers is rounded up in as many blocks as its fraction says
                trained = int(len(roles[role]) * self.fraction + (rank + 0.5) / len(found))
                for unit in _shuffled(len(roles[role]), draw)[trained:]:
                    frozen |= {f"{path}.{name}" for name in roles[role][unit]}
        return frozen


def _shuffled(count: int, draw: torch.Generator) -> list[int]:
    return torch.randperm(count, generator=draw, device="cpu").tolist()  # a model without numbers is on another device


def _under(model: nn.Module, path: str):
    return ((f"{path}.{name}", p) for name, p in model.get_submodule(path).named_parameters())
