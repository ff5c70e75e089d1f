"""Cells that differ in `finish` alone: one training kept in the local store, and `measure`."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from evaluation.probe import load_probes, probe
from experiments.commands import plan, tune
from experiments.model import tuned
from experiments.model.measure import Measure
from experiments.model.random_models import byte_tokenizer
from experiments.model.weights import load_model
from experiments.stages import data, model, prepare, resolve, train
from experiments.study.cells import Cell
from methods.part import REGISTERED, Part, register, setting
from methods.tools.files import read_json
from methods.tools.process_group import Shards
from tests.experiments.test_prepare import load


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study in whose grid three methods begin from one training, and one does not."""

    @register(key="scaled", title="Scaled", paper="", line="Multiply every trained tensor.")
    @dataclass(frozen=True, kw_only=True)
    class Scaled(Part):
        by: float = setting(1.0)

        def finish(self, *, run, state, final, measure):
            state["probe"] = measure(final)
            assert not run.weights and next(run.model.parameters()).is_meta
            return {name: self.by * tensor for name, tensor in final.items()}

        def report(self, *, run, state):
            return state["probe"]

    root = tmp_path_factory.mktemp("study")
    study = load(root, methods())
    model.main(study, model="llama-tiny")
    data.main(study)
    for method in study.grid.methods:
        prepare.main(study, model="llama-tiny", method=method, seed=0, cell=cell(method))
    yield root
    del REGISTERED["scaled"]


def methods(**blocks):
    """What makes these blocks the study's methods."""
    blocks = blocks or {
        "full": {},
        "half": {"scaled": {"by": 0.5}},
        "third": {"scaled": {"by": 1 / 3}},
        "lora": {"lora": {"rank": 2}},
    }

    def change(raw):
        raw["methods"] = blocks
        raw["grid"]["methods"] = list(blocks)

    return change


def cell(method):
    return Cell("llama-tiny", "sums", method, 0)


def run(root, method, change=methods()):
    """A cell's train.json."""
    study = load(root, change)
    train.main(study, cell(method))
    return read_json(study.paths.run(cell(method)) / "train.json")


def kept(root):
    return sorted((root / "work/local/trained/default/llama-tiny/sums/seed0").glob("*/manifest.json"))


def test_cells_that_differ_in_finish_alone_train_once(made):
    full, half, third = (run(made, method) for method in ("full", "half", "third"))
    assert (full["training_reused"], half["training_reused"], third["training_reused"]) == (False, True, True)
    same = ("seconds_train", "seconds_begin", "tokens_trained", "flops", "steps", "bytes_optimizer_state")
    assert full["added"] == {} and half["added"]["scaled"]["tokens"] > 0 and half["added"]["scaled"]["seconds"] > 0
    assert [half[key] for key in same] == [third[key] for key in same] == [full[key] for key in same]
    curves = {(made / "results/runs" / cell(m).name / "curve.csv").read_text() for m in ("full", "half", "third")}
    assert len(curves) == 1
    (manifest,) = kept(made)
    trained = load_file(manifest.parent / "out" / "weights.safetensors")
    study = load(made, methods())
    found, _ = tuned.tensors(study.paths.weights(cell("third")), folder=study.paths.model("llama-tiny"))
    for name, tensor in trained.items():
        assert torch.equal(found[name], (tensor / 3)) or torch.allclose(found[name], tensor / 3, rtol=1e-7)
    merged = run(made, "lora")
    assert kept(made) == [manifest]  # no other cell could begin from it
    # probes during training are not of the weights that are kept where a part changes these, beyond merging
    assert full["finished"] is None and merged["finished"] is None
    delivered = load_model(study.paths.model("llama-tiny"), dtype=torch.float32)
    tuned.fill(delivered, found.items())
    sets = load_probes(study.paths.data / "train" / "sums" / "probe", byte_tokenizer())
    assert third["finished"] == {"parts": ["scaled"], "probe": pytest.approx(probe(model=delivered, sets=sets))}


def test_what_is_kept_is_the_same_as_what_is_trained_again(made):
    reused = run(made, "half")
    for manifest in kept(made):
        weights = manifest.parent / "out" / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")  # damaged
    again = run(made, "half")
    assert (reused["training_reused"], again["training_reused"]) == (True, False)
    assert again["weights_sha256"] == reused["weights_sha256"]
    assert again["parts"] == reused["parts"]  # what was measured, too


def test_other_settings_train_again_and_what_no_cell_needs_is_removed(made):
    run(made, "half")
    before = kept(made)

    def slower(raw):
        methods()(raw)
        raw["train"]["learning_rate"] = 5.0e-4

    assert run(made, "half", slower)["training_reused"] is False
    assert run(made, "third", slower)["training_reused"] is True
    assert len(kept(made)) == 2
    resolve.main(load(made, slower))  # which DVC runs where params.yaml changed
    assert len(kept(made)) == 1 and kept(made) != before
    resolve.main(load(made, methods(full={}, lora={"lora": {"rank": 2}})))
    assert kept(made) == []


def test_a_study_without_such_cells_keeps_nothing(made):
    for manifest in kept(made):
        manifest.unlink()
    run(made, "full", methods(full={}, lora={"lora": {"rank": 2}}))
    assert kept(made) == []


def test_a_full_disk_loses_no_training(made, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    weights = run(made, "half")["weights_sha256"]
    for manifest in kept(made):
        manifest.unlink()
    monkeypatch.setattr("experiments.model.trained.save_file", full)
    assert run(made, "half")["weights_sha256"] == weights
    assert "not kept for other cells: [Errno 28] No space left on device" in capsys.readouterr().err
    assert kept(made) == []


def test_the_plan_counts_a_training_once(made):
    def fresh(raw):
        methods()(raw)
        raw["train"]["epochs"] = 1.0e5  # seconds are rounded

    planned = {c["cell"].split("/")[2]: c for c in plan.make(load(made, fresh))["cells"]}
    assert [planned[m]["training_reused"] for m in ("full", "half", "third", "lora")] == [False, True, True, False]
    assert planned["full"]["seconds_train"] > 0 == planned["half"]["seconds_train"] == planned["third"]["seconds_train"]
    assert planned["full"]["tokens"] == planned["half"]["tokens"]  # what stands behind the weights
    folder = load(made, fresh).paths.model("llama-tiny")
    entries = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert planned["full"]["disk_bytes"] - planned["half"]["disk_bytes"] == 4 * entries


def test_a_trial_is_judged_by_the_finished_weights(made, capsys):
    def change(raw):
        methods()(raw)
        raw["tune"] = {"methods": {"half": {"scaled.by": [0.0, 1.0]}, "full": {"train.learning_rate": [1e-3, 2e-3]}}}

    study = load(made, change)
    tune.main(study, ["half", "full"])
    record = read_json(study.paths.tuning("llama-tiny", "sums"))
    trials = {(t["method"], *t["settings"].values()): t for t in record["trials"]}
    assert trials["half", 1.0]["perplexity"] == trials["full", 1e-3]["perplexity"]
    assert trials["half", 0.0]["perplexity"] == pytest.approx(258, rel=1e-5)  # zeros: any of the 258 tokens


def test_measure_is_what_the_whole_models_say(made):
    study = load(made, methods())
    folder, probes = study.paths.model("llama-tiny"), study.paths.data / "train" / "sums" / "probe"
    before, after = (load_model(folder, dtype=torch.float32) for _ in range(2))
    weights = {
        name: p.detach() + 0.03 * torch.randn(p.shape, generator=torch.manual_seed(1))
        for name, p in after.named_parameters()
    }
    after.load_state_dict(weights, strict=False)
    measure = Measure(
        folder=folder,
        probes=probes,
        base=dict(before.named_parameters()),
        dtype=torch.float32,
        device=torch.device("cpu"),
        shards=Shards(),
    )
    costs = []
    nll = kl = count = read = 0
    tokenizer = byte_tokenizer()
    with torch.no_grad():
        for line in (probes / "general.jsonl").read_text().splitlines():
            ids = [
                tokenizer.bos_token_id or tokenizer.eos_token_id,
                *tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids,
            ]
            q, p = (torch.log_softmax(m(torch.tensor([ids])).logits[0, :-1].double(), -1) for m in (before, after))
            nll -= p[range(len(ids) - 1), ids[1:]].sum()
            kl += (q.exp() * (q - p)).sum()
            count, read = count + len(ids) - 1, read + len(ids)
    found = measure(weights, charge=lambda **cost: costs.append(cost))
    assert found["nll"] == pytest.approx(float(nll / count), rel=1e-6)
    assert found["kl"] == pytest.approx(float(kl / count), rel=1e-4) and found["kl"] > 0
    assert costs[0]["tokens"] == 2 * read and costs[0]["flops"] > 0
    assert measure({})["kl"] == 0.0  # the base itself
    measure(weights, charge=lambda **cost: costs.append(cost))
    assert costs[1] == {"tokens": read, "flops": costs[0]["flops"] / 2}  # the base is run once
