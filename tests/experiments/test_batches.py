"""The order of examples: complete, drawn by the seed alone, of like lengths."""

import pytest

from experiments.batches import epoch_order, schedule

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


@pytest.mark.parametrize(("epochs", "batches"), [(1, 26), (2, 52), (0.5, 13), (1.5, 39), (0.001, 1)])
def test_fractional_epochs(epochs, batches):
    assert len(schedule(LENGTHS, 8, 0, epochs)) == batches
