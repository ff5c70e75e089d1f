"""The hub path against a hub on this machine and against caches laid out as the hub's client lays them out."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from datasets import Dataset

from experiments.model import hub, random_models, tuned, weights
from experiments.study.schema import Model
from methods.errors import UserError
from tests.experiments.hub_server import COMMIT, Hub, digest, fill_cache, run_python

# one line for each repository asked for: the commit's folder, or why it was refused
ASK = """
import sys, time
time.sleep = lambda seconds: None  # between tries
from pathlib import Path
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1000  # small files, too, end in the middle of their chunks
from experiments.model import hub
from methods.errors import UserError
copy_to, *names = sys.argv[1:]
for name in names:
    kind, name, revision, *copy_bytes = name.split(":")
    try:
        if kind == "model":
            print(hub.snapshot(name, revision=revision, patterns=["*.json", "*.safetensors"], copy_to=Path(copy_to),
                               copy_bytes=int(copy_bytes[0]) if copy_bytes else None))
        else:
            print(hub.data_set_commit(name, revision=revision))
    except UserError as error:
        print(error)
"""


def save(
    folder: Path, architecture: str = "llama", *, shard: str = "5GB", dtype: torch.dtype = torch.float32, **config
):
    model = random_models.build(architecture, seed=5, dtype=dtype, **config)
    model.save_pretrained(folder, max_shard_size=shard)
    random_models.byte_tokenizer().save_pretrained(folder)
    return model


def make(out: Path, **block) -> dict:
    return weights.materialise(name="tiny", block=Model(**block), packages={}, out_dir=out)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache for this process, which tests/conftest.py keeps offline."""
    assert huggingface_hub.is_offline_mode()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("architecture", ["gptj", "llama"])
def test_a_filled_cache_is_enough_offline_also_for_weights_in_several_files(tmp_path, cache, architecture):
    model = save(tmp_path / "given", architecture, shard="40KB")
    assert len(list((tmp_path / "given").glob("model-*.safetensors"))) > 2
    fill_cache(cache, "someone/tiny", tmp_path / "given")
    base = make(tmp_path / "made", source=f"hub:someone/tiny@{COMMIT}")
    assert base["revision"] == COMMIT and base["sha256"] == weights.tensor_sha256(tmp_path / "given")
    assert json.loads((tmp_path / "made" / "base.json").read_text()) == base
    for (name, a), b in zip(
        weights.load_model(tmp_path / "made", dtype="auto").named_parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert not [file for file in (tmp_path / "made").iterdir() if file.is_symlink()]


def test_a_branch_is_resolved_and_its_commit_recorded_and_told(tmp_path, cache, capsys):
    save(tmp_path / "given")
    fill_cache(cache, "someone/tiny", tmp_path / "given")
    for source in ("hub:someone/tiny", "hub:someone/tiny@main"):
        assert make(tmp_path / "made", source=source)["revision"] == COMMIT
        assert f"someone/tiny at main is commit {COMMIT}: name it in the source" in capsys.readouterr().out
    make(tmp_path / "made", source=f"hub:someone/tiny@{COMMIT}")
    assert "is commit" not in capsys.readouterr().out
    with pytest.raises(
        UserError, match=f"'someone/tiny' at revision {'f' * 40} is missing or incomplete in the local hub cache"
    ):
        make(tmp_path / "made", source=f"hub:someone/tiny@{'f' * 40}")


@pytest.mark.parametrize("asked", [None, "float16", "float32"])
def test_a_hub_model_is_written_in_the_blocks_dtype(tmp_path, cache, asked):
    model = save(tmp_path / "given", dtype=torch.bfloat16)
    fill_cache(cache, "someone/tiny", tmp_path / "given")
    base = make(tmp_path / "made", source=f"hub:someone/tiny@{COMMIT}", **({"dtype": asked} if asked else {}))
    assert base["dtype"] == (asked or "bfloat16")
    loaded = weights.load_model(tmp_path / "made", dtype="auto")
    for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.to(a.dtype)) and a.dtype == getattr(torch, base["dtype"])


def test_a_cache_that_is_damaged_or_lacks_a_file_is_refused_by_the_files_name(tmp_path, cache):
    save(tmp_path / "given", shard="40KB")
    snapshot = fill_cache(cache, "someone/tiny", tmp_path / "given")
    shard, settings = snapshot / "model-00002-of-00003.safetensors", snapshot / "tokenizer.json"
    assert shard.is_symlink()
    for file in (shard, settings):
        whole, blob = file.read_bytes(), file.resolve()
        blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(
            UserError, match=f"{file.name} of someone/tiny is damaged: its hash is .* Delete .*{blob.name}"
        ):
            make(tmp_path / "made", source=f"hub:someone/tiny@{COMMIT}")
        blob.unlink()
        with pytest.raises(UserError, match=f"{file.name} of someone/tiny is missing"):
            make(tmp_path / "made", source=f"hub:someone/tiny@{COMMIT}")
        blob.write_bytes(whole)
    shutil.copytree(
        snapshot, tmp_path / "copy", symlinks=False
    )  # as on a file system without links: nothing to check against
    shutil.rmtree(snapshot)
    shutil.copytree(tmp_path / "copy", snapshot)
    assert make(tmp_path / "made", source=f"hub:someone/tiny@{COMMIT}")["sha256"] == weights.tensor_sha256(
        tmp_path / "given"
    )
    shutil.rmtree(tmp_path / "made")
    shard.unlink()
    with pytest.raises(UserError, match=f"model 'tiny': .*{shard.name}"):
        make(tmp_path / "made", source=f"hub:someone/tiny@{COMMIT}")
    assert not (tmp_path / "made").exists()


def test_a_damaged_file_of_a_data_set_in_the_cache_is_refused_by_its_name(tmp_path, cache):
    (tmp_path / "given").mkdir()
    for name in ("train.parquet", "README.md"):
        (tmp_path / "given" / name).write_text(f"rows of {name}")
    snapshot = fill_cache(cache, "someone/rows", tmp_path / "given")
    (cache / "models--someone--rows").rename(cache / "datasets--someone--rows")
    snapshot = cache / "datasets--someone--rows" / snapshot.relative_to(cache / "models--someone--rows")
    hub.refuse_damaged_data_set("someone/rows", commit=COMMIT)
    for name in ("train.parquet", "README.md"):
        blob = (snapshot / name).resolve()
        blob.write_text("others")
        with pytest.raises(UserError, match=f"{name} of someone/rows is damaged: its hash is"):
            hub.refuse_damaged_data_set("someone/rows", commit=COMMIT)
        blob.write_text(f"rows of {name}")
    hub.refuse_damaged_data_set("someone/never-fetched", commit=COMMIT)


def test_a_bin_of_the_hub_needs_its_checksum(tmp_path, cache):
    model = save(tmp_path / "given", "gptj")
    (tmp_path / "given" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "given" / "pytorch_model.bin")
    fill_cache(cache, "someone/old", tmp_path / "given")
    source, sha256 = f"hub:someone/old@{COMMIT}", digest(tmp_path / "given" / "pytorch_model.bin")
    with pytest.raises(UserError, match="someone/old holds no safetensors.*bin_sha256"):
        make(tmp_path / "made", source=source)
    with pytest.raises(UserError, match="checksum of pytorch_model.bin differs"):
        make(tmp_path / "made", source=source, bin_sha256="0" * 64)
    base = make(tmp_path / "made", source=source, bin_sha256=sha256)
    assert base["revision"] == COMMIT and not list((tmp_path / "made").glob("*.bin"))
    for a, b in zip(weights.load_model(tmp_path / "made", dtype="auto").parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model's folder with things beside it that are not wanted, and a data set's."""
    folder = tmp_path_factory.mktemp("given")
    save(folder / "model", "gptj", shard="40KB")
    (folder / "model" / "original").mkdir()
    (folder / "model" / "original" / "model.safetensors").write_bytes(b"the same once more")
    (folder / "model" / "modeling_own.py").write_text("raise SystemExit('run')")
    (folder / "rows").mkdir()
    Dataset.from_list([{"q": f"question {i}"} for i in range(5)]).to_parquet(
        str(folder / "rows" / "train-00000-of-00001.parquet")
    )
    return folder


def test_every_refusal_of_the_hub_is_told_apart(tmp_path, given):
    faults = {
        "gated": (403, "GatedRepo", "Access to model is restricted"),
        "gone": (401, "RepoNotFound", "Repository not found"),
        "off": (403, "", "Access to this resource is disabled."),
        "login": (401, "", "Invalid credentials in Authorization header"),
        "rights": (403, "", "no"),
        "often": (429, "", "We had to rate limit you"),
        "broken": (503, "", ""),
        "fault": (500, "", "Internal"),
    }
    said = {
        "gated": "is gated: accept its terms at https://huggingface.co/{page}someone/gated, "
        "then log in with `hf auth login`",
        "gone": "was not found on the hub: check the name .*renamed.*if it is private, log in",
        "off": "was disabled by the hub",
        "login": r"is refused to this login \(HTTP 401\).*hf auth login",
        "rights": r"is refused to this login \(HTTP 403\)",
        "often": r"cannot be downloaded now: the hub limits the number of requests \(HTTP 429\). Wait",
        "broken": r"cannot be downloaded now: the hub has an internal error \(HTTP 503\). Run again later",
        "fault": r"cannot be downloaded now: the hub has an internal error \(HTTP 500\)",
    }
    folders = {
        ("models", "someone/tiny"): given / "model",
        ("datasets", "someone/rows"): given / "rows",
        ("models", "someone/llama"): given / "model",
    }
    asked = [
        f"{kind}:someone/{name}:{revision}"
        for kind in ("model", "data set")
        for name in faults
        for revision in ("main", COMMIT)
    ]
    more = [
        "model:someone/tiny:v9",
        f"model:someone/tiny:{'e' * 40}",
        "model:not/a/name:main",
        "data set:someone/rows:v9",
        f"model:someone/llama:{COMMIT}",
    ]
    with Hub(
        folders=folders, faults={f"someone/{name}": fault for name, fault in faults.items()}, gated={"someone/llama"}
    ) as server:
        lines = run_python(
            ASK, tmp_path / "hf", str(tmp_path / "out"), *asked, *more, HF_ENDPOINT=server.url
        ).splitlines()
    for request, line in zip(asked, lines, strict=False):
        kind, name, revision = request.split(":")
        expected = said[name.removeprefix("someone/")].replace("{page}", "datasets/" if kind == "data set" else "")
        assert re.match(f"{kind} '{name}' at revision {revision} {expected}", line), (request, line)
    branch, commit, name, rows, files = lines[len(asked) :]
    assert "model 'someone/tiny' at revision v9 does not exist" in branch and "not that revision" in branch
    assert f"model 'someone/tiny' at revision {'e' * 40} does not exist" in commit
    assert f"model 'someone/llama' at revision {COMMIT} is gated: accept its terms" in files
    assert "OWNER/NAME" in name and "data set 'someone/rows' at revision v9 does not exist" in rows
    # nobody answers there any more
    lines = run_python(
        ASK,
        tmp_path / "hf",
        str(tmp_path / "out"),
        "model:someone/tiny:main",
        f"model:someone/tiny:{COMMIT}",
        "data set:someone/rows:main",
        HF_ENDPOINT=server.url,
    ).splitlines()
    assert len(lines) == 3 and all("the hub is not reachable. Check the network" in line for line in lines)
    line = run_python(ASK, tmp_path / "hf", str(tmp_path / "out"), "model:someone/tiny:main", HF_HUB_OFFLINE="1")
    assert (
        "model 'someone/tiny' at revision main is missing or incomplete in the local hub cache, "
        "and HF_HUB_OFFLINE is set" in line
    )


def test_a_disk_without_room_is_told_before_anything_is_fetched(tmp_path, given):
    """Room for the download and for a copy: of the same size, or of the size that parameters and dtype give."""
    shard = next((given / "model").glob("model-00001-of-*.safetensors")).name
    with Hub(folders={("models", "someone/big"): given / "model"}, sizes={shard: 2**60}) as server:
        same, smaller = run_python(
            ASK,
            tmp_path / "hf",
            str(tmp_path / "out"),
            f"model:someone/big:{COMMIT}",
            f"model:someone/big:{COMMIT}:{2**58}",
            HF_ENDPOINT=server.url,
        ).splitlines()
    for line, needed in ((same, 2**61), (smaller, 2**60 + 2**58)):
        assert (
            f"too little disk for someone/big ({2**30:.1f} GiB to download" in line
            and f": {needed / 2**30:.1f} GiB needed at" in line
        )
    assert not [request for request in server.asked if request.startswith("GET") and "/resolve/" in request]


def test_a_download_that_is_cut_off_goes_on_or_begins_anew(tmp_path, given):
    shard = next((given / "model").glob("model-00001-of-*.safetensors")).name
    ask = f"model:someone/tiny:{COMMIT}"
    with Hub(folders={("models", "someone/tiny"): given / "model"}, cut={shard: 99}) as server:
        line = run_python(ASK, tmp_path / "hf", str(tmp_path / "out"), ask, HF_ENDPOINT=server.url)
        assert "model 'someone/tiny'" in line and "cannot be downloaded" in line and "run again" in line
        cache = tmp_path / "hf" / "hub" / "models--someone--tiny"
        assert not (cache / "snapshots" / COMMIT / shard).exists()
        kept = {file.name for file in (cache / "snapshots" / COMMIT).iterdir()}
        # offline half a download is not taken for a whole one
        line = run_python(ASK, tmp_path / "hf", str(tmp_path / "out"), ask, HF_HUB_OFFLINE="1")
        assert "is missing or incomplete in the local hub cache" in line
        server.cut[shard] = 1
        server.asked.clear()
        line = run_python(ASK, tmp_path / "hf", str(tmp_path / "out"), ask, HF_ENDPOINT=server.url)
        assert Path(line.strip()) == cache / "snapshots" / COMMIT
    fetched = [request for request in server.asked if request.startswith("GET") and "/resolve/" in request]
    assert kept and not [request for request in fetched if request.split("/")[-1].split()[0] in kept]
    assert [
        request for request in fetched if shard in request and "bytes=" in request
    ]  # it went on where it was cut off
    names = {file.name for file in (cache / "snapshots" / COMMIT).iterdir()}
    assert names == {file.name for file in (given / "model").iterdir() if file.suffix in (".json", ".safetensors")}
    assert all(
        (cache / "snapshots" / COMMIT / name).read_bytes() == (given / "model" / name).read_bytes() for name in names
    )
    assert run_python(ASK, tmp_path / "hf", str(tmp_path / "out"), ask, HF_HUB_OFFLINE="1") == line


MAKE = """
import sys
from pathlib import Path
from experiments.model import weights
from experiments.study.schema import Model
from methods.errors import UserError
try:
    weights.materialise(name="tiny", block=Model(source="hub:someone/tiny"), packages={}, out_dir=Path(sys.argv[1]))
except UserError as error:
    print(error)
"""


@pytest.mark.thorough
def test_weights_that_could_not_be_used_are_not_fetched(tmp_path, given):
    config = given / "model" / "config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"quantization_config": {"quant_method": "gptq"}}))
    try:
        with Hub(folders={("models", "someone/tiny"): given / "model"}) as server:
            line = run_python(MAKE, tmp_path / "hf", str(tmp_path / "out"), HF_ENDPOINT=server.url)
    finally:
        config.write_text(before)
    assert "model 'tiny': someone/tiny is quantised (gptq" in line
    assert [request for request in server.asked if "config.json" in request] and not [
        request for request in server.asked if request.split()[1].endswith(".safetensors")
    ]


def test_a_renamed_repository_is_followed(tmp_path, given):
    with Hub(folders={("models", "someone/new"): given / "model"}, renamed={"someone/old": "someone/new"}) as server:
        line = run_python(ASK, tmp_path / "hf", str(tmp_path / "out"), "model:someone/old:main", HF_ENDPOINT=server.url)
    assert line.strip().endswith(f"models--someone--old/snapshots/{COMMIT}")


ROWS = """
import sys, time
time.sleep = lambda seconds: None
from experiments.data import rows
from experiments.study.schema import Rows
from methods.errors import UserError
for revision in sys.argv[1:]:
    block = {"hub": {"path": "someone/rows", "split": "train"} | ({"revision": revision} if revision != "none" else {})}
    try:
        found = rows.read(Rows(**block), packages={}, prefer="hub", where="tasks.tiny")
        print(len(found.rows), found.source)
    except UserError as error:
        print(error)
"""


def test_rows_of_the_hub_are_of_the_commit_asked_for_also_from_the_cache(tmp_path, given):
    other = "f" * 40
    with Hub(folders={("datasets", "someone/rows"): given / "rows"}) as server:
        lines = run_python(ROWS, tmp_path / "hf", COMMIT, "main", "none", other, HF_ENDPOINT=server.url).splitlines()
        assert lines[:3] == [f"5 hub:someone/rows@{COMMIT}/train"] * 3
        assert "tasks.tiny: data set 'someone/rows' at revision ffff" in lines[3] and "not that revision" in lines[3]
        # `datasets` would now answer from its cache, whatever was asked
        server.faults["someone/rows"] = (429, "", "slow down")
        line = run_python(ROWS, tmp_path / "hf", other, HF_ENDPOINT=server.url)
        assert "the hub limits the number of requests (HTTP 429)" in line
        server.faults.clear()
        server.gated.add("someone/rows")
        line = run_python(ROWS, tmp_path / "new", COMMIT, HF_ENDPOINT=server.url)
        assert (
            f"data set 'someone/rows' at revision {COMMIT} is gated: accept its terms at "
            "https://huggingface.co/datasets/" in line
        )
    kept, refused = run_python(ROWS, tmp_path / "hf", COMMIT, other, HF_HUB_OFFLINE="1").splitlines()
    assert kept == f"5 hub:someone/rows@{COMMIT}/train"
    assert f"'someone/rows' in the local cache has commit {COMMIT}, not {other}" in refused
    empty = run_python(ROWS, tmp_path / "empty", COMMIT, HF_HUB_OFFLINE="1")
    assert "data set 'someone/rows'" in empty and "is missing or incomplete in the local hub cache" in empty


# every Python call that opens a connection or resolves an address is noted, and refused unless it goes to the hub
GUARD = """
import sys
allowed, asked = [], []
def watch(event, given):
    if event not in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        return
    address = given[:2] if event == "socket.getaddrinfo" else given[-1]
    asked.append(f"{event} {address}")
    if not isinstance(address, tuple) or address[1] not in allowed:
        raise OSError(f"connection refused by the test: {event} {address}")
sys.addaudithook(watch)
"""
STAGES = (
    GUARD
    + """
import importlib, pkgutil
from pathlib import Path
import analysis, evaluation, experiments, methods
for package in (analysis, evaluation, experiments, methods):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
import datasets, lm_eval, mlflow, transformers
assert not asked, asked
from experiments.model import weights
from experiments.study import cells, config
from experiments.study.schema import Model
from experiments.stages import collect, data, evaluate, model, prepare, resolve, train
root, sources = Path(sys.argv[1]), sys.argv[2:]
for number, source in enumerate(sources):
    weights.materialise(name="tiny", block=Model(source=source), packages={}, out_dir=root / f"made{number}")
    weights.load_model(root / f"made{number}", dtype="auto"), weights.load_tokenizer(root / f"made{number}")
study = config.load("demo", root=root)
resolve.main(study)
model.main(study, model="llama-tiny")
data.main(study)
evaluate.base(study, model="llama-tiny")
cell = cells.parse("llama-tiny/sums/ewc/seed0", study)
prepare.main(study, model=cell.model, method=cell.method, seed=0, cell=cell)
train.main(study, cell)
evaluate.main(study, cell)
collect.main(study, cell)
import threading
names = [thread.name for thread in threading.enumerate()]
assert not [name for name in names if "conversion" in name or "elemetry" in name], names
assert not asked, asked
print("nothing asked")
"""
)


def test_no_connection_is_opened_that_no_setting_asked_for(tmp_path):
    """All modules are imported, models of three kinds are made and a cell runs every stage, without any network."""
    model = save(tmp_path / "given", "llama", shard="40KB")
    save(tmp_path / "gptj", "gptj")
    fill_cache(tmp_path / "hf" / "hub", "someone/tiny", tmp_path / "given")
    study = tmp_path / "root" / "experiments" / "studies" / "demo"
    study.mkdir(parents=True)
    for file in ("dvc.yaml", "experiments/studies/demo/dvc.yaml"):
        (tmp_path / "root" / file).write_text(Path(file).read_text())
    text = Path("experiments/studies/demo/params.yaml").read_text()
    text = text.replace("random:llama", f"hub:someone/tiny@{COMMIT}")
    text = text.replace("dtype: float32", "dtype: float16\n    compute_dtype: float64")
    (study / "params.yaml").write_text(text)
    said = run_python(
        STAGES,
        tmp_path / "hf",
        str(tmp_path / "root"),
        f"path:{tmp_path / 'gptj'}",
        "random:gptj",
        f"hub:someone/tiny@{COMMIT}",
        HF_HUB_OFFLINE="1",
    )
    assert said.splitlines()[-1] == "nothing asked"
    measured = json.loads((tmp_path / "root/results/demo/runs/llama-tiny/sums/ewc/seed0/train.json").read_text())
    assert measured["compute_dtype"] == "float64" and measured["dtype"] == "float16"
    work = tmp_path / "root" / "work" / "demo"
    trained, _ = tuned.tensors(work / "cells/llama-tiny/sums/ewc/seed0/weights", folder=work / "models/llama-tiny")
    base = dict(model.named_parameters())
    assert {tensor.dtype for tensor in trained.values()} == {torch.float16}
    assert not all(torch.equal(tensor, base[name].half()) for name, tensor in trained.items())


ONLINE = (
    GUARD
    + """
from pathlib import Path
from urllib.parse import urlsplit
from huggingface_hub import constants
from experiments.data import rows
from experiments.model import weights
from experiments.study.schema import Model, Rows
hub = urlsplit(constants.ENDPOINT).port
out = Path(sys.argv[1])
weights.materialise(name="tiny", block=Model(source="random:gptj"), packages={}, out_dir=out / "random")
assert not asked, asked
allowed.append(hub)
base = weights.materialise(name="tiny", block=Model(source="hub:someone/tiny@main"), packages={}, out_dir=out / "hub")
old = Model(source="hub:someone/old", bin_sha256=sys.argv[2])
weights.materialise(name="old", block=old, packages={}, out_dir=out / "old")
rows.read(Rows(**{"hub": {"path": "someone/rows", "split": "train"}}), packages={}, prefer="hub", where="tasks.tiny")
assert asked and all(f", {hub})" in address for address in asked), asked
print(base["revision"], base["sha256"])
"""
)


def test_a_hub_source_asks_the_hub_and_nobody_else(tmp_path, given):
    """Also online and for a branch, where transformers would ask for a conversion and `datasets` for an export."""
    old = given / "old"
    model = save(old)
    (old / "model.safetensors").unlink()
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    (old / "pytorch_model.bin.index.json").write_text("{}")
    folders = {
        ("models", "someone/tiny"): given / "model",
        ("models", "someone/old"): old,
        ("datasets", "someone/rows"): given / "rows",
    }
    with Hub(folders=folders) as server:
        said = run_python(
            ONLINE, tmp_path / "hf", str(tmp_path), digest(old / "pytorch_model.bin"), HF_ENDPOINT=server.url
        )
    assert said.splitlines()[-1] == f"{COMMIT} {weights.tensor_sha256(given / 'model')}"
    # what a repository has beside its weights stays there: copies in other forms, and code
    assert not [
        request
        for request in server.asked
        if "original" in request or "/modeling_own.py" in request or "agent" in request
    ]
    assert all(
        request.split()[1].startswith(
            ("/api/models/someone/", "/api/datasets/someone/", "/someone/", "/datasets/someone/")
        )
        for request in server.asked
    )
