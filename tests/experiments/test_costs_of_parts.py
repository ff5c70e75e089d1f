"""A part answers for its own costs: what plan, memory and prepare know of it is what it says itself."""

import ast
import copy
import dataclasses
import io
import types
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from experiments.commands import plan
from experiments.data import expected
from experiments.laws.laws import judge
from experiments.laws.trial import Trial
from experiments.model.positions import refuse_long_documents
from experiments.model.random_models import byte_tokenizer
from experiments.model.shape import shape_of
from experiments.stages import collect, data, model, prepare, train
from experiments.study import ahead, config
from experiments.study.cells import Cell
from experiments.study.paths import HERE, Paths
from experiments.study.schema import Model
from experiments.training import memory, prepared
from experiments.training.flops import Flops
from experiments.training.settings import TrainSettings
from methods import registry
from methods.errors import UserError
from methods.part import REGISTERED, Part, Prepared, register, setting
from methods.settings import declared
from methods.tools.costs import Added, Memory, Pass
from methods.tools.files import read_json

DEMO = YAML(typ="safe").load(HERE / "experiments" / "studies" / "demo" / "params.yaml")


COMMON = set(vars(TrainSettings())) | {"path", "dropout"}  # settings whose names other objects have, too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replayed(Part):
    """What a first part of somebody else's looks like: it prepares, and has none of the settings that ours have."""

    share: float = setting(0.25, within="[0, 1]", help="tokens read for each token of the domain")

    def prepare(self, *, model, base, general, seed, fit, progress, shards=None, resume=None, sample=None):
        longest = max(general, key=lambda example: len(example["input_ids"]))
        return Prepared(carry={"text": longest["input_ids"]}, tokens=sum(len(e["input_ids"]) for e in general))

    def examples(self, *, run, state, rows, step):
        text = state["carry"]["text"]
        return [*rows, {"input_ids": text, "labels": text.clone()}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated(Part):
    """It reads the bare model's hidden states, adapts the model by them, and prepares on the adapted model."""

    def preparation(self):
        return Pass(bare=True, gradients="none", documents=3), Pass(documents=2, length=8)

    def calibrate(self, *, model, general, seed, progress, shards, sample):
        assert not hasattr(model, "directions")
        with torch.no_grad():
            hidden = [model.model(e["input_ids"][None]).last_hidden_state[0] for e in general[:3]]
        tokens = sum(len(one) for one in hidden)
        return Prepared(calibration={"mean": torch.cat(hidden).mean(0)}, tokens=tokens, notes={"read": 3})

    def adapt(self, model, *, seed, state=types.MappingProxyType({})):
        if "calibration" in state:
            model.directions = state["calibration"]["mean"]
        return model

    def prepare(self, *, model, general, **_):
        texts = [document["input_ids"][:8] for document in general[:2]]
        return Prepared(carry={"twice": 2 * model.directions}, tokens=sum(map(len, texts)), notes={"cut": 2})


@pytest.fixture(autouse=True)
def parts():
    for kind, capabilities in ((Replayed, ()), (Calibrated, ("adapts",))):
        name = kind.__name__
        register(title=name, paper="", line="x.", key=name.lower(), capabilities=frozenset(capabilities))(kind)
    yield
    for kind in (Replayed, Calibrated):
        del REGISTERED[kind.key]


@pytest.fixture
def study(tmp_path):
    raw = copy.deepcopy(DEMO)
    raw["grid"]["methods"] = ["own"]
    raw["methods"] = {"own": {"replayed": {}}, "calibrated": {"calibrated": {}}}
    out = io.StringIO()
    YAML().dump(raw, out)
    (tmp_path / "params.yaml").write_text(out.getvalue())
    return config.load(root=tmp_path)


def test_a_part_with_none_of_our_settings_is_planned_and_prepared(study):
    (before,) = plan.make(study)["cells"]
    assert before["seconds_prepare"] >= 0 and before["memory"]["prepare"]["total"] > 0
    model.main(study, model="llama-tiny")
    data.main(study)
    assert ahead.look(study) == []
    prepare.main(study, model="llama-tiny", method="own", seed=0, cell=Cell("llama-tiny", "sums", "own", 0))
    costs = read_json(study.paths.prepare_costs(model="llama-tiny", method="own", seed=0))
    folder = study.paths.prepared(model="llama-tiny", method="own", seed=0)
    (states,) = prepared.load_states(folder, study.methods["own"].parts).values()
    text = [len(row["input_ids"]) for row in prepared.encoded_text(general_text(study), byte_tokenizer())]
    assert costs["tokens_prepare"] == sum(text) and len(states["carry"]["text"]) == max(text)
    # what it adds to every step is recorded beside the domain's tokens, and joined with what it took to prepare
    train.main(study, Cell("llama-tiny", "sums", "own", 0))
    record = read_json(study.paths.run(Cell("llama-tiny", "sums", "own", 0)) / "train.json")
    added = record["added"]["replayed"]
    one = Flops(built(study)).step(lengths=[max(text)], labelled=max(text) - 1)
    assert (added["tokens"], added["flops"]) == (record["steps"] * max(text), record["steps"] * one)
    joined = collect._costs(record, costs, {"seconds_evaluate": 1.0})
    assert (joined["tokens_trained"], joined["tokens_added"]) == (record["tokens_trained"], added["tokens"])
    assert (joined["flops"], joined["flops_added"]) == (record["flops"], added["flops"])
    assert joined["flops_prepare"] == costs["added"]["replayed"]["flops"] > 0
    assert joined["added"] == {"prepare": costs["added"], "train": record["added"]}
    earlier = collect._costs(record | {"added": None}, costs | {"added": None}, {"seconds_evaluate": 1.0})
    assert [earlier[key] for key in ("tokens_added", "flops_added", "flops_prepare")] == [None] * 3


def test_calibration_is_made_on_the_bare_model_and_stored_for_the_adapted_one(study):
    model.main(study, model="llama-tiny")
    data.main(study)
    prepare.main(
        study, model="llama-tiny", method="calibrated", seed=0, cell=Cell("llama-tiny", "sums", "calibrated", 0)
    )
    folder = study.paths.prepared(model="llama-tiny", method="calibrated", seed=0)
    state = prepared.load_states(folder, study.methods["calibrated"].parts)["calibrated"]
    assert torch.equal(state["carry"]["twice"], 2 * state["calibration"]["mean"])
    assert state["notes"] == {"read": 3, "cut": 2}
    # what it took is recorded for the part, by what it states
    costs = read_json(study.paths.prepare_costs(model="llama-tiny", method="calibrated", seed=0))
    lengths = [len(row["input_ids"]) for row in prepared.encoded_text(general_text(study), byte_tokenizer())]
    cut = [min(8, length) for length in lengths[:2]]
    counter = Flops(built(study))
    flops = counter.forward(lengths=lengths[:3], predicted=0) + counter.step(lengths=cut, labelled=sum(cut))
    sizes = {kind: (folder / f"calibrated.{kind}.safetensors").stat().st_size for kind in ("calibration", "carry")}
    assert costs["added"] == {
        "calibrated": {
            "tokens": sum(lengths[:3]) + sum(cut),
            "flops": flops,
            "seconds": costs["seconds_prepare"],
            "bytes": sum(sizes.values()),
        }
    }
    assert costs["tokens_prepare"] == costs["added"]["calibrated"]["tokens"]
    stored = {kind: costs[f"bytes_{kind}"] for kind in ("calibration", "importance", "start", "carry")}
    assert stored == {"importance": 0, "start": 0} | sizes


def built(study):
    return shape_of("llama-tiny", study.models["llama-tiny"], Path("nowhere")).build()


def general_text(study):
    return study.paths.data / "general" / "importance.jsonl"


def test_documents_of_a_part_without_a_length_are_refused_where_the_model_is_shorter(study):
    shape = shape_of("llama-tiny", study.models["llama-tiny"], Path("nowhere"))
    refuse_long_documents(study, model="llama-tiny", method="own", shape=shape, longest=512)
    with pytest.raises(UserError, match=r"methods\.own\.replayed reads documents of 513 tokens.*512 positions"):
        refuse_long_documents(study, model="llama-tiny", method="own", shape=shape, longest=513)


def said(**answers):
    """A part that answers as given."""
    functions = {name: (lambda self, answer=answer, **_: answer) for name, answer in answers.items()}
    return dataclasses.dataclass(frozen=True, kw_only=True)(type("Said", (Part,), functions))()


def predict(part, phase="train", **settings):
    return memory.predict(
        phase=phase,
        shape=shape_of("tiny", Model(source="random:llama"), Path("nowhere")),
        parts=(part,),
        settings=TrainSettings(**({"batch": 8, "micro_batch": 4, "length": 64} | settings)),
        checkpoint_dtype=torch.float32,
        compute_dtype=torch.float32,
        device_type="cuda",
    )


def test_memory_of_a_part_is_added_to_the_engines():
    plain = predict(Part())
    for answer, kind, more in (
        (Memory(anchor=1000), "anchor", 1000),
        (Memory(importance=1000), "importance", 1000),
        (Memory(state=1000), "state", 1000),
        (Memory(kept=1000), "scratch", 1000),
        (Memory(forward=1000), "scratch", 1000),  # this step's peak is in its passes
        (Memory(update=1000), "scratch", 0),
        (Memory(optimizer=1000), "scratch", 0),
    ):
        found = predict(said(memory=answer))
        assert found[kind] == plain[kind] + 1000, answer
        assert found["total"] == plain["total"] + more, answer
    update = predict(said(memory=Memory(update=10**9)))
    assert update["total"] - update["weights"] - update["moments"] - update["gradients"] == 10**9
    # the optimizer's own scratch and what is taken beside it are not taken at once
    assert predict(said(memory=Memory(update=10**9, optimizer=10**8)))["total"] == update["total"]


def test_longer_examples_that_a_part_brings_are_planned_for():
    assert predict(said(added=Added(trained=1.0, length=128))) == predict(Part(), length=128)
    assert predict(said(added=Added(trained=1.0, length=16))) == predict(Part())


def test_gradients_wait_for_the_passes_over_rows_that_a_part_adds():
    one_pass, more = predict(Part(), micro_batch=8), predict(said(added=Added(trained=0.1)), micro_batch=8)
    assert one_pass["total"] < more["total"] <= one_pass["total"] + one_pass["gradients"]
    assert predict(said(added=Added(read=1.0)), micro_batch=8) == one_pass


def test_memory_of_a_pass_is_that_of_what_gets_a_gradient():
    kinds = {
        gradients: predict(said(preparation=(Pass(length=64, rows=2, gradients=gradients),)), "prepare")
        for gradients in ("none", "adapted")
    }
    hidden = 2 * 64 * 32 * 4  # all that is left of a forward pass, but for the positions
    assert kinds["none"]["activations"] == pytest.approx(hidden, rel=0.01)
    assert kinds["adapted"]["activations"] > 2 * hidden
    assert predict(said(preparation=()), "prepare")["total"] == 0


def test_what_a_part_adds_to_a_step_is_planned(study, monkeypatch):
    (plain,) = plan.make(study)["cells"]
    monkeypatch.setattr(Replayed, "added", lambda self: Added(trained=self.share, read=2.0), raising=False)
    monkeypatch.setattr(plan._Model, "rate", (1.0, "one FLOP a second"))
    (found,) = plan.make(study)["cells"]
    assert (found["tokens"], found["tokens_added"]) == (plain["tokens"], round(2.25 * plain["tokens"]))
    assert plain["tokens_added"] == 0
    length = study.settings(model="llama-tiny", domain="sums", method="own").length
    rows, labelled = expected.train_rows(study, "sums", length=length)
    step, plain_model = {"lengths": rows, "labelled": labelled}, built(study)
    both, forward = Flops(plain_model).step(**step), Flops(plain_model.requires_grad_(False)).step(**step)
    assert found["seconds_train"] == pytest.approx((1.25 * both + 2.0 * forward) * plain["tokens"] / sum(rows))


def test_a_pass_for_a_statistic_of_the_step_is_planned_where_the_step_is_cut(study, monkeypatch):
    monkeypatch.setattr(Replayed, "added", lambda self: Added(pooled=1.0), raising=False)
    for cut in (False, True):
        monkeypatch.setattr(TrainSettings, "cut", lambda self, processes, cut=cut: cut)
        (found,) = plan.make(study)["cells"]
        assert found["tokens_added"] == cut * found["tokens"] and found["tokens"]
    monkeypatch.undo()
    cuts = [({"batch": 8, "micro_batch": 8}, None), ({"micro_batch": 4}, 1), ({"pack": 64}, 1), ({}, 2)]
    assert [TrainSettings(**settings).cut(processes) for settings, processes in cuts] == [False, True, True, True]


def test_a_law_holds_a_part_to_the_costs_that_it_states(tmp_path, monkeypatch):
    def verdict(kind):
        return judge("costs", Trial(kind=kind, architecture="llama", folder=tmp_path))

    assert verdict(Calibrated).status == "passed"
    unstated = verdict(Replayed)  # it adds a row to every step
    assert unstated.status == "failed" and "it states 0 tokens beside those of the domain" in unstated.text
    monkeypatch.setattr(Calibrated, "preparation", lambda self: (Pass(documents=2, length=8),))
    unstated = verdict(Calibrated)
    assert unstated.status == "failed" and "it states passes over 16 tokens, and reads" in unstated.text


def test_no_setting_of_a_part_is_read_by_name():
    """Nobody above methods/ asks a part for an attribute that only some parts have."""
    of_all = {name for name in dir(Part) if not name.startswith("__")}
    settings = {field.name for part in registry.parts().values() for field in declared(part)} - of_all
    found = []
    for path in [*(HERE / "experiments").rglob("*.py"), *(HERE / "analysis").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "part" and node.attr in settings:
                found.append(f"{path.name}:{node.lineno} part.{node.attr}")
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
                name = node.args[1]
                if isinstance(name, ast.Constant) and name.value in settings - COMMON:
                    found.append(f"{path.name}:{node.lineno} {name.value}")
    assert not found


def test_a_part_that_measures_weights_needs_probe_text():
    raw = copy.deepcopy(DEMO)
    raw["general"]["probe"] = 0
    raw["grid"]["methods"] = ["full", "clipped"]
    raw["methods"]["clipped"] = {"budget": {"nats": 0.1}}
    study = config.build(raw, paths=Paths(study="demo"))
    with pytest.raises(UserError, match="methods.clipped.budget measures weights on general probe text, and .* is 0"):
        ahead.look(study)
