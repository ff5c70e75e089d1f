"""An adapter of peft's own script in a study: from its folder to the report by YAML alone."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from analysis.load import record
from experiments.model import weights
from experiments.model.random_models import byte_tokenizer
from experiments.stages import collect, data, evaluate, model, prepare, resolve, train
from experiments.study import ahead
from experiments.study.cells import Cell
from methods.errors import UserError
from methods.tools.files import read_json
from tests.experiments.test_ahead import study


def test_an_adapter_goes_through_the_stages_like_its_merged_model(tmp_path, capsys):
    methods = {name: {"given": {"path": str(tmp_path / name)}} for name in ("theirs", "merged")}
    found = study(tmp_path / "root", ("methods", methods), ("grid/methods", list(methods)))
    model.main(found, model="llama-tiny")
    base = weights.load_model(found.paths.model("llama-tiny"), dtype="float32")
    base.name_or_path = "owner/another"
    with torch.random.fork_rng():
        torch.manual_seed(4)
        made = LoraConfig(r=3, task_type="CAUSAL_LM", init_lora_weights=False, use_rslora=True)
        adapted = get_peft_model(base, made)
    adapted.save_pretrained(tmp_path / "theirs")
    byte_tokenizer().save_pretrained(tmp_path / "theirs")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")

    data.main(found)
    resolve.main(found)
    assert re.search(
        r"methods.theirs.given: .*theirs was made for owner/another, .* merged into llama-tiny", capsys.readouterr().out
    )
    evaluate.base(found, model="llama-tiny")
    metrics, scores = {}, {}
    for method in methods:
        cell = Cell("llama-tiny", "sums", method, 0)
        prepare.main(found, model="llama-tiny", method=method, seed=0, cell=cell)
        train.main(found, cell)
        evaluate.main(found, cell)
        collect.main(found, cell)
        metrics[method] = record(found.paths.run(cell))
        scores[method] = (found.paths.run(cell) / "scores.json").read_bytes()
    assert metrics["theirs"]["weights_sha256"] == metrics["merged"]["weights_sha256"]
    assert scores["theirs"] == scores["merged"] and metrics["theirs"]["general_kl"] > 0
    assert metrics["theirs"]["cost_known"] is False and metrics["theirs"]["seconds_train"] is None
    trained = read_json(found.paths.run(Cell("llama-tiny", "sums", "theirs", 0)) / "train.json")
    assert trained["parts"]["given"]["adapter_of"] == "owner/another"

    before = resolve.contents(found)  # an adapter that is trained on makes its cell stale, and no other
    tensors = load_file(tmp_path / "theirs/adapter_model.safetensors")
    save_file({n: 2 * t for n, t in tensors.items()}, tmp_path / "theirs/adapter_model.safetensors")
    after = resolve.contents(found)
    assert {name for name in before if before[name] != after[name]} == {"train/llama-tiny/sums/theirs.json"}

    config = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    (tmp_path / "theirs/adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    with pytest.raises(UserError, match="methods.theirs.given.path: .* is an adapter for SEQ_CLS"):
        ahead.look(found)
