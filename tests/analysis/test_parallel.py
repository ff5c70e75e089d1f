"""Work on several comparisons at once."""

import os
import sys

import pytest

from analysis import parallel
from methods.errors import UserError

PAIRS = [(model, "math") for model in "abcde"]


@pytest.mark.parametrize("cores", [{0}, {0, 1, 2}])
def test_results_come_in_the_order_of_the_comparisons(monkeypatch, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    found = parallel.each(lambda model, domain: (f"{model}/{domain}", os.getpid()), PAIRS)
    assert [name for name, _ in found] == [f"{model}/math" for model, _ in PAIRS]
    assert (os.getpid() in {process for _, process in found}) == (len(cores) == 1 or sys.platform != "linux")
    assert parallel.each(lambda model, domain: model, []) == []


def test_bad_input_is_named_as_by_one_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)

    def refuse(model: str, domain: str) -> None:
        raise UserError(f"{model} has no items")

    with pytest.raises(UserError, match="^a has no items$"):
        parallel.each(refuse, PAIRS)
