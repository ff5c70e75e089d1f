"""Text to token ids exactly as lm-eval's HFLM encodes it, without lm-eval.

Training labels and probes are cut by these functions, so that what is trained is what is scored: trailing spaces of
the context move to the continuation, context and whole are encoded apart, BOS comes as the tokenizer adds it, and an
empty context is the prefix token alone.
"""

from collections.abc import Iterator
from typing import Any

Tokenizer = Any  # transformers' PreTrainedTokenizerBase
DEFAULT_MAX_LENGTH = 2048  # where neither the config nor the tokenizer names a length


def prefix_token(tokenizer: Tokenizer) -> int:
    """What stands before the first token of a text: BOS, or EOS where the tokenizer has no BOS."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text; special tokens as the tokenizer adds them, unless the text already begins with the prefix token."""
    if text.startswith(tokenizer.decode(prefix_token(tokenizer))):
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(text)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, *, end: bool = False) -> tuple[list[int], int]:
    """(ids of context and continuation, number of ids that are context). The rest are what is scored or trained on.

    With `end` the tokenizer's end of text stands behind the continuation: an answer that is written, and has to stop.
    """
    if end:
        ids, start = encode_pair(tokenizer, context, continuation)
        return ids + [tokenizer.eos_token_id], start
    if context == "":
        ids = tokenizer.encode(continuation, add_special_tokens=False)
        prefix = prefix_token(tokenizer)
        return (ids if ids[0] == prefix else [prefix, *ids]), 1
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    head = encode_text(tokenizer, context)
    # the context's own ids, not the whole's: they differ where a token spans the border, and HFLM scores after these
    return head + encode_text(tokenizer, context + continuation)[len(head) :], len(head)


def windows(ids: list[int], *, prefix: int, max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, continuation) pieces that score every token of a text once, each with at most `max_length` inputs.

    The first window's context is the prefix token; a later one sees as much of the text before it as fits (lm-eval's
    rolling windows with a context of one, made disjoint).
    """
    if not ids:
        return
    first = min(max_length, len(ids))
    yield [prefix], ids[:first]
    done = first
    while done < len(ids):
        size = min(len(ids) - done, max_length)
        end = done + size
        yield ids[end - max_length - 1 : end - size], ids[end - size : end]
        done = end


def max_length(model: Any, tokenizer: Tokenizer = None) -> int:
    """The longest input the model takes, read where HFLM reads it."""
    config = getattr(model.config, "text_config", None) or model.config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    length = getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and length < 10**18 else DEFAULT_MAX_LENGTH
