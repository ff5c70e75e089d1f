"""What has changed since the beginning is told by content, and put into values that are made anew."""

import collections
import json
from dataclasses import dataclass

import pytest
import torch

from experiments.training.snapshot import Beginning, Unkeepable, fingerprint, tensors_in
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
    odd = torch.arange(13, dtype=torch.uint8)  # no whole number of words
    assert fingerprint(odd) == fingerprint(torch.cat([odd, odd])[:13]) and fingerprint(odd) != fingerprint(odd.flip(0))


def test_pieces_give_one_fingerprint(monkeypatch):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = fingerprint(tensor)
    monkeypatch.setattr("experiments.training.snapshot.PIECE", 64)
    assert fingerprint(tensor) == whole


def through_json(make, change):
    """A value that is changed, and another one, made anew, into which the change is put."""
    first = make()
    begun = Beginning({"x": first}, weights={})
    change(first)
    changes, tensors = begun.changes({"x": first})
    second = make()
    begun = Beginning({"x": second}, weights={})
    return first, begun.restore(json.loads(json.dumps(changes)), tensors.__getitem__)["x"], changes["x"]


def test_what_is_unchanged_is_not_written():
    value = {"big": torch.ones(1000), "codes": encode(torch.rand(3)), "n": [1, {"a": (2, {3})}], "odd": object()}
    begun = Beginning({"x": value}, weights={})
    assert begun.changes({"x": value}) == ({"x": ["same"]}, {})
    value["n"].append(4)
    changes, tensors = begun.changes({"x": value})
    assert not tensors and json.dumps(changes).count("value") == 5  # the four keys, and the 4


def test_one_object_in_two_places_that_become_two_objects():
    def make():
        shared = [1]
        return {"a": shared, "b": shared}

    def change(value):
        value["a"] = [2, 3]

    first, second, _ = through_json(make, change)
    assert second == first == {"a": [2, 3], "b": [1]}


def test_two_objects_that_become_one():
    def change(value):
        value["a"].append(2)
        value["b"] = value["a"]

    first, second, _ = through_json(lambda: {"a": [1], "b": [1]}, change)
    assert second == first and second["a"] is second["b"]


def test_a_set_comes_back_whatever_the_order_of_its_elements():
    """0 and 8 stand in the order in which they came; texts have another order in every process."""
    first, second = set([0, 8]), set([8, 0])  # noqa: C405
    assert list(first) != list(second)
    begun = Beginning({"x": first}, weights={})
    changes, _ = begun.changes({"x": first | {16}})
    begun = Beginning({"x": second}, weights={})
    assert begun.restore(json.loads(json.dumps(changes)), {}.__getitem__)["x"] == {0, 8, 16}


def test_keys_that_are_tuples():
    def change(value):
        value[("a", 1)] += 1
        value[("b", None)] = torch.ones(2)

    first, second, _ = through_json(lambda: {("a", 1): torch.zeros(2)}, change)
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


@dataclass
class Holder:
    value: object


class Fixed:
    def __init__(self):
        self.seen = collections.Counter("abc")


CHANGES = {
    "an attribute of an object": (lambda: {"x": Fixed()}, lambda v: v["x"].seen.update("a"), r'x\["x"\] is a .*Fixed'),
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
    begun = Beginning({"x": value}, weights={})
    change(value)
    with pytest.raises(Unkeepable, match=said):
        begun.changes({"x": value})


def test_tensors_are_found_at_any_depth():
    one, codes = torch.ones(2), encode(torch.rand(3))
    assert list(map(id, tensors_in({"a": [one, (1, {"b": codes})], "c": collections.deque(["x"]), "d": None}))) == [
        id(one),
        id(codes.codes),
    ]
