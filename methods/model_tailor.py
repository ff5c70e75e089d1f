"""Model Tailor (Zhu et al. 2024): after training keep a tenth of the change, compensated for the rest, on the base.

For each linear layer of the blocks, with W its tuned weights, Δ = W − W₀, and H = XXᵀ of the inputs X that it has on
`samples` rows of the domain:

    score = z(|Δ|) + z( Δ² / d² )          z: standardised in each row of a block of columns; d² as [H⁻¹] allows
    the top `fraction` of the block stay tuned, all others return to W₀; later columns make up for what was undone

(methods/tools/compensation.py). The second term is the optimal-brain-surgeon cost of undoing an entry's change: the
paper's text. The published code takes W² in its place (`sensitivity: weight`), and adds the compensation with a plus,
where SparseGPT, from which it is taken, subtracts it. Only the minus lowers the error of the layer's output, so it is
the default; `compensation: plus` is the code's. H is of the tuned model.

Norms, embeddings, biases and the head return to the base, as the paper keeps at most a tenth of the tuned weights
(`rest: tuned` leaves them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from methods.errors import UserError
from methods.part import Part, Run, register, setting
from methods.tools.compensation import GROUP, groups, linear_layers, moments_of, patched
from methods.tools.costs import Memory

SIGNS = {"minus": -1.0, "none": 0.0, "plus": 1.0}


@register(
    title="Model Tailor",
    paper="https://arxiv.org/abs/2402.12048",
    line="After training keep the tenth of the change that matters most, compensated for what is undone.",
    phase="merge",
)
@dataclass(frozen=True, kw_only=True)
class ModelTailor(Part):
    shares = ("methods.tools.compensation",)
    scratch = ("rows",)
    neutral = {"fraction": 1.0}
    trial = {"fraction": 0.3, "samples": 5, "block": 8}

    fraction: float = setting(0.1, within="[0, 1]", help="share of a linear layer's entries that keep their change")
    samples: int = setting(128, within="[1, inf)", help="rows of the domain on which the layers' inputs are measured")
    compensation: Literal["minus", "none", "plus"] = setting(
        "minus", help="how what is left makes up for what is undone: as SparseGPT, not at all, or as the published code"
    )
    sensitivity: Literal["change", "weight"] = setting(
        "change", help="what the cost of an entry is taken of: its change, or the tuned weight as in the published code"
    )
    rest: Literal["base", "tuned"] = setting("base", help="what norms, embeddings, biases and the head become")
    damp: float = setting(0.01, within="(0, inf)", help="share of H's mean diagonal that is added to it")
    block: int = setting(128, within="[2, inf)", help="columns whose entries are chosen together")

    def memory(self, *, counts, phase):
        if phase != "train" or self.fraction == 1:
            return Memory()
        matrices = 6 * 8 * counts.largest_regularised + 6 * 8 * counts.largest_square  # in float64: W's copies, and H's
        return Memory(update=min(GROUP, 4 * counts.wide * counts.base) + matrices)

    def begin(self, *, run, state, examples, general=()):
        drawn = torch.randperm(len(examples), generator=run.generator(self.key))[: self.samples]
        state["rows"] = [examples[index] for index in drawn.tolist()]

    def finish(self, *, run, state, final, measure=None):
        if self.fraction == 1:
            return final
        changed = [name for name, tuned in final.items() if not torch.equal(tuned, run.base[name].to(tuned))]
        layers = linear_layers(run.model, set(run.shards.broadcast(changed)))
        if not layers:
            raise UserError("model_tailor: training changed no linear layer of the model's blocks: take the part out")
        result, kept = (dict(final) if self.rest == "tuned" else {}), 0
        bar = tqdm(total=len(layers), desc=self.key, unit="layer", disable=not run.shards.first, mininterval=1.0)
        with bar:
            for group in groups(layers):
                moments = moments_of(run, state["rows"], group)
                for name in group if run.shards.first else ():
                    result[name] = self._patched(run, final[name], name, moments.pop(name), group[name])
                    kept += int((result[name] != run.base[name].to(result[name])).sum())
                    bar.update()
        if run.shards.first:
            state["kept"] = kept / sum(final[name].numel() for name in layers)
        return result

    def _patched(self, run: Run, tuned: Tensor, name: str, moments: Tensor, layer: nn.Module) -> Tensor:
        turned = isinstance(layer, Conv1D)  # GPT-2 stores in × out
        base, weight = (t.T if turned else t for t in (run.base[name].to(run.device), tuned.to(run.device)))
        settings = {"damp": self.damp, "block": self.block, "sign": SIGNS[self.compensation]}
        try:
            value = patched(base, weight, moments, choose=self._choose, **settings).to("cpu", tuned.dtype)
        except torch.linalg.LinAlgError as error:
            raise UserError(
                f"model_tailor.damp is {self.damp:g}: with it the inputs' products of {name} have no inverse: raise it"
            ) from error
        return value.T.contiguous() if turned else value

    def _choose(self, moved: Tensor, weight: Tensor, d: Tensor, may: Tensor) -> Tensor:
        cost = ((moved if self.sensitivity == "change" else weight) / d).square()
        score = (_standard(moved.abs()) + _standard(cost)).masked_fill_(~may, -torch.inf)
        kept = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
        kept[score.reshape(-1).topk(round(self.fraction * score.numel())).indices] = True
        return kept.view(score.shape)

    def report(self, *, run, state):
        return {"kept": state["kept"]} if "kept" in state else {}


def _standard(values: Tensor) -> Tensor:
    """Each row of values ≥ 0 less its mean, over its standard deviation; 0 where it varies by rounding alone."""
    mean, std = values.mean(1, keepdim=True), values.std(1, correction=0, keepdim=True)
    return (values - mean) / torch.where(std > 1e-12 * mean, std, torch.inf)
