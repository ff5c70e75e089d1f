"""The stage `prepare`: what general text a part reads, and when a preparation is made again."""

import copy
import fcntl
import io
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ruamel.yaml import YAML

from experiments.commands import plan
from experiments.model.positions import refuse_long_documents
from experiments.model.random_models import byte_tokenizer
from experiments.model.shape import shape_of
from experiments.stages import data, model, prepare
from experiments.study import ahead, config
from experiments.study.cells import Cell
from experiments.study.paths import HERE
from experiments.training import prepared
from experiments.training.hardware import device
from methods.errors import UserError
from methods.tools.files import read_json, sha256, write_json

DEMO = YAML(typ="safe").load(HERE / "experiments" / "studies" / "demo" / "params.yaml")
METHODS = ("ewc", "hierarchical")


def load(root, change=lambda raw: None):
    """The demo's study below `root`, changed."""
    raw = copy.deepcopy(DEMO)
    raw["grid"]["methods"] = list(METHODS)
    raw["methods"]["ewc"]["ewc"]["length"] = 40
    raw["methods"]["hierarchical"]["hierarchical"]["length"] = 40
    change(raw)
    out = io.StringIO()
    YAML().dump(raw, out)
    (root / "params.yaml").write_text(out.getvalue())
    return config.load(root=root)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A root in which model and data are made."""
    root = tmp_path_factory.mktemp("study")
    study = load(root)
    model.main(study, model="llama-tiny")
    data.main(study)
    return root


def run(root, method, change=lambda raw: None):
    """(importance's hash, notes, costs) of one preparation."""
    study = load(root, change)
    prepare.main(study, model="llama-tiny", method=method, seed=0, cell=Cell("llama-tiny", "sums", method, 0))
    out = study.paths.prepared(model="llama-tiny", method=method, seed=0)
    return (
        sha256(out / f"{method}.importance.safetensors"),
        read_json(out / "prepared.json")[method],
        read_json(study.paths.prepare_costs(model="llama-tiny", method=method, seed=0)),
    )


def general(root, text):
    """Put other general text in the place of the data stage's."""
    folder = root / "work" / "data"
    path = folder / "general" / "importance.jsonl"
    path.write_text(text)
    facts = read_json(folder / "data.json")
    facts["files"]["general/importance.jsonl"] = sha256(path)
    write_json(folder / "data.json", facts)


@pytest.fixture
def texts(made):
    before = (made / "work" / "data" / "general" / "importance.jsonl").read_text()
    yield lambda found: general(
        made, "".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(found))
    )
    general(made, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_parts_own_length_alone_cuts_its_documents(made, texts, method):
    texts(["a" * 100] * 16)  # one token a character
    digest, notes, costs = run(made, method)
    assert costs["tokens_prepare"] == 16 * 40
    shorter_rows = run(made, method, lambda raw: raw["train"].update(length=16))
    assert shorter_rows == (digest, notes, costs | {"reused": True})
    longer = run(made, method, lambda raw: raw["methods"][method][method].update(length=64))
    assert longer[0] != digest and longer[2]["tokens_prepare"] == 16 * 64


def test_documents_without_a_token_to_predict_are_left_out(made, texts, capsys):
    texts(["a", "b"] * 3 + ["one two three", "four five six"])
    _, notes, _ = run(made, "ewc")
    assert notes["documents"] == 2 and notes["documents_asked"] == 16
    said = capsys.readouterr().out
    assert "6 of 8 documents are a single token" in said
    assert "ewc.samples is 16, but the general text has 2 documents" in said
    texts(["one two three", "four five six"] * 8)
    assert "documents_asked" not in run(made, "ewc")[1]  # what is there is enough
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("method", METHODS)
def test_general_text_of_single_tokens_is_refused(made, texts, method):
    texts(["a"] * 8)
    with pytest.raises(UserError, match=r"^general: none of the 8 documents of `general.importance`.*`general.rows`"):
        prepared.stored(load(made), "llama-tiny", method, 0)
    study = load(made)
    with pytest.raises(UserError, match=r"^general: none of the 32 documents"):  # and before any stage runs
        ahead.refuse_long(
            study,
            model="llama-tiny",
            shape=shape_of("llama-tiny", study.models["llama-tiny"], made),
            tokenizer=byte_tokenizer(),
            data=study.paths.data,
        )


def test_importance_of_zeros_is_refused(made, texts, monkeypatch):
    from methods.ewc import EWC

    texts(["some text"] * 8)
    original = EWC.prepare

    def nothing(self, **arguments):
        found = original(self, **arguments)
        for codes in found.importance.values():
            codes.codes.zero_()
        return found

    monkeypatch.setattr(EWC, "prepare", nothing)
    with pytest.raises(UserError, match=r"methods\.ewc\.ewc: the importance of every weight came out as 0"):
        prepared.stored(load(made), "llama-tiny", "ewc", 0)


def test_documents_longer_than_the_models_positions_are_refused_by_the_parts_name(made, texts):
    def written(raw):
        raw["methods"]["ewc"]["ewc"].update(length=600)

    def default(raw):
        raw["methods"]["ewc"]["ewc"].pop("length")

    def narrow(raw):
        default(raw)
        raw["models"]["llama-tiny"].update(config={"max_position_embeddings": 256})

    message = r"methods\.ewc\.ewc\.length is 600, and llama-tiny has 512 positions: write `length: 512`"
    with pytest.raises(UserError, match=message):
        plan.make(load(made, written))
    small = load(made, narrow)  # 512, by default, of a model of 256: refused only if a document is as long
    shape = shape_of("llama-tiny", small.models["llama-tiny"], made / "nowhere")
    refuse_long_documents(small, model="llama-tiny", method="ewc", shape=shape)
    refuse_long_documents(small, model="llama-tiny", method="ewc", shape=shape, longest=256)
    with pytest.raises(UserError, match=r"methods\.ewc\.ewc\.length is 512, and llama-tiny has 256 positions"):
        refuse_long_documents(small, model="llama-tiny", method="ewc", shape=shape, longest=257)
    texts(["a" * 600] * 8)
    with pytest.raises(UserError, match=message):
        prepared.stored(load(made, written), "llama-tiny", "ewc", 0)
    assert run(made, "ewc", default)[2]["tokens_prepare"] == 8 * 512  # the default is what the model takes


def test_the_key_of_the_store_says_what_a_preparation_depends_on(made, monkeypatch):
    """Beside the settings, which have a test of their own: the base, its tokenizer, the text, the seed if it draws."""
    where, keys = device("cpu"), {}

    def key(study=None, method="ewc", seed=0, at=where):
        return prepared.store_key(study or load(made), "llama-tiny", method, seed, at)

    first = keys["first"] = key()
    assert key(seed=1) == first and key(method="hierarchical", seed=0) != key(method="hierarchical", seed=1)
    folder = made / "work" / "models" / "llama-tiny"
    for file, change in (
        (folder / "base.json", {"sha256": "0" * 64}),
        (folder / "tokenizer_config.json", {"add_bos_token": True}),
        (folder / "config.json", {"rms_norm_eps": 1e-3}),
    ):
        before = file.read_bytes()
        write_json(file, read_json(file) | change)
        keys[file.name] = key()
        file.write_bytes(before)
    text = made / "work" / "data" / "general" / "importance.jsonl"
    before = text.read_bytes()
    text.write_bytes(before + b'{"id": "1", "text": "more"}\n')
    keys["text"] = key()
    text.write_bytes(before)
    keys["dtype"] = key(load(made, lambda raw: raw["models"]["llama-tiny"].update(compute_dtype="float64")))
    keys["device"] = key(at=torch.device("meta"))
    monkeypatch.setattr("evaluation.version", lambda name: "9.9")
    keys["versions"] = key()
    assert len(set(keys.values())) == len(keys)


def test_a_preparation_that_changed_after_it_was_written_is_refused_by_name(made):
    run(made, "ewc")
    cell, study = Cell("llama-tiny", "sums", "ewc", 0), load(made)
    prepared.refuse_damaged(study, cell)
    file = study.paths.prepared(model="llama-tiny", method="ewc", seed=0) / "ewc.importance.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        UserError, match="ewc.importance.safetensors is not what .*--single-item prepare@llama-tiny-ewc-0"
    ):
        prepared.refuse_damaged(study, cell)


def test_who_asks_for_a_preparation_that_is_being_computed_waits_for_it(made, capsys):
    """`drift` computes the importance where `prepare` has not yet, and both may run at the same time."""
    study = load(made, lambda raw: raw["methods"]["ewc"]["ewc"].update(length=24))
    key = prepared.store_key(study, "llama-tiny", "ewc", 0, device(study.device))
    folder = study.paths.resume / "prepare"
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool, (folder / f"{key}.lock").open("a") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        waiting = pool.submit(prepared.stored, study, "llama-tiny", "ewc", 0)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=1.0)
        assert not prepared.in_store(study, "llama-tiny", "ewc", 0)
        fcntl.flock(busy, fcntl.LOCK_UN)
        assert waiting.result(timeout=60.0) == (study.paths.local / "prepared" / key, False)
    assert "another process computes this preparation: waiting for it" in capsys.readouterr().out
    assert prepared.stored(study, "llama-tiny", "ewc", 0)[1] and prepared.in_store(study, "llama-tiny", "ewc", 0)
