"""Greedy continuations in batches: transformers' `generate` with its cache, prompts padded on the left.

Each row ends by itself, at the end of text or after the first of its stop strings; lm-eval's HFLM continues until every
row of the batch has reached one. The texts are the same: what follows a stop string is cut off.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from evaluation.progress import Bar
from methods.tools import architecture


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is continued: its ids (not empty), the strings it stops at, and the most tokens to write."""

    ids: tuple[int, ...]
    until: tuple[str, ...]
    tokens: int


@torch.no_grad()
def texts(
    *,
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_length: int,
    batch_size: int,
    description: str | None = None,
) -> list[str]:
    """The likeliest next token, again and again, for each prompt; special tokens left out, cut before its stop string.

    A prompt longer than `max_length` less its `tokens` loses its beginning.
    """
    written = [""] * len(prompts)

    def likeness(number: int) -> tuple:
        prompt = prompts[number]
        return prompt.until, prompt.tokens, -len(prompt.ids), prompt.ids

    order = sorted(range(len(prompts)), key=likeness)
    with Bar(total=len(prompts), desc=description, unit="text", disable=None if description else True) as bar:
        for batch in _batches(order, prompts, batch_size):
            for number, text in zip(batch, _continued(model, tokenizer, [prompts[i] for i in batch], max_length)):
                written[number] = text
            bar.update(len(batch))
    return written


def ends_of_text(model: torch.nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the model's own and the tokenizer's."""
    named = model.generation_config.eos_token_id
    ids = named if isinstance(named, list) else [named]
    own = [] if tokenizer is None else [tokenizer.eos_token_id]
    return sorted({i for i in [*ids, *own] if i is not None})


def padding(model: torch.nn.Module, tokenizer: Any) -> int:
    """The id that fills up short rows, which nothing attends to: the tokenizer's if the model embeds it, else 0."""
    pad = None if tokenizer is None else tokenizer.pad_token_id
    return pad if pad is not None and 0 <= pad < model.get_input_embeddings().num_embeddings else 0


def padded(rows: Sequence[Sequence[int]], pad: int, *, side: str = "left") -> tuple[Tensor, Tensor]:
    """(ids, attention mask), each (rows, tokens)."""
    width = max(map(len, rows))

    def filled(own: list[int], other: int) -> list[int]:
        missing = [other] * (width - len(own))
        return missing + own if side == "left" else own + missing

    ids, mask = [filled(list(row), pad) for row in rows], [filled([1] * len(row), 0) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _batches(order: list[int], prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """At most `size` prompts together, all with the same stop strings and number of tokens, longest first."""
    batches: list[list[int]] = []
    for number in order:
        new = prompts[number]
        first = prompts[batches[-1][0]] if batches else None
        if first is None or len(batches[-1]) == size or (first.until, first.tokens) != (new.until, new.tokens):
            batches.append([])
        batches[-1].append(number)
    return batches


def generated(
    *,
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    tokens: int,
    processors: Sequence[Any] = (),
    criteria: Sequence[Any] = (),
    together: bool = False,
    ended: bool = False,
) -> list[list[int]]:
    """The likeliest continuation of each row of token ids, at most `tokens` ids, without the end of text.

    processors   change the logits that the likeliest token is taken of (transformers' LogitsProcessor)
    criteria     end a row early (transformers' StoppingCriteria)
    together     other processes share the model: each goes on until all have finished
    ended        with the end of text, where a row has come to one
    """
    model = architecture.plain(model)  # adapters stay where they are in it
    pad = padding(model, tokenizer)
    ids, seen = padded(rows, pad)
    width = ids.shape[1]
    device = next(model.parameters()).device
    ends = ends_of_text(model, tokenizer)
    whole = model.generate(
        input_ids=ids.to(device),
        attention_mask=seen.to(device),
        max_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=ends or None,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList(criteria),
        synced_gpus=together,
    )
    return [
        row[: next((place + ended for place, token in enumerate(row) if token in ends), tokens)]
        for row in whole[:, width:].tolist()
    ]


def _continued(model: torch.nn.Module, tokenizer: Any, batch: list[Prompt], max_length: int) -> list[str]:
    until, tokens = batch[0].until, batch[0].tokens
    rows = [prompt.ids[-(max_length - tokens) :] for prompt in batch]
    stop = StopStrings(tokenizer, until, start=max(map(len, rows)), rows=len(batch))
    return [
        postprocess_generated_text(tokenizer.decode(row, skip_special_tokens=True), list(until), None)
        for row in generated(model=model, tokenizer=tokenizer, rows=rows, tokens=tokens, criteria=[stop])
    ]


class StopStrings(StoppingCriteria):
    """Which rows have written one of the strings, looking at as many last tokens as the longest string can take.

    start   tokens of the padded prompts
    """

    def __init__(self, tokenizer: Any, until: tuple[str, ...], *, start: int, rows: int):
        self.tokenizer, self.until, self.start = tokenizer, [text for text in until if text], start
        self.window = max((len(text.encode()) for text in self.until), default=0) + 4
        self.done = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if self.until:
            tails = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :]
            for row, tail in enumerate(self.tokenizer.batch_decode(tails, skip_special_tokens=True)):
                if not self.done[row] and self._in(tail):
                    # a tail that is cut inside a character may read differently, so look at the whole
                    whole = self.tokenizer.decode(input_ids[row, self.start :], skip_special_tokens=True)
                    self.done[row] = self._in(whole)
        return self.done.to(input_ids.device)

    def cut(self, ids: Sequence[int]) -> list[int]:
        """What one row has written, up to the token with which the first of the strings is complete."""
        texts = (self.tokenizer.decode(ids[:count], skip_special_tokens=True) for count in range(1, len(ids)))
        return list(ids[: next((count for count, text in enumerate(texts, 1) if self._in(text)), len(ids))])

    def _in(self, text: str) -> bool:
        return any(stop in text for stop in self.until)
