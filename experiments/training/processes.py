"""The processes of one run: joined where torchrun started them, started where a model's block says how many."""

import ctypes
import logging
import os
import signal
import sys
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from methods.errors import UserError
from methods.tools.process_group import Shards

PATIENCE = timedelta(hours=6)  # the others wait while the first one writes weights or looks for a preparation
PR_SET_PDEATHSIG = 1
STARTED = "TORCHELASTIC_RUN_ID"  # torchrun sets it


def join(device: torch.device) -> Shards:
    """This process among those torchrun started; a run of one where it was started plainly."""
    if STARTED not in os.environ:
        return Shards()
    if not dist.is_initialized():
        if sys.platform == "linux":  # torchrun killed outright would leave its processes at work
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Shards(rank=dist.get_rank(), world=dist.get_world_size(), active=True)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", 0)) == 0 or STARTED not in os.environ


def asked_for(model) -> int | None:
    """How many processes to start for a model of params.yaml: None where it names no number, or where they run already."""
    return None if STARTED in os.environ else model.processes


def start(count: int, arguments: list[str]) -> None:
    """Run `python -m experiments ARGUMENTS` in `count` processes on this machine, as torchrun would.

    Raises UserError where one of them fails; what it said is already on the screen.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        max_restarts=0,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
    )
    # each process explains itself; torchrun's own account of it is a page of traceback
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-m", "experiments", *arguments)
    except ChildFailedError as error:
        number, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
        raise UserError(f"process {number} of {count} failed with exit status {failure.exitcode}") from None
