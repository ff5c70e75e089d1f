"""What a study will write, and the refusal where the disk has too little room for it."""

import io
import json
from collections import namedtuple

import pytest
from ruamel.yaml import YAML

from experiments.commands import plan, repro
from experiments.data import expected
from experiments.model import weights
from experiments.study import config, room
from experiments.study.paths import HERE
from methods.errors import UserError

FULL = HERE / "experiments" / "studies" / "full-size" / "params.yaml"
PARAMETERS = {"gptj": 6_050_882_784, "llama": 8_030_261_248}
GB = 10**9


def study(tmp_path, change=lambda raw: None):
    raw = YAML(typ="safe").load(FULL)
    for rows in (raw["general"], raw["tasks"]["colours"], raw["domains"]["answers"]):
        rows["rows"]["jsonl"] = str(HERE / rows["rows"]["jsonl"])
    change(raw)
    out = io.StringIO()
    YAML().dump(raw, out)
    (tmp_path / "params.yaml").write_text(out.getvalue())
    return config.load(root=tmp_path)


def with_free(monkeypatch, free):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(free))


def test_full_size_fits_into_40_gb_and_24_gb_of_memory(tmp_path, monkeypatch, capsys):
    with_free(monkeypatch, 40 * GB)
    plan.main(study(tmp_path), as_json=True)
    made = json.loads(capsys.readouterr().out)
    assert "models that are not here yet: 26.23 GiB of disk" in plan.text(made)
    assert made["disk"]["needed"]["models"] == 2 * sum(PARAMETERS.values())
    # in the pipeline, and in the local store
    assert made["disk"]["needed"]["preparations"] == 2 * sum(cell["prepared_bytes"] for cell in made["cells"])
    assert made["total"]["peak_memory_bytes"] < 20 * GB
    for cell in made["cells"]:
        model, _, method, _ = cell["cell"].split("/")
        in_and_out = {"gptj": 28 * (4096 + 4096), "llama": 32 * (4096 + 1024)}[model]
        assert cell["disk_bytes"] == 4 * 8 * in_and_out  # an adapter of rank 8 in float32
        assert (cell["prepared_bytes"] > 0) == (method == "hierarchical")
        # 4 + 4 rows to score and 4 texts, of which a token is a byte: not 250,000
        assert cell["tokens_score"] == 8 * expected.ASKED + 4 * expected.DOCUMENT
        assert cell["tokens"] == 10 * 120  # until the rows are here, half of `length` each
    made["disk"]["free"] = 28 * GB
    monkeypatch.setattr(plan, "make", lambda *_, **__: made)
    with pytest.raises(
        UserError, match=r"too little disk: 27\.\d GiB would be written \(models 26.2 GiB.* 26.1 GiB are"
    ):
        plan.main(study(tmp_path), as_json=True)
    assert not (tmp_path / "work" / "models").exists()


def test_a_study_without_room_for_its_models_is_not_begun(tmp_path, monkeypatch):
    with_free(monkeypatch, 26 * GB)  # enough for either of them
    monkeypatch.setattr(repro, "committed", lambda path: False)
    with pytest.raises(
        UserError, match=r"too little disk: 26.2 GiB would be written \(models 26.2 GiB\), and 24.2 GiB"
    ):
        repro.main(study(tmp_path))
    assert not (tmp_path / "work" / "models").exists()


@pytest.mark.thorough
def test_a_plan_for_another_machine_is_not_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_is_here", lambda device: device.type == "cpu")
    with_free(monkeypatch, GB)
    plan.main(study(tmp_path, lambda raw: raw.update(device="cuda")), as_json=True)


def test_models_that_are_here_are_not_counted(tmp_path):
    def tiny(raw):
        raw["models"]["gptj"]["config"] = raw["models"]["llama"]["config"] = {"vocab_size": 300}

    here = study(tmp_path, tiny)
    sizes = {name: plan._Model(study=here, name=name).bytes for name in here.grid.models}
    for name in here.grid.models:
        assert room.of(here, models=sizes, prepared=3, cells=4).total == sum(sizes.values()) + 7
        weights.materialise(name=name, block=here.models[name], packages={}, out_dir=here.paths.model(name))
        assert sizes.pop(name) == sum(p.nbytes for p in weights.load_tensors(here.paths.model(name)).values())
    assert room.of(here, models=dict.fromkeys(here.grid.models, 5), prepared=3, cells=4).total == 7


def test_rows_to_score_are_those_that_are_asked_for(tmp_path):
    def count(change):
        return expected.scored(study(tmp_path, change), "answers", characters=1.0)

    before = count(lambda raw: None)
    assert count(lambda raw: raw["tasks"]["colours"].update(test=14)) == before + 10 * expected.ASKED
    assert count(lambda raw: raw["domains"]["answers"]["split"].update(test=14)) == before + 10 * expected.ASKED
    assert count(lambda raw: raw["general"].update(test=14)) == before + 10 * expected.DOCUMENT
    whole = count(lambda raw: raw["tasks"]["colours"].update(test="all"))
    assert whole == before - 4 * expected.ASKED + expected.SCORED
    assert count(lambda raw: raw["domains"]["answers"].pop("retention")) == before - 4 * expected.ASKED
