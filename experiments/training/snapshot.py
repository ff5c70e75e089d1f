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
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PLAIN = (type(None), bool, int, float, str)
BY_IDENTITY = (nn.Module, FunctionType, MethodType, BuiltinFunctionType)
SAME = ["same"]


class Unkeepable(Exception):
    """A value has changed that cannot be restored; the message names its place."""


class Snapshot:
    """The values of a run, by place: all of them at its beginning, later what is not as it was. Raises Unkeepable.

    weights  tensors that are kept elsewhere, by name
    apart    objects that are not looked into
    begun    the beginning's snapshot

    changes  what is not as it was: JSON by place
    tensors  the tensors that `changes` names
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        weights: Mapping[str, Tensor],
        apart: tuple = (),
        begun: "Snapshot | None" = None,
    ) -> None:
        self.looks: dict[str, str] = {}
        self.objects: dict[str, Any] = {}  # by place; also holds them, so that their ids stay their own
        self.aliases: set[str] = set()  # places whose object has an earlier place too
        self.tensors: dict[str, Tensor] = {}
        self.weights = weights
        self._begun, self._same = None if begun is None else begun.looks, set()
        self._first: dict[int, str] = {}
        self._apart = {id(one) for one in apart}
        self._names = {id(weight): name for name, weight in weights.items()}
        self._owners = {memory: f"weight {name}" for name, weight in weights.items() if (memory := _memory(weight))}
        self.changes = {place: self._write(value, place) for place, value in values.items()}

    def _write(self, value: Any, place: str) -> list:
        self.objects[place] = value
        if type(value) in PLAIN:
            return self._node(place, repr(value), ["value", value])
        if id(value) in self._names:
            return self._node(place, f"weight {self._names[id(value)]}", ["weight", self._names[id(value)]])
        if id(value) in self._first:
            self.aliases.add(place)
            first = self._first[id(value)]
            return self._node(place, f"as {first}", ["as", first], unchanged=first in self._same)
        self._first[id(value)] = place
        if id(value) in self._apart:
            return self._opaque(value, place)
        if isinstance(value, Tensor):
            return self._tensor(value, place)
        if (data := _from_numpy(value)) is not None:
            return self._container(value, place, "array", {".data": data}, isinstance(value, np.generic))
        if isinstance(value, dict) and None not in (keys := [self._hashable(key) for key in value]):
            return self._container(value, place, "dict", dict(zip(map(_label, keys), value.values())), keys)
        if type(value) is set and None not in (entries := [self._hashable(one) for one in value]):
            return self._node(place, f"set {sorted(map(str, entries))}", ["set", entries])
        if isinstance(value, list | deque) or type(value) is tuple or hasattr(value, "_make"):
            kind = "list" if isinstance(value, list) else "deque" if isinstance(value, deque) else "tuple"
            parts = {f"[{index}]": one for index, one in enumerate(value)}
            return self._container(value, place, kind, parts, getattr(value, "maxlen", None))
        if (fields := _fields(value)) is not None:
            parts = {f".{name}": one for name, one in fields.items()}
            return self._container(value, place, "fields", parts, list(fields))
        if (found := _state(value)) is not None:
            return self._container(value, place, "state", {".state": found[0]})
        return self._opaque(value, place)

    def _node(self, place: str, look: str, written: list, *, unchanged: bool = True) -> list:
        """What is written of a place: SAME where it looks as at the beginning."""
        self.looks[place] = look
        if self._begun is None or not unchanged or self._begun.get(place) != look:
            return written
        self._same.add(place)
        return SAME

    def _container(self, value: Any, place: str, kind: str, parts: Mapping[str, Any], *more: Any) -> list:
        children = [self._write(one, place + label) for label, one in parts.items()]
        look = f"{type(value)} {len(children)} {more}"
        written = self._node(place, look, [kind, children, *more], unchanged=all(child == SAME for child in children))
        if self._begun is not None and type(value) not in (dict, list, tuple, deque) and kind != "array":
            if not self._begun.get(place, "").startswith(f"{type(value)} "):
                raise Unkeepable(f"{place} is a {type(value).__qualname__} that was made in a step: make it in `begin`")
        return written

    def _hashable(self, value: Any) -> list | None:
        """A key of a dict or an element of a set; None for a kind that cannot be restored."""
        if type(value) in PLAIN:
            return ["value", value]
        if type(value) is tuple and None not in (entries := [self._hashable(one) for one in value]):
            return ["tuple", entries, None]
        if id(value) in self._names:
            return ["weight", self._names[id(value)]]
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
        written = self._node(place, f"{where}{content}", ["tensor", in_place, str(own.device), grad])
        if self._begun is None or written == SAME:
            return SAME
        if owner != place and not there:
            raise Unkeepable(f"{place} shares the memory of {owner} since a step: keep a copy (.clone())")
        if not dense or (isinstance(value, DTensor) and not in_place):
            raise Unkeepable(f"{place} is a tensor of a kind that a checkpoint does not hold ({own.layout})")
        self.tensors[place] = own
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
        """A hash of what pickle would write, which is never read.

        Its identity where pickle cannot write the object, and None for an iterator, whose position cannot be seen.
        """
        apart, names = self._apart, self._names

        class Pickler(pickle.Pickler):
            def persistent_id(self, one):
                if isinstance(one, Tensor):
                    return names.get(id(one)) or f"{one.shape} {fingerprint(one)}"
                return f"{type(one)} {id(one)}" if id(one) in apart or isinstance(one, BY_IDENTITY) else None

        data = io.BytesIO()
        try:
            with warnings.catch_warnings(action="ignore"):
                Pickler(data).dump(value)
        except Exception:  # whatever an object does when it is pickled
            return None if hasattr(value, "__next__") else str(id(value))
        return hashlib.sha256(data.getvalue()).hexdigest()


def restore(begun: Snapshot, changes: Mapping[str, list], tensor: Callable[[str], Tensor]) -> dict[str, Any]:
    """The values of the beginning with later `changes` put into them, in place where they were there at the beginning.

    tensor  gives a tensor by its name in `changes`
    """
    values = _Restored(begun, tensor)
    return {place: values.read(written, place) for place, written in changes.items()}


class _Restored:
    """Values by place, read in the order in which they were written."""

    def __init__(self, begun: Snapshot, tensor: Callable[[str], Tensor]) -> None:
        self._begun, self._stored = begun, tensor
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
        return self._begun.weights[name]

    def _as(self, there, place, first):
        return self._restored.get(first, self._begun.objects.get(first))

    @torch.no_grad()
    def _tensor(self, there, place, in_place, device, grad):
        stored = self._stored(place)
        if not in_place:
            return stored.to(device, copy=True).requires_grad_(grad)
        _local(there.detach()).copy_(stored)
        return there

    def _array(self, there, place, children, single):
        data = self.read(children[0], f"{place}.data")
        in_place = data is self._begun.objects.get(f"{place}.data") and not single and there.flags.writeable
        return there if in_place else data.numpy()[()] if single else data.numpy()

    def _dict(self, there, place, children, keys):
        values = [self.read(child, place + _label(key)) for key, child in zip(keys, children)]
        return _refilled(there, {}, zip([self.read(key, "") for key in keys], values))

    def _set(self, there, place, entries):
        return _refilled(there, set(), [self.read(entry, "") for entry in entries])

    def _list(self, there, place, children, _):
        return _refilled(there, [], self._entries(place, children))

    def _deque(self, there, place, children, maxlen):
        there = there if getattr(there, "maxlen", None) == maxlen else None
        return _refilled(there, deque(maxlen=maxlen), self._entries(place, children))

    def _tuple(self, there, place, children, _):
        entries = self._entries(place, children)
        return there._make(entries) if hasattr(there, "_make") else tuple(entries)

    def _entries(self, place: str, children: list) -> list:
        return [self.read(child, f"{place}[{index}]") for index, child in enumerate(children)]

    def _fields(self, there, place, children, names):
        values = {name: self.read(child, f"{place}.{name}") for name, child in zip(names, children)}
        if any(value is not getattr(there, name, None) for name, value in values.items()):
            there = copy(there) if dataclasses.is_dataclass(there) and there.__dataclass_params__.frozen else there
            for name, value in values.items():
                object.__setattr__(there, name, value)
        return there

    def _state(self, there, place, children):
        _, put = _state(there)
        put(self.read(children[0], f"{place}.state"))
        return there


def _refilled(there: Any, empty: Any, entries: Iterable) -> Any:
    """A list, deque, set or dict with other entries: the one that was there, or a new one."""
    target = there if isinstance(there, type(empty)) else empty
    target.clear()
    (target.extend if isinstance(target, list | deque) else target.update)(entries)
    return target


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


def fingerprint(tensor: Tensor) -> int:
    """A checksum of a tensor's content (CRC-32), the same in any memory layout."""
    return zlib.crc32(_local(tensor).detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())


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
    return f'["{key[1]}"]' if isinstance(key[1], str) else f"[{key[1]!r}]"


def _from_numpy(value: Any) -> Tensor | None:
    """An array or a number of numpy's as a tensor, in the same memory where that may be written; else None."""
    if type(value) is not np.ndarray and not isinstance(value, np.generic):
        return None
    try:
        return torch.from_numpy(value if value.flags.writeable else np.array(value))
    except (TypeError, ValueError):  # texts, objects, negative strides
        return None


def _fields(value: Any) -> dict[str, Any] | None:
    """The fields of a dataclass and the attributes of an optimizer by name; None for another object."""
    if isinstance(value, torch.optim.Optimizer):
        # the groups come first, so that the state's keys are known; `scratch` holds nothing from one step to the next
        scratch = getattr(type(value), "scratch", ())
        return {"param_groups": None} | {name: one for name, one in vars(value).items() if name not in scratch}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return None


def _state(value: Any) -> tuple[Any, Callable[[Any], Any]] | None:
    """The state of an object and what takes it back; None for an object that has no such pair."""
    if isinstance(value, random.Random):
        return value.getstate(), value.setstate
    if isinstance(value, torch.Generator):
        return value.get_state(), value.set_state
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state, partial(setattr, value.bit_generator, "state")
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False), value.set_state
    both = (getattr(type(value), name, None) for name in ("state_dict", "load_state_dict"))
    return (value.state_dict(), value.load_state_dict) if all(map(callable, both)) else None
