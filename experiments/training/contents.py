"""What a value holds, in a few bytes: whether two looks at it have seen the same."""

import dataclasses
import hashlib
import io
import pickle
import random
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

PIECE = 1 << 24  # words mixed at a time


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dicts, sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for one in value.values() for t in tensors_in(one))
    elif isinstance(value, list | tuple | set | deque):
        yield from (t for one in value for t in tensors_in(one))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (t for f in dataclasses.fields(value) for t in tensors_in(getattr(value, f.name)))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, and any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def memory(tensor: Tensor) -> tuple | None:
    """Where a tensor's memory is; None where it has none."""
    own = local(tensor)
    if own.layout != torch.strided or own.is_meta or not own.numel():
        return None
    return own.device, own.untyped_storage().data_ptr()


def overlaps(tensor: Tensor) -> bool:
    """Whether entries share memory with one another, so that nothing can be read into them."""
    return any(stride == 0 and size > 1 for stride, size in zip(local(tensor).stride(), local(tensor).shape))


def plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


def same_view(one: Tensor, other: Tensor) -> bool:
    """Of two tensors in one memory."""
    a, b = ((t.dtype, t.shape, t.stride(), t.storage_offset()) for t in (one, other))
    return a == b


def looks(tensor: Tensor) -> tuple:
    return local(tensor).shape, tensor.dtype


def digest(tensor: Tensor) -> int:
    """32 bits (on a GPU 64) of a tensor's bits and where they stand; to be compared on the same device alone."""
    data = local(tensor).detach().contiguous().reshape(-1).view(torch.uint8)
    return mixed(data) if data.is_cuda else zlib.crc32(data.cpu().numpy())


@torch.no_grad()
def mixed(data: Tensor) -> int:
    """64 bits of bytes, computed where they are: the sum over all words w_i of mix(mix(w_i) + i)."""
    whole = len(data) - len(data) % 8
    start = data[:whole]
    words = start.view(torch.int64) if not start.storage_offset() % 8 else start.clone().view(torch.int64)
    rest = torch.zeros(8, dtype=torch.uint8, device=data.device)
    rest[: len(data) - whole] = data[whole:]
    total, at = torch.zeros((), dtype=torch.int64, device=data.device), 0
    for piece in (*words.split(PIECE), rest.view(torch.int64)):
        total += _mix(_mix(piece) + torch.arange(at, at + len(piece), device=data.device)).sum()
        at += len(piece)
    return int(total)


def _mix(words: Tensor) -> Tensor:
    """A finaliser of 64-bit hashes (the constants are Stafford's, mix 13), with products modulo 2⁶⁴."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
        words = (words ^ (words >> shift)) * factor
    return words ^ (words >> 31)


def pickled(value: Any, *, named: Callable[[Any], str | None]) -> str | None:
    """A hash of what pickle would write of an object, but for what `named` has a text of. Of what pickle cannot write it is the object's
    identity, and None for an iterator, whose place nobody can see."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, one):
            return named(one)

    data = io.BytesIO()
    try:
        with warnings.catch_warnings(action="ignore"):
            Pickler(data).dump(value)
    except Exception:  # whatever an object does when it is pickled
        return None if hasattr(value, "__next__") else f"{id(value)}"
    return hashlib.sha256(data.getvalue()).hexdigest()


def state_of(value: Any) -> Any:
    """The state of an object that can tell it and take it back, else None."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    both = (getattr(type(value), name, None) for name in ("state_dict", "load_state_dict"))
    return value.state_dict() if all(map(callable, both)) else None


def set_state(value: Any, state: Any) -> None:
    if isinstance(value, random.Random):
        value.setstate(state)
    elif isinstance(value, torch.Generator):
        value.set_state(state.cpu())
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    elif isinstance(value, np.random.RandomState):
        value.set_state(state)
    elif isinstance(value, torch.optim.Optimizer):
        _set_optimizer(value, state)
    else:
        value.load_state_dict(state)


def _set_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """In the groups and the state that it has: an optimizer that wraps another one holds the same. `load_state_dict` makes new ones,
    and, where it is torch's own, casts each tensor of the state to its weight's dtype."""
    groups, held = optimizer.param_groups, optimizer.state
    optimizer.load_state_dict(state)
    for group, found in zip(groups, optimizer.param_groups, strict=True):
        group.update(found)
    found = dict(optimizer.state)
    if type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict:
        weights = [weight for group in groups for weight in group["params"]]
        found = {weights[key] if isinstance(key, int) else key: one for key, one in state["state"].items()}
    held.clear()
    held.update(found)
    vars(optimizer).update(
        {name: one for name, one in (("param_groups", groups), ("state", held)) if name in vars(optimizer)}
    )
