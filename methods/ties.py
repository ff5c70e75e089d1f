"""TIES-Merging (Yadav et al. 2023): trim the update, elect a sign for each entry, and average what agrees with it.

    θ = θ₀ + λ·mean{ Δ̃_k : sign Δ̃_k = γ },   γ = sign Σ_k Δ̃_k,   Δ̃_k = Δ_k with all but its largest entries at zero

Δ_k = θ_k − θ₀ is the update of the k-th model: this run's own, and that of every folder named in `models`, a
checkpoint or an adapter of the same base. The mean is over the models that have the elected sign, entry by entry. With
no other model the part trims and scales: θ = θ₀ + λ·Δ̃.

The share `fraction` of an update's entries with the largest |Δ| is kept, counted over all tensors that the model
changed together, as in the paper, or within each tensor (`trim: tensor`), as in peft and mergekit. Tensors that equal
the base's, such as those that a LoRA run does not adapt, are no part of the count: with them in it, the largest 20 %
would be its whole update. Of equal sizes the first are kept. Where the updates cancel exactly there is no sign, and the
entry is the base's; the published code takes the sign that most entries of the model have.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from methods.part import Part, register, setting
from methods.tools.checkpoint import fits, read
from methods.tools.task_vector import largest

WHERE = "ties.models"


@register(
    title="TIES",
    paper="https://arxiv.org/abs/2306.01708",
    line="Trim the update to its largest entries, and merge it with other models' by elected signs.",
    phase="merge",
)
@dataclass(frozen=True, kw_only=True)
class TIES(Part):
    shares = (
        "methods.tools.checkpoint",
        "methods.tools.peft_adapter",
        "methods.tools.rebuilt",
        "methods.tools.task_vector",
    )

    neutral = {"fraction": 1.0, "scale": 1.0}

    fraction: float = setting(0.2, within="[0, 1]", help="share of an update's entries that is kept")
    scale: float = setting(1.0, within="[0, inf)", help="λ of the merged update")
    trim: Literal["model", "tensor"] = setting("model", help="the entries that are compared when an update is trimmed")
    models: tuple[str, ...] = setting(
        (), path=True, help="folders of other checkpoints or adapters of the same base, merged with this run's weights"
    )

    def look(self, *, shapes):
        for path in self.models:
            fits(path, shapes, where=WHERE)

    def finish(self, *, run, state, final, measure=None):
        if not run.shards.first or (self.fraction == self.scale == 1 and not self.models):
            return final
        updates = [self._trimmed(run.base, final)]
        updates += [self._trimmed(run.base, read(path, run, where=WHERE)) for path in self.models]
        merged, moved, entries = {}, 0, 0
        for name in dict.fromkeys(name for update in updates for name in update):
            change = elected([update[name] for update in updates if name in update])
            merged[name] = run.base[name].to(change).add(change, alpha=self.scale)
            moved, entries = moved + int((change != 0).sum()), entries + change.numel()
        state["moved"] = moved / max(1, entries)
        return merged

    def _trimmed(self, base, tuned) -> dict[str, Tensor]:
        """Δ̃ of one model by name."""
        updates = {name: tensor - base[name].to(tensor) for name, tensor in tuned.items()}
        updates = {name: update for name, update in updates.items() if update.any()}
        if self.trim == "tensor":
            masks = [largest(update.abs(), self.fraction) for update in updates.values()]
        else:
            every = torch.cat([torch.empty(0), *(update.abs().flatten() for update in updates.values())])
            masks = largest(every, self.fraction).split([update.numel() for update in updates.values()])
        return {
            name: update.mul_(mask.view(update.shape))
            for (name, update), mask in zip(updates.items(), masks, strict=True)
        }

    def report(self, *, run, state):
        return {"models": 1 + len(self.models)} | ({"moved": state["moved"]} if "moved" in state else {})


def elected(updates: list[Tensor]) -> Tensor:
    """The mean of those updates that have the sign of their sum, entry by entry; 0 where the sum is."""
    if len(updates) == 1:
        return updates[0]
    sign = sum(updates).sign()
    agree = [(update.sign() == sign) & (sign != 0) for update in updates]
    total = sum(update * mask for update, mask in zip(updates, agree, strict=True))
    return total / sum(mask.to(total) for mask in agree).clamp_(min=1)
