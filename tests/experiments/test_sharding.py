"""One run on several processes: the numbers of one process; and a run that was stopped, gone on from, bit for bit.

Processes are real (gloo), weights are shared by torch's fully_shard.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from experiments.paths import HERE
from experiments.sharding import Shards
from tests import goldens
from tests.experiments import worlds


def start(world: int, folder: Path, job: str) -> dict:
    command = [sys.executable, "-m", "tests.experiments.worlds", str(world), str(folder), job]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / f"{job}-{world}.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone():
    return worlds.everything(Shards(), Path())


@pytest.fixture(scope="module", params=[1, 2])
def shared(request, tmp_path_factory):
    """The same cells by `fully_shard`, on one process and on two."""
    if request.param == 2:
        return start(2, tmp_path_factory.mktemp("worlds"), "everything")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return worlds.everything(Shards(active=True), Path())
    finally:
        dist.destroy_process_group()


def away(tensor: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((tensor - wanted).norm() / wanted.norm()).item()


def test_numbers_do_not_depend_on_the_processes(alone, shared):
    assert len(shared) >= len(worlds.METHODS)
    for name, found in shared.items():
        wanted = alone[name]
        assert len(wanted["curve"]) == 10 and all(found["shared"]) and not any(wanted["shared"])
        assert found["final"].keys() == wanted["final"].keys()
        # bf16 moments are rounded at random: a last bit of the gradient can turn a rounding
        limit = 1e-4 if name == "moments" else 1e-6
        for tensor, value in wanted["final"].items():
            assert away(found["final"][tensor], value) < limit, f"{name}: {tensor}"
        for row, theirs in zip(found["curve"], wanted["curve"], strict=True):
            assert row == pytest.approx(theirs, rel=1e-3 if name == "moments" else 2e-5, abs=1e-7), name


def test_reports_are_of_the_whole(alone, shared):
    for method in ("mofo", "hierarchical", "lora"):
        for part, wanted in alone["llama", method]["reports"].items():
            found = shared["llama", method]["reports"][part]
            for key, value in wanted.items():
                assert found[key] == (pytest.approx(value, rel=1e-3) if isinstance(value, dict | float) and key != "settings" else value), key


def test_methods_and_settings_differ(alone):
    """What is compared above is not one run under many names."""
    finals = [torch.cat([t.flatten() for t in cell["final"].values()]) for name, cell in alone.items() if "gptj" not in name]
    assert sum(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(finals) for b in finals[:i]) == 0


@pytest.mark.parametrize("architecture, method", [("gptj", "full"), *(("llama", method) for method in worlds.METHODS)])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(tmp_path, architecture, method):
    blocks = goldens.METHODS[method]  # 8 bits and dropout, whose random state is gone on from
    whole = worlds.cell(architecture, method, blocks=blocks)
    steps = len(whole["curve"])
    for stop in range(1, 40):
        try:
            worlds.cell(architecture, method, blocks=blocks, folder=tmp_path / str(stop), stop=stop)
            break
        except worlds.Stopped:
            again = worlds.cell(architecture, method, blocks=blocks, folder=tmp_path / str(stop))
        for name, tensor in whole["final"].items():
            assert torch.equal(again["final"][name], tensor), f"stopped after {stop}: {name}"
        assert again["curve"] == whole["curve"] and again["reports"] == whole["reports"]
    assert stop > steps and again["resumed"] == steps - 1


def test_runs_of_two_processes_go_on_too(tmp_path):
    for method, (whole, again) in start(2, tmp_path, "stopped").items():
        assert again["resumed"] > 0, method
        for name, tensor in whole["final"].items():
            assert torch.equal(again["final"][name], tensor), f"{method}: {name}"
        assert again["curve"] == whole["curve"]


def test_rows_are_cut_as_torch_cuts_them():
    for count in (0, 1, 2, 5, 7, 8):
        tensor = torch.arange(count)
        for world in (1, 2, 3, 4):
            pieces = [Shards(rank=rank, world=world).local(tensor) for rank in range(world)]
            chunks = list(torch.chunk(tensor, world)) if count else []
            assert torch.equal(torch.cat(pieces), tensor)
            assert [p.tolist() for p in pieces if len(p)] == [c.tolist() for c in chunks if len(c)]
