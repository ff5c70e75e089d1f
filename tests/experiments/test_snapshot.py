"""Changes since the beginning are found by content and put into values that are made anew."""

import collections
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from experiments.training.snapshot import Snapshot, Unkeepable, fingerprint, restore, tensors_in
from methods.tools.importance import encode


def test_every_bit_and_its_place_count():
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert fingerprint(tensor) == fingerprint(tensor.clone()) == fingerprint(torch.stack([tensor, -tensor], 1)[:, 0])
    seen = {fingerprint(tensor)}
    for index in (0, 1, 2, 257, 998, 999):
        changed = tensor.clone()
        changed.view(torch.int32)[index] ^= 1
        seen.add(fingerprint(changed))
        moved = torch.zeros(1000)
        moved[index] = 1.0  # the same entry elsewhere
        seen.add(fingerprint(moved))
    assert len(seen) == 13
    assert fingerprint(torch.tensor(0.0)) != fingerprint(torch.tensor(-0.0))


def snapshot(value, begun=None):
    return Snapshot({"x": value}, weights={}, begun=begun)


def restored(begun, later):
    return restore(begun, json.loads(json.dumps(later.changes)), later.tensors.__getitem__)["x"]


def through_json(make, change):
    """A value that is changed, and another one, made anew, into which the change is put."""
    first = make()
    begun = snapshot(first)
    change(first)
    return first, restored(snapshot(make()), snapshot(first, begun))


def test_what_is_unchanged_is_not_written():
    value = {"big": torch.ones(1000), "codes": encode(torch.rand(3)), "n": [1, {"a": (2, {3})}], "odd": object()}
    begun = snapshot(value)
    later = snapshot(value, begun)
    assert later.changes == {"x": ["same"]} and not later.tensors
    value["n"].append(4)
    later = snapshot(value, begun)
    assert not later.tensors and json.dumps(later.changes).count("value") == 5  # the four keys, and the 4


def test_one_object_in_two_places_that_become_two_objects():
    def make():
        shared = [1]
        return {"a": shared, "b": shared}

    def change(value):
        value["a"] = [2, 3]

    first, second = through_json(make, change)
    assert second == first == {"a": [2, 3], "b": [1]}


def test_two_objects_that_become_one():
    def change(value):
        value["a"].append(2)
        value["b"] = value["a"]

    first, second = through_json(lambda: {"a": [1], "b": [1]}, change)
    assert second == first and second["a"] is second["b"]


def test_a_set_comes_back_whatever_the_order_of_its_elements():
    """0 and 8 stand in the order in which they came; texts have another order in every process."""
    first, second = set([0, 8]), set([8, 0])  # noqa: C405
    assert list(first) != list(second)
    assert restored(snapshot(second), snapshot(first | {16}, snapshot(first))) == {0, 8, 16}


def test_keys_that_are_tuples():
    def change(value):
        value[("a", 1)] += 1
        value[("b", None)] = torch.ones(2)

    first, second = through_json(lambda: {("a", 1): torch.zeros(2)}, change)
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def test_arrays_that_are_changed_in_place_become_others_and_cannot_be_written():
    def make():
        fixed = np.arange(3.0)
        fixed.flags.writeable = False
        return {"a": np.zeros(2), "b": np.zeros(2), "fixed": fixed, "n": np.int64(1), "text": np.array(["x"])}

    def change(value):
        value["a"] += 1
        value["b"] = np.ones((3, 2), dtype=np.uint16)
        value["fixed"] = value["fixed"] * 2
        value["n"] += 1

    value = make()
    held, begun = value["a"], snapshot(value)
    first = make()
    before = snapshot(first)
    change(first)
    second = restored(begun, snapshot(first, before))
    assert second["a"] is held
    for key, wanted in first.items():
        assert second[key].dtype == wanted.dtype and np.array_equal(second[key], wanted), key


@dataclass
class Holder:
    value: object


class Fixed:
    def __init__(self):
        self.seen = collections.Counter("abc")

    def __call__(self):
        self.seen.update("a")


CHANGES = {
    "an attribute of an object": (lambda: {"x": Fixed()}, lambda v: v["x"](), r'x\["x"\] is a .*Fixed'),
    "an iterator's position": (lambda: {"x": iter([1])}, lambda v: next(v["x"]), "list_iterator"),
    "a generator's position": (lambda: {"x": (i for i in (1, 2))}, lambda v: None, "generator"),
    "a dataclass made on the way": (dict, lambda v: v.update(x=Holder(1)), "is a Holder that was made in a step"),
    "a view made on the way": (
        lambda: {"x": torch.ones(4)},
        lambda v: v.update(y=v["x"][1:]),
        r'x\["y"\] shares the memory of x\["x"\]',
    ),
    "a sparse tensor": (dict, lambda v: v.update(x=torch.eye(2).to_sparse()), "does not hold"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_cannot_be_restored_is_named(kind):
    make, change, said = CHANGES[kind]
    value = make()
    begun = snapshot(value)
    change(value)
    with pytest.raises(Unkeepable, match=said):
        snapshot(value, begun)


def test_tensors_are_found_at_any_depth():
    one, codes = torch.ones(2), encode(torch.rand(3))
    assert list(map(id, tensors_in({"a": [one, (1, {"b": codes})], "c": collections.deque(["x"]), "d": None}))) == [
        id(one),
        id(codes.codes),
    ]
