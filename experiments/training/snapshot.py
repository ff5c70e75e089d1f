"""What has changed in a run's state since its beginning, as JSON and tensors, and the state restored from them.

Dicts, lists, tuples, sets, deques and dataclasses are looked into at any depth, and so are random generators, torch's
optimizers and objects with a `state_dict`. In them tensors, numpy's arrays, numbers, texts, bools and None are compared
by content, so that it does not matter how they were changed. What is unchanged is not written: it is there again when
the run is set up again (importance, anchors, frozen weights). An object of any other kind cannot be restored; where one
has changed, `Unkeepable` names it.

A place is the way to a value, written as in Python: ewc: state["seen"][3].
"""

import dataclasses
import hashlib
import io
import pickle
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PLAIN = (type(None), bool, int, float, str)
SEQUENCES = {"list": list, "tuple": tuple, "deque": deque}
SAME = ["same"]
PIECE = 1 << 24  # words hashed at a time


class Unkeepable(Exception):
    """A value has changed that cannot be restored; the message names its place."""


class Beginning:
    """The values of a run, by place, before its first step.

    weights  tensors that are kept elsewhere, by name
    apart    objects that are not looked into
    """

    def __init__(self, values: Mapping[str, Any], *, weights: Mapping[str, Tensor], apart: tuple = ()) -> None:
        self._weights, self._apart = weights, apart
        self._walk: _Walk | None = _Walk(weights, apart, begun=None)
        for place, value in values.items():
            self._walk.write(value, place)
        self._looks = self._walk.looks

    def changes(self, values: Mapping[str, Any]) -> tuple[dict, dict[str, Tensor]]:
        """What is not as it was: JSON by place, and the tensors that it names. Raises Unkeepable."""
        walk = _Walk(self._weights, self._apart, begun=self._looks)
        return {place: walk.write(value, place) for place, value in values.items()}, walk.tensors

    def restore(self, changes: dict, read: Callable[[str], Tensor]) -> dict[str, Any]:
        """The values with the changes in them; what was there at the beginning is changed in place.

        read  gives a tensor by its name in `changes`
        """
        back = _Back(self._walk, self._weights, read)
        return {place: back.read(written, place) for place, written in changes.items()}

    def release(self) -> None:
        """Hold the values of the beginning no longer; `restore` cannot be called after it."""
        self._walk = None


class _Walk:
    """One look at all values: what is written of them, and how each place looks."""

    def __init__(self, weights: Mapping[str, Tensor], apart: tuple, *, begun: Mapping[str, str] | None) -> None:
        self.looks: dict[str, str] = {}
        self.objects: dict[str, Any] = {}  # by place; also holds them, so that their ids stay their own
        self.aliases: set[str] = set()  # places whose object has an earlier place too
        self.tensors: dict[str, Tensor] = {}
        self._begun, self._same = begun, set()
        self._first: dict[int, str] = {}
        self._apart = {id(one) for one in apart}
        self._weights = {id(weight): name for name, weight in weights.items()}
        self._owners = {memory: f"weight {name}" for name, weight in weights.items() if (memory := _memory(weight))}

    def write(self, value: Any, place: str) -> list:
        self.objects[place] = value
        if type(value) in PLAIN:
            return self._node(place, repr(value), ["value", value])
        if id(value) in self._weights:
            name = self._weights[id(value)]
            return self._node(place, f"weight {name}", ["weight", name])
        if id(value) in self._first:
            self.aliases.add(place)
            first = self._first[id(value)]
            return self._node(place, f"as {first}", ["as", first], unchanged=first in self._same)
        self._first[id(value)] = place
        if id(value) in self._apart:
            return self._opaque(value, place)
        if isinstance(value, Tensor):
            return self._tensor(value, place)
        if (type(value) is np.ndarray or isinstance(value, np.generic)) and value.dtype != object:
            return self._array(value, place)
        if isinstance(value, dict) and None not in (keys := [self._hashable(key) for key in value]):
            children = [self.write(one, f"{place}[{_label(key)}]") for key, one in zip(keys, value.values())]
            return self._container(value, place, "dict", children, keys)
        if type(value) is set and None not in (entries := [self._hashable(one) for one in value]):
            return self._node(place, f"set {sorted(map(str, entries))}", ["set", entries])
        for kind, sequence in SEQUENCES.items():
            if isinstance(value, sequence) and (
                sequence is not tuple or type(value) is tuple or hasattr(value, "_make")
            ):
                children = [self.write(one, f"{place}[{index}]") for index, one in enumerate(value)]
                return self._container(value, place, kind, children, getattr(value, "maxlen", None))
        if (fields := _fields(value)) is not None:
            children = [self.write(one, f"{place}.{name}") for name, one in fields.items()]
            return self._container(value, place, "fields", children, list(fields))
        if (state := _state(value)) is not None:
            return self._container(value, place, "state", [self.write(state, f"{place}.state")])
        return self._opaque(value, place)

    def _node(self, place: str, look: str, written: list, *, unchanged: bool = True) -> list:
        self.looks[place] = look
        if self._begun is None or not (unchanged and self._begun.get(place) == look):
            return written
        self._same.add(place)
        return SAME

    def _container(self, value: Any, place: str, kind: str, children: list, *more: Any) -> list:
        unchanged = all(child == SAME for child in children)
        look = f"{type(value)} {len(children)} {more}"
        written = self._node(place, look, [kind, children, *more], unchanged=unchanged)
        if self._begun is not None and type(value) not in (dict, *SEQUENCES.values()):
            if not self._begun.get(place, "").startswith(f"{type(value)} "):
                raise Unkeepable(f"{place} is a {type(value).__qualname__} that was made in a step: make it in `begin`")
        return written

    def _hashable(self, value: Any) -> list | None:
        """A key of a dict or an element of a set; None for a kind that cannot be restored."""
        if type(value) in PLAIN:
            return ["value", value]
        if type(value) is tuple and None not in (entries := [self._hashable(one) for one in value]):
            return ["tuple", entries, None]
        if id(value) in self._weights:
            return ["weight", self._weights[id(value)]]
        return ["as", self._first[id(value)]] if isinstance(value, Tensor) and id(value) in self._first else None

    def _tensor(self, value: Tensor, place: str) -> list:
        own, memory = _local(value), _memory(value)
        dense = own.layout == torch.strided and not own.is_quantized and not own.is_meta
        owner = self._owners.setdefault(memory, place) if memory else place
        shape = f"{own.dtype} {own.device} {list(own.shape)} {own.stride()}" if dense else f"{own.layout} {id(value)}"
        where = f"{shape} {own.storage_offset() if dense else ''} in {owner}: "
        content = fingerprint(own) if dense and not owner.startswith("weight ") else ""
        there = self._begun is not None and self._begun.get(place, "").startswith(where)
        overlapping = dense and any(size > 1 and not step for size, step in zip(own.shape, own.stride()))
        in_place = there and not overlapping
        grad = value.requires_grad and value.is_leaf
        written = self._node(place, f"{where}{content}", ["tensor", place, in_place, str(own.device), grad])
        if self._begun is None or written == SAME:
            return SAME
        if owner != place and not there:
            raise Unkeepable(f"{place} shares the memory of {owner} since a step: keep a copy (.clone())")
        if not dense or (isinstance(value, DTensor) and not in_place):
            raise Unkeepable(f"{place} is a tensor of a kind that a checkpoint does not hold ({own.layout})")
        self.tensors[place] = own
        return written

    def _array(self, value: np.ndarray | np.generic, place: str) -> list:
        data = torch.frombuffer(bytearray(np.ascontiguousarray(value).tobytes() or b"\0"), dtype=torch.uint8)
        facts = [value.dtype.str, list(value.shape), isinstance(value, np.generic)]
        written = self._node(place, f"{facts} {fingerprint(data)}", ["array", place, *facts])
        if written != SAME:
            self.tensors[place] = data
        return written

    def _opaque(self, value: Any, place: str) -> list:
        look = self._content(value) if id(value) not in self._apart else str(id(value))
        same = self._node(place, f"{type(value)} {look}", [], unchanged=look is not None) == SAME
        if self._begun is None or same:
            return SAME
        raise Unkeepable(
            f"{place} is a {type(value).__module__}.{type(value).__qualname__}, which changes and cannot be restored; "
            "keep numbers, texts, tensors or random generators"
        )

    def _content(self, value: Any) -> str | None:
        """A hash of what pickle would write, which is never read. Where pickle cannot write the object, its identity, and None for an
        iterator, whose position cannot be seen."""
        apart, weights = self._apart, self._weights

        class Pickler(pickle.Pickler):
            def persistent_id(self, one):
                if isinstance(one, Tensor):
                    return weights.get(id(one)) or f"{one.shape} {fingerprint(one)}"
                known = id(one) in apart or isinstance(one, nn.Module) or callable(one)
                return f"{type(one)} {id(one)}" if known and not isinstance(one, type) else None

        data = io.BytesIO()
        try:
            with warnings.catch_warnings(action="ignore"):
                Pickler(data).dump(value)
        except Exception:  # whatever an object does when it is pickled
            return None if hasattr(value, "__next__") else str(id(value))
        return hashlib.sha256(data.getvalue()).hexdigest()


class _Back:
    """All values restored, from what was written of them."""

    def __init__(self, begun: _Walk, weights: Mapping[str, Tensor], tensor: Callable[[str], Tensor]) -> None:
        self._begun, self._weights, self._stored = begun, weights, tensor
        self._restored: dict[str, Any] = {}

    def read(self, written: list, place: str) -> Any:
        kind, *facts = written
        there = self._begun.objects.get(place)
        if kind == "same":
            value = there
        else:  # an object with two places at the beginning is changed at the first one only
            value = getattr(self, f"_{kind}")(None if place in self._begun.aliases else there, place, *facts)
        self._restored[place] = value
        return value

    def _value(self, there, place, value):
        return value

    def _weight(self, there, place, name):
        return self._weights[name]

    def _as(self, there, place, first):
        return self._restored.get(first, self._begun.objects.get(first))

    @torch.no_grad()
    def _tensor(self, there, place, name, in_place, device, grad):
        stored = self._stored(name)
        if not in_place:
            return stored.to(device, copy=True).requires_grad_(grad)
        _local(there.detach()).copy_(stored)
        return there

    def _array(self, there, place, name, dtype, shape, single):
        count = int(np.prod(shape))
        value = np.frombuffer(self._stored(name).numpy().tobytes(), np.dtype(dtype), count).reshape(shape)
        if single:
            return value[()]
        if not (isinstance(there, np.ndarray) and there.dtype.str == dtype and there.shape == value.shape):
            return value.copy()
        there[...] = value
        return there

    def _dict(self, there, place, children, keys):
        values = [self.read(one, f"{place}[{_label(key)}]") for key, one in zip(keys, children)]
        target = there if isinstance(there, dict) else {}
        target.clear()
        target.update(zip([self.read(key, "") for key in keys], values))
        return target

    def _set(self, there, place, entries):
        target = there if isinstance(there, set) else set()
        target.clear()
        target.update(self.read(one, "") for one in entries)
        return target

    def _list(self, there, place, children, _):
        target = there if isinstance(there, list) else []
        target[:] = self._entries(place, children)
        return target

    def _deque(self, there, place, children, maxlen):
        target = there if isinstance(there, deque) and there.maxlen == maxlen else deque(maxlen=maxlen)
        entries = self._entries(place, children)
        target.clear()
        target.extend(entries)
        return target

    def _tuple(self, there, place, children, _):
        entries = self._entries(place, children)
        return there._make(entries) if hasattr(there, "_make") else tuple(entries)

    def _entries(self, place: str, children: list) -> list:
        return [self.read(one, f"{place}[{index}]") for index, one in enumerate(children)]

    def _fields(self, there, place, children, names):
        values = {name: self.read(one, f"{place}.{name}") for name, one in zip(names, children)}
        if any(value is not getattr(there, name, None) for name, value in values.items()):
            there = copy(there) if dataclasses.is_dataclass(there) and there.__dataclass_params__.frozen else there
            for name, value in values.items():
                object.__setattr__(there, name, value)
        return there

    def _state(self, there, place, children):
        _set_state(there, self.read(children[0], f"{place}.state"))
        return there


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


@torch.no_grad()
def fingerprint(tensor: Tensor) -> int:
    """64 bits of a tensor's content, computed on its device: the sum over its 8-byte words w_i of mix(mix(w_i) + i)."""
    data = _local(tensor).contiguous().reshape(-1).view(torch.uint8)
    data = nn.functional.pad(data, (0, -len(data) % 8))
    words = (data.clone() if data.storage_offset() % 8 else data).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), PIECE):
        piece = words[start : start + PIECE]
        total += _mix(_mix(piece) + torch.arange(start, start + len(piece), device=words.device)).sum()
    return int(total)


def _mix(words: Tensor) -> Tensor:
    """A finaliser of 64-bit hashes (the constants are Stafford's mix 13), with products modulo 2⁶⁴."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
        words = (words ^ (words >> shift)) * factor
    return words ^ (words >> 31)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, and any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _memory(tensor: Tensor) -> tuple | None:
    """Where a tensor's memory is; None where it has none."""
    own = _local(tensor)
    if own.layout != torch.strided or own.is_meta or not own.numel():
        return None
    return own.device, own.untyped_storage().data_ptr()


def _label(key: list) -> str:
    """A dict's key as it is shown in a place."""
    return f'"{key[1]}"' if isinstance(key[1], str) else repr(key[1])


def _fields(value: Any) -> dict[str, Any] | None:
    """The fields of a dataclass and the attributes of an optimizer by name; None for another object."""
    if isinstance(value, torch.optim.Optimizer):
        # the groups come first, so that the state's keys are known; `scratch` holds nothing from one step to the next
        scratch = getattr(type(value), "scratch", ())
        return {"param_groups": None} | {name: one for name, one in vars(value).items() if name not in scratch}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return None


def _state(value: Any) -> Any:
    """The state of an object that can give it and take it back, else None."""
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


def _set_state(value: Any, state: Any) -> None:
    if isinstance(value, random.Random):
        value.setstate(state)
    elif isinstance(value, torch.Generator):
        value.set_state(state.cpu())
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    elif isinstance(value, np.random.RandomState):
        value.set_state(state)
    else:
        value.load_state_dict(state)
