"""The lossless difference: bits that come back, bytes against the entropy, what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from experiments.bench.delta import entropy
from experiments.model import delta, difference, weights
from methods.errors import UserError

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def drawn(count, *, change, dtype=torch.bfloat16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(count, generator=draw)).to(dtype)
    return base, (base.double() + 0.02 * change * torch.randn(count, generator=draw, dtype=torch.float64)).to(dtype)


def any_bits(count, *, dtype, seed):
    """Random bit patterns: NaN of all payloads, infinities, subnormal numbers, both zeros."""
    signed = torch.int16 if dtype.itemsize == 2 else torch.int32
    info = torch.iinfo(signed)
    bits = torch.randint(info.min, info.max + 1, (count,), generator=torch.Generator().manual_seed(seed)).to(signed)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")], dtype=dtype).view(signed)
    return torch.cat([special, bits]).view(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 7, 1000, 40_000])
def test_every_bit_comes_back(dtype, count, monkeypatch):
    monkeypatch.setattr(difference, "CHUNK", 1 << 14)
    monkeypatch.setattr(difference, "SMALLEST", 300)
    one, other = any_bits(count, dtype=dtype, seed=0), any_bits(count, dtype=dtype, seed=1)
    pairs = [(one, other), (one, one), (one, torch.where(torch.arange(len(one)) % 97 == 3, other, one))]
    pairs += [drawn(count, change=change, dtype=dtype) for change in (1e-4, 1e-2, 1.0, 1e4)]
    for base, tuned in pairs:
        assert delta.same(difference.decode(base, difference.encode(base, tuned)), tuned)
    square = one[:1].reshape(()), other[:1].reshape(())
    assert difference.decode(square[0], difference.encode(*square)).shape == ()


def test_ordinals_are_in_the_order_of_the_numbers():
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    finite = numbers[~numbers.isnan()]
    order = np.argsort(difference._ordinal(difference._bits(finite)))
    ordered = finite.double().numpy()[order]
    assert (np.diff(ordered) >= 0).all() and (np.diff(ordered) == 0).sum() == 1  # −0.0 and 0.0
    assert (difference._bits_of(difference._ordinal(difference._bits(numbers))) == difference._bits(numbers)).all()


@pytest.mark.parametrize("radix", difference.RADICES)
def test_digits_unpack(radix):
    for count in (1, 2, 23, 240):
        values = np.arange(count, dtype=np.uint32) * 7 % (radix + 2)
        packed = difference._pack(values, radix)
        assert len(packed) == -(-count // difference.RADICES[radix])
        assert (difference._unpack(packed, radix, count) == np.minimum(values, radix - 1)).all()


def test_entropy_of_a_known_source():
    base = torch.tensor([1.0, 4.0], dtype=torch.bfloat16).repeat(100)
    steps = torch.tensor([0, 0, 0, 0, 0, 1, 0, 1]).repeat(25).to(torch.int16)  # of 1.0 never, of 4.0 every second time
    assert entropy(base, (base.view(torch.int16) + steps).view(torch.bfloat16)) == pytest.approx(0.5)


@pytest.mark.parametrize("change", [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
def test_bytes_are_near_the_entropy_given_the_bases_exponent(change):
    base, tuned = drawn(1 << 19, change=change)
    assert 8 * len(difference.encode(base, tuned)) / len(base) <= 1.3 * entropy(base, tuned)


@pytest.fixture
def pair():
    """Weights before and after: changed, untouched, of a dtype that is not coded, in another order of names."""
    base = dict(zip("zyxw", (drawn(3000, change=0, seed=s)[0] for s in range(4)), strict=True)) | {
        "v": torch.arange(6.0, dtype=torch.float64)
    }
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["y"] = drawn(3000, change=1e-2, seed=1)[1]
    tuned["x"][7] = float("nan")
    tuned["v"][2] = -0.0
    shapes = {"x": (30, 100)}
    return tuple({name: t.reshape(shapes.get(name, t.shape)) for name, t in side.items()} for side in (base, tuned))


def test_a_file_rebuilds_weights_of_the_same_hash(pair, tmp_path, monkeypatch):
    base, tuned = pair
    (tmp_path / "tuned").mkdir()
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    path = tmp_path / "delta.safetensors"
    digest = delta.write(path, base=base, tuned=tuned, base_sha256="a" * 64)
    assert digest == weights.tensor_sha256(tmp_path / "tuned") == delta.sha256_of(tuned)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"y", "x", "v"}
        about = file.metadata()
    assert about["base_sha256"] == "a" * 64 and about["sha256"] == digest
    assert json.loads(about["tensors"])["x"] == ["bfloat16", [30, 100]]
    found = delta.Delta(path, base=base, base_sha256="a" * 64)
    assert list(found) == list(base) and all(delta.same(found[name], tuned[name]) for name in base)
    assert [name for name, _ in delta.verified(found, sha256=found.sha256, what=path)] == sorted(base)
    monkeypatch.setattr(difference, "THREADS", 1)
    delta.write(tmp_path / "again", base=base, tuned=tuned, base_sha256="a" * 64)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_nothing_changed(pair, tmp_path):
    base, _ = pair
    delta.write(tmp_path / "none", base=base, tuned=base, base_sha256="a")
    found = delta.Delta(tmp_path / "none", base=base, base_sha256="a")
    assert dict(delta.verified(found, sha256=delta.sha256_of(base), what="")).keys() == base.keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tuned: tuned | {"new": torch.zeros(2)}, "new is a tensor of the tuned model alone"),
        (lambda tuned: {name: t for name, t in tuned.items() if name != "w"}, "w is a tensor of the base alone"),
        (
            lambda tuned: tuned | {"x": tuned["x"].reshape(-1)},
            r"x is torch.bfloat16 \[3000\] in the tuned model, torch.bfloat16 \[30, 100\] in the base",
        ),
        (lambda tuned: tuned | {"v": tuned["v"].float()}, "v is torch.float32 .* in the tuned model, torch.float64"),
    ],
)
def test_other_tensors_than_the_bases_are_refused_by_name(pair, tmp_path, change, said):
    base, tuned = pair
    with pytest.raises(UserError, match=said):
        delta.write(tmp_path / "delta", base=base, tuned=change(tuned), base_sha256="a")
    assert not list(tmp_path.iterdir())


def test_tensors_of_any_layout_come_back(tmp_path):
    """Turned, strided, expanded, without entries, without dimensions, and of every dtype that safetensors names."""
    wide = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    base = {
        "turned": wide.T,
        "strided": wide[::2, 1::3],
        "expanded": wide[:, :1].expand(6, 4),
        "none": torch.empty(0, 5),
        "single": torch.tensor(1.5),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "long": torch.tensor([2**62 + 1, -1]),
        "truth": torch.tensor([True, False]),
        "eight": wide.to(torch.float8_e4m3fn),
        "double": wide.double(),
    }
    tuned = {name: (t.float() + 1).to(t.dtype) if t.is_floating_point() else ~t for name, t in base.items()}
    tuned["turned"] = tuned["turned"].clone().T.contiguous().T
    tuned["double"][0, 0] = float("nan")
    digest = delta.write(tmp_path / "delta", base=base, tuned=tuned, base_sha256="a")
    found = dict(delta.verified(delta.Delta(tmp_path / "delta", base=base, base_sha256="a"), sha256=digest, what=""))
    assert all(found[name].shape == t.shape and delta.same(found[name], t) for name, t in tuned.items())


def test_another_base_another_version_no_delta(pair, tmp_path, monkeypatch):
    base, tuned = pair
    path = tmp_path / "delta.safetensors"
    delta.write(path, base=base, tuned=tuned, base_sha256="a" * 64)
    with pytest.raises(
        UserError, match="is a delta of the base aaaaaaaaaaaa, this one is bbbbbbbbbbbb: give the base it was made from"
    ):
        delta.Delta(path, base=base, base_sha256="b" * 64)
    with pytest.raises(UserError, match=r"y is \['bfloat16', \[3000\]\], the base's is torch.float16"):
        delta.Delta(path, base=base | {"y": base["y"].half()}, base_sha256="a" * 64)["y"]
    changed = delta.Delta(
        path, base=base | {"w": -base["w"]}, base_sha256="a" * 64
    )  # what the stated hash of the base hides
    with pytest.raises(UserError, match="gives weights"):
        list(delta.verified(changed, sha256=changed.sha256, what=path))
    monkeypatch.setattr(delta, "VERSION", "2")
    with pytest.raises(UserError, match="holdfast-delta of version 1, this program reads holdfast-delta of version 2"):
        delta.Delta(path, base=base, base_sha256="a" * 64)
    save_file(base, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is no delta of version None"):
        delta.Delta(tmp_path / "model.safetensors", base=base, base_sha256="a")
    with pytest.raises(UserError, match="is missing"):
        delta.Delta(tmp_path / "nowhere", base=base, base_sha256="a")


def test_damage_is_found_wherever_it_is(pair, tmp_path):
    base, tuned = pair
    path = tmp_path / "delta.safetensors"
    digest = delta.write(path, base=base, tuned=tuned, base_sha256="a")
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")

    def read():
        found = delta.Delta(path, base=base, base_sha256="a")
        list(delta.verified(found, sha256=digest, what=path))

    read()
    for at in range(start, len(whole), 41):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        with pytest.raises(UserError, match="damaged|gives weights"):
            read()
    for at in (4, start // 2, start, len(whole) - 1):
        path.write_bytes(whole[:at])
        with pytest.raises(UserError, match="is damaged"):
            read()
