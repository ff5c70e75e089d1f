"""Work spread over threads: results in order, errors, and torch's own number of threads left as it was."""

import threading

import pytest
import torch

from experiments.threads import MOST, scratch, spread


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2, 5, MOST + 3])
@pytest.mark.parametrize("items", [0, 1, 3, 200])
def test_results_stand_in_the_items_order(threads, items):
    torch.set_num_threads(threads)
    assert spread(lambda i: i * i, range(items)) == [i * i for i in range(items)]
    assert torch.get_num_threads() == threads


def test_threads_work_at_once_each_alone_and_without_gradients():
    torch.set_num_threads(3)
    together = threading.Barrier(3, timeout=30)

    def work(item):
        together.wait()  # passed only where three are in it at once
        return threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    found = spread(work, range(3))
    assert len({ident for ident, _, _ in found}) == 3 and all((number, grad) == (1, False) for _, number, grad in found)
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3] and torch.is_grad_enabled()


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_is_raised_and_nothing_is_left_behind(threads):
    torch.set_num_threads(threads)

    def work(item):
        if item == 7:
            raise ValueError("seven")
        return item

    with pytest.raises(ValueError, match="seven"):
        spread(work, range(20))
    assert torch.get_num_threads() == threads and spread(work, [1, 2]) == [1, 2]


def test_scratch_is_a_threads_own():
    first = scratch("a", 10, torch.float32).fill_(1)
    assert scratch("a", 5, torch.float32).data_ptr() == first.data_ptr()
    assert scratch("b", 10, torch.float32).data_ptr() != first.data_ptr() != scratch("a", 10, torch.float64).data_ptr()
    others = []
    thread = threading.Thread(target=lambda: others.append(scratch("a", 10, torch.float32)))
    thread.start()
    thread.join()
    assert others[0].data_ptr() != first.data_ptr() and scratch("a", 1000, torch.float32).shape == (1000,)
