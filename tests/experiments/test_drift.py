"""Drift of a cell's weights: closed forms on tiny random models, and the stage on what is kept of a cell."""

import dataclasses
import json
import math
from hashlib import sha256 as new_sha256

import pytest
import torch
from ruamel.yaml import YAML

from experiments.model import drift, tuned, weights
from experiments.model.base import load_tensors
from experiments.model.random_models import build
from experiments.stages import data, prepare, resolve
from experiments.stages import drift as stage
from experiments.study import cells, config, pipeline
from methods.lora import LoRA
from methods.part import Run
from methods.tools.files import read_json, sha256
from methods.tools.importance import Codes, decode, encode
from methods.tools.stored import load_importance

CELL = cells.Cell("llama-tiny", "sums", "full", 0)


def tensors(architecture):
    model = build(architecture, seed=1)
    return model, {name: p.detach().clone() for name, p in model.named_parameters()}


def by_role(found):
    return {(row["group"], row["kind"]): row for row in found["groups"]}


def noise(base, *, scale=0.01, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return {name: p + scale * torch.randn(p.shape, generator=draw) for name, p in base.items()}


def test_roles_by_structure():
    llama = drift.roles(build("llama", seed=0, tie_word_embeddings=False))
    assert llama["model.layers.1.self_attn.q_proj.weight"] == ("block.1", "q_proj")
    assert llama["model.layers.0.post_attention_layernorm.weight"] == ("block.0", "norm")
    assert llama["model.embed_tokens.weight"] == ("embedding", "embed_tokens")
    assert llama["model.norm.weight"] == ("final_norm", "norm") and llama["lm_head.weight"] == ("head", "lm_head")
    gptj = drift.roles(build("gptj", seed=0))
    assert gptj["transformer.h.0.mlp.fc_in.weight"] == gptj["transformer.h.0.mlp.fc_in.bias"] == ("block.0", "fc_in")
    assert gptj["transformer.h.1.ln_1.bias"] == ("block.1", "norm") and gptj["transformer.ln_f.weight"] == (
        "final_norm",
        "norm",
    )
    assert gptj["transformer.wte.weight"][0] == "embedding" and gptj["lm_head.bias"] == ("head", "lm_head")


def test_two_modules_of_one_name_in_a_block_are_kept_apart():
    from transformers import AutoModelForCausalLM, GPT2Config

    found = drift.roles(AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20)))
    assert {kind for group, kind in found.values() if group == "block.1"} == {
        "c_attn",
        "attn.c_proj",
        "c_fc",
        "mlp.c_proj",
        "norm",
    }


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_movement_by_group_is_that_of_the_tensors(architecture):
    model, base = tensors(architecture)
    final = noise(base)
    still = next(name for name in base if ".0." in name and name.endswith("v_proj.weight"))
    final[still] = base[still]
    found = drift.measure(base=base, tuned=final.items(), roles=drift.roles(model))
    moved = {name: (final[name].double() - base[name].double()).norm().item() for name in base}
    assert found["overall"]["distance"] == pytest.approx(math.hypot(*moved.values()), rel=1e-5)
    size = math.hypot(*(p.double().norm() for p in base.values()))
    assert found["overall"]["relative"] == pytest.approx(math.hypot(*moved.values()) / size, rel=1e-5)
    rows = by_role(found)
    assert (
        sum(row["entries"] for row in found["groups"])
        == found["overall"]["entries"]
        == sum(p.numel() for p in base.values())
    )
    assert rows["block.0", "v_proj"] == {
        "group": "block.0",
        "kind": "v_proj",
        "entries": base[still].numel(),
        "matrices": 0,
        "distance": 0.0,
        "relative": 0.0,
        "changed": 0.0,
        "base_norm": pytest.approx(base[still].double().norm().item(), rel=1e-5),
        "effective_rank": None,
        "overlap": None,
        "overlap_within": None,
        "top_share": None,
    }
    key = next(name for name in base if ".1." in name and name.endswith("q_proj.weight"))
    query = rows["block.1", "q_proj"]
    assert query["distance"] == pytest.approx(moved[key], rel=1e-5) and query["changed"] == pytest.approx(1, abs=0.01)
    assert query["effective_rank"] == pytest.approx(drift.effective_rank(final[key] - base[key]), rel=1e-4)
    norms = [name for name, role in drift.roles(model).items() if role == ("block.1", "norm")]
    assert rows["block.1", "norm"]["distance"] == pytest.approx(math.hypot(*(moved[n] for n in norms)), rel=1e-5)
    assert rows["block.1", "norm"]["effective_rank"] is None
    assert found["groups"][0]["group"] == "embedding" and found["groups"][0]["effective_rank"] is None


def test_a_base_of_zeros_has_no_relative_movement():
    found = drift.measure(base={"b": torch.zeros(4)}, tuned=[("b", torch.tensor([0.0, 3.0, 0.0, 4.0]))], roles={})
    assert found["groups"][0]["group"] == "other" and found["overall"]["relative"] is None
    assert (found["overall"]["distance"], found["overall"]["changed"]) == (5.0, 0.5)


def test_the_ranks_of_large_matrices_are_estimated_and_named(monkeypatch):
    model, base = tensors("llama")
    exact = drift.measure(base=base, tuned=noise(base).items(), roles=drift.roles(model))
    assert "rank_estimated" not in exact
    monkeypatch.setattr(drift, "EXACT", 31)
    found = drift.measure(base=base, tuned=noise(base).items(), roles=drift.roles(model))
    assert "model.layers.0.mlp.up_proj.weight" in found["rank_estimated"]
    assert not {"model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"} & {*found["rank_estimated"]}
    exact, found = by_role(exact), by_role(found)
    assert exact.keys() == found.keys()
    for role, row in found.items():  # k and v are 16 × 32, and as exact as before
        rank = exact[role]["effective_rank"]
        assert row["effective_rank"] == (rank and pytest.approx(rank, rel=0.02))
        assert row | {"effective_rank": 0} == exact[role] | {"effective_rank": 0}


@pytest.mark.parametrize("coded", [True, False])
def test_equal_importance_says_that_movement_ignored_it(coded):
    model, base = tensors("llama")
    importance = {name: torch.full_like(p, 0.25) for name, p in base.items()}
    if coded:
        importance = {name: encode(f) for name, f in importance.items()}
    found = drift.measure(base=base, tuned=noise(base).items(), roles=drift.roles(model), importance=importance)
    for row in (found["overall"], *found["groups"]):
        assert (row["overlap"], row["overlap_within"], row["top_share"]) == pytest.approx((1.0, 1.0, 0.1), rel=1e-5)


def test_movement_in_important_weights_and_away_from_them():
    base = {"a": torch.zeros(100), "b": torch.zeros(100)}
    importance = {"a": torch.cat([torch.full((20,), 9.0), torch.full((80,), 1.0)]), "b": torch.full((100,), 1.0)}
    towards = {"a": torch.cat([torch.ones(20), torch.zeros(80)]), "b": torch.zeros(100)}
    away = {"a": torch.cat([torch.zeros(20), torch.ones(80)]), "b": torch.ones(100)}
    mean, mean_a = (20 * 9 + 180) / 200, (20 * 9 + 80) / 100
    found = drift.measure(base=base, tuned=towards.items(), roles={}, importance=importance)["overall"]
    assert (found["overlap"], found["overlap_within"], found["top_share"]) == pytest.approx(
        (9 / mean, 9 / mean_a, 1.0), rel=1e-5
    )
    found = drift.measure(base=base, tuned=away.items(), roles={}, importance=importance)["overall"]
    expected = 180 / (80 * mean_a + 100 * 1.0)
    assert (found["overlap"], found["overlap_within"], found["top_share"]) == pytest.approx(
        (1 / mean, expected, 0.0), rel=1e-5
    )
    # of 200 entries the 20 most important are those of `a`; where 10 more entries belong to the 10 %, a part of the
    # level 1 counts
    wider = drift.measure(
        base=base | {"c": torch.zeros(100)},
        tuned=(away | {"c": torch.zeros(100)}).items(),
        roles={},
        importance=importance | {"c": torch.full((100,), 1.0)},
    )["overall"]
    assert wider["top_share"] == pytest.approx(10 / 280, rel=1e-5)
    partly = drift.measure(base=base, tuned=away.items(), roles={}, importance={"b": importance["b"]})["overall"]
    assert partly["overlap"] == pytest.approx(1.0, rel=1e-5) and partly["distance"] == pytest.approx(
        math.sqrt(180), rel=1e-5
    )


def small(tmp_path, **grid):
    """The demo study with its folders in tmp_path, and its base model in bf16."""
    study = config.load("demo")
    changed = {"paths": dataclasses.replace(study.paths, root=tmp_path), "grid": study.grid.model_copy(update=grid)}
    study = study.model_copy(update=changed)
    block = study.models["llama-tiny"].model_copy(update={"dtype": "bfloat16"})
    weights.materialise(name="llama-tiny", block=block, packages={}, out_dir=study.paths.model("llama-tiny"))
    return study


def importance_of(path):
    return [
        (
            name,
            decode(kept.codes, low=kept.low, step=kept.step, dtype=torch.float64) if isinstance(kept, Codes) else kept,
        )
        for name, kept in load_importance(path).items()
    ]


def test_stage_of_a_difference_with_and_without_an_importance(tmp_path, capsys):
    study = small(tmp_path, methods=["full"])
    folder, out = study.paths.model("llama-tiny"), study.paths.weights(CELL)
    base = load_tensors(folder)
    digest = tuned.keep(out, folder=folder, base=base, final=noise({name: base[name].float() for name in base}))
    stage.main(study, CELL)
    found = read_json(study.paths.run(CELL) / "drift.json")
    assert found["weights_sha256"] == digest and found["base_sha256"] == read_json(folder / "base.json")["sha256"]
    assert (
        found["reference"] is None and found["overall"]["overlap"] is None and found["overall"]["effective_rank"] > 10
    )

    study = small(tmp_path)
    data.main(study)
    capsys.readouterr()
    stage.main(study, CELL)  # before `prepare`: it computes the importance itself
    again = read_json(study.paths.run(CELL) / "drift.json")
    prepare.main(study, model="llama-tiny", method="ewc", seed=0, cell=CELL)
    costs = read_json(study.paths.prepare_costs(model="llama-tiny", method="ewc", seed=0))
    path = study.paths.prepared(model="llama-tiny", method="ewc", seed=0) / "ewc.importance.safetensors"
    assert costs["reused"] is True and again["reference"].pop("sha256") == sha256(path)
    values = {name: decoded.double() for name, decoded in importance_of(path)}
    entries = sum(base[name].numel() for name in base)
    mean = sum(value.sum() for value in values.values()).item() / entries
    settings = resolve.text(resolve.prepare(study, "llama-tiny", "ewc"))
    assert again["reference"] == {
        "method": "ewc",
        "part": "ewc",
        "entries": entries,
        "mean": pytest.approx(mean, rel=1e-3),
        "settings_sha256": new_sha256(settings.encode()).hexdigest(),
    }
    changes = {
        name: (p.double() - base[name].double()).square() for name, p in tuned.tensors(out, folder=folder)[0].items()
    }
    weighted = sum((values[name] * changes[name]).sum() for name in base).item()
    assert again["overall"]["overlap"] == pytest.approx(
        weighted / sum(change.sum() for change in changes.values()).item() / mean, rel=1e-4
    )
    assert {k: v for k, v in again["overall"].items() if v != found["overall"][k]}.keys() == {
        "overlap",
        "overlap_within",
        "top_share",
    }
    text = (study.paths.run(CELL) / "drift.json").read_text()
    stage.main(study, CELL)
    assert (study.paths.run(CELL) / "drift.json").read_text() == text


def test_stage_of_an_adapter(tmp_path, monkeypatch):
    study = small(tmp_path, methods=["lora"])
    folder, out = study.paths.model("llama-tiny"), study.paths.weights(CELL)
    part = LoRA(rank=2, targets=("q_proj",))
    base = load_tensors(folder)
    model = part.adapt(weights.load_model(folder, dtype=torch.float32), seed=0)
    run = Run(
        model=model,
        weights={n: p for n, p in model.named_parameters() if p.requires_grad},
        base=base,
        seed=0,
        device="cpu",
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in run.weights.values():
            p.add_(0.5 * torch.randn(p.shape, generator=draw))
    part.save(run=run, state={}, folder=out)
    tuned.keep(out, folder=folder, base=base, final=part.finish(run=run, state={}, final={}))
    assert json.loads((out / "weights.json").read_text())["kind"] == "adapter"
    stage.main(study, CELL)
    found = read_json(study.paths.run(CELL) / "drift.json")
    assert {(r["group"], r["kind"]) for r in found["groups"] if r["distance"]} == {
        ("block.0", "q_proj"),
        ("block.1", "q_proj"),
    }
    assert (
        1 < by_role(found)["block.0", "q_proj"]["effective_rank"] < 2.5
    )  # of rank 2, and rounding to bf16 moves a little in all directions
    monkeypatch.setattr(drift, "EXACT", 1)
    stage.main(study, CELL)
    large = read_json(study.paths.run(CELL) / "drift.json")
    a, b = (tuned.factors(out)["model.layers.0.self_attn.q_proj.weight"][part].double() for part in "ab")
    singular = torch.linalg.svdvals(b @ a)[:2]
    share = singular / singular.sum()
    expected = math.exp(-(share * share.log()).sum())
    assert by_role(large)["block.0", "q_proj"]["effective_rank"] == pytest.approx(expected, rel=1e-5)
    assert "rank_estimated" not in large  # it is that of the adapter's update


def test_reference_is_the_first_importance_of_the_whole_model():
    paper, demo = config.load("paper"), config.load("demo")
    assert drift.reference(paper) == drift.reference(demo) == ("ewc", "ewc")

    def with_grid(*methods):
        return paper.model_copy(update={"grid": paper.grid.model_copy(update={"methods": list(methods)})})

    assert (
        drift.reference(with_grid("full", "lora", "mofo", "hierarchical")) is None
    )  # Ω of an adapter's matrices alone
    assert drift.reference(with_grid("hierarchical", "ewc-lora", "ewc")) == ("ewc-lora", "ewc")
    assert not [path for path in YAML().load(pipeline.rendered(paper))["stages"]["drift"]["deps"] if "prepared" in path]
