"""The checks of tests/gpu on this machine's GPU: `python -m pytest -m gpu`."""

import os

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: deterministic matrix products

import torch  # noqa: E402

from experiments.bench import running  # noqa: E402
from experiments.bench.sizes import Skipped  # noqa: E402
from methods.tools.process_group import Shards  # noqa: E402
from tests.gpu.checks import checks  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.mark.parametrize("name", checks(tiny=False, shards=Shards()))
def test_the_device_computes_what_it_should(name):
    device = torch.device("cuda")
    with running.process_group(device) as shards:
        try:
            checks(tiny=False, shards=shards)[name](device)
        except Skipped as reason:
            pytest.skip(str(reason))
