"""Texts that a model writes once, before it is tuned, and how they are stored for the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from methods.errors import UserError
from methods.part import Prepared
from methods.tools.architecture import plain

TOGETHER = 32  # texts that are written at once


def written(
    model: nn.Module,
    prompts: Sequence[list[int]],
    *,
    sample: Callable[..., list[list[int]]],
    progress: Callable[..., Any] | None,
    key: str,
    **settings: Any,
) -> Prepared:
    """One text behind each prompt, up to its end of text; `texts` reads what is carried.

    sample    as `Part.calibrate` is given it; `settings` are its `tokens` and `temperature`
    key       of the part, which draws and progress are named after
    """
    with progress(total=len(prompts), desc=key, unit="text") if progress else nullcontext() as bar:
        done = None if bar is None else bar.update
        about = {"key": (key,), "ended": True, "size": TOGETHER, "done": done}
        found = sample(model=model, prompts=prompts, **about, **settings)
    ids = [prompt + text for prompt, text in zip(prompts, found, strict=True)]
    carry = {
        "ids": torch.tensor(list(chain(*ids)), dtype=torch.int32),
        "lengths": torch.tensor([len(text) for text in ids], dtype=torch.int32),
        "prompts": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32),
    }
    ended = sum(len(text) < settings["tokens"] for text in found)
    notes = {"texts": len(ids), "tokens": sum(map(len, found)), "ended": ended}
    return Prepared(carry=carry, tokens=sum(map(len, ids)), notes=notes)


def texts(carry: Mapping[str, Tensor]) -> list[tuple[Tensor, int]]:
    """Token ids (tokens,) of each text, and how many of them are its prompt."""
    whole = carry["ids"].long().split(carry["lengths"].tolist())
    return list(zip(whole, carry["prompts"].tolist(), strict=True))


def beginnings(
    model: nn.Module, general: Sequence[Mapping[str, Tensor]], *, texts: int, tokens: int, where: str
) -> list[list[int]]:
    """What each of `texts` texts begins with: the first `tokens` tokens of a document of general text.

    Where there are fewer documents they begin again. With tokens = 0 it is the beginning-of-text token, else the
    end-of-text token. Raises UserError, which begins with `where`, for a model that then names neither.
    """
    if tokens:
        return [document["input_ids"][:tokens].tolist() for document in islice(cycle(general), texts)]
    named, known = plain(model).generation_config, model.get_input_embeddings().num_embeddings
    for token in (named.bos_token_id, named.eos_token_id):
        token = token[0] if isinstance(token, list) else token
        if token is not None and 0 <= token < known:
            return [[token]] * texts
    raise UserError(
        f"{where} is 0, but the model names neither a beginning-of-text token nor an end-of-text token: let the texts "
        f"continue general text, such as {where.rpartition('.')[2]}: 8"
    )
