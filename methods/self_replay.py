"""Self-replay: hold the model to text that it wrote itself before it was tuned, so that no other data is needed.

    loss = mean nll of the step's labels + strength · mean over the sampled tokens of a step of

        kl    KL( p₀(·|x<t) ‖ p(·|x<t) ), forward, over the whole vocabulary, in nats (2605.26097: strength 10)
        nll   −log p(x_t|x<t)                                                         (2505.13811)

The base p₀ writes the texts once a model, before it sees the domain, from the beginning-of-text token alone or behind
the first tokens of general text, which are not learned. They depend neither on the seed nor on an adapter. A text
ends at `tokens` tokens or with the end-of-text token, which belongs to it. Of a step's tokens `share` are of these
texts, as with `replay`; the means are taken apart, so that `share` does not change the weight of the domain. 2605.26097
draws 64 texts a step from 1,024; it and 2505.13811 add their texts to the domain's batch, as `mode: add` does.
"""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from methods.errors import UserError
from methods.part import Part, Prepared, Row, register, setting
from methods.tools import architecture, mixture
from methods.tools.costs import Memory, Pass
from methods.tools.process_group import Shards

TOGETHER = 32  # texts that are written at once
CHUNK = 1024  # rows of logits that are held at once while predictions are compared


@register(
    title="Self-replay",
    paper="https://arxiv.org/abs/2605.26097",
    line="Hold the model to text that the base has written itself.",
    # after the parts that mask labels, before those that count them
    phase="weights",
)
@dataclass(frozen=True, kw_only=True)
class SelfReplay(Part):
    shares = ("methods.tools.mixture",)
    scratch = ("rows",)
    neutral = {"share": 0.0}
    trial = {"texts": 6, "tokens": 12, "share": 0.4}

    texts: int = setting(256, phase="prepare", within="[1, inf)", help="texts that the base writes")
    tokens: int = setting(128, phase="prepare", within="[1, inf)", help="tokens that it writes of each, at most")
    prompt: int = setting(
        0,
        phase="prepare",
        within="[0, inf)",
        help="tokens of a document of general text that each text continues; 0: the beginning-of-text token alone",
    )
    temperature: float = setting(
        1.0, phase="prepare", within="[0, inf)", help="of the softmax that tokens are drawn from; 0: the likeliest"
    )
    objective: Literal["kl", "nll"] = setting("kl", help="what is taken on the texts: KL to the base, or cross-entropy")
    strength: float = setting(10.0, within="[0, inf)", help="λ of the mean over the sampled tokens, in nats")
    share: float = setting(0.25, within="[0, 1)", help="share of a step's tokens that are of these texts")
    mode: Literal["swap", "add"] = setting("add", help="in place of domain rows, or beside them")

    @property
    def _compares(self) -> bool:
        return self.objective == "kl" and self.share > 0

    def preparation(self):
        start = self.prompt or 1
        rows = min(self.texts, TOGETHER)
        written = {"generated": self.tokens, "cut_by": "tokens", "rows": rows, "gradients": "none", "bare": True}
        return (Pass(documents=self.texts, length=start, **written),)

    def added(self):
        length = {"length": (self.prompt or 1) + self.tokens, "cut_by": "tokens"} if self.share else {}
        read = mixture.added(share=self.share, mode=self.mode).trained if self._compares else 0.0
        return mixture.added(share=self.share, mode=self.mode, read=read, **length)

    def memory(self, *, counts, phase):
        if phase != "train" or not self._compares:
            return Memory()
        # adapters are switched off for the base's predictions; where base tensors are trained, the base is there twice
        copy = counts.share(counts.compute * counts.base) if counts.trained_base else 0
        return Memory(state=copy, forward=5 * counts.wide * counts.vocabulary * CHUNK)

    def calibrate(self, *, model, general, seed, progress, shards=Shards(), sample=None):
        if self.prompt:
            documents = itertools.islice(itertools.cycle(general), self.texts)
            prompts = [document["input_ids"][: self.prompt].tolist() for document in documents]
        else:
            prompts = [[_first_token(model)]] * self.texts
        with progress(total=self.texts, desc="self_replay", unit="text") if progress else nullcontext() as bar:
            written = sample(
                model=model,
                prompts=prompts,
                tokens=self.tokens,
                temperature=self.temperature,
                key=(self.key,),
                ended=True,
                size=TOGETHER,
                done=None if bar is None else bar.update,
            )
        texts = [prompt + text for prompt, text in zip(prompts, written, strict=True)]
        carry = {
            "ids": torch.tensor(list(itertools.chain(*texts)), dtype=torch.int32),
            "lengths": torch.tensor([len(text) for text in texts], dtype=torch.int32),
            "prompts": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32),
        }
        count = sum(map(len, written))
        notes = {"texts": len(texts), "tokens": count, "ended": sum(len(text) < self.tokens for text in written)}
        return Prepared(carry=carry, tokens=sum(map(len, texts)), notes=notes)

    def begin(self, *, run, state, examples, general=()):
        kept = state["carry"]
        whole = kept["ids"].long().split(kept["lengths"].tolist())
        state["rows"] = [self._row(ids, prompt) for ids, prompt in zip(whole, kept["prompts"].tolist(), strict=True)]

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
        texts = _texts(batch)
        reference = run.reference.hidden(texts)[texts["self_replay"][:, 1:].nonzero(as_tuple=True)]
        own = hidden[batch["self_replay"][:, 1:].nonzero(as_tuple=True)]
        return self.strength * state["own"] * run.reference.kl(own, reference)


def _texts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sequences of a micro-batch with sampled tokens, or one token of any, for every process must read something.

    Rows keep their padding, so that the base's numbers are rounded as the model's are, which on the CPU makes the
    gradient of their KL exactly 0 where they agree.
    """
    mark, positions = batch["self_replay"], batch.get("position_ids")
    given = {
        name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "self_replay") if name in batch
    }
    if not mark.any():
        return {name: tensor[:1, :1] for name, tensor in given.items()}
    if positions is None:
        return {name: tensor[mark.any(1)] for name, tensor in given.items()}
    number = (positions == 0).cumsum(1)  # of each sequence of a packed row
    kept = torch.isin(number, number[mark])
    return {name: tensor[kept][None] for name, tensor in given.items()}


def _first_token(model: nn.Module) -> int:
    """The token that every text begins with: the beginning-of-text token, else the end-of-text token."""
    named, known = architecture.plain(model).generation_config, model.get_input_embeddings().num_embeddings
    for token in (named.bos_token_id, named.eos_token_id):
        token = token[0] if isinstance(token, list) else token
        if token is not None and 0 <= token < known:
            return token
    raise UserError(
        "self_replay.prompt is 0, but the model names neither a beginning-of-text token nor an end-of-text token: let "
        "the texts continue general text, such as prompt: 8"
    )
