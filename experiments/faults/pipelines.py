"""Faults of DVC, which runs the stages: it is killed, and its locks and its cache are damaged."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from experiments.faults.kinds import kind, told
from experiments.faults.warm import Ended, Inside
from experiments.faults.world import Stage, World, expect
from experiments.study import cells

REPRO = Stage(words=("repro",), makes=())
BY_DVC = Inside(
    environment={
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": f"{os.getcwd()}/site",  # what DVC notes outside of a project
    },
    call=os.setsid,
)
LOCK, KEPT = Path("dvc.lock"), Path("undisturbed/dvc.lock")


def known_to_dvc(world: World) -> None:
    """The finished study, with dvc.lock and DVC's cache as after `dvc repro`; made once, from the undisturbed run."""
    world.finished()
    shutil.rmtree("work/local/running", ignore_errors=True)
    if not KEPT.is_file():
        told(world.run(Stage(words=("pipeline",), makes=())), 0)
        ended = world.warm.run("dvc", "commit", "--force", "dvc.yaml", inside=BY_DVC)
        expect(ended.status == 0 and LOCK.is_file(), f"DVC cannot commit the undisturbed run: {ended.text[-1500:]}")
        shutil.rmtree(".dvc/cache/runs", ignore_errors=True)  # what it has is not run again
        shutil.copyfile(LOCK, KEPT)
        shutil.copytree(".dvc", "undisturbed/.dvc")
    shutil.copyfile(KEPT, LOCK)
    shutil.rmtree(".dvc")
    shutil.copytree("undisturbed/.dvc", ".dvc")


def finished_by_dvc(world: World) -> Ended:
    """`python -m experiments repro` ends well, with everything as in the undisturbed run and in dvc.lock."""
    ended = world.run(REPRO, BY_DVC)
    told(ended, 0)
    world.equal()
    status = world.warm.run("dvc", "status", "--json", "dvc.yaml", inside=BY_DVC)
    clean = next((line for line in status.text.splitlines() if line.startswith("{")), "")
    expect(clean and json.loads(clean) == {}, f"`dvc status` is not clean: {status.text[-1500:]}")
    return ended


def forgotten(world: World, draw: random.Random) -> Stage:
    """A stage that is to run again, with those behind it: what it made is gone."""
    stage = draw.choice([s for s in world.stages if s.name in ("prepare", "collect", "drift", "data", "compare")])
    for made in map(Path, stage.makes):
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    shutil.rmtree(".dvc/cache", ignore_errors=True)  # from which DVC would take it
    return stage


@kind("repro")
def killed_repro(world: World, draw: random.Random) -> str:
    """`repro` is killed, with its stage or alone; the next one goes on, and knows what was finished."""
    known_to_dvc(world)
    stage = forgotten(world, draw)
    started, after = world.start(REPRO, BY_DVC), draw.uniform(0, 8 + 2 * stage.seconds)
    together, number = draw.random() < 0.5, draw.choice([signal.SIGKILL, signal.SIGTERM])
    time.sleep(after)
    if together:
        try:
            os.killpg(started.pid, number)
        except ProcessLookupError:
            pass
    else:
        started.send(number)
    started.wait()
    until = time.monotonic() + 60
    while world.look() and any(Path("work/local/running/default").glob("*")) and time.monotonic() < until:
        time.sleep(0.2)  # its stage sees that it was killed, and stops
    finished_by_dvc(world)
    return f"{' '.join(stage.words)}, signal {int(number)} to {'all' if together else 'dvc'} after {after:.1f} s"


@kind("dvc-lock")
def lock_of_dvc(world: World, draw: random.Random) -> str:
    """DVC's lock files are of a dead process or cut off; dvc.lock is cut off, and git or its copy has the rest."""
    known_to_dvc(world)
    how = draw.choice(["rwlock of a dead process", "rwlock cut off", "dvc.lock cut off", "dvc.lock, with a copy"])
    temporary = Path(".dvc/tmp")
    temporary.mkdir(exist_ok=True)
    (temporary / "lock").touch()
    held = {"pid": 2**22 - 1, "cmd": "dvc repro"}
    text = json.dumps({"write": {os.path.abspath("results/metrics"): held}, "read": {}})
    said = ""
    if how == "dvc.lock, with a copy":
        copy = world.study.paths.local / "locks" / "default.lock"
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(LOCK, copy)
        os.truncate(LOCK, draw.randrange(1, LOCK.stat().st_size))
    elif how == "dvc.lock cut off":
        os.truncate(LOCK, draw.randrange(1, LOCK.stat().st_size))
        ended = world.run(Stage(words=("plan",), makes=()))
        told(ended, 0, 2)
        said = f": {ended.said}" if ended.status else ": what is left of it can be read"
        shutil.copyfile(KEPT, LOCK)
    else:
        (temporary / "rwlock").write_text(text if how.endswith("process") else text[: draw.randrange(len(text))])
    finished_by_dvc(world)
    return f"{how}{said}"


@kind("dvc-cache")
def damaged_cache(world: World, draw: random.Random) -> str:
    """A file of DVC's cache is damaged, and DVC takes it from there: who reads it refuses it, and it is made again."""
    known_to_dvc(world)
    reader, maker = draw.choice([("evaluate", "train"), ("train", "model"), ("evaluate", "data")])
    stage = world.stage(reader)
    made = next(s for s in world.stages if s.name == maker and (not s.cell or s.cell == stage.cell))
    folder = Path(made.makes[0])
    name = {"train": "delta.safetensors", "model": "model.safetensors", "data": "evaluate/sums/sums.jsonl"}[maker]
    content = (folder / name).read_bytes()
    entry = next(p for p in Path(".dvc/cache/files/md5").rglob("*") if p.is_file() and p.read_bytes() == content)
    entry.chmod(0o644)
    os.truncate(entry, draw.randrange(len(content)))
    entry.chmod(0o444)
    shutil.rmtree(folder)
    taken = world.warm.run("dvc", "checkout", "--force", str(folder), inside=BY_DVC)
    if (folder / name).is_file():
        ended = world.run(stage)
        told(ended, 2)
    else:
        ended = taken
    targets = {"train": f"train@{cells.parse(stage.cell, world.study).stage}", "model": "@".join(made.words)}
    target = targets.get(maker, maker)
    again = world.warm.run("dvc", "repro", "--force", "--single-item", target, inside=BY_DVC)
    expect(again.status == 0, f"`dvc repro --force --single-item {target}` fails: {again.text[-1500:]}")
    told(world.run(stage), 0)
    world.equal()
    return f"{folder / name}: {ended.said}"
