"""Numbers as they stand on the pages, at the limits between two ways of writing them."""

import math

import pytest

from analysis import numbers

NONE = (None, math.nan)


@pytest.mark.parametrize(
    "write, value, text",
    [
        (numbers.p, 0.00099, "p < 0.001"),
        (numbers.p, 0.001, "p = 0.001"),
        (numbers.p, 0.0496, "p = 0.050"),
        (numbers.p, 1.0, "p = 1.000"),
        (numbers.rate, 0.00015, "1.5e-4"),
        (numbers.rate, 0.001, "1e-3"),
        (numbers.rate, 0.01, "0.01"),
        (numbers.rate, 0.0, "0"),
        (numbers.nats, 0.00049, "+0.0005"),
        (numbers.nats, -0.0005, "−0.001"),
        (numbers.nats, 0.00007, "+0.00007"),
        (numbers.nats, -0.000096, "−0.0001"),
        (numbers.nats, 1e-10, "0"),
        (numbers.points, 0.0005, "+0.1"),
        (numbers.points, -0.0004, "0.0"),
        (numbers.seconds, 0.0004, "0 s"),
        (numbers.seconds, 0.94, "940 ms"),
        (numbers.seconds, 9.94, "9.9 s"),
        (numbers.seconds, 59.6, "1 min 00 s"),
        (numbers.seconds, 3599.6, "1 h 00 min"),
        (numbers.size, 999, "999 B"),
        (numbers.size, 999.6, "1.0 kB"),
        (numbers.size, 99.6e6, "100 MB"),
        (numbers.size, 2e15, "2000 TB"),
        (numbers.times, 0.0994, "×0.099"),
        (numbers.times, 9.96, "×10.0"),
        (numbers.times, 99.6, "×100"),
        (numbers.fine_percent, 0.000123, "0.0123"),
        (numbers.fine_percent, 0.0, "0"),
        (numbers.count, 71528.6, "71,500"),
    ],
)
def test_numbers_as_people_read_them(write, value, text):
    assert write(value).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize("value", NONE)
def test_what_is_missing_is_never_a_number(value):
    for write in (numbers.percent, numbers.fine_percent, numbers.points, numbers.nats, numbers.times, numbers.count):
        assert write(value) == "–"
    assert numbers.p(value) == "" and numbers.seconds(value) == numbers.size(value) == "unknown"
