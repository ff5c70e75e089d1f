"""The language models that lm-eval evaluates: its own HFLM, and HFLM with our scorer and our generation."""

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from evaluation import SCORING, encode, generate, shared_prefix
from evaluation.kept import KeptTokens
from methods.errors import UserError

SCORERS = ("shared-prefix", "hflm")
TOKENS_PER_BATCH_SIZE = shared_prefix.TOKENS // 16  # batch_size 16 stands for the default budget of tokens


class _Encoding(HFLM):
    """HFLM that encodes as `evaluation.encode` does, like training and probes.

    The ids are HFLM's wherever HFLM works, except for an end of text that a tokenizer adds to every prompt.

    answer_tokens   number of tokens of each (context, continuation) that was scored
    """

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.answer_tokens: dict[tuple[str, str], int] = {}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        if add_special_tokens is None:
            ids = encode.encode_text(self.tokenizer, string)
        else:
            ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ):
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        return generate.padded(rows, generate.padding(self.model, self.tokenizer), side=padding_side)

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        encoded, crossing = [], []
        for request in requests:
            context, continuation = request.args
            try:
                ids, start = encode.answer_pair(self.tokenizer, context, continuation)
            except UserError as error:
                raise UserError(f"{_row(request)}: {error}") from error
            if encode.crossed(self.tokenizer, context, continuation, ids):
                crossing.append(request)
            encoded.append((request.args, ids[:start], ids[start:]))
        if crossing:
            print(
                f"{len(crossing)} of {len(requests)} answers begin inside a token of the whole text, the first in "
                f"{_row(crossing[0])}: as in lm-eval, their scores may leave out their first characters",
                flush=True,
            )
        self._count(requests, [(ids, continuation) for _, ids, continuation in encoded])
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _count(self, requests: list, pairs: Sequence[shared_prefix.Request]) -> None:
        """Note the tokens of each answer, and refuse one that the model cannot take whole, by its row."""
        for request, (_, ids) in zip(requests, pairs, strict=True):
            self.answer_tokens[request.args] = len(ids)
            if len(ids) > self.max_length:
                raise UserError(
                    f"{_row(request)}: the answer {encode.shown(request.args[1])} has {len(ids)} tokens, but the model "
                    f"takes {self.max_length}: leave the row out, or choose a model that takes more"
                )

    def _windows(self, requests: list) -> tuple[list[shared_prefix.Request], list[int]]:
        """Pieces that score each text whole, and the number of the text that each belongs to."""
        pieces, owners = [], []
        for number, request in enumerate(requests):
            context, ids = encode.encode_rolling(self.tokenizer, request.args[0])
            for piece in encode.windows(ids, prefix=context[0], max_length=self.max_length) if ids else ():
                pieces.append(piece)
                owners.append(number)
        return pieces, owners


class QuietLM(_Encoding):
    """lm-eval's HFLM with its own values, without progress bars where there is no terminal."""

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        if self.prefix_token_id is not None:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)
        pieces, owners = self._windows(requests)
        values: list[list[float]] = [[] for _ in requests]
        for piece, owner in zip(pieces, owners):
            values[owner].append(self._loglikelihood_tokens([(None, *piece)], override_bs=1)[0][0])
        return [math.fsum(own) for own in values]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        _generation_settings(requests, self)
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"task {requests[0].task_name}: lm-eval's HFLM writes answers only with a tokenizer that has an EOS "
                "token: name `eos_token` in tokenizer_config.json, or score with `scorer: shared-prefix`"
            )
        if empty := [request for request in requests if not self.tok_encode(request.args[0])]:
            raise UserError(
                f"{_row(empty[0])}: lm-eval's HFLM writes nothing after a prompt without a token: give it some text, "
                "or score with `scorer: shared-prefix`"
            )
        with _numbers(self.model, requests[0].task_name):
            return super().generate_until(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        # HFLM shows a bar for each batch of windows
        quiet = disable_tqdm or override_bs is not None or not sys.stderr.isatty()
        return super()._loglikelihood_tokens(requests, disable_tqdm=quiet, override_bs=override_bs)


class SharedPrefixLM(_Encoding):
    """HFLM whose log-likelihoods come from `evaluation.shared_prefix`, which encodes each context once.

    Everything else (truncation from the left, rolling windows) is HFLM's. Values equal HFLM's within 1e-3 nats in
    float32; in half precision the softmax is computed in float32 here and in half precision there. Texts come from
    `evaluation.generate` and equal HFLM's if the tokenizer's end of text is the model's own; if it is another token, a
    text ends there, while HFLM continues after it.

    kept    a folder in which the ids of choices are kept for the next model, or None
    """

    def __init__(self, *args: Any, kept: Path | None = None, **settings: Any):
        super().__init__(*args, **settings)
        encoding = [SCORING, self.add_bos_token, self.prefix_token_id]
        self.kept = KeptTokens(kept, self.tokenizer, encoding) if kept else None

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = self.kept.load([request.args for request in requests]) if self.kept else None
        if pairs is not None:
            self._count(requests, pairs)
            return self._log_likelihoods(pairs, "scoring choices")
        return super().loglikelihood(requests)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        if self.kept:
            self.kept.save([texts for texts, _, _ in requests], pairs)
        return self._log_likelihoods(pairs, "scoring choices")

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        pieces, owners = self._windows(requests)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._log_likelihoods(pieces, "scoring text")):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        settings = _generation_settings(requests, self)
        if not generate.ends_of_text(self.model, self.tokenizer):
            raise UserError(
                f"task {requests[0].task_name}: written answers have to end, and neither tokenizer nor model "
                "names an end of text: name `eos_token` in tokenizer_config.json"
            )
        prompts = [
            generate.Prompt(
                ids=tuple(self.tok_encode(request.args[0]) or [self._prefix(request)]),
                until=tuple(kwargs["until"]),
                tokens=kwargs["max_gen_toks"],
            )
            for request, kwargs in zip(requests, settings)
        ]
        with _numbers(self.model, requests[0].task_name):
            return generate.texts(
                model=self.model,
                tokenizer=self.tokenizer,
                prompts=prompts,
                max_length=self.max_length,
                batch_size=self.batch_size,
                description="writing answers",
            )

    def _prefix(self, request: Any) -> int:
        if self.prefix_token_id is None:
            raise UserError(
                f"{_row(request)}: the prompt has no token, and the tokenizer has neither a BOS nor an EOS token to "
                "begin with"
            )
        return self.prefix_token_id

    def _log_likelihoods(self, requests: list[shared_prefix.Request], what: str) -> list[tuple[float, bool]]:
        return shared_prefix.log_likelihoods(
            self.model,
            requests,
            max_length=self.max_length,
            tokens=self.batch_size * TOKENS_PER_BATCH_SIZE,
            description=what,
        )


def _row(request: Any) -> str:
    """The row of a request as a message names it; lm-eval counts documents from 0."""
    return f"task {request.task_name}, row {request.doc_id + 1} of those scored"


@contextlib.contextmanager
def _numbers(model: torch.nn.Module, task: str) -> Iterator[None]:
    """Refuse logits that are NaN: an answer would be written nevertheless, and would be wrong."""

    def look(_: torch.nn.Module, __: Any, output: Any) -> None:
        if output.logits[:, -1].isnan().any():
            raise UserError(
                f"task {task}: the model's logits are NaN: its activations overflow in this dtype, or its weights are "
                "damaged; state compute_dtype: float32 or bfloat16 in the model's block"
            )

    hook = model.register_forward_hook(look)
    try:
        yield
    finally:
        hook.remove()


def _generation_settings(requests: Sequence[Any], model: HFLM) -> list[dict[str, Any]]:
    """Each request's generation settings; UserError where they leave no room for the prompt."""
    settings = [normalize_gen_kwargs(request.args[1], model.max_gen_toks) for request in requests]
    for request, kwargs in zip(requests, settings):
        if kwargs["max_gen_toks"] >= model.max_length:
            raise UserError(
                f"task {request.task_name}: an answer may have {kwargs['max_gen_toks']} tokens, but the model takes "
                f"{model.max_length} in all: lower `generation_kwargs: {{max_gen_toks: ...}}` of the task, or choose a "
                "model that takes more"
            )
    return settings


def build(
    model: torch.nn.Module, tokenizer: Any, *, scorer: str, batch_size: int, kept: Path | None = None
) -> tuple[HFLM, str]:
    """The lm-eval model for `scorer`, and its name in the scores (with the reason if another scorer is used)."""
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
