"""What goes wrong inside a command's own process."""

import errno
import socket
import time

import torch

from experiments.training import update


def gradient_is_not_a_number(step: int) -> None:
    """One entry of one gradient is NaN at a step, counted from 0, as an overflow or a broken chip leaves it."""
    clip, done = update.clip, [0]

    def broken(run, limit):
        if done[0] == step:
            next(iter(run.weights.values())).grad.view(-1)[0] = torch.nan
        done[0] += 1
        return clip(run, limit)

    update.clip = broken


def no_network() -> None:
    """No address outside of this machine is reached, nor found."""

    def unreachable(*_, **__):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    socket.socket.connect = socket.socket.connect_ex = unreachable
    socket.getaddrinfo = unknown


def clock_steps_back(seconds: float, after: int) -> None:
    """The clock is `seconds` earlier from the time it is read for the `after`-th time on."""
    now, read = time.time, [0]

    def stepped() -> float:
        read[0] += 1
        return now() - (seconds if read[0] > after else 0)

    time.time = stepped
