"""Importance in 8 bits and the penalty on it, against the formulas written out in float64."""

import math

import pytest
import torch

from methods.errors import UserError
from methods.tools import importance
from methods.tools.importance import Codes, decode, encode, penalise, placed, totals
from methods.tools.process_group import Shards

ROUNDING = 2.0**-23  # float32's


def drawn(entries=5000, spread=4.0, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(entries, generator=draw, dtype=torch.float64)).exp2().to(dtype)


def decoded(coded, dtype=torch.float32):
    return decode(coded.codes, low=coded.low, step=coded.step, dtype=dtype)


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_codes_are_the_nearest_of_all(spread, dtype):
    values = drawn(spread=spread, dtype=dtype)
    values[7] = 0
    wide = values.float().double()
    high = math.log2(wide.max())
    low = max(math.log2(wide[wide >= 2.0 ** (high - 41)].min()), high - 40)
    gaps = (wide.log2()[:, None] - torch.linspace(low, high, 255, dtype=torch.float64)).abs()  # from every code's value
    codes = encode(values).codes.long()
    assert torch.equal(codes == 0, wide < 2.0 ** (high - 41)) and codes[7] == 0
    kept = codes > 0
    # within 1e-8: at half the way either will do
    torch.testing.assert_close(gaps[kept, codes[kept] - 1], gaps[kept].min(dim=1).values, rtol=0, atol=1e-8)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_error_is_within_half_a_step_and_reaches_it(spread):
    values = drawn(spread=spread)
    coded = encode(values)
    assert values.double().log2().aminmax().min == pytest.approx(coded.low)
    error = (decoded(coded, torch.float64) / values.double() - 1).abs().max().item()
    bound = 2 ** (coded.step / 2) - 1
    assert 0.9 * bound < error <= bound + ROUNDING


def test_smallest_and_largest_are_kept_exactly():
    values = drawn()
    actual = decoded(encode(values))
    assert actual.min() == values.min() and actual.max() == values.max()


def test_forty_octaves_below_the_largest_the_nearer_of_the_smallest_code_and_zero():
    top = 3.0
    bottom = top * 2.0**-40
    coded = encode(torch.tensor([top, bottom, bottom * 0.51, bottom * 0.49, bottom * 1e-6, 0.0]))
    assert coded.codes.tolist() == [255, 1, 1, 0, 0, 0]
    assert (coded.low, coded.step) == (pytest.approx(math.log2(bottom)), pytest.approx(40 / 254))
    assert 2 ** (coded.step / 2) - 1 == pytest.approx(0.056, abs=5e-4)  # as the module says


def test_codes_are_not_spent_on_what_becomes_zero():
    coded = encode(torch.tensor([1.0, 2.0**-20, 2.0**-60]))
    assert coded.codes.tolist() == [255, 1, 0] and coded.low == -20


@pytest.mark.parametrize(
    "values",
    [
        drawn(),
        drawn(spread=20.0),
        drawn(spread=0.001),
        drawn(spread=1e-6),
        torch.tensor([1.0, 1 + ROUNDING, 1 + 2 * ROUNDING]),
        torch.tensor([1.0, 2.0**-20, 2.0**-60]),
        torch.tensor([1e-45, 1e-40, 1e-38, 1e-36]),
        torch.tensor([3e38, 1e-38]),
        torch.full((9,), 0.3),
        torch.zeros(4),
        torch.tensor([0.0, 5e-324], dtype=torch.float64),
        torch.tensor([1e-39, 1e-45]),
    ],
)
def test_decoded_values_have_the_same_codes(values):
    coded = encode(values)
    again = encode(decoded(coded))
    assert torch.equal(again.codes, coded.codes)
    assert torch.equal(decoded(again), decoded(coded))


def test_few_or_no_values():
    equal = encode(torch.tensor([0.3, 0.0, 0.3]))
    assert equal.codes.tolist() == [1, 0, 1] and equal.step == 0
    assert decoded(equal).tolist() == torch.tensor([0.3, 0.0, 0.3]).tolist()
    assert decoded(encode(torch.zeros(2, 3))).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert encode(torch.zeros(0, 3)).codes.shape == (0, 3)
    assert decoded(encode(torch.tensor(0.25))).item() == 0.25
    assert decoded(encode(torch.tensor([[-0.0, 4.0]]))).tolist() == [[0, 4]]


def test_subnormal_numbers_become_the_smallest_normal_one_or_zero():
    tiny = torch.finfo(torch.float32).tiny
    coded = encode(torch.tensor([1e-45, 0.4 * tiny, 0.6 * tiny, tiny, 8 * tiny]))
    assert decoded(coded).tolist() == [0, 0, tiny, tiny, 8 * tiny]


def test_shape_is_kept_and_layout_does_not_matter():
    values = drawn(600).view(20, 30)
    assert encode(values).codes.shape == (20, 30)
    assert torch.equal(encode(values.T).codes, encode(values).codes.T)


@pytest.mark.parametrize("entries", [1, 63, 64, 65, 200])
def test_pieces_change_nothing(entries, monkeypatch):
    values = drawn(entries)
    whole = encode(values)
    monkeypatch.setattr(importance, "CPU_PIECE", 64)
    cut = encode(values)
    assert torch.equal(whole.codes, cut.codes) and (whole.low, whole.step) == (cut.low, cut.step)
    parts = [decode(part, low=whole.low, step=whole.step) for part in whole.codes.split(50)]
    assert torch.equal(torch.cat(parts), decoded(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decode_in_another_dtype(dtype):
    coded = encode(drawn())
    k = coded.codes.double()
    exact = torch.where(k == 0, 0.0, (coded.low + (k - 1) * coded.step).exp2())
    assert decoded(coded, dtype).dtype == dtype
    torch.testing.assert_close(decoded(coded, dtype).double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_what_is_no_importance_is_refused_by_name(bad):
    values = torch.tensor([1.0, bad, 2.0])
    with pytest.raises(UserError, match=r"h\.0\.weight.*finite and not negative"):
        encode(values, name="h.0.weight")
    with pytest.raises(UserError, match="finite"):
        encode(torch.tensor([1e300], dtype=torch.float64))


@pytest.mark.parametrize("coded", [True, False])
def test_totals(coded, monkeypatch):
    monkeypatch.setattr(importance, "CPU_PIECE", 64)
    values = drawn(500, spread=3.0).view(20, 25)
    if coded:
        values = encode(values)
    dense = (decoded(values) if coded else values).double()
    assert totals(values) == (pytest.approx(dense.sum().item()), pytest.approx(dense.square().sum().item()))
    assert totals(encode(torch.zeros(0)) if coded else torch.zeros(0)) == (0, 0)
    assert values.numel() == 500


def test_a_process_gets_its_rows(run_of, make):
    run = run_of(make(), {})
    run.shards = Shards(rank=1, world=2)
    values = drawn(35).view(7, 5)
    assert torch.equal(placed(run, values), values[4:])
    coded = placed(run, encode(values))
    assert torch.equal(decoded(coded), decoded(encode(values))[4:])
    assert torch.equal(placed(run, torch.tensor(3.0)), torch.tensor(3.0))


def brute(weight, anchor, dense, gradient, scale):
    moved = weight.double() - (0 if anchor is None else anchor.double())
    return gradient.double() + scale * dense.double() * moved, (dense.double() * moved.square()).sum()


@pytest.mark.parametrize("piece", [7, 64, 1 << 18])
@pytest.mark.parametrize("kind", ["codes", "float32", "bfloat16", "one value"])
@pytest.mark.parametrize("anchor_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_penalty_against_the_formula(dtype, anchor_dtype, kind, piece, monkeypatch):
    monkeypatch.setattr(importance, "CPU_PIECE", piece)
    draw = torch.Generator().manual_seed(3)
    weight, gradient = (torch.randn(12, 32, generator=draw, dtype=dtype) for _ in range(2))
    anchor = None if anchor_dtype is None else (weight + 0.1 * torch.randn(12, 32, generator=draw)).to(anchor_dtype)
    if kind == "codes":
        given = encode(drawn(12 * 32, spread=2.0).view(12, 32))
        dense = decoded(given, torch.float64 if dtype == torch.float64 else torch.float32)
    elif kind == "one value":
        given = dense = torch.tensor(0.7)
    else:
        given = dense = drawn(12 * 32, spread=2.0, dtype=getattr(torch, kind)).view(12, 32)
    kept = [
        weight.clone(),
        None if anchor is None else anchor.clone(),
        given.codes.clone() if kind == "codes" else given.clone(),
    ]
    wanted, total = brute(weight, anchor, dense, gradient, 0.3)

    actual = penalise(weight=weight, anchor=anchor, importance=given, gradient=gradient, scale=0.3)

    assert actual.dtype == dtype and actual.dim() == 0 and gradient.dtype == dtype
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(gradient.double(), wanted, **close)
    torch.testing.assert_close(actual.double(), total, **close)
    for now, before in zip((weight, anchor, given.codes if kind == "codes" else given), kept, strict=True):
        assert before is None or torch.equal(now, before)


@pytest.mark.parametrize("entries, start", [(1000, 0), (999, 0), (1000, 1), (1000, 2), (1, 0), (0, 0)])
def test_codes_decoded_two_at_once_are_what_they_stand_for(entries, start, monkeypatch):
    codes = torch.randint(0, 256, (entries + start,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))[
        start:
    ]
    codes[:3] = torch.tensor([0, 255, 0], dtype=torch.uint8)[: len(codes)]
    exact = torch.where(codes == 0, 0.0, (-30 + (codes.double() - 1) * (40 / 254)).exp2())
    for least in (1, 1 << 30):
        monkeypatch.setattr(importance, "_PAIRED", least)
        gradient = torch.zeros(entries)
        penalise(
            weight=torch.ones(entries),
            anchor=None,
            importance=Codes(codes=codes, low=-30.0, step=40 / 254),
            gradient=gradient,
            scale=1.0,
        )
        torch.testing.assert_close(gradient.double(), exact, rtol=2.0**-24, atol=0)


def test_penalty_on_half_precision_weights_is_computed_in_float32():
    draw = torch.Generator().manual_seed(4)
    anchor = torch.randn(500, generator=draw).bfloat16()
    weight = (anchor.float() * (1 + 0.02 * torch.rand(500, generator=draw))).bfloat16()
    given, gradient = drawn(500, spread=2.0), torch.zeros(500, dtype=torch.bfloat16)
    wanted, total = brute(weight, anchor, given, gradient, 2.0)
    actual = penalise(weight=weight, anchor=anchor, importance=given, gradient=gradient, scale=2.0)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), total, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2.0**-8, atol=0)


def test_penalty_is_the_gradient_of_its_half():
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    anchor, given = torch.randn(6, 5, dtype=torch.float64), encode(drawn(30).view(6, 5))
    (0.4 / 2 * (decoded(given, torch.float64) * (weight - anchor).square()).sum()).backward()
    gradient = torch.zeros(6, 5, dtype=torch.float64)
    penalise(weight=weight, anchor=anchor, importance=given, gradient=gradient, scale=0.4)
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(0,), (0, 4)])
def test_penalty_on_nothing_is_zero(shape):
    empty = torch.zeros(shape)
    for given in (encode(empty), empty, torch.tensor(1.0)):
        actual = penalise(weight=empty, anchor=None, importance=given, gradient=empty.clone(), scale=1.0)
        assert actual.item() == 0 and actual.dim() == 0


def test_penalty_on_one_number():
    weight, gradient = torch.tensor(3.0), torch.tensor(1.0)
    for given in (encode(torch.tensor(0.25)), torch.tensor(0.25)):
        gradient.fill_(1)
        actual = penalise(weight=weight, anchor=torch.tensor(1.0), importance=given, gradient=gradient, scale=2.0)
        assert (actual.item(), gradient.item()) == (1.0, 2.0)


def test_penalty_refuses_what_it_would_get_wrong():
    weight = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"shapes differ.*\(6, 4\)"):
        penalise(weight=weight, anchor=None, importance=torch.ones(6, 4), gradient=torch.zeros(4, 6), scale=1.0)
    with pytest.raises(RuntimeError):  # a copy of the gradient would be added to
        penalise(weight=weight, anchor=None, importance=torch.ones(4, 6), gradient=torch.zeros(6, 4).T, scale=1.0)


def test_codes_are_what_they_are_called():
    coded = encode(drawn(10))
    assert isinstance(coded, Codes) and coded.codes.dtype == torch.uint8
    with pytest.raises(AttributeError):
        coded.low = 0.0
