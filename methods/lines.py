"""LiNeS (Wang et al. 2024): scale the update less in early blocks and more in late ones.

    θ = θ₀ + (α + β·l/(L−1))·Δ in block l = 0 … L−1        θ = θ₀ + α·Δ outside the blocks        Δ = θ_tuned − θ₀

Early blocks hold what is general, so they stay closer to the base. For one task the paper sets β = 1 − α, so that the
last block keeps its whole update; this is the default here. Embedding, final norm and head are scaled by α, as in the
published code. That code finds a block by its name; here it is found by the model's structure. The only block of a
model with one is its last. Adapters are merged before.
"""

from dataclasses import dataclass

from methods.part import Part, register, setting
from methods.tools.architecture import base_name, blocks
from methods.tools.task_vector import moved


@register(
    title="LiNeS",
    paper="https://arxiv.org/abs/2410.17146",
    line="Scale the update block by block, from little in the first to all of it in the last.",
    phase="interpolate",
)
@dataclass(frozen=True, kw_only=True)
class LiNeS(Part):
    shares = ("methods.tools.task_vector",)

    neutral = {"alpha": 1.0}

    alpha: float = setting(0.5, within="[0, 1]", help="scale in the first block and outside the blocks")
    beta: float | None = setting(
        None, within="[0, inf)", help="what is added to it until the last block; null: 1 − alpha"
    )

    def finish(self, *, run, state, final, measure=None):
        scales = self._scales(run.model)
        return {
            name: moved(
                run.base[name],
                tuned,
                next((scale for prefix, scale in scales.items() if name.startswith(prefix)), self.alpha),
            )
            for name, tuned in final.items()
        }

    def _scales(self, model) -> dict[str, float]:
        """The scale of each block, by the beginning of its parameters' names in the base."""
        stack = blocks(model)
        rise = 1 - self.alpha if self.beta is None else self.beta
        share = [index / (len(stack) - 1) if len(stack) > 1 else 1.0 for index in range(len(stack))]
        return {base_name(f"{path}."): self.alpha + rise * part for (path, _), part in zip(stack, share, strict=True)}

    def report(self, *, run, state):
        return {"outside_blocks": self.alpha, "blocks": list(self._scales(run.model).values())}
