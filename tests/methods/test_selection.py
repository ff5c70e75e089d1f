"""The k-th largest, both ways, against a sorted copy: heavy tails, ties, zeros, constants, a few levels, one entry."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from methods.tools import selection
from methods.tools.selection import COUNTED, LANES, TRASH, kth_by_histogram, kth_largest

CPU = torch.device("cpu")


def cases(entries, dtype=torch.float32):
    draw = torch.Generator().manual_seed(entries)
    heavy = torch.randn(entries, generator=draw, dtype=dtype).exp_().mul_(1e-4)
    share = torch.rand(entries, generator=draw, dtype=dtype)
    return {
        "heavy-tailed": heavy,
        "rounded": heavy.bfloat16().to(dtype),
        "few levels": (share * 8).floor(),
        "constant": torch.full_like(heavy, 0.3),
        "all zero": torch.zeros_like(heavy),
        **{f"{q:.0%} zeros": heavy * (share >= q) for q in (0.3, 0.5, 0.7, 0.95)},
        **{f"half are {x}": torch.where(share < 0.5, x, heavy) for x in (1e-6, 1e-4, 1.0)},
        "two values and a tail": torch.where(share < 0.4, 1e-4, torch.where(share < 0.8, 2e-4, heavy)),
        "extremes": torch.where(share < 0.3, math.inf, torch.where(share < 0.6, 1e-42, heavy)),
    }


def ranks(entries):
    return sorted({1, min(2, entries), max(1, entries // 7), max(1, entries // 2), max(1, entries - 1), entries})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entries", [1, 2, 7, 255, 1000, 70_001])
def test_partition_is_exact(entries, dtype):
    for name, size in cases(entries, dtype).items():
        ordered = size.sort(descending=True).values
        for k in ranks(entries):
            actual = kth_largest(size.clone(), k)
            assert actual.dtype == dtype and actual.dim() == 0
            assert actual == ordered[k - 1], (name, k)


def test_no_rank_among_equal_entries_is_searched_for(monkeypatch):
    """What a partition is given has no value that an eighth of the entries share, wherever the k-th largest is."""
    left = []
    monkeypatch.setattr(
        selection, "_heavy", lambda values, heavy=selection._heavy: left.append(heavy(values)) or left[-1]
    )
    for name, size in cases(70_001).items():
        for k in ranks(70_001):
            left.clear()
            size_now = size.clone()
            actual = kth_largest(size_now, k)
            partitioned = left[-1] is None
            assert partitioned or (size == actual).float().mean() > 0.05, (name, k)
            if partitioned:
                most = size_now.view(torch.int32).unique(return_counts=True)[1].max()
                assert most < 0.2 * size.numel(), (name, k)


@pytest.mark.parametrize("entries", [1, 7, 1000, 20_011])
@pytest.mark.parametrize("lanes", [1, LANES])
def test_histogram_is_exact(entries, lanes):
    for name, size in cases(entries).items():
        if lanes > 1 and not ("zero" in name or "heavy" in name):  # its histograms are large
            continue
        ordered = size.sort(descending=True).values
        for k in ranks(entries) if lanes == 1 else ranks(entries)[1::3]:
            for counted in (100, entries) if entries <= 1000 and lanes == 1 else (entries // 3 + 1,):
                assert kth_by_histogram(lambda: size.split(counted), k, device=CPU, lanes=lanes) == ordered[k - 1], (
                    name,
                    k,
                    counted,
                )


@pytest.mark.parametrize("cut", [0, 1700, 5000])
def test_histograms_add_up_over_processes(cut):
    """Two threads stand for two processes, one of them perhaps with nothing."""
    size = cases(5000)["50% zeros"]
    held, here = [torch.zeros(()), torch.zeros(())], Barrier(2)

    def one_of_two(rank):
        def add(counts):
            held[rank] = counts.clone()
            here.wait(timeout=30)
            counts += held[1 - rank]
            here.wait(timeout=30)
            return counts

        own = (size[:cut], size[cut:])[rank]
        return [
            float(kth_by_histogram(lambda: own.split(512), k, device=CPU, shards=SimpleNamespace(sum=add)))
            for k in ranks(5000)
        ]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one_of_two, (0, 1))
    assert first == second == [float(size.sort(descending=True).values[k - 1]) for k in ranks(5000)]


class Asking(TorchDispatchMode):
    """Operations whose result or shape the host must wait for, had the tensors been on a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        waiting = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags)
        if waiting or function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.bincount.default):
            self.seen.append(str(function))
        return function(*arguments, **(named or {}))


def test_histograms_ask_for_no_number():
    size = cases(1000)["heavy-tailed"]
    with Asking() as asking:
        actual = kth_by_histogram(lambda: size.split(300), 70, device=CPU, lanes=LANES)
    assert not asking.seen
    with asking:
        float(actual)
    assert asking.seen


@pytest.mark.parametrize("lanes", [1, LANES])
def test_histograms_take_no_more_than_they_say(lanes):
    counted, size = 1 << 18, cases(600_000)["heavy-tailed"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kth_by_histogram(lambda: size.split(counted), 7000, device=CPU, lanes=lanes)
    made = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    cells = (1 << 16) + TRASH
    assert 20 * counted < max(accumulate(made)) <= 24 * counted + (12 * lanes + 8) * cells
    assert 24 * COUNTED + (12 * LANES + 8) * cells < 0.5e9  # whatever the tensor's size
