"""The order of examples: complete, drawn by the seed alone, of like lengths."""

from decimal import Decimal
from fractions import Fraction

import pytest

from experiments.training.batches import epoch_order, schedule, steps

LENGTHS = [5 + (i * 37) % 90 for i in range(203)]


def test_every_example_once_an_epoch():
    for epoch in (0, 1):
        seen = sorted(i for batch in epoch_order(LENGTHS, 8, 0, epoch) for i in batch)
        assert seen == list(range(len(LENGTHS)))


def test_seed_and_epoch_change_the_order_and_nothing_else_does():
    assert epoch_order(LENGTHS, 8, 0, 0) == epoch_order(LENGTHS, 8, 0, 0)
    assert epoch_order(LENGTHS, 8, 0, 0) != epoch_order(LENGTHS, 8, 1, 0)
    assert epoch_order(LENGTHS, 8, 0, 0) != epoch_order(LENGTHS, 8, 0, 1)


def test_batches_hold_like_lengths():
    def padding(batches):
        padded = sum(max(LENGTHS[i] for i in b) * len(b) for b in batches)
        return padded / sum(LENGTHS)

    plain = [list(range(i, min(i + 8, len(LENGTHS)))) for i in range(0, len(LENGTHS), 8)]
    assert padding(epoch_order(LENGTHS, 8, 0, 0)) < 0.75 * padding(plain)


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "batches"),
    [
        (203, 8, 1, 26),
        (203, 8, 2, 52),
        (203, 8, 0.5, 13),
        (203, 8, 1.5, 39),
        (203, 8, 0.001, 1),
        (8, 8, 1.2, 1),
        (8, 8, 1.6, 2),
        (16, 8, 2.1, 4),
        (16, 8, 2.5, 5),
        (16, 8, 0.1, 1),
        (3, 8, 3.0, 3),
        (18, 4, 1.5, 7),
        (0, 8, 1.0, 0),
    ],
)
def test_fractional_epochs(rows, batch, epochs, batches):
    assert len(schedule([5] * rows, batch, 0, epochs)) == steps(rows, batch, epochs) == batches


def test_a_fraction_of_an_epoch_is_that_share_of_its_batches():
    """Exact arithmetic on the written number: no count is further from epochs·batches than a half, none is 0."""
    for rows in (1, 2, 7, 8, 9, 31, 64, 100):
        for batch in (1, 3, 8):
            whole = -(-rows // batch)
            for written in (
                "0.01",
                "0.1",
                "0.3",
                "0.49",
                "0.5",
                "0.75",
                "0.99",
                "1",
                "1.01",
                "1.1",
                "1.2",
                "1.5",
                "2.1",
                "2.9",
                "3",
                "4.7",
            ):
                wanted = max(Fraction(1), Fraction(Decimal(written)) * whole)
                found = schedule([5] * rows, batch, 3, float(written))
                assert abs(len(found) - wanted) <= Fraction(1, 2), (rows, batch, written)
                orders = [order for epoch in range(5) for order in epoch_order([5] * rows, batch, 3, epoch)]
                assert found == orders[: len(found)]
