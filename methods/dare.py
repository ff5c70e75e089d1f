"""DARE (Yu et al. 2023): drop entries of the update at random and rescale the others.

    θ = θ₀ + m ⊙ Δ/(1 − p)        m ~ Bernoulli(1 − p) for each entry        Δ = θ_tuned − θ₀

so that the update's mean over draws stays Δ. Dropped entries are the base's, bit for bit. m is drawn from the run's
seed and the tensor's name: it depends on no other tensor and on no number of processes. `rescale: false` leaves the
kept entries as they were tuned, which is plain random pruning. The paper drops 90 % or 99 % of updates that are mostly
below 0.002, and reports that larger ones do not survive it.
"""

from dataclasses import dataclass

import torch

from methods.part import Part, register, setting
from methods.tools.task_vector import moved


@register(
    title="DARE",
    paper="https://arxiv.org/abs/2311.03099",
    line="Drop entries of the update at random and rescale those that are left.",
    phase="merge",
)
@dataclass(frozen=True, kw_only=True)
class DARE(Part):
    shares = ("methods.tools.task_vector",)

    neutral = {"drop": 0.0}
    trial = {"drop": 0.2}  # in tensors of 32 entries three would be left of 0.9

    drop: float = setting(0.9, within="[0, 1)", help="p, the probability with which an entry becomes the base's")
    rescale: bool = setting(True, help="divide what is kept by 1 − p")

    def finish(self, *, run, state, final, measure=None):
        if self.drop == 0:
            return final
        scale, dropped = 1 / (1 - self.drop) if self.rescale else 1.0, {}
        for name, tuned in final.items():
            base = run.base[name].to(tuned)
            keep = torch.rand(tuned.shape, generator=run.generator(self.key, name)) >= self.drop
            dropped[name] = torch.where(keep, moved(base, tuned, scale), base)
        return dropped
