"""Checkpoints come back bit for bit; whatever is not this run's own whole checkpoint is named and not used."""

import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist

from experiments.training import resume as module
from experiments.training.random_state import random_state, set_random_state
from experiments.training.resume import Resume
from experiments.training.snapshot import Snapshot, restore
from methods.tools.process_group import Shards

IDENTITY = {"settings": "a1", "base": "b2", "numerics": 3}


def tensors():
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 8, generator=draw)
    return {
        "model.layers.0.weight": wide.clone(),
        "double": wide.double() / 3,
        "half": wide.bfloat16(),
        "turned": wide.T,
        "every other": wide[::2, 1::3],
        "spread": wide[:, :1].expand(6, 4),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "long": torch.tensor([2**62 + 1, -1]),
        "step": torch.tensor(7.0),
        "none": torch.empty(0, 5),
        "truth": torch.tensor([True, False]),
        "complex": torch.view_as_complex(torch.randn(3, 2, generator=draw)),
        "odd": torch.tensor([math.nan, -0.0, math.inf, 5e-324], dtype=torch.float64),
        "parameter": torch.nn.Parameter(wide + 1),
    }


def same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found[key], value))
        assert found[key].dtype == value.dtype and found[key].shape == value.shape and torch.equal(a, b), key


@pytest.fixture
def folder(tmp_path):
    """A folder with one whole checkpoint."""
    Resume(tmp_path / "run", identity=IDENTITY).save({"x": torch.arange(4.0)}, {"step": 1})
    return tmp_path / "run"


def newest(folder):
    return max(folder.glob("save-*"))


def refused(folder, capsys, identity=IDENTITY, into=None):
    """Loads, and gives the one line that says why nothing was."""
    capsys.readouterr()
    assert Resume(folder, identity=identity).load(into or {}) is None
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.endswith("; starting from the beginning\n") and not said.out
    assert said.err.startswith(f"checkpoint {folder}")
    return said.err


def test_everything_comes_back_bit_for_bit(tmp_path, capsys, recwarn):
    position = {
        "step": 3,
        "loss": 0.1 + 0.2,
        "tiny": 5e-324,
        "curve": [{"loss": 1 / 3, "probe": None}],
        "rate": math.nan,
        "text": "ü",
    }
    Resume(tmp_path / "run", identity=IDENTITY).save(tensors(), position)
    found, place = Resume(tmp_path / "run", identity=IDENTITY).load({})
    same_bits(found, tensors())
    assert math.isnan(place.pop("rate")) and place == {k: v for k, v in position.items() if k != "rate"}
    assert not recwarn.list and capsys.readouterr() == ("", "")


def test_given_tensors_are_read_in_place_and_the_others_allocated(tmp_path):
    Resume(tmp_path / "run", identity=IDENTITY).save(tensors(), {})
    room = torch.full((8, 12), 9.0)
    into = {"turned": room[:, ::2], "parameter": torch.nn.Parameter(torch.zeros(6, 8)), "none": torch.empty(0, 5)}
    found, _ = Resume(tmp_path / "run", identity=IDENTITY).load(into)
    same_bits(found, tensors())
    assert all(found[key] is tensor for key, tensor in into.items())
    assert torch.equal(room[:, ::2], tensors()["turned"]) and (room[:, 1::2] == 9).all()


def test_a_run_without_tensors_and_without_a_checkpoint(tmp_path, capsys):
    run = Resume(tmp_path / "run", identity=IDENTITY)
    assert run.load({}) is None and not (tmp_path / "run").exists() and capsys.readouterr().err == ""
    run.save({}, {"step": 1})
    assert run.load({}) == ({}, {"step": 1})


def test_one_checkpoint_is_kept_and_clear_removes_all(folder):
    run = Resume(folder, identity=IDENTITY)
    for step in (2, 3):
        run.save({"x": torch.full((4,), float(step))}, {"step": step})
        assert [p.name for p in folder.iterdir()] == [f"save-{step:08d}"]
    found, place = run.load({})
    assert place == {"step": 3} and (found["x"] == 3).all()
    run.clear()
    assert not folder.exists()


def truncate(save):
    path = max(save.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


def change_a_byte(save):
    path = max(save.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (truncate, r"process-0.safetensors has \d+ bytes, \d+ were written"),
    "changed byte": (change_a_byte, "process-0.safetensors is damaged"),
    "changed position": (
        lambda s: (s / "process-0.json").write_text((s / "process-0.json").read_text().replace("1", "2")),
        "process-0.json is damaged",
    ),
    "missing file": (lambda s: (s / "process-0.safetensors").unlink(), "process-0.safetensors is missing"),
    "missing manifest": (lambda s: (s / "manifest.json").unlink(), "manifest.json is missing"),
    "cut manifest": (lambda s: (s / "manifest.json").write_text('{"format"'), "it cannot be read .JSONDecodeError"),
    "another manifest": (lambda s: (s / "manifest.json").write_text("[]"), "it cannot be read .TypeError"),
    "a file in its place": (lambda s: (shutil.rmtree(s), s.touch()), "manifest.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_not_used(folder, capsys, kind):
    damage, said = DAMAGE[kind]
    damage(newest(folder))
    into = {"x": torch.full((4,), 9.0)}
    err = refused(folder, capsys, into=into)
    assert re.search(said, err), err
    assert (into["x"] == 9).all()


def test_another_run_is_named_by_what_differs(folder, capsys):
    err = refused(folder, capsys, identity={"settings": "a1", "base": "c3", "data": None})
    assert "it belongs to another run, which differs in base, data, numerics;" in err and "settings" not in err


def test_another_number_of_processes_and_another_torch_are_named(folder, capsys):
    save = newest(folder)
    manifest = json.loads((save / "manifest.json").read_text())
    for key, other in (("processes", 2), ("torch", "2.0.1")):
        changed = manifest | {"identity": manifest["identity"] | {key: other}}
        (save / "manifest.json").write_text(json.dumps(changed))
        assert f"it belongs to another run, which differs in {key};" in refused(folder, capsys)


def test_an_earlier_versions_checkpoint_is_named_and_stays_unread(folder, capsys):
    """That version's had a folder of pickled metadata a process, and format 2."""
    save = newest(folder)
    shutil.rmtree(save)
    (save / "process-0").mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "position.json"):
        (save / "process-0" / name).write_bytes(b"no such thing")
    (save / "manifest.json").write_text(json.dumps({"format": 2, "torch": "2.0", "processes": 1, "identity": IDENTITY}))
    assert "it was written by an earlier version (format 2, this is 3);" in refused(folder, capsys)
    run = Resume(folder, identity=IDENTITY)
    run.save({"x": torch.zeros(4)}, {"step": 1})
    assert run.load({})[1] == {"step": 1} and len(list(folder.iterdir())) == 1


def test_tensors_that_do_not_fit_are_named(folder, capsys):
    assert "it has no tensor y" in refused(folder, capsys, into={"y": torch.zeros(1)})
    assert "x in it is float32 [4], here float32 [5]" in refused(folder, capsys, into={"x": torch.zeros(5)})
    assert "x in it is float32 [4], here float64 [4]" in refused(folder, capsys, into={"x": torch.zeros(4).double()})


def test_an_older_checkpoint_stands_in_for_a_damaged_one(folder, capsys):
    shutil.copytree(newest(folder), folder.parent / "kept")
    run = Resume(folder, identity=IDENTITY)
    run.save({"x": torch.zeros(4)}, {"step": 2})
    (folder.parent / "kept").rename(folder / "save-00000001")
    truncate(newest(folder))
    found, place = run.load({})
    assert place == {"step": 1} and torch.equal(found["x"], torch.arange(4.0))
    assert capsys.readouterr().err.endswith("were written; using the older save-00000001\n")
    run.save({"x": torch.ones(4)}, {"step": 3})
    assert [p.name for p in folder.iterdir()] == ["save-00000003"]


def kill(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)


# where the process dies: (module, name, calls it survives), and the step to go on from
KILLED = {
    "before the tensors": (module, "_write", 0, 1),
    "before the disk has the tensors": (os, "fsync", 0, 1),
    "before the position": (module, "_write", 1, 1),
    "before the manifest": (module, "_write", 2, 1),
    "before its name": (Path, "rename", 0, 1),
    "before the older is removed": (module.shutil, "rmtree", 0, 2),
}


@pytest.mark.parametrize("when", KILLED)
def test_a_save_that_is_killed_leaves_a_whole_checkpoint(folder, capsys, monkeypatch, when):
    owner, name, survived, step = KILLED[when]
    real, calls = getattr(owner, name), []

    def killing(*arguments, **named):
        calls.append(name)
        return kill() if len(calls) > survived else real(*arguments, **named)

    def dies():
        setattr(owner, name, killing)
        Resume(folder, identity=IDENTITY).save({"x": torch.full((4,), 2.0)}, {"step": 2})

    child = multiprocessing.get_context("fork").Process(target=dies)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL and len(list(folder.iterdir())) == 2
    run = Resume(folder, identity=IDENTITY)
    found, place = run.load({})
    assert place == {"step": step} and torch.equal(
        found["x"], torch.arange(4.0) if step == 1 else torch.full((4,), 2.0)
    )
    run.save({"x": torch.zeros(4)}, {"step": 9})
    assert run.load({})[1] == {"step": 9} and len(list(folder.iterdir())) == 1
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_named_once_and_the_older_checkpoint_stays(folder, capsys, monkeypatch):
    run = Resume(folder, identity=IDENTITY)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(1, 1, 100))
        run.save({"x": torch.zeros(4)}, {"step": 2})
        run.save({"x": torch.zeros(4)}, {"step": 3})
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("no checkpoint was written: too little disk for a checkpoint: ")
    assert run.load({})[1] == {"step": 1}
    run.save({"x": torch.zeros(4)}, {"step": 4})
    assert run.load({})[1] == {"step": 4} and capsys.readouterr().err == ""


def test_a_disk_that_fills_while_writing_is_named_and_the_older_checkpoint_stays(folder, capsys):
    """The limit of a file's size is this process's own."""
    run, before = Resume(folder, identity=IDENTITY), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        run.save({f"x{i}": torch.zeros(1 << 12) for i in range(8)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert capsys.readouterr().err.startswith("no checkpoint was written: OSError: [Errno 27] File too large")
    assert [p.name for p in folder.iterdir()] == ["save-00000001"] and run.load({})[1] == {"step": 1}


def test_a_position_that_is_not_json_is_an_error(folder):
    with pytest.raises(TypeError):
        Resume(folder, identity=IDENTITY).save({}, {"step": torch.tensor(1)})


def test_due_by_the_clock(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    always, never, some = (Resume(tmp_path / "run", identity={}, every=every) for every in (0, math.inf, 60))
    assert always.due() and not never.due() and not some.due()
    now[0] += 59
    assert not some.due()
    now[0] += 1
    assert some.due() and some.due()
    some.save({}, {})
    always.save({}, {})
    assert not some.due() and always.due() and not never.due()
    now[0] += 60
    assert some.due() and not never.due()


def saved_and_restored(folder, device):
    """Makes the run's random generators what they were: through a checkpoint, as one is resumed."""
    begun = Snapshot({"random": random_state(device)}, weights={})
    torch.rand(1, device=device), random.random(), numpy.random.rand()
    later = Snapshot({"random": random_state(device)}, weights={}, begun=begun)
    run = Resume(folder, identity=IDENTITY)
    run.save(later.tensors, later.changes)
    checkpoint = run.newest()
    return lambda: set_random_state(restore(begun, checkpoint.position, checkpoint.tensor)["random"], device)


def test_random_generators_go_on_where_they_were(tmp_path):
    random.seed(1), torch.manual_seed(2), numpy.random.seed(3)
    random.gauss(0, 1), numpy.random.standard_normal()  # each keeps a second draw back

    def draws():
        return [random.gauss(0, 1), random.random(), torch.randn(3).tolist(), numpy.random.standard_normal(3).tolist()]

    restore = saved_and_restored(tmp_path / "run", "cpu")
    wanted = draws()
    assert draws() != wanted
    restore()
    assert draws() == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    restore = saved_and_restored(tmp_path / "random", "cuda")
    wanted = torch.randn(5, device="cuda")
    restore()
    assert torch.equal(torch.randn(5, device="cuda"), wanted)
    there = {key: t.detach().cuda() for key, t in tensors().items()}
    run = Resume(tmp_path / "run", identity=IDENTITY)
    run.save(there, {})
    into = {"turned": torch.zeros(8, 6, device="cuda")}
    found, _ = run.load(into, "cuda")
    same_bits(found, there)
    assert found["turned"] is into["turned"] and all(t.is_cuda for t in found.values())


def two_processes(target, *arguments):
    """target(rank, *arguments) in two processes of one gloo group."""
    context = multiprocessing.get_context("fork")
    store = Path(arguments[0]) / f"store-{target.__name__}"
    children = [context.Process(target=_joined, args=(rank, store, target, arguments)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]


def _joined(rank, store, target, arguments):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    target(rank, *arguments)
    dist.destroy_process_group()


def test_two_processes_keep_their_own_tensors_and_positions(tmp_path, capfd):
    def saves(rank, folder):
        run = Resume(folder / "run", identity=IDENTITY, shards=Shards(rank=rank, world=2, active=True))
        assert run.load({}) is None
        run.save(
            {"shared": torch.full((3,), float(rank)), f"own {rank}": torch.arange(rank)}, {"rank": rank, "step": 1}
        )
        assert len(list((folder / "run").iterdir())) == 1

    def loads(rank, folder):
        run = Resume(folder / "run", identity=IDENTITY, shards=Shards(rank=rank, world=2, active=True))
        into = {"shared": torch.zeros(3)}
        found, place = run.load(into)
        assert place == {"rank": rank, "step": 1} and found["shared"] is into["shared"]
        same_bits(found, {"shared": torch.full((3,), float(rank)), f"own {rank}": torch.arange(rank)})

    def clocks_disagree(rank, folder):
        module.monotonic = lambda: 0.0
        run = Resume(folder / "run", identity=IDENTITY, shards=Shards(rank=rank, world=2, active=True), every=10)
        for ahead, wanted in (((0, 99), False), ((99, 0), True)):
            module.monotonic = lambda: ahead[rank]
            assert run.due() is wanted

    def one_is_damaged(rank, folder):
        into = {"shared": torch.full((3,), 9.0)}
        assert (
            Resume(folder / "run", identity=IDENTITY, shards=Shards(rank=rank, world=2, active=True)).load(into) is None
        )
        assert (into["shared"] == 9).all()

    def one_cannot_write(rank, folder):
        if rank == 1:
            module._write = None
        run = Resume(folder / "run", identity=IDENTITY, shards=Shards(rank=rank, world=2, active=True))
        run.save({"x": torch.zeros(3)}, {"step": 2})
        assert [p.name for p in (folder / "run").iterdir()] == ["save-00000001"]

    for target in (saves, loads, clocks_disagree, one_cannot_write):
        two_processes(target, tmp_path)
    err = capfd.readouterr().err
    assert "no checkpoint was written: TypeError: 'NoneType' object is not callable" in err
    assert Resume(tmp_path / "run", identity=IDENTITY).load({}) is None
    assert (
        "it belongs to another run, which differs in processes; starting from the beginning" in capfd.readouterr().err
    )
    change_a_byte(newest(tmp_path / "run"))
    two_processes(one_is_damaged, tmp_path)
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "is not used: process-1.safetensors is damaged" in err
