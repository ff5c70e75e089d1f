"""OSF, orthogonal subspace fine-tuning (Nayak et al. 2025, "Sculpting Subspaces", arXiv 2504.07097).

    W₀ = U·S·Vᵀ    U_h (rows × k), V_h (columns × k): the k = ⌊preserved·min(rows, columns)⌋ largest singular values'
    P(X) = (I − U_h·U_hᵀ)·X·(I − V_h·V_hᵀ)    G ← P(G) before clipping    W ← W₀ + P(W − W₀) after the step

What the base does with its strongest inputs, W₀·V_h, and what it says in its strongest outputs, U_hᵀ·W₀, never change.
The published form keeps U_h, S_h and V_h fixed and trains the other factors, with gradients orthogonal to U_h and V_h.
It can reach the same weights, W₀ + P(X) for any X. Here X itself is trained, because peft's layer loses digits of the
subspace in bfloat16 and does not wrap GPT-2's layers. Adam then sees entries of W, and rates do not carry over.

Adam's scaling of entries and weight decay leave the subspace. peft projects gradients alone; the authors' trainer also
projects after the step, as is done here (`restore`). Weight decay then acts on the free part of W alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.part import Part, Prepared, Run, register, setting
from methods.tools.architecture import linear_weights
from methods.tools.costs import Memory, Pass
from methods.tools.effective import base_anchor
from methods.tools.process_group import Shards, in_turn

DECOMPOSED = 64  # bytes for each entry of a matrix: in float64 W, the copy that is decomposed, U, V and LAPACK's own
MASKED = "a mask freezes entries of a matrix, which the projection moves together"
MASKS = ("gmt", "hft", "lisa", "mofo", "random_mask", "spider", "ssu")


@register(
    title="OSF",
    paper="https://arxiv.org/abs/2504.07097",
    line="Train matrices orthogonally to the strongest singular directions that they have in the base.",
    phase="projection",
    capabilities=frozenset({"adapts"}),
)
@dataclass(frozen=True, kw_only=True)
class OSF(Part):
    shares = ("methods.tools.effective", "methods.tools.importance")
    scratch = ("calibration", "anchor", "bases")
    neutral = {"preserved": 0.0, "others": True}
    excludes = dict.fromkeys(MASKS, MASKED) | {"adapter": "osf trains the matrices, which an adapter freezes"}

    preserved: float = setting(
        0.5, phase="prepare", within="[0, 1]", help="share of each matrix's singular directions that is kept"
    )
    others: bool = setting(False, phase="prepare", help="train what is no such matrix as well, without a projection")
    restore: bool = setting(True, help="project the step, too; false: gradients alone, as in peft")

    def preparation(self):
        return (Pass(documents=0, length=1, bare=True, gradients="none"),)

    def memory(self, *, counts, phase):
        bases = int(2 * self.preserved * counts.wide * counts.trained)  # at most: of square matrices
        if phase == "prepare":
            return Memory(gradient=bases + DECOMPOSED * counts.largest_trained)
        whole = counts.processes is not None and counts.device == "cpu"  # as they were read, of which rows are views
        return Memory(
            anchor=counts.share(counts.checkpoint * counts.trained),
            state=bases if whole else counts.share(bases),
            update=counts.wide * (counts.share(2 * counts.largest_trained) + counts.largest_trained),
        )

    def calibrate(self, *, model, general, seed, progress, shards=Shards(), sample=None):
        def bases(name: str) -> dict[str, Tensor]:
            weight = model.get_parameter(name).detach()
            u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
            k, dtype = int(self.preserved * min(weight.shape)), torch.promote_types(weight.dtype, torch.float32)
            return {f"{name}.left": u[:, :k].to(dtype), f"{name}.right": vh[:k].to(dtype)}

        names = linear_weights(model)
        made = in_turn(names, bases, desc=self.key, unit="matrix", progress=progress, shards=shards)
        return Prepared(calibration=made, notes={"matrices": len(names)})

    def adapt(self, model, *, seed, state=None):
        matrices = linear_weights(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.others or name in matrices)
        return model

    def begin(self, *, run, state, examples, general=()):
        made = state.pop("calibration")
        names = [name for name in linear_weights(run.model) if self.preserved and made[f"{name}.left"].shape[1]]
        state["bases"] = {
            name: tuple(run.shards.local(made[f"{name}.{side}"]).to(run.device) for side in ("left", "right"))
            for name in names
        }
        anchor = base_anchor(run)
        state["anchor"] = {name: anchor[name] for name in names}

    def before_clip(self, *, run, state, step):
        for name, bases in state["bases"].items():
            _project(run, run.weights[name].grad, *bases)

    def after_step(self, *, run, state, step, gradient):
        for name, bases in state["bases"].items() if self.restore else ():
            weight, start = run.weights[name].detach(), state["anchor"][name]
            weight.copy_(_project(run, weight - start, *bases).add_(start))

    def report(self, *, run, state):
        """The largest of ‖U_hᵀ·ΔW‖/‖ΔW‖ and ‖ΔW·V_h‖/‖ΔW‖ over all matrices: what left the subspace."""
        shares = [0.0]
        for name, (left, right) in state["bases"].items():
            moved = run.weights[name].detach() - state["anchor"][name]
            right = run.shards.whole(right, torch.Size((left.shape[1], moved.shape[1])))
            down = run.shards.sum(left.T @ moved).square().sum()
            across, size = run.shards.sum(torch.stack([(moved @ right.T).square().sum(), moved.square().sum()]))
            shares.append((max(down, across) / size).sqrt().item() if size else 0.0)
        return {"matrices": len(state["bases"]), "outside": float(f"{max(shares):.1e}")}


def _project(run: Run, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """P(matrix), in place; of it and of both bases, U_h (rows × k) and V_hᵀ (k × columns), this process's rows."""
    run.charge(flops=8.0 * matrix.numel() * left.shape[1])
    matrix.addmm_(left, run.shards.sum(left.T @ matrix), alpha=-1)
    right = run.shards.whole(right, torch.Size((left.shape[1], matrix.shape[1])))
    return matrix.addmm_(matrix @ right.T, right, alpha=-1)
