"""The language models lm-eval asks: its own HFLM, and HFLM with the shared-prefix scorer in place of its forward passes."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from evaluation import encode, shared_prefix
from experiments.errors import UserError

SCORERS = ("shared-prefix", "hflm")
TOKENS_PER_BATCH_SIZE = shared_prefix.TOKENS // 16  # batch_size 16 stands for the default budget of tokens


class QuietLM(HFLM):
    """lm-eval's HFLM, every value its own; without progress bars where nobody watches."""

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        # HFLM shows a bar for each batch of windows
        quiet = disable_tqdm or override_bs is not None or not sys.stderr.isatty()
        return super()._loglikelihood_tokens(requests, disable_tqdm=quiet, override_bs=override_bs)


class SharedPrefixLM(HFLM):
    """HFLM whose log-likelihoods come from `evaluation.shared_prefix`: each context once, the logits that are asked for.

    Everything else (encoding, truncation from the left, rolling windows, generation) is HFLM's. Equal to HFLM within
    1e-3 nats in float32; in half precision the softmax is taken in float32 here and in half there.
    """

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # encoding takes moments

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        return self._ask([(context, continuation) for _, context, continuation in requests], "scoring choices")

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

    def _ask(self, requests: list[shared_prefix.Request], what: str) -> list[tuple[float, bool]]:
        return shared_prefix.log_likelihoods(
            self.model,
            requests,
            max_length=self.max_length,
            tokens=self.batch_size * TOKENS_PER_BATCH_SIZE,
            description=what,
        )


def build(model: torch.nn.Module, tokenizer: Any, *, scorer: str, batch_size: int) -> tuple[HFLM, str]:
    """The lm-eval model for `scorer`, and what it is called in the scores (with the reason where it is not used)."""
    if scorer not in SCORERS:
        raise UserError(f"scorer {scorer!r} is unknown: choose one of {', '.join(SCORERS)}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size {batch_size!r}: give a whole number of at least 1")
    if scorer == "shared-prefix":
        model.eval()
        reason = shared_prefix.refusal(model)
        if not reason:
            return SharedPrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), scorer
        scorer = f"hflm (shared-prefix not used: {reason})"
    return QuietLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), scorer
