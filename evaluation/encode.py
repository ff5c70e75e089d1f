"""Text to token ids exactly as lm-eval's HFLM encodes it, without lm-eval.

Training labels, probes and scores are all cut by these functions, so that what is trained is what is scored: trailing
spaces of the context move to the continuation, context and whole are encoded apart, BOS comes as the tokenizer adds it,
and an empty context is the prefix token alone. Two things differ from HFLM, and docs/scoring.md says so: what a
tokenizer adds to the end of every text (its end of text) is left out, because HFLM would score the answer after that of
the prompt; and a tokenizer without BOS and EOS is used without a prefix, where HFLM stops with a TypeError.
"""

from collections.abc import Iterator
from typing import Any

from methods.errors import UserError

Tokenizer = Any  # transformers' PreTrainedTokenizerBase
DEFAULT_MAX_LENGTH = 2048  # where neither the config nor the tokenizer names a length
SHOWN = 60  # characters of a text that a message quotes


def prefix_token(tokenizer: Tokenizer) -> int | None:
    """The token before a text: BOS; EOS if there is no BOS; None if there is neither."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text with the tokenizer's prefix, unless the text begins with it; without what it adds at the end."""
    prefix = prefix_token(tokenizer)
    if prefix is not None and text.startswith(tokenizer.decode(prefix)):
        return tokenizer.encode(text, add_special_tokens=False)
    ids, own = _marked(tokenizer, text)
    if not own and ids:  # the text has no token of its own between the additions before and after it
        return ids[: min(_marked(tokenizer, "a")[1], default=0)]
    return ids[: own[-1] + 1] if own else ids


def appended(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer would add to the end of every text, which `encode_text` leaves out."""
    ids, own = _marked(tokenizer, "a")
    return ids[own[-1] + 1 :] if own else []


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, *, end: bool = False) -> tuple[list[int], int]:
    """(ids of context and continuation, number of ids that are context). The rest are what is scored or trained on.

    With `end` the tokenizer's end of text follows the continuation, so that a written answer learns to stop.
    Raises UserError where a prefix or an end is needed that the tokenizer does not have.
    """
    prefix, empty = prefix_token(tokenizer), not context
    if spaces := len(context) - len(context.rstrip()):
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    head = [] if empty else encode_text(tokenizer, context)
    if head:
        # the ids of the context alone: HFLM scores what follows them, even where a token of the whole spans the border
        ids, start = head + encode_text(tokenizer, context + continuation)[len(head) :], len(head)
    elif prefix is not None:
        ids, start = tokenizer.encode(continuation, add_special_tokens=False), 1
        ids = ids if ids[:1] == [prefix] else [prefix, *ids]
    else:
        raise UserError(
            f"the answer {shown(continuation)} has no prompt, and the tokenizer has neither a BOS nor an EOS "
            "token to put there: give the prompt some text, or name `bos_token` in tokenizer_config.json"
        )
    if end and tokenizer.eos_token_id is None:
        raise UserError(
            "an answer that is written has to end, and the tokenizer has no EOS token: name `eos_token` in "
            "tokenizer_config.json"
        )
    return ids + [tokenizer.eos_token_id] if end else ids, start


def answer_pair(tokenizer: Tokenizer, context: str, continuation: str, *, end: bool = False) -> tuple[list[int], int]:
    """`encode_pair` of an answer; raises UserError where no token is left of it to score or to train on."""
    ids, start = encode_pair(tokenizer, context, continuation, end=end)
    if len(ids) == start + end:
        why = (
            "a token of this tokenizer runs over the border between them; end the prompt differently (`doc_to_text`, "
            "`target_delimiter`), or choose a model with another tokenizer"
        )
        if not tokenizer.encode(continuation, add_special_tokens=False):
            why = "there is nothing in it; correct the row"
        raise UserError(
            f"the answer {shown(continuation)} has no token of its own after the prompt {shown(context, end=True)}: "
            f"{why}"
        )
    return ids, start


def crossed(tokenizer: Tokenizer, context: str, continuation: str, ids: list[int]) -> bool:
    """Whether a token of the whole text spans the border, so that `ids` of `encode_pair` do not decode to the text.

    As in lm-eval, the score is then of what follows as many tokens as the context has alone.
    """
    return bool(context.strip()) and encode_text(tokenizer, context + continuation) != ids


def encode_rolling(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """(context of one id, scored ids) of a whole text: the context is the prefix token, or else the first token."""
    ids, prefix = encode_text(tokenizer, text), prefix_token(tokenizer)
    return (ids[:1], ids[1:]) if prefix is None else ([prefix], ids)


def windows(ids: list[int], *, prefix: int, max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, continuation) pieces that score every token of a text once, each with at most `max_length` inputs.

    The first window's context is the prefix token; a later one sees as much of the text before it as fits (lm-eval's
    rolling windows with a context of one, made disjoint).
    """
    if not ids:
        return
    yield [prefix], ids[:max_length]
    for start in range(max_length, len(ids), max_length):
        end = min(start + max_length, len(ids))
        yield ids[end - max_length - 1 : start], ids[start:end]


def max_length(model: Any, tokenizer: Tokenizer = None) -> int:
    """The longest input the model takes, read where HFLM reads it."""
    config = getattr(model.config, "text_config", None) or model.config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    length = getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and 0 < length < 10**18 else DEFAULT_MAX_LENGTH


def shown(text: str, *, end: bool = False) -> str:
    """A text as a message quotes it: its beginning, or its end."""
    if len(text) <= SHOWN:
        return repr(text)
    return repr("…" + text[-SHOWN:] if end else text[:SHOWN] + "…")


def _marked(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Ids of a text as the tokenizer gives them, and the places of those that are not its additions."""
    # verbose=False: no warning that a text is longer than the model's positions
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    return list(encoded["input_ids"]), [place for place, mark in enumerate(encoded["special_tokens_mask"]) if not mark]
