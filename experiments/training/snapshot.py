"""What of a nested value has changed since its beginning, as JSON and tensors, and the value put back as it was.

Looked into are dicts, lists, tuples, sets, deques and dataclasses at any depth, and generators of random numbers and objects with a
`state_dict`, which say what their state is. In them tensors, numpy's arrays, numbers, texts, true, false and None are compared by
content, so that it does not matter how they were changed. Any other object is compared by what pickle would write of it. It cannot be
put back, so where it has changed that is said (`Unkeepable`) and nothing is kept.

A place is the way to a value as it is written in Python: state["seen"][3].
"""

import dataclasses
from collections import deque
from collections.abc import Mapping
from copy import copy
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from experiments.training.contents import (
    digest,
    local,
    looks,
    memory,
    overlaps,
    pickled,
    plain,
    same_view,
    set_state,
    state_of,
)

PLAIN = (type(None), bool, int, float, str)
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "deque": deque}


class Unkeepable(Exception):
    """A value has changed that cannot be put back; the message names its place."""


class Beginning:
    """A value as it is before anything changes: what each place holds, and how its content reads.

    weights  tensors that are kept elsewhere, by name: what shares their memory is theirs
    apart    objects that are not looked into
    """

    def __init__(self, value: Any, *, place: str, weights: Mapping[str, Tensor] = {}, apart: tuple = ()):
        self.place, self.weights, self.apart = place, weights, {id(one) for one in apart}
        self.objects: dict[str, Any] = {}
        first = _Walk(self, begun=None)
        first.write(value, place)
        self.objects, self.prints, self.shares = first.objects, first.prints, first.shares

    def changes(self, value: Any) -> tuple[Any, dict[str, Tensor]]:
        """What of `value` is not as it was: JSON, and tensors by their place. Raises Unkeepable."""
        walk = _Walk(self, begun=self.prints)
        return walk.write(value, self.place), walk.tensors

    def room(self) -> dict[str, Tensor]:
        """Tensors there were at the beginning, by place, that kept ones can be read into."""
        found = {place: one for place, one in self.objects.items() if isinstance(one, Tensor)}
        owned = {memory(weight) for weight in self.weights.values()}
        return {
            place: one.detach()
            for place, one in found.items()
            if memory(one) not in owned | {None} and not overlaps(one)
        }

    def restore(self, changes: Any, tensors: Mapping[str, Tensor]) -> Any:
        """The value with `changes` in it, in place where the place was there at the beginning. Once, and before anything has changed."""
        return _Back(self, tensors).read(changes, self.place)

    def settle(self) -> None:
        """Let go of the objects of the beginning: from now on there is nothing to restore."""
        self.objects = {}


class _Walk:
    """One look at a value: what is written down, with how it reads at each place."""

    def __init__(self, beginning: Beginning, *, begun: Mapping[str, str] | None):
        self.beginning, self.begun = beginning, begun
        self.tensors: dict[str, Tensor] = {}
        self.prints: dict[str, str] = {}
        self.shares: dict[str, str] = {}  # places of tensors whose memory an earlier place has too
        self.objects: dict[str, Any] = {}
        self._seen: dict[int, str] = {}
        self._memories: dict[tuple, str] = {}
        self._owners = {memory(weight): name for name, weight in beginning.weights.items() if weight.numel()}

    def write(self, value: Any, place: str) -> list:
        kind, self.objects[place] = type(value), value
        if kind in PLAIN:
            return self._leaf(place, repr(value), ["value", value])
        if id(value) in self._seen:
            first = self._seen[id(value)]
            return self._leaf(place, f"as {first}", ["as", first], same=self._unchanged(first))
        self._seen[id(value)] = place  # and objects[place] keeps it, so that no other gets its id
        if id(value) in self.beginning.apart:
            return self._opaque(value, place, "the run's")
        if isinstance(value, Tensor):
            return self._tensor(value, place)
        if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
            return self._array(value, place)
        if isinstance(value, dict) and all(type(key) in PLAIN for key in value):
            items = [[key, self.write(one, f"{place}[{_key(key)}]")] for key, one in value.items()]
            return self._container(value, place, "dict", items, [repr(key) for key in value], [one for _, one in items])
        for name, sequence in SEQUENCES.items():
            if isinstance(value, sequence):
                items = [self.write(one, f"{place}[{index}]") for index, one in enumerate(value)]
                more = [value.maxlen] if sequence is deque else []
                return self._container(value, place, name, items, [str(len(items)), *map(str, more)], items, *more)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            items = [
                [f.name, self.write(getattr(value, f.name, None), f"{place}.{f.name}")]
                for f in dataclasses.fields(value)
            ]
            return self._container(
                value, place, "fields", items, [name for name, _ in items], [one for _, one in items]
            )
        state = state_of(value)
        if state is not None:
            inner = self.write(state, f"{place}.state")
            return self._container(value, place, "state", [inner], [], [inner])
        return self._opaque(value, place, pickled(value, named=self._named))

    def print_of(self, tensor: Tensor) -> str:
        """How a tensor reads: which of the weights it is, or its content."""
        own = local(tensor)
        look = f"{own.dtype} {tuple(own.shape)} {own.device}"
        if owner := self._owners.get(memory(tensor)):
            return f"weight {owner} {look} {own.stride()} {own.storage_offset()}"
        return f"{look} {digest(own) if plain(own) else id(tensor)}"

    def _named(self, one: Any) -> str | None:
        """What stands for an object in what pickle writes: the run's own, modules and functions by identity, tensors by content."""
        if isinstance(one, Tensor):
            return self.print_of(one)
        known = id(one) in self.beginning.apart or isinstance(
            one, nn.Module | FunctionType | MethodType | BuiltinFunctionType
        )
        return f"{type(one)} {id(one)}" if known else None

    def _unchanged(self, place: str) -> bool:
        return self.begun is not None and self.begun.get(place) == self.prints.get(place)

    def _leaf(self, place: str, print_: str, written: list, *, same: bool = True) -> list:
        self.prints[place] = print_
        return ["same"] if same and self._unchanged(place) else written

    def _container(
        self, value: Any, place: str, kind: str, items: list, look: list[str], children: list, *more: Any
    ) -> list:
        self.prints[place] = f"{type(value)} {look}"
        there = self._unchanged(place)
        if there and all(child == ["same"] for child in children):
            return ["same"]
        plain = type(value) in (dict, *SEQUENCES.values())
        if self.begun is not None and not there and not plain and str(type(value)) not in self.begun.get(place, ""):
            raise Unkeepable(f"{place} is a {type(value).__qualname__} that was made on the way; make it in `begin`")
        return [kind, items, *more]

    def _tensor(self, value: Tensor, place: str) -> list:
        own, where = local(value), memory(value)
        first = self._memories.setdefault(where, place) if where else place
        if first != place:
            self.shares[place] = first
        there = self.begun is not None and place in self.begun
        self.prints[place] = f"{self.print_of(value)} {self.shares.get(place)}" if self.begun is None or there else ""
        if self.begun is None or self._unchanged(place):
            return ["same"]
        if owner := self._owners.get(where):
            weight = self.beginning.weights[owner]
            if not same_view(own, weight):
                raise Unkeepable(
                    f"{place} is a view of the weight {owner} that was made on the way: keep a copy (.clone())"
                )
            return ["weight", owner, value is weight]
        together = self.shares.get(place) == self.beginning.shares.get(place)
        if first != place and not together:
            if not same_view(own, local(self.objects[first])):
                raise Unkeepable(
                    f"{place} shares the memory of {first} since it was made on the way: keep a copy (.clone())"
                )
            return ["as", first]
        if not plain(own) or (isinstance(value, DTensor) and not there):
            raise Unkeepable(f"{place} is a tensor of a kind that a checkpoint does not hold ({own.layout})")
        name = place if there and together else f"{place}, new"
        self.tensors[name] = value
        return ["tensor", name, str(own.device), value.requires_grad and value.is_leaf]

    def _array(self, value: np.ndarray | np.generic, place: str) -> list:
        flat = torch.from_numpy(np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8).copy())
        self.prints[place] = f"{type(value)} {value.dtype.str} {value.shape} {digest(flat)}"
        if self.begun is None or self._unchanged(place):
            return ["same"]
        self.tensors[place] = flat
        return ["array", value.dtype.str, list(value.shape), isinstance(value, np.generic)]

    def _opaque(self, value: Any, place: str, print_: str | None) -> list:
        """What cannot be put back; a print of None is of what may change unseen."""
        self.prints[place] = f"{type(value)} {print_}"
        if self.begun is None or (print_ is not None and self._unchanged(place)):
            return ["same"]
        raise Unkeepable(
            f"{place} is a {type(value).__module__}.{type(value).__qualname__}, which changes and cannot be put back; "
            "keep numbers, texts, tensors or generators of random numbers"
        )


class _Back:
    """One value put back."""

    def __init__(self, beginning: Beginning, tensors: Mapping[str, Tensor]):
        self._objects, self._weights, self._tensors = beginning.objects, beginning.weights, tensors
        self._read: dict[str, Any] = {}

    def read(self, written: list, place: str) -> Any:
        kind, *facts = written
        fresh = self._objects.get(place)
        if kind == "same":
            return fresh
        if kind == "as":
            return self._read[facts[0]] if facts[0] in self._read else self._objects[facts[0]]
        found = getattr(self, f"_{kind}")(fresh, place, *facts)
        self._read[place] = found
        return found

    def _value(self, fresh, place, value):
        return value

    def _weight(self, fresh, place, name, itself):
        return self._weights[name] if itself else self._weights[name].detach()

    def _tensor(self, fresh, place, name, device, grad):
        found = self._tensors[name]
        if name == place and isinstance(fresh, Tensor) and not overlaps(fresh) and looks(fresh) == looks(found):
            if memory(fresh) != memory(found):  # else it was read in place
                with torch.no_grad():
                    local(fresh.detach()).copy_(local(found))
            return fresh
        return found.to(device).requires_grad_(grad)

    def _array(self, fresh, place, dtype, shape, single):
        found = np.frombuffer(self._tensors[place].cpu().numpy().tobytes(), np.dtype(dtype)).reshape(shape)
        if single:
            return found[()]
        if (
            isinstance(fresh, np.ndarray)
            and fresh.dtype.str == dtype
            and list(fresh.shape) == shape
            and fresh.flags.writeable
        ):
            fresh[...] = found
            return fresh
        return found.copy()

    def _dict(self, fresh, place, items):
        target = self._read[place] = fresh if isinstance(fresh, dict) else {}
        found = {key: self.read(one, f"{place}[{_key(key)}]") for key, one in items}
        target.clear()
        target.update(found)
        return target

    def _list(self, fresh, place, items):
        target = self._read[place] = fresh if isinstance(fresh, list) else []
        target[:] = self._items(place, items)
        return target

    def _deque(self, fresh, place, items, maxlen):
        target = self._read[place] = (
            fresh if isinstance(fresh, deque) and fresh.maxlen == maxlen else deque(maxlen=maxlen)
        )
        found = self._items(place, items)
        target.clear()
        target.extend(found)
        return target

    def _set(self, fresh, place, items):
        target, found = fresh if isinstance(fresh, set) else set(), self._items(place, items)
        target.clear()
        target.update(found)
        return target

    def _tuple(self, fresh, place, items):
        found = self._items(place, items)
        return fresh._make(found) if hasattr(fresh, "_make") else tuple(found)

    def _items(self, place: str, items: list) -> list:
        return [self.read(one, f"{place}[{index}]") for index, one in enumerate(items)]

    def _fields(self, fresh, place, items):
        found = {name: self.read(one, f"{place}.{name}") for name, one in items}
        if all(value is getattr(fresh, name, None) for name, value in found.items()):
            return fresh
        target = copy(fresh) if fresh.__dataclass_params__.frozen else fresh
        for name, value in found.items():
            object.__setattr__(target, name, value)
        return target

    def _state(self, fresh, place, items):
        set_state(fresh, self.read(items[0], f"{place}.state"))
        return fresh


def _key(key: Any) -> str:
    return f'"{key}"' if isinstance(key, str) else repr(key)
