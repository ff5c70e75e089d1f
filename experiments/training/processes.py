"""Start and join the processes of one run; torchrun starts them, or `start` where a model's block has `processes`."""

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

PATIENCE = timedelta(hours=6)  # other processes wait while the first one writes weights or looks for a preparation
STOPPING = 90  # seconds in which stopped processes end their step and write a checkpoint; torchrun's own are 30
PR_SET_PDEATHSIG = 1
STARTED = "TORCHELASTIC_RUN_ID"  # the environment variable that torchrun sets


class Failed(UserError):
    """A process of this run failed, after it had given its reason."""


class Killed(Failed):
    """A process of this run was ended by a signal, so that it gave no reason."""


def join(device: torch.device) -> Shards:
    """This process among those that torchrun started, or a single process where it did not."""
    if STARTED not in os.environ:
        return Shards()
    if not dist.is_initialized():
        if sys.platform == "linux":  # so that this process ends when torchrun is killed
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Shards(rank=dist.get_rank(), world=dist.get_world_size(), active=True)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return int(os.environ.get("RANK", 0)) == 0 or STARTED not in os.environ


def to_start(model) -> int | None:
    """How many processes are to be started for a model of params.yaml; None: no number, or they run already."""
    return None if STARTED in os.environ else model.processes


def start(count: int, arguments: list[str]) -> None:
    """Run `python -m experiments ARGUMENTS` in `count` processes on this machine, as torchrun would.

    Raises `Failed` where one of them fails, and `Killed` where one is killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    nodes = {"min_nodes": 1, "max_nodes": 1, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(
        nproc_per_node=count, run_id=uuid.uuid4().hex, max_restarts=0, shutdown_timeout=STOPPING, **nodes
    )
    # each process prints its own error; torchrun would add a page of traceback
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-m", "experiments", *arguments)
    except ChildFailedError as error:
        number, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
        if failure.exitcode < 0:
            raise Killed(f"process {number} of {count} was killed by signal {-failure.exitcode}") from None
        raise Failed(f"process {number} of {count} failed with exit status {failure.exitcode}") from None
    except SignalException:  # torchrun's own word for a stop, after it has stopped the processes
        raise KeyboardInterrupt from None
