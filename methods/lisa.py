"""Layerwise importance sampled AdamW (Pan et al., arXiv 2403.17919): a few blocks at a time train, drawn at random.

    every `every` steps: draw `blocks` of the model's transformer blocks; the others do not move until the next draw

What is in no block (embeddings, head, final norm) always trains. The optimizer's state of a block is dropped as soon as
the block is frozen, so that it begins anew when it is drawn again; this is what saves memory: moments exist of the
blocks that train. The gradients of frozen blocks are computed here all the same, and discarded before clipping. The
blocks are drawn uniformly, from the seed and the number of the draw. A block that once trained stays where it is while
it is frozen, so the base comes back nowhere: LISA claims memory and speed, not retention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from methods.part import Part, register, setting
from methods.tools.architecture import blocks
from methods.tools.costs import Memory


@register(
    title="LISA",
    paper="https://arxiv.org/abs/2403.17919",
    line="Train a few random blocks at a time, and always what is in no block.",
    phase="mask",
)
@dataclass(frozen=True, kw_only=True)
class LISA(Part):
    scratch = ("optimizer",)

    neutral = {"blocks": 1000}
    frozen = "for a while: the blocks that train are drawn anew"

    blocks: int = setting(
        1, within="[1, inf)", help="γ, the number of blocks that train at a time; all from the model's number on"
    )
    every: int = setting(20, within="[1, inf)", help="K, the optimizer steps from one draw to the next")

    def memory(self, *, counts, phase):
        """What is frozen is held once more during a step."""
        return Memory(update=counts.share(counts.wide * counts.trained) if phase == "train" else 0)

    def begin(self, *, run, state, examples, general=()):
        paths = [f"{path}." for path, _ in blocks(run.model)]
        state["block"] = {
            name: index for name in run.weights for index, path in enumerate(paths) if name.startswith(path)
        }
        state["steps"] = [0] * len(paths)

    def optimizer_ready(self, *, run, state, optimizer):
        state["optimizer"] = optimizer

    def examples(self, *, run, state, rows, step):
        draw = run.generator(self.key, step // self.every)
        drawn = torch.randperm(len(state["steps"]), generator=draw)[: self.blocks].tolist()
        for index in drawn:
            state["steps"][index] += 1
        if step % self.every:
            return rows
        before = state.get("frozen", {})
        state["frozen"] = {name: torch.tensor(index not in drawn) for name, index in state["block"].items()}
        for name, frozen in state["frozen"].items():
            if frozen or before.get(name, False):
                state["optimizer"].state.pop(run.weights[name], None)
        return rows

    def report(self, *, run, state):
        return {"steps_by_block": state["steps"]}
