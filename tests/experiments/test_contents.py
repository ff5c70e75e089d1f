"""What tells one content from another: every bit and its place, whatever the layout, and nothing else."""

import collections

import pytest
import torch

from experiments.training.contents import digest, mixed, overlaps, pickled, tensors_in
from methods.tools.importance import encode


@pytest.mark.parametrize(
    "look",
    [digest, lambda tensor: mixed(tensor.contiguous().reshape(-1).view(torch.uint8))],
    ids=["on the CPU", "on a GPU"],
)
def test_every_bit_and_its_place_count(look):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert look(tensor) == look(tensor.clone()) == look(torch.stack([tensor, -tensor], 1)[:, 0])
    seen = {look(tensor)}
    for index in (0, 1, 2, 257, 998, 999):
        changed = tensor.clone()
        changed.view(torch.int32)[index] ^= 1
        seen.add(look(changed))
        moved = torch.zeros(1000)
        moved[index] = 1.0  # the same entry elsewhere
        seen.add(look(moved))
    assert len(seen) == 13
    assert look(torch.empty(0)) == look(torch.empty(0, 5)) and look(torch.tensor(0.0)) != look(torch.tensor(-0.0))
    odd = torch.arange(13, dtype=torch.uint8)  # no whole number of words
    assert look(odd) == look(torch.cat([odd, odd])[:13]) and look(odd) != look(odd.flip(0))


def test_what_pickle_would_write_tells_a_change():
    class Fixed:
        pass

    value = {("a", 1): collections.Counter("abc")}
    before = pickled(value, named=lambda one: None)
    assert pickled(value, named=lambda one: None) == before
    value["a", 1]["a"] += 1
    assert pickled(value, named=lambda one: None) != before
    assert pickled(iter([1]), named=lambda one: None) and pickled((i for i in ()), named=lambda one: None) is None
    assert pickled(Fixed(), named=lambda one: None).isdigit()  # a local class cannot be pickled: its identity


def test_tensors_are_found_at_any_depth():
    one, codes = torch.ones(2), encode(torch.rand(3))
    assert list(map(id, tensors_in({"a": [one, (1, {"b": codes})], "c": collections.deque(["x"]), "d": None}))) == [
        id(one),
        id(codes.codes),
    ]
    assert (
        overlaps(torch.ones(1).expand(3))
        and not overlaps(torch.ones(3, 4).T)
        and not overlaps(torch.ones(1, 1).expand(1, 1))
    )
