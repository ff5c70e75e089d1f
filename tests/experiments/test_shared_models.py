"""Models made from the same settings are converted once and taken over by other studies."""

import os
import shutil
import sys

import pytest
from dvc_data.hashfile.build import build
from dvc_data.hashfile.db import HashFileDB
from dvc_objects.fs import LocalFileSystem
from ruamel.yaml import YAML

from experiments.model.weights import load_model, tensor_sha256
from experiments.stages import model, resolve
from experiments.study import config, lock
from experiments.study.paths import HERE, Paths
from methods.tools.files import write_json
from tests.experiments.test_inheritance import OWN, load, write
from tests.test_pipeline import project_of, repro, run


def recorded(study, name):
    """Write what `dvc repro` would record of the study's stage, by DVC's own hash of the folder."""
    out, settings = study.paths.model(name), study.paths.resolved / "model" / f"{name}.json"
    write_json(settings, resolve.model(study, name))
    odb = HashFileDB(LocalFileSystem(), str(study.paths.root / "odb"))
    hashes = [build(odb, str(path), LocalFileSystem(), "md5")[2].hash_info.value for path in (settings, out)]
    paths = [path.relative_to(study.paths.root).as_posix() for path in (settings, out)]
    dep, made = ({"path": path, "hash": "md5", "md5": value} for path, value in zip(paths, hashes, strict=True))
    entry = {"cmd": "model", "deps": [dep], "outs": [made]}
    with (study.paths.folder / "dvc.lock").open("w") as file:
        YAML().dump({"schema": "2.0", "stages": {f"model@{name}": entry}}, file)
    return hashes[1]


@pytest.fixture
def two(tmp_path):
    """The default study, whose llama-tiny is made, and a study that takes its block over."""
    mine = load(tmp_path)
    default = config.load(root=tmp_path)
    model.main(default, model="llama-tiny")
    return default, mine


def test_the_hash_of_a_folder_is_that_of_dvc(two):
    default, _ = two
    assert recorded(default, "llama-tiny") == lock.folder_md5(default.paths.model("llama-tiny"))


def test_a_model_of_the_same_settings_is_taken_over_and_lies_on_the_disk_once(two, capsys, monkeypatch):
    default, mine = two
    made, out = default.paths.model("llama-tiny"), mine.paths.model("llama-tiny")
    recorded(default, "llama-tiny")
    monkeypatch.setattr(model, "materialise", None)  # it is not called
    model.main(mine, model="llama-tiny")
    assert "taken over from work/models/llama-tiny" in capsys.readouterr().out
    assert lock.folder_md5(out) == lock.folder_md5(made)
    shared = [file for file in made.iterdir() if file.samefile(out / file.name)]
    assert [file.suffix for file in shared] == [".safetensors"]  # the small files are the study's own
    load_model(out, dtype="auto")


def test_other_settings_damaged_files_and_no_record_are_made_anew(two, capsys):
    default, mine = two
    made = default.paths.model("llama-tiny")
    assert model.made_before(mine, "llama-tiny") is None  # DVC has recorded nothing
    recorded(default, "llama-tiny")
    assert model.made_before(mine, "llama-tiny") == made
    assert model.made_before(default, "llama-tiny") is None  # itself
    other = OWN | {"models": {"llama-tiny": {"source": "random:llama", "seed": 1}}}
    assert model.made_before(load(mine.paths.root, other), "llama-tiny") is None
    (made / "config.json").write_text((made / "config.json").read_text() + " ")
    assert model.made_before(mine, "llama-tiny") is None
    model.main(mine, model="llama-tiny")
    assert "taken over" not in capsys.readouterr().out
    assert tensor_sha256(mine.paths.model("llama-tiny")) == tensor_sha256(made)
    (default.paths.folder / "dvc.lock").write_text("<<<<<<< ours")
    assert model.made_before(mine, "llama-tiny") is None


def test_a_disk_without_hard_links_gets_copies(two, monkeypatch):
    default, mine = two

    def refused(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    made, out = default.paths.model("llama-tiny"), mine.paths.model("llama-tiny")
    model.take_over(made, out)
    assert lock.folder_md5(out) == lock.folder_md5(made)
    assert not [file for file in made.iterdir() if file.samefile(out / file.name)]


@pytest.mark.thorough
def test_dvc_keeps_a_model_that_is_taken_over_apart_from_its_source(tmp_path):
    """With real DVC: the second study's stage takes over, and a later change of its model changes only its own."""
    demo = YAML(typ="safe").load(HERE / "experiments/studies/demo/params.yaml")
    project_of(tmp_path, demo)
    run(tmp_path, "dvc", "config", "cache.type", "hardlink")  # a copy on write could not write through
    pipeline, mine = "experiments/studies/mine/dvc.yaml", Paths(study="mine", root=tmp_path)
    own = {"grid": demo["grid"], "domains": demo["domains"], "train": demo["train"]}
    write(mine.folder, own)
    run(tmp_path, sys.executable, "-m", "experiments", "pipeline", "--study", "mine")
    assert repro(tmp_path, "model@llama-tiny") == ["resolve", "model@llama-tiny"]
    made, taken = tmp_path / "work/models/llama-tiny", mine.model("llama-tiny")
    before = lock.folder_md5(made)
    done = run(tmp_path, "dvc", "repro", f"{pipeline}:model@llama-tiny")
    assert "taken over from work/models/llama-tiny" in done.stdout
    assert lock.folder_md5(taken) == before
    assert (taken / "model.safetensors").samefile(made / "model.safetensors")  # on the disk once, DVC's cache included
    status = ("dvc", "status", "model@llama-tiny", f"{pipeline}:model@llama-tiny")
    assert "up to date" in run(tmp_path, *status).stdout
    write(mine.folder, own | {"models": {"llama-tiny": demo["models"]["llama-tiny"] | {"seed": 1}}})
    assert "taken over" not in run(tmp_path, "dvc", "repro", f"{pipeline}:model@llama-tiny").stdout
    assert lock.folder_md5(taken) != before == lock.folder_md5(made)
    assert "up to date" in run(tmp_path, *status).stdout
    write(mine.folder, own)
    shutil.rmtree(made)
    run(tmp_path, "dvc", "repro", f"{pipeline}:model@llama-tiny")  # from DVC's cache
    run(tmp_path, "dvc", "checkout", "model@llama-tiny")
    assert lock.folder_md5(taken) == before == lock.folder_md5(made)
    assert "up to date" in run(tmp_path, *status).stdout
