"""The kinds of faults. Each function disturbs the study once, lets the next commands run, and checks what must hold:

results equal the undisturbed run's bit for bit, or an error names what is wrong and running again mends it; what is
half-written is never taken for whole; a failure is never a zero; a finished cell is never lost.

A function returns what happened in words; it raises `Lost` where something does not hold, and `Skipped` where the
system does not let it happen.
"""

import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from experiments.faults import inside
from experiments.faults.warm import Ended, Inside
from experiments.faults.world import Stage, World, expect
from methods.tools.files import read_json

Fault = Callable[[World, random.Random], str]
KINDS: dict[str, Fault] = {}


class Skipped(Exception):
    """This kind cannot be tried here; the message says why."""


def kind(name: str) -> Callable[[Fault], Fault]:
    """Register a function as a kind of fault."""

    def register(function: Fault) -> Fault:
        KINDS[name] = function
        return function

    return register


def told(ended: Ended, *statuses: int) -> None:
    """The command ended in one of these ways, and without a traceback."""
    expect(ended.status in statuses, f"exit status {ended.status} instead of {statuses}: {ended.text[-1500:]}")
    expect("Traceback" not in ended.text, f"a traceback: {ended.text[-1500:]}")
    if ended.status == 2:
        expect("error: " in ended.said, f"exit status 2 without an error: {ended.text[-1500:]}")


def again(world: World, stage: Stage) -> None:
    """The stage runs again, and all is as in the undisturbed run."""
    told(world.run(stage), 0)
    for cell in Path("results/failures").rglob("*.json"):  # `prepare` and `evaluate` clear their own, `collect` all
        expect(False, f"{cell} is still there after {' '.join(stage.words)} ran again")
    world.equal()


def somewhere(world: World, draw: random.Random) -> Stage:
    """A stage that begins now: for the first time, or over its own finished results."""
    stage = draw.choice(world.stages)
    world.finished() if draw.random() < 0.5 else world.before(stage)
    return stage


def stopped(world: World, draw: random.Random, number: int) -> str:
    """Send a signal to a stage, after some time or before one of its changes of the disk; then look and go on."""
    stage = somewhere(world, draw)
    if draw.random() < 0.5 and stage.changes:
        at = draw.randint(1, stage.changes)
        where, ended = f"before change {at} of the disk", world.run(stage, Inside(at=at, signal=number))
    else:
        after = draw.uniform(0, stage.seconds)
        where, started = f"after {after:.2f} s", world.start(stage)
        time.sleep(after)
        started.send(number)
        ended = started.wait()
    if number == signal.SIGKILL:
        expect(ended.status in (0, -signal.SIGKILL), f"exit status {ended.status}: {ended.text[-1500:]}")
    else:
        told(ended, 0, 2, 130, -signal.SIGTERM)
    noted = stage.marker.exists()
    seen = world.look()
    if noted and stage.cell:
        record = read_json(Path(f"results/failures/{stage.cell}.json"), "kind", "reason", "stage")
        expect((record["kind"], record["stage"]) == ("killed", stage.name), f"the kill left the record {record}")
    expect(ended.status == 0 or stage.name != "train" or seen, "nothing was seen")
    again(world, stage)
    return f"{' '.join(stage.words)} {where}: {'it had ended' if ended.status == 0 else ended.said or 'killed'}"


@kind("sigkill")
def killed(world: World, draw: random.Random) -> str:
    return stopped(world, draw, signal.SIGKILL)


@kind("sigterm")
def terminated(world: World, draw: random.Random) -> str:
    return stopped(world, draw, signal.SIGTERM)


@kind("twice")
def started_twice(world: World, draw: random.Random) -> str:
    """The same stage in two processes: one runs it, the other one says so, or runs after it."""
    stage = somewhere(world, draw)
    one = world.start(stage)
    time.sleep(draw.uniform(0, 0.5 * stage.seconds))
    other = world.start(stage)
    ends = [one.wait(), other.wait()]
    for ended in ends:
        told(ended, 0, 2)
    refused = [ended for ended in ends if ended.status]
    expect(len(refused) < 2 and all("is running already" in ended.said for ended in refused), f"{refused}")
    again(world, stage)
    return f"{' '.join(stage.words)}: {refused[0].said if refused else 'one after the other'}"


@kind("nan")
def not_a_number(world: World, draw: random.Random) -> str:
    """A gradient is NaN once: a named failure, no checkpoint of it, and the next run is whole."""
    stage = draw.choice([s for s in world.stages if s.name == "train"])
    world.before(stage)
    step = draw.randrange(8)
    ended = world.run(stage, Inside(call=partial(inside.gradient_is_not_a_number, step)))
    told(ended, 2)
    record = read_json(Path(f"results/failures/{stage.cell}.json"), "kind", "reason")
    expect(record["kind"] == "nan", f"the record is {record}")
    expect(world.look()[stage.cell] == "nan", "the failure is not seen")
    again(world, stage)
    return f"{stage.cell} at step {step + 1}: {record['reason']}"


@kind("memory")
def no_memory(world: World, draw: random.Random) -> str:
    """The process may take only a little more memory than it has when it begins."""
    stage = somewhere(world, draw)
    room = draw.randrange(1 << 20, 64 << 20)
    ended = world.run(stage, Inside(room=room))
    if ended.status < 0:  # a library that ends the process where it gets no memory
        noted = stage.marker.exists()
        seen = world.look()
        expect(not (noted and stage.cell) or seen.get(stage.cell) == "killed", "the end left no record")
    else:
        told(ended, 0, 2)
        world.look()
    again(world, stage)
    return f"{' '.join(stage.words)} with {room >> 20} MB: {ended.said if ended.status else 'it was enough'}"
