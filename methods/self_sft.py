"""Self-SFT: learn right answers in the model's own words, drawn anew in each epoch (2510.18874).

At the beginning of an epoch the model as it is then answers the prompt of every row `samples` times. The first answer
that is accepted takes the place of the domain's:

    accept   equal      it is the domain's answer, but for case, white space and the punctuation around it
             contains   the domain's answer stands in it as words
             any        whatever it is

The loss stays the mean cross-entropy of the step's labelled tokens. This is rejection sampling; the paper draws anew
with reinforcement learning, and finds that data of the initial policy alone (`refresh: once`) keeps less. An answer
counts only where it has ended: with the end of text where the domain's answers have one, else with that or with `stop`,
neither of which is then learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from methods.errors import UserError
from methods.part import Part, register, setting
from methods.tools import answers
from methods.tools.costs import Added


@register(
    title="Self-SFT",
    paper="https://arxiv.org/abs/2510.18874",
    line="Learn the model's own answers where they are right, drawn anew in each epoch.",
    phase="data",
)
@dataclass(frozen=True, kw_only=True)
class SelfSFT(Part):
    shares = ("methods.tools.answers",)
    neutral = {"samples": 0}
    # many answers end with bytes that are no text
    trial = {"samples": 2, "tokens": 4, "accept": "any", "stop": "\ufffd"}

    samples: int = setting(4, within="[0, inf)", help="answers sampled for each row")
    tokens: int = setting(64, within="[1, inf)", help="most tokens of a sampled answer")
    temperature: float = setting(0.8, within="[0, inf)", help="of the softmax that answers are drawn from")
    accept: Literal["equal", "contains", "any"] = setting("equal", help="which answers may take the domain's place")
    extract: str = setting("", help="regular expression: its last match in both answers is compared; empty: the whole")
    otherwise: Literal["keep", "leave-out"] = setting("keep", help="rows without an accepted answer: keep the domain's")
    refresh: Literal["epoch", "once"] = setting("epoch", help="sample in each epoch, or in the first one alone")
    stop: str = setting("\n", help="text that ends a sampled answer where the domain's have no end of text")

    def __post_init__(self):
        super().__post_init__()
        answers.refuse_expression(self.extract, where="self_sft.extract")

    def added(self):
        return Added(read=float(self.samples))

    def begin(self, *, run, state, examples, general=()):
        if not self.samples:
            return
        answers.refuse(examples, part=self.key)
        state["longest"] = max(len(row["input_ids"]) for row in examples)
        state["ended"] = answers.has_end(run, examples)
        state["accepted"] = []  # share of the rows, by epoch
        if not any(self._accepts(run, answer, answer) for _, answer in map(answers.divided, examples)):
            raise UserError(f"self_sft.extract is {self.extract!r}, which matches no answer of the domain: correct it")

    def epoch(self, *, run, state, examples, epoch):
        if not self.samples:
            return examples
        if epoch and self.refresh == "once":
            return state["drawn"]
        rows = [answers.divided(row) for row in examples]
        prompts = [answers.fitting(run, prompt or answer[:1], tokens=self.tokens) for prompt, answer in rows]
        asked = [prompt for prompt in prompts for _ in range(self.samples)]
        until = (self.stop,) if self.stop and not state["ended"] else ()
        given = {"tokens": self.tokens, "temperature": self.temperature, "key": (self.key, epoch), "ended": True}
        sampled = iter(run.sample(prompts=asked, until=until, **given))
        found = []
        for row, (_, answer) in zip(examples, rows, strict=True):
            end = answer[-1] if state["ended"] else None
            own = [answers.finished(run, next(sampled), end=end, stop=self.stop) for _ in range(self.samples)]
            room = state["longest"] - len(row["labels"]) + len(answer)
            found.append([ids for ids in own if 0 < len(ids) <= room and self._accepts(run, ids, answer)])
        state["accepted"].append(sum(map(bool, found)) / len(found))
        if not any(found) and run.shards.first:
            print(
                f"self_sft: no sampled answer was accepted in epoch {epoch + 1}, so that nothing of the model's own is "
                "learned: look at `extract`, `accept` and `stop`, or take a model that answers better",
                flush=True,
            )
        drawn = [self._row(*each) for each in zip(examples, rows, found, strict=True)]
        if self.refresh == "once":
            state["drawn"] = drawn
        return drawn

    def _accepts(self, run, ids: list[int], answer: list[int]) -> bool:
        if self.accept == "any":
            return True
        own, right = (answers.normalised(answers.extracted(run.decode(each), self.extract)) for each in (ids, answer))
        return bool(right) and (own == right if self.accept == "equal" else answers.contains(own, right))

    def _row(self, row, parts: tuple, found: list):
        if found:
            prompt, answer = parts
            rest = {name: row[name][len(prompt) + len(answer) :] for name in ("input_ids", "labels")}
            return answers.row_of(prompt, found[0], rest)
        return row if self.otherwise == "keep" else row | {"labels": torch.full_like(row["labels"], -100)}

    def examples(self, *, run, state, rows, step):
        if not self.samples or self.otherwise == "keep":
            return rows
        return [row for row in rows if "index" not in row or (row["labels"] != -100).any()] or rows[:1]

    def report(self, *, run, state):
        return {"accepted": state["accepted"]} if self.samples else {}
