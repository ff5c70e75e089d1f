"""Self-replay: hold the model to text that it wrote itself before it was tuned, so that no other data is needed.

    loss = mean nll of the step's labels + strength · mean over the sampled tokens of a step of

        kl    KL( p₀(·|x<t) ‖ p(·|x<t) ), forward, over the whole vocabulary, in nats (2605.26097: strength 10)
        nll   −log p(x_t|x<t)                                                         (2505.13811)

The base p₀ writes the texts once a model, from the beginning-of-text token alone or behind the first tokens of general
text, which are not learned. A text ends at `tokens` tokens or with the end-of-text token, which belongs to it. Of a
step's tokens `share` are of these texts, as with `replay`; the means are taken apart, so that `share` does not change
the weight of the domain. Both papers add their texts to the domain's batch, as `mode: add` does.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from methods.part import Part, Row, register, setting
from methods.tools import mixture
from methods.tools.costs import Memory, Pass
from methods.tools.process_group import Shards
from methods.tools.sequences import marked
from methods.tools.written import TOGETHER, beginnings, texts, written


@register(
    title="Self-replay",
    paper="https://arxiv.org/abs/2605.26097",
    line="Hold the model to text that the base has written itself.",
    # after the parts that mask labels, before those that count them
    phase="weights",
)
@dataclass(frozen=True, kw_only=True)
class SelfReplay(Part):
    shares = ("methods.tools.mixture", "methods.tools.sequences", "methods.tools.written")
    scratch = ("rows",)
    neutral = {"share": 0.0}
    trial = {"texts": 6, "tokens": 12, "share": 0.4}

    texts: int = setting(256, phase="prepare", within="[1, inf)", help="texts that the base writes")
    tokens: int = setting(128, phase="prepare", within="[1, inf)", help="tokens that it writes of each, at most")
    prompt: int = setting(
        0, phase="prepare", within="[0, inf)", help="tokens of general text that each continues; 0: beginning of text"
    )
    temperature: float = setting(1.0, phase="prepare", within="[0, inf)", help="of the draws; 0: the likeliest token")
    objective: Literal["kl", "nll"] = setting("kl", help="what is taken on the texts: KL to the base, or cross-entropy")
    strength: float = setting(10.0, within="[0, inf)", help="λ of the mean over the sampled tokens, in nats")
    share: float = setting(0.25, within="[0, 1)", help="share of a step's tokens that are of these texts")
    mode: Literal["swap", "add"] = setting("add", help="in place of domain rows, or beside them")

    @property
    def _compares(self) -> bool:
        return self.objective == "kl" and self.share > 0

    def preparation(self):
        made = {"documents": self.texts, "length": self.prompt or 1, "generated": self.tokens, "cut_by": "tokens"}
        return (Pass(**made, rows=min(self.texts, TOGETHER), gradients="none", bare=True),)

    def added(self):
        length = {"length": (self.prompt or 1) + self.tokens, "cut_by": "tokens"} if self.share else {}
        read = mixture.added(share=self.share, mode=self.mode).trained if self._compares else 0.0
        return mixture.added(share=self.share, mode=self.mode, read=read, **length)

    def memory(self, *, counts, phase):
        if phase != "train" or not self._compares:
            return Memory()
        return Memory(state=counts.frozen_base, forward=counts.distributions)

    def calibrate(self, *, model, general, seed, progress, shards=Shards(), sample=None):
        prompts = beginnings(model, general, texts=self.texts, tokens=self.prompt, where=f"{self.key}.prompt")
        settings = {"tokens": self.tokens, "temperature": self.temperature}
        return written(model, prompts, sample=sample, progress=progress, key=self.key, **settings)

    def begin(self, *, run, state, examples, general=()):
        state["rows"] = [self._row(ids, prompt) for ids, prompt in texts(state["carry"])]

    def _row(self, ids: Tensor, prompt: int) -> Row:
        """A text, with a mark where its tokens were sampled; these are labels where they are learned."""
        sampled = torch.arange(len(ids)) >= prompt
        labels = ids.where(sampled & (self.objective == "nll"), -100)
        return {"input_ids": ids, "labels": labels, "self_replay": sampled}

    def examples(self, *, run, state, rows, step):
        if not self.share:
            return rows

        def drawn() -> Iterator[Row]:
            for number in itertools.count():
                draw = run.generator(self.key, step, number)
                yield state["rows"][int(torch.randint(len(state["rows"]), (), generator=draw))]

        draw = run.generator(self.key, step)
        rows = mixture.mixed(rows, drawn, share=self.share, mode=self.mode, draw=draw)
        rows = [{"self_replay": torch.zeros_like(row["labels"], dtype=torch.bool)} | row for row in rows]
        sampled = sum(int(row["self_replay"].sum()) for row in rows)
        labels = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
        others = labels - sampled * (self.objective == "nll")
        # the engine divides by all labels of the step, and each of the two means is to be divided by its own number
        state["own"], state["other"] = (count and max(1, labels) / count for count in (sampled, others))
        return rows

    def token_weights(self, *, run, state, batch, statistics):
        if self._compares or not self.share:
            return None
        own = batch["self_replay"][statistics.rows, statistics.columns]
        other = own.new_full(own.shape, state["other"], dtype=torch.float64)
        return other.masked_fill(own, self.strength * state["own"])

    def loss(self, *, run, state, batch, hidden):
        if not self._compares or not state["own"]:  # no text in this step
            return None
        read = marked(batch, self.key)
        reference = run.reference.hidden(read)[read[self.key][:, 1:].nonzero(as_tuple=True)]
        own = hidden[batch["self_replay"][:, 1:].nonzero(as_tuple=True)]
        return self.strength * state["own"] * run.reference.kl(own, reference)
