"""Faults of the disk: files cut short, bits that changed, a disk that fills."""

import os
import random
import shutil
from pathlib import Path

from experiments.faults.kinds import Skipped, again, kind, somewhere, told
from experiments.faults.warm import Inside
from experiments.faults.world import FOLDERS, World, expect

# files by how their paths begin, and the stages that read them
READ_BY = {
    "work/models": ("base", "prepare", "train", "evaluate", "drift"),
    "work/data/train": ("train",),
    "work/data/evaluate": ("base", "evaluate"),
    "work/data/general": ("prepare",),
    "work/data/data.json": ("base", "prepare", "train", "evaluate"),
    "work/prepared": ("train",),
    "work/cells": ("evaluate", "drift"),
    "results/base": ("compare",),
    "results/prepared": ("collect",),
    "results/runs": ("collect", "compare"),
    "work/local/prepared": ("prepare",),
    "work/local/trained": ("train",),
    "work/local": ("train", "evaluate"),
}


def damaged(world: World, draw: random.Random, path: Path, how: str) -> str:
    """A file of the finished study is damaged: who reads it refuses it by name, or does without it and ends equal."""
    name = path.as_posix()
    readers = next(stages for start, stages in READ_BY.items() if name.startswith(start))
    candidates = [stage for stage in world.stages if stage.name in readers]
    own = [stage for stage in candidates if "/" not in stage.words[-1] or stage.words[-1] in name] or candidates
    reader = draw.choice(own)
    kept = path.read_bytes()
    ended = world.run(reader)
    told(ended, 0, 2)
    outcome = f"{name} {how}, read by {' '.join(reader.words)}: {ended.said if ended.status else 'it ended equal'}"
    if ended.status:
        expect(path.name in ended.text or path.parent.name in ended.text or "damaged" in ended.text, f"{outcome}")
    else:
        world.made_equal(reader)
    world.look()
    if path.is_file() and path.read_bytes() == kept:  # who made it makes it again
        for maker in world.stages:
            if any(name == made or name.startswith(f"{made}/") for made in maker.makes):
                told(world.run(maker), 0)
        if name.startswith("work/local"):
            path.unlink()
    again(world, reader)
    return outcome


def one_file(draw: random.Random, *starts: str) -> Path:
    files = [
        path
        for folder in FOLDERS
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.as_posix().startswith(starts) and path.stat().st_size
    ]
    return draw.choice(files)


@kind("cut")
def cut_short(world: World, draw: random.Random) -> str:
    world.finished()
    path = one_file(draw, *READ_BY)
    content = path.read_bytes()
    size = draw.randrange(len(content))
    if draw.random() < 0.5 and b"\n" in content[:-1]:  # between two lines, where a reader sees nothing odd
        size = draw.choice([i + 1 for i, byte in enumerate(content[:-1]) if byte == 10])
    os.truncate(path, size)
    return damaged(world, draw, path, f"cut to {size} of {len(content)} bytes")


@kind("cache")
def changed_in_the_cache(world: World, draw: random.Random) -> str:
    """A byte of a file in the local store, or of what DVC's cache gave, is another one."""
    world.finished()
    path = one_file(
        draw,
        "work/local/prepared",
        "work/local/trained",
        "work/local/reference",
        "work/local/tokens",
        "work/models",
        "work/cells",
        "work/data/train",
        "work/data/evaluate",
    )
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    content[at] ^= draw.randrange(1, 256)
    path.write_bytes(content)
    return damaged(world, draw, path, f"with another byte {at}")


@kind("disk")
def full(world: World, draw: random.Random) -> str:
    """The disk fills while a stage writes; with room again, it runs."""
    if os.environ.get("HOLDFAST_SMALL_DISK") != "1":
        raise Skipped("this system lets neither root nor a user mount a small disk")
    stage = somewhere(world, draw)
    room = draw.choice([0, draw.randrange(16 << 10), draw.randrange(512 << 10)])
    ballast = Path("ballast")
    free = shutil.disk_usage(".").free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - room))
    try:
        ended = world.run(stage)
    finally:
        ballast.unlink()
    told(ended, 0, 2)
    noted = stage.marker.exists()
    seen = world.look()
    if ended.status and stage.cell:
        expect(seen.get(stage.cell, "named") != "whole" or not noted, "the failure left no record")
    again(world, stage)
    return f"{' '.join(stage.words)} with {room >> 10} KB: {ended.said if ended.status else 'it was enough'}"


@kind("checkpoint")
def checkpoint_damaged(world: World, draw: random.Random) -> str:
    """A training is killed, and a file of its checkpoint is damaged: it is not used, and the training ends equal."""
    stage = draw.choice([s for s in world.stages if s.name == "train" and s.changes > 8])
    world.before(stage)
    at = draw.randint(stage.changes // 4, 2 * stage.changes // 3)
    world.run(stage, Inside(at=at))
    files = sorted(path for path in Path("work/local/resume").rglob("*") if path.is_file())
    said = "there was none"
    if files:
        path = draw.choice(files)
        content = bytearray(path.read_bytes())
        where = draw.randrange(max(1, len(content)))
        if draw.random() < 0.5 or not content:
            os.truncate(path, where)
        else:
            content[where] ^= draw.randrange(1, 256)
            path.write_bytes(content)
        said = f"{path.name} of {path.parent.name} was damaged at byte {where}"
    world.look()
    again(world, stage)
    return f"{stage.cell} killed before change {at}: {said}"
