"""Source-shielded updates (Yamaguchi et al., arXiv 2512.04844): columns that general text relies on are frozen.

    s_j = ‖W[:, j]‖₂ · ‖X_j‖₂        for each input j of each linear layer in the blocks, after Wanda (arXiv 2306.11695)
    the (1 − fraction)·in columns with the largest s_j do not move

X_j is the layer's input j over all tokens of general text, on the bare model; both norms are of whole vectors. With
GPT-2's Conv1D a column of W is a row of the stored tensor. Embeddings, head, norms and biases train, and so do experts
that are no linear layers. The published script masks gradients, so that its weight decay (0.01) still moves what it
froze; here frozen columns are the base's to the bit. It also freezes the embeddings of a chat template's tokens and
half of the entries of norms and biases, which is not done here.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.errors import UserError
from methods.part import Part, Prepared, cut, register, setting
from methods.tools.architecture import hidden_states, linear_weights
from methods.tools.costs import Memory, Pass
from methods.tools.process_group import Shards


@register(
    title="SSU",
    paper="https://arxiv.org/abs/2512.04844",
    line="Freeze the columns of weights whose inputs general text relies on.",
    phase="mask",
)
@dataclass(frozen=True, kw_only=True)
class SourceShielded(Part):
    neutral = {"fraction": 1.0}
    excludes = {"adapter": "ssu freezes columns of the base's matrices, which do not train beside an adapter"}
    trial = {"samples": 4, "length": 24}

    fraction: float = setting(0.5, within="[0, 1]", help="share of each linear layer's columns that move")
    samples: int = setting(500, phase="prepare", within="[1, inf)", help="documents of general text")
    length: int = setting(512, phase="prepare", within="[1, inf)", help="each document is cut at this many tokens")

    def preparation(self):
        return (Pass(documents=self.samples, length=self.length, cut_by="length", gradients="none", bare=True),)

    def memory(self, *, counts, phase):
        """What has frozen columns is held once more during a step; masks and scores have an entry for each column."""
        return Memory(update=counts.share(counts.wide * counts.trained) if phase == "train" else 0)

    def calibrate(self, *, model, general, seed, progress, shards=Shards(), sample=None):
        """s of each linear layer's inputs by the name of its weight, (in,), float32."""
        documents = cut(general, samples=self.samples, length=self.length, part=self if shards.first else None)
        if not documents:
            raise UserError("ssu: there is no general text: set `general.importance`")
        parameters, inputs = dict(model.named_parameters()), linear_weights(model)
        with progress(total=len(documents), desc="ssu", unit="doc") if progress else nullcontext() as bar:
            squares = input_squares(model, [d["input_ids"] for d in documents], bar=bar, shards=shards)
        scores = {}
        for name, dim in inputs.items():
            columns = torch.linalg.vector_norm(parameters[name].detach(), dim=1 - dim, dtype=torch.float64)
            scores[name] = (columns * squares[name].sqrt()).float().cpu()
        return Prepared(calibration=scores, tokens=sum(len(d["input_ids"]) for d in documents))

    def begin(self, *, run, state, examples, general=()):
        state["frozen"], inputs = {}, linear_weights(run.model)
        for name, score in state["calibration"].items():
            count = round((1 - self.fraction) * len(score))
            if count and name in run.weights:
                mask = torch.zeros(len(score), dtype=torch.bool)
                mask[score.argsort(descending=True, stable=True)[:count]] = True
                mask = mask[None, :] if inputs[name] == 1 else run.shards.local(mask[:, None])
                state["frozen"][name] = mask.to(run.device)

    def report(self, *, run, state):
        frozen = sum(round((1 - self.fraction) * len(state["calibration"][name])) for name in state["frozen"])
        return {"layers": len(state["frozen"]), "frozen_columns": frozen}


@torch.no_grad()
def input_squares(model: nn.Module, texts: list[Tensor], *, bar=None, shards: Shards = Shards()) -> dict[str, Tensor]:
    """Σ x_j² over all tokens, for each input j of each linear layer in the blocks: (in,), float64, by weight name.

    Each process reads its share of the texts, one at a time, so that there is no padding.
    """
    sums: dict[str, Tensor] = {}

    def adding(name: str):
        def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            flat = arguments[0].flatten(0, -2)
            sums[name] += torch.linalg.vector_norm(flat, dim=0, dtype=torch.float64).square_()

        return add

    training, device = model.training, next(model.parameters()).device
    model.eval()
    with ExitStack() as hooks:
        for name, dim in linear_weights(model).items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            sums[name] = torch.zeros(layer.weight.shape[dim], dtype=torch.float64, device=device)
            hooks.callback(layer.register_forward_pre_hook(adding(name)).remove)
        for at in range(shards.rank, len(texts), shards.world):
            hidden_states(model, texts[at][None].to(device), None)
            if bar is not None:
                bar.update(min(shards.world, len(texts) - at))
    model.train(training)
    return {name: shards.sum(total) for name, total in sums.items()}
