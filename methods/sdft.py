"""SDFT: the model learns its own answers as it would give them with the right one in view (2601.19897).

For every row of a step, with the prompt x and the domain's answer a:

    y ~ p_θ(· | x)                                          the answer is sampled from the model as it is
    loss = 1/n · Σ_t KL( p_φ(· | c, y<t) ‖ p_θ(· | x, y<t) )        c: the `template` with x and a; n: labelled tokens
    φ ← (1 − rate)·φ + rate·θ                               after each step, in float32; φ begins as θ

KL over the whole vocabulary, in nats, on the tokens of y, its end of text included. There is no cross-entropy on a. The
text of the paper has the reverse KL(p_θ‖p_φ), its authors' runs the forward one, which is the default here; TRL's
trainer takes half of each on the 100 likeliest tokens and the base as the teacher. No gradient flows through y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from methods.part import Part, register, setting
from methods.tools import answers
from methods.tools.costs import Added, Memory

NO_ANSWER = "sdft does not learn the domain's answers, on which the other acts in the loss"


@register(
    title="SDFT",
    paper="https://arxiv.org/abs/2601.19897",
    line="Distil the model's own answers from a teacher that sees the right one.",
    phase="data",
)
@dataclass(frozen=True, kw_only=True)
class SDFT(Part):
    shares = ("methods.tools.answers",)
    scratch = ("teacher", "states")
    neutral = "none: it learns sampled answers in place of the domain's"
    # a teacher far from the model: where both nearly agree, rounding decides the sign of Adam's first step
    trial = {"tokens": 3, "template": "{prompt} {answer}."}
    excludes = {
        "self_sft": "each puts sampled answers in the place of the domain's; keep one",
        **dict.fromkeys(("stm", "flow", "eaft", "talr", "dft", "asft", "profit"), NO_ANSWER),
    }

    teacher: Literal["ema", "base"] = setting("ema", help="a mean of the weights over the steps, or the frozen base")
    rate: float = setting(0.01, within="[0, 1]", help="share of the new weights in the mean after each step")
    direction: Literal["forward", "reverse"] = setting("forward", help="KL(teacher‖model), or KL(model‖teacher)")
    template: str = setting(
        "{prompt}{answer}\n\n{prompt}", help="what the teacher reads before the sampled answer: {prompt} and {answer}"
    )
    tokens: int = setting(128, within="[1, inf)", help="most tokens of a sampled answer")
    temperature: float = setting(1.0, within="[0, inf)", help="of the softmax that answers are drawn from")
    stop: str = setting("\n", help="text that ends a sampled answer where the domain's have no end of text")

    def __post_init__(self):
        super().__post_init__()
        answers.refuse_template(self.template, where="sdft.template")

    def added(self):
        return Added(read=1.0 + self.template.count("{prompt}"))  # to sample, and by the teacher

    def memory(self, *, counts, phase):
        if phase != "train":
            return Memory()
        if self.teacher == "base":
            return Memory(state=counts.frozen_base, forward=counts.distributions)
        mean = counts.share(counts.wide * counts.trained) + counts.compute * counts.head_trained
        swapped = counts.share(counts.wide * counts.largest_trained)
        return Memory(state=mean, forward=counts.distributions, update=swapped)

    def begin(self, *, run, state, examples, general=()):
        answers.refuse(examples, part=self.key)
        state["longest"] = max(len(row["input_ids"]) for row in examples)
        state["until"] = (self.stop,) if self.stop and not answers.has_end(run, examples) else ()

    def optimizer_ready(self, *, run, state, optimizer):
        state["teacher"] = run.reference
        if self.teacher == "ema":
            state["mean"] = {name: weight.detach().clone() for name, weight in run.weights.items()}
            state["teacher"] = run.teacher(state["mean"])

    def examples(self, *, run, state, rows, step):
        if step and self.teacher == "ema":  # not in after_step, where other parts may still move the weights
            for name, mean in state["mean"].items():
                mean.lerp_(run.weights[name].detach(), self.rate)
        domain = [answers.divided(row) for row in rows if "index" in row]
        prompts = [prompt or answer[:1] for prompt, answer in domain]
        if not prompts:
            return rows
        given = {"tokens": self.tokens, "temperature": self.temperature, "until": state["until"]}
        asked = [answers.fitting(run, prompt, tokens=self.tokens) for prompt in prompts]
        sampled = run.sample(prompts=asked, key=(self.key, step), ended=True, **given)
        # no row becomes longer than the domain's longest, which the memory is planned for
        sampled = [own[: max(1, state["longest"] - len(x))] for x, own in zip(prompts, sampled, strict=True)]
        read = []
        for prompt, (_, answer), own in zip(prompts, domain, sampled, strict=True):
            view = answers.filled(run, self.template, prompt=prompt, answer=answer, tokens=self.tokens)
            read.append(answers.row_of(view, own))
        state["states"] = torch.cat(state["teacher"].states(read))
        changed, count = [answers.row_of(prompt, own) for prompt, own in zip(prompts, sampled, strict=True)], 0
        for row in changed:
            learned = row["labels"] != -100
            row["sdft"] = torch.where(learned, learned.cumsum(0) + count, 0)  # a token's place in `states`, from 1
            count += int(learned.sum())
        left = iter(changed)
        return [next(left) | {"index": row["index"]} if "index" in row else row for row in rows]

    def token_weights(self, *, run, state, batch, statistics):
        if "sdft" not in batch:
            return None
        return (batch["sdft"][statistics.rows, statistics.columns] == 0).double()  # 1 for rows of other parts

    def loss(self, *, run, state, batch, hidden):
        if "sdft" not in batch:
            return None
        # every process runs the teacher for every micro-batch, also where there is nothing to compare
        line, column = batch["sdft"][:, 1:].nonzero(as_tuple=True)
        states = state["states"][batch["sdft"][line, column + 1] - 1]
        return state["teacher"].kl(hidden[line, column], states, reverse=self.direction == "reverse")
