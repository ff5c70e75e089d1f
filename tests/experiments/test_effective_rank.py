"""Effective ranks: closed forms, and the estimate for large matrices against the exact value."""

import math

import pytest
import torch

from experiments.model.effective_rank import effective_rank, estimated, of_factors


def test_effective_rank_in_closed_form():
    draw = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(40, 40, generator=draw, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(24, 24, generator=draw, dtype=torch.float64))
    for values in ([1.0], [2.0] * 24, [3.0, 1.0], [8.0, 4.0, 2.0, 1.0]):
        matrix = u[:, : len(values)] * torch.tensor(values, dtype=torch.float64) @ v[: len(values)]
        share = [s / sum(values) for s in values]
        expected = math.exp(-sum(p * math.log(p) for p in share))
        assert effective_rank(matrix) == pytest.approx(expected, rel=1e-6)
        assert effective_rank(matrix.T) == pytest.approx(expected, rel=1e-6)
    matrix = torch.randn(30, 17, generator=draw)
    singular = torch.linalg.svdvals(matrix.double())
    share = singular / singular.sum()
    assert effective_rank(matrix) == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-9)
    assert effective_rank(torch.zeros(5, 7)) is None


def test_the_rank_of_a_product_follows_from_its_factors():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 30, generator=draw), torch.randn(50, 4, generator=draw)
    assert of_factors(a, b) == pytest.approx(effective_rank(b @ a), rel=1e-6)
    assert of_factors(a, torch.zeros(50, 4)) is None


SPECTRA = {
    "power -1/2": (lambda i: i**-0.5, 0.02),
    "power -1": (lambda i: 1 / i, 0.02),
    "power -2": (lambda i: i**-2, 0.02),
    "falls by e every 5": (lambda i: torch.exp(-i / 5), 0.02),
    "falls by e every 50": (lambda i: torch.exp(-i / 50), 0.06),
    "rank 1": (lambda i: (i == 1).double(), 1e-3),
    "rank 8": (lambda i: (i <= 8).double(), 1e-3),
    "rank 100": (lambda i: (i <= 100).double(), 0.02),
    "all alike": (lambda i: i**0, 0.02),
}


def of_spectrum(values, *, rows, columns):
    draw = torch.Generator().manual_seed(2)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=draw, dtype=torch.float64)).Q
        for size in (rows, columns)
    )
    return left * values @ right.T


DEFAULT = ("power -1", "falls by e every 50", "rank 100")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.thorough) for n in SPECTRA])
def test_the_estimate_for_known_singular_values(name):
    values, within = SPECTRA[name]
    singular = values(torch.arange(1, 513, dtype=torch.float64))
    share = singular[singular > 0] / singular.sum()
    exact = math.exp(-(share * share.log()).sum())
    matrix = of_spectrum(singular, rows=512, columns=768)
    assert estimated(matrix) == pytest.approx(exact, rel=within + 0.005)  # of three digits
    assert estimated(1e-20 * matrix) == estimated(matrix)


def test_the_estimate_for_noise_is_the_same_every_time():
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(512, 1024, generator=draw)
    sparse = noise * (torch.rand(512, 1024, generator=draw) < 0.02)
    low = of_spectrum(torch.ones(8, dtype=torch.float64), rows=512, columns=1024)
    for matrix in (noise, sparse.T, low + 1e-3 * noise):
        assert estimated(matrix) == pytest.approx(effective_rank(matrix), rel=0.02)
        assert estimated(matrix) == estimated(matrix.clone())
    assert estimated(torch.zeros(70, 90)) is None


def test_the_estimate_for_a_matrix_that_is_all_top():
    draw = torch.Generator().manual_seed(1)
    for shape in ((60, 90), (64, 64), (66, 80), (3, 500)):
        matrix = torch.randn(shape, generator=draw)
        assert estimated(matrix) == pytest.approx(effective_rank(matrix), rel=0.01)
