"""The language models lm-eval asks: its own HFLM, and HFLM with our scorer and our generation in place of its forward passes."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from evaluation import encode, generate, shared_prefix
from evaluation.kept import KeptTokens
from experiments.errors import UserError

SCORERS = ("shared-prefix", "hflm")
TOKENS_PER_BATCH_SIZE = shared_prefix.TOKENS // 16  # batch_size 16 stands for the default budget of tokens


class QuietLM(HFLM):
    """lm-eval's HFLM, every value its own; without progress bars where nobody watches."""

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        _room(requests, self)
        return super().generate_until(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        # HFLM shows a bar for each batch of windows
        quiet = disable_tqdm or override_bs is not None or not sys.stderr.isatty()
        return super()._loglikelihood_tokens(requests, disable_tqdm=quiet, override_bs=override_bs)


class SharedPrefixLM(HFLM):
    """HFLM whose log-likelihoods come from `evaluation.shared_prefix`: each context once, the logits that are asked for.

    Everything else (encoding, truncation from the left, rolling windows) is HFLM's. Equal to HFLM within 1e-3 nats in
    float32; in half precision the softmax is taken in float32 here and in half there. Texts come from
    `evaluation.generate` and are HFLM's where the tokenizer's end of text is the model's own; where it is another token,
    a text ends there, while HFLM writes on behind it.

    kept    a folder in which the ids of choices are kept for the next model, or None
    """

    def __init__(self, *args: Any, kept: Path | None = None, **settings: Any):
        super().__init__(*args, **settings)
        self.kept = KeptTokens(kept, self.tokenizer, [self.add_bos_token, self.prefix_token_id]) if kept else None

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = self.kept.load([request.args for request in requests]) if self.kept else None
        if pairs is not None:
            return self._ask(pairs, "scoring choices")
        return super().loglikelihood(requests, disable_tqdm=True)  # encoding takes moments

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        if self.kept:
            self.kept.save([texts for texts, _, _ in requests], pairs)
        return self._ask(pairs, "scoring choices")

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        pieces, owners = [], []
        for number, request in enumerate(requests):
            for piece in encode.windows(
                self.tok_encode(request.args[0]), prefix=self.prefix_token_id, max_length=self.max_length
            ):
                pieces.append(piece)
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._ask(pieces, "scoring text")):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        asked = _room(requests, self)
        prompts = [
            generate.Prompt(ids=tuple(self.tok_encode(request.args[0])), until=tuple(kwargs["until"]), tokens=kwargs["max_gen_toks"])
            for request, kwargs in zip(requests, asked)
        ]
        return generate.texts(
            model=self.model,
            tokenizer=self.tokenizer,
            prompts=prompts,
            max_length=self.max_length,
            batch_size=self.batch_size,
            description="writing answers",
        )

    def _ask(self, requests: list[shared_prefix.Request], what: str) -> list[tuple[float, bool]]:
        return shared_prefix.log_likelihoods(
            self.model,
            requests,
            max_length=self.max_length,
            tokens=self.batch_size * TOKENS_PER_BATCH_SIZE,
            description=what,
        )


def _room(requests: Sequence[Any], asked: HFLM) -> list[dict[str, Any]]:
    """Each request's generation settings; UserError where they leave no room for the prompt."""
    settings = [normalize_gen_kwargs(request.args[1], asked.max_gen_toks) for request in requests]
    for request, kwargs in zip(requests, settings):
        if kwargs["max_gen_toks"] >= asked.max_length:
            raise UserError(
                f"task {request.task_name}: an answer may have {kwargs['max_gen_toks']} tokens, but the model takes {asked.max_length} in "
                "all: lower `generation_kwargs: {max_gen_toks: ...}` of the task, or choose a model that takes more"
            )
    return settings


def build(model: torch.nn.Module, tokenizer: Any, *, scorer: str, batch_size: int, kept: Path | None = None) -> tuple[HFLM, str]:
    """The lm-eval model for `scorer`, and what it is called in the scores (with the reason where it is not used)."""
    if scorer not in SCORERS:
        raise UserError(f"scorer {scorer!r} is unknown: choose one of {', '.join(SCORERS)}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size {batch_size!r}: give a whole number of at least 1")
    if scorer == "shared-prefix":
        model.eval()
        reason = shared_prefix.refusal(model)
        if not reason:
            return SharedPrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, kept=kept), scorer
        scorer = f"hflm (shared-prefix not used: {reason})"
    return QuietLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), scorer
