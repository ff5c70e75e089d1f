"""O-LoRA (Wang et al. 2023, arXiv 2310.14152): learn in a subspace orthogonal to that of an earlier adapter.

    penalty = strength · Σ_layers Σ_ij |(A_old·Aᵀ)_ij|        gradient of A: strength · sign(A_old·Aᵀ)ᵀ·A_old,
    A_old, A: rank × in                                       with sign(0) = 0

The loss is in nats per labelled token; the sum is over all pairs of rows of all layers, as published, and is divided by
nothing. The rows of A_old span the inputs that the earlier adapter reads, as an estimate of the gradients of what it
learned. In the paper it learned the tasks before this one in a sequence. With one domain there is none, so an
adapter like `lora`'s is first fitted on general text, from a draw of its own, once for all seeds; or `path` names one.

The earlier adapter is only avoided. The paper also keeps it in the model; here the domain phase would then start from a
model that was trained on general text, and not from the base as every other method does. In a sequence the base has it
merged already. The paper's second term, λ₂·Σ‖·‖ with λ₂ = 0 in its scripts, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from methods.errors import UserError
from methods.part import Part, Prepared, Run, cut, generator, register, setting
from methods.tools import peft_adapter
from methods.tools.adapter import read_adapter
from methods.tools.costs import Memory, Pass
from methods.tools.effective import Factored, factored_weights
from methods.tools.process_group import Shards

OWN_START = "its factor A starts from the weight itself, for the earlier adapter as for the new one"


@register(
    title="O-LoRA",
    paper="https://arxiv.org/abs/2310.14152",
    line="Keep LoRA's update orthogonal to what an earlier adapter, or one fitted on general text, reads.",
    phase="penalty",
)
@dataclass(frozen=True, kw_only=True)
class OLoRA(Part):
    shares = (
        "methods.tools.adapter",
        "methods.tools.effective",
        "methods.tools.importance",
        "methods.tools.peft_adapter",
    )
    scratch = ("carry", "old")

    neutral = {"strength": 0.0}
    trial = {"samples": 4, "length": 24}
    beside = {"lora": {"rank": 2}}
    excludes = dict.fromkeys(("pissa", "milora", "corda", "lora_null", "mica"), OWN_START)

    strength: float = setting(0.5, within="[0, inf)", help="λ₁ of λ₁·Σ|A_old·Aᵀ|, against nats per labelled token")
    path: str | None = setting(
        None, phase="prepare", path=True, help="folder of the earlier adapter; null: one is fitted on general text"
    )
    samples: int = setting(256, phase="prepare", within="[1, inf)", help="documents of general text it is fitted on")
    length: int = setting(512, phase="prepare", within="[2, inf)", help="each document is cut at this many tokens")
    epochs: float = setting(1.0, phase="prepare", within="(0, inf)", help="epochs over them")
    learning_rate: float | None = setting(
        None, phase="prepare", within="(0, inf)", help="of the fit on general text; null: the method's own"
    )

    def look(self, *, shapes):
        if self.path:
            _earlier(self.path, shapes)

    def preparation(self):
        if self.path:
            return ()
        training = {"learning_rate": self.learning_rate, "epochs": self.epochs}
        return (Pass(documents=self.samples, length=self.length, cut_by="length", training=training),)

    def memory(self, *, counts, phase):
        factors = counts.wide * counts.adapters  # at most: A_old is smaller
        return Memory(state=factors) if phase == "train" else Memory(update=factors)

    def prepare(self, *, model, base, general, seed, fit, progress, shards=Shards(), resume=None, sample=None):
        if self.path:
            old = _earlier(self.path, {name: tensor.shape for name, tensor in base.items()})
            return Prepared(carry=old, notes={"layers": len(old)})
        examples = cut(general, samples=self.samples, length=self.length, part=self if shards.first else None)
        if not examples:
            raise UserError("o_lora: there is no general text to fit an adapter on: set `general.importance`")
        draw = generator(self.key, seed)  # with the seed alone A would start where the new adapter's does
        with torch.no_grad():
            for module in model.modules():
                for factor in getattr(module, "lora_A", {}).values():
                    start = nn.init.kaiming_uniform_(torch.empty(factor.weight.shape), a=math.sqrt(5), generator=draw)
                    factor.weight.copy_(start)
        (fitted,) = self.preparation()
        result = fit(model=model, parts=(), examples=examples, seed=seed, **fitted.training)
        old = {weight.name: result.run.whole(weight.a).cpu().clone() for weight in _adapted(result.run)}
        return Prepared(carry=old, tokens=result.tokens, notes={"layers": len(old), "documents": len(examples)})

    def begin(self, *, run, state, examples, general=()):
        adapted = _adapted(run)
        state["old"] = {
            weight.a: state["carry"][weight.name].to(run.device, run.weights[weight.a].dtype)
            for weight in adapted
            if weight.name in state["carry"]
        }
        if not state["old"]:
            raise UserError(
                f"o_lora.path: the adapter in {self.path} is of other layers than this method's: of "
                f"{', '.join(list(state['carry'])[:3])}, and here {adapted[0].name} is adapted first"
            )
        state["at_start"] = _overlap(run, state["old"])

    def before_clip(self, *, run, state, step):
        if not self.strength:
            return None
        value = torch.zeros((), device=run.device)
        for name, old in state["old"].items():
            products = old @ run.weights[name].detach().T  # with this process's rows of A
            run.weights[name].grad.add_(products.sign().T @ old, alpha=self.strength)
            value += products.abs().sum()
        return self.strength * value

    def report(self, *, run, state):
        return {"overlap_at_start": state["at_start"], "overlap": _overlap(run, state["old"])}


def _adapted(run: Run) -> list[Factored]:
    if not (adapted := factored_weights(run)):
        raise UserError("o_lora: the method has no adapters: add `lora` to its block")
    return adapted


def _overlap(run: Run, old: dict[str, Tensor]) -> float:
    """The mean |cosine| of a row of A_old and one of A, over all pairs and layers."""
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for name, other in old.items():
        one, other = (
            nn.functional.normalize(matrix.detach().double().cpu(), dim=1) for matrix in (run.weights[name], other)
        )
        total += (other @ one.T).abs().sum()
        pairs += len(other) * run.shapes[name][0]
    return run.shards.sum(total.to(run.device)).item() / pairs


def _earlier(path: str, shapes: dict) -> dict[str, Tensor]:
    """A of an adapter's folder by base name of the weight. Raises UserError for what is no such adapter, or not of the
    model with these shapes."""
    given, folder = f"o_lora.path: {path}", Path(path)
    if not peft_adapter.is_adapter(folder):
        raise UserError(f"{given} is no folder of a peft adapter: name one with {peft_adapter.CONFIG}")
    if (kind := peft_adapter.read_config(folder, given)["peft_type"]) != "LORA":
        raise UserError(f"{given} is a {kind} adapter, which has no factor A: name a LoRA adapter's folder")
    if shapes:
        peft_adapter.refuse_other_shapes(folder, given, shapes, "the base")
    return {name: update["a"].float().contiguous() for name, update in read_adapter(folder)[0].items()}
