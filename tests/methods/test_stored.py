"""Importance on disk: what is written is read back."""

import math
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.errors import UserError
from methods.tools.importance import Codes, encode
from methods.tools.stored import load_importance, save_importance


def drawn(*shape, spread=4.0, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=draw, dtype=torch.float64)).exp2().to(dtype)


def sparse(*shape, share=0.2):
    values = drawn(*shape)
    return values * (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share)


def same(actual, wanted):
    if isinstance(wanted, Codes):
        return torch.equal(actual.codes, wanted.codes) and (actual.low, actual.step) == (wanted.low, wanted.step)
    return torch.equal(actual, wanted) and actual.dtype == wanted.dtype


MADE = {
    "dense": encode(drawn(24, 30)),
    "sparse": encode(sparse(7, 13)),
    "turned": Codes(codes=encode(drawn(4, 6)).codes.T, low=-3.5, step=0.1),
    "zeros": encode(torch.zeros(3)),
    "none": encode(torch.zeros(0, 3)),
    "one": encode(torch.tensor(2.0)),
    "float": drawn(5, 7),
    "double": drawn(9, dtype=torch.float64),
    "bf16": drawn(3, 3, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 2),
    "strided": drawn(4, 6).T,
}


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    save_importance(MADE, tmp_path / "a.safetensors")
    actual = load_importance(tmp_path / "a.safetensors")
    assert actual.keys() == MADE.keys() and all(same(actual[name], wanted) for name, wanted in MADE.items())
    assert all(
        f.shape == w.shape for f, w in ((actual[n].codes, w.codes) for n, w in MADE.items() if isinstance(w, Codes))
    )
    again = dict(reversed(MADE.items()))
    save_importance(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def bits_an_entry(importance, path):
    """Of the frames alone, without the header."""
    save_importance({"w": importance}, path)
    return 8 * sum(t.nbytes for t in load_file(path).values()) / importance.numel()


def entropy(codes):
    shares = codes.reshape(-1).bincount().double() / codes.numel()
    return -(shares[shares > 0] * shares[shares > 0].log2()).sum().item()


def test_codes_take_about_their_entropy_and_few_of_them_a_bitmap_and_theirs(tmp_path):
    dense, few = encode(drawn(300_000)), encode(sparse(300_000, share=0.1))
    assert entropy(dense.codes) - 0.01 < bits_an_entry(dense, tmp_path / "dense") < 1.02 * entropy(dense.codes)
    limit = entropy((few.codes > 0).byte()) + 0.1 * entropy(few.codes[few.codes > 0])
    assert limit - 0.01 < bits_an_entry(few, tmp_path / "few") < 1.05 * limit
    assert set(load_file(tmp_path / "few")) == {"w", "w::bitmap"} and set(load_file(tmp_path / "dense")) == {"w"}
    assert bits_an_entry(drawn(300_000), tmp_path / "float") < 0.9 * 32


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_a_float_that_is_no_importance_is_refused_by_name(bad, tmp_path):
    with pytest.raises(UserError, match=r"h\.0\.weight.*finite and not negative"):
        save_importance({"fine": torch.ones(3), "h.0.weight": torch.tensor([1.0, bad, 2.0])}, tmp_path / "x")


def test_another_layout_and_a_frame_that_ends_early_are_refused(tmp_path):
    save_file({"w": torch.ones(4)}, tmp_path / "old.safetensors")
    with pytest.raises(UserError, match="old.safetensors holds no importance in this version's layout: prepare"):
        load_importance(tmp_path / "old.safetensors")
    from safetensors import safe_open

    save_importance({"w": encode(drawn(4000))}, tmp_path / "whole")
    with safe_open(tmp_path / "whole", framework="pt") as file:
        save_file({"w": file.get_tensor("w")[:-900]}, tmp_path / "cut", metadata=file.metadata())
    with pytest.raises(UserError, match="cut: w ends after .* of 4,000 bytes"):
        load_importance(tmp_path / "cut")


def test_without_zstandard_only_files_are_missed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="zstandard: install requirements.lock"):
        save_importance({"w": encode(drawn(9))}, tmp_path / "x")
