"""Muon: the update of each hidden matrix is made orthogonal (Jordan 2024; for large models arXiv:2502.16982).

    M ← momentum·M + (1 − momentum)·G        O = NewtonSchulz(G + momentum·(M − G)), approximately U·Vᵀ
    W ← W − rate·weight_decay·W − rate·scale·O

scale is 0.2·√max(rows, columns), with which an update is as large as AdamW's usually are, so that `train.learning_rate`
carries over; or √max(1, rows/columns), Jordan's own, whose rates are of another size. Without `nesterov` O is of M. It
is torch's own optimizer. As its authors say it moves the matrices of the blocks alone: embeddings, head, norms, biases
and tensors of other dimensions are moved by AdamW with the settings of `train`.

Newton-Schulz needs whole matrices. Where processes share the model each gathers one matrix after the other and computes
the same; its momentum is of its own rows. torch computes it in bfloat16, where the last bit of a gradient, which the
number of processes changes, can become a rounding of the update: after ten steps weights differ by about 1e-4 of their
norm. In float32, at about four times the time, they do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from methods.errors import UserError
from methods.part import Part, register, setting
from methods.tools import orthogonal
from methods.tools.architecture import base_name, blocks
from methods.tools.costs import Memory


@register(
    title="Muon",
    paper="https://arxiv.org/abs/2502.16982",
    line="Make the update of each hidden matrix orthogonal; AdamW moves all other tensors.",
    phase="mask",
    capabilities=frozenset({"optimizer"}),
)
@dataclass(frozen=True, kw_only=True)
class Muon(Part):
    shares = ("methods.tools.orthogonal",)
    excludes = {"adapter": "muon moves whole matrices, and an adapter's factors would all be left to AdamW"}
    neutral = "none: it makes every update of a matrix orthogonal"
    trial = {"precision": "float32"}  # in which the number of processes changes nothing

    momentum: float = setting(0.95, within="[0, 1)", help="decay of the mean of gradients")
    nesterov: bool = setting(True, help="orthogonalise the gradient moved towards that mean, not the mean")
    iterations: int = setting(5, within="[1, 99]", help="of Newton and Schulz")
    scale: Literal["match_rms_adamw", "original"] = setting(
        "match_rms_adamw", help="of an update: as large as AdamW's, at its rates, or as Jordan's, at rates of its own"
    )
    precision: Literal["bfloat16", "float32"] = setting("bfloat16", help="of Newton and Schulz; torch has bfloat16")

    def memory(self, *, counts, phase):
        if phase != "train":
            return Memory()
        # of a matrix of the blocks one moment, of all else two
        moments = counts.share(counts.wide * (2 * counts.trained - counts.matrices))
        # of the largest matrix: its update, the whole one where rows are shared, and what Newton and Schulz take
        return Memory(moments=moments, optimizer=7 * counts.wide * counts.largest_matrix)

    def optimizer(self, *, run, learning_rate, betas, eps, weight_decay):
        if run.moments.dtype != "float32":
            raise UserError(
                f"muon: train.moments is {run.moments.dtype}, but torch keeps Muon's momentum in float32, which takes "
                "no more than two moments in bfloat16: set `train: {moments: float32}` for this method"
            )
        names = _matrices(run)
        if not names:
            raise UserError("muon: no matrix of the model's blocks is trained, so there is nothing that it could move")
        common = {"lr": learning_rate, "weight_decay": weight_decay}
        own = {"momentum": self.momentum, "nesterov": self.nesterov, "ns_steps": self.iterations}
        own |= common | {"adjust_lr_fn": self.scale}
        matrices = [run.weights[name] for name in names]
        others = [weight for name, weight in run.weights.items() if name not in names]
        if run.shards.world == 1 and self.precision == "bfloat16":
            muon = torch.optim.Muon(matrices, **own)
        else:
            own |= {"shards": run.shards, "shapes": [run.shapes[name] for name in names], "precision": self.precision}
            muon = orthogonal.Muon(matrices, **own)
        adamw = [torch.optim.AdamW(others, betas=betas, eps=eps, fused=True, **common)] if others else []
        return orthogonal.Both(muon, *adamw)

    def optimizer_ready(self, *, run, state, optimizer):
        state["flops"] = sum(orthogonal.flops(run.shapes[name], self.iterations) for name in _matrices(run))

    def before_clip(self, *, run, state, step):
        if run.shards.first:  # every process computes the same
            run.charge(flops=state["flops"])


def _matrices(run) -> list[str]:
    """Names of the base's matrices in the blocks, as far as they are trained."""
    paths = tuple(f"{path}." for path, _ in blocks(run.model))
    names = (name for name in run.weights if name.startswith(paths) and base_name(name) in run.base)
    return [name for name in names if len(run.shapes[name]) == 2]
