"""The plan: models that are nowhere here, times from FLOPs, memory by kind."""

import copy
import io
import json
from types import SimpleNamespace

import pytest
import torch
from ruamel.yaml import YAML

from experiments.commands import plan
from experiments.model.shape import shape_of
from experiments.study import config
from experiments.study.cells import Cell
from experiments.study.paths import HERE
from experiments.study.schema import Model
from experiments.training import hardware, memory
from experiments.training.flops import Flops
from methods.errors import UserError

DEMO = YAML(typ="safe").load(HERE / "experiments" / "studies" / "demo" / "params.yaml")
DEFAULT = YAML(typ="safe").load(HERE / "params.yaml")
ANSWER, QUESTION = 10, 50  # characters, of which the tokenizer of random models makes a token each


def study(tmp_path, **changes):
    raw = copy.deepcopy(DEMO)
    raw["grid"] |= {"methods": ["full", "lora", "ewc"]} | changes.pop("grid", {})
    raw["models"] = changes.pop(
        "models", raw["models"] | {name: DEFAULT["models"][name] for name in ("gptj-6b", "llama3-8b")}
    )
    raw |= changes
    out = io.StringIO()
    YAML().dump(raw, out)
    (tmp_path / "params.yaml").write_text(out.getvalue())
    return config.load(root=tmp_path)


def with_rows(tmp_path, count=6):
    folder = tmp_path / "work" / "data" / "train" / "sums"
    folder.mkdir(parents=True)
    row = {"context": "q" * QUESTION, "choices": ["a", "b" * ANSWER], "gold": 1}
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(count)))


def test_the_target_models_are_planned_without_being_fetched(tmp_path):
    adapters = {
        "gptj-6b": 28 * 2 * 4 * (4096 + 4096),
        "llama3-8b": 32 * 4 * ((4096 + 4096) + (4096 + 1024)),
    }  # rank 4 on q and v
    made = plan.make(study(tmp_path, grid={"models": ["gptj-6b", "llama3-8b"]}))
    cells = {c["cell"]: c for c in made["cells"]}
    available = made["total"]["available_memory_bytes"]
    for model, parameters in (("gptj-6b", 6_050_882_784), ("llama3-8b", 8_030_261_248)):
        full, lora, ewc = (cells[f"{model}/sums/{method}/seed0"] for method in ("full", "lora", "ewc"))
        assert full["disk_bytes"] == ewc["disk_bytes"] == parameters // 2  # 4 bits a weight
        assert lora["disk_bytes"] == 4 * adapters[model]
        assert full["memory"]["train"]["moments"] == 8 * parameters
        assert full["memory_bytes"] == full["memory"]["train"]["total"] > 12 * parameters
        assert ewc["memory"]["prepare"]["total"] > 6 * parameters and full["memory"]["prepare"]["total"] == 0
        assert ewc["memory_bytes"] > full["memory_bytes"] > lora["memory_bytes"] > 2 * parameters
        assert full["seconds_train"] > lora["seconds_train"] > 0
        assert ewc["seconds_prepare"] > 0 == full["seconds_prepare"]
        for cell in (full, lora, ewc):
            assert cell["fits"] == (cell["memory_bytes"] <= available)
    assert made["total"]["too_large"] == sum(not c["fits"] for c in cells.values())
    assert made["total"]["peak_memory_bytes"] == max(c["memory_bytes"] for c in cells.values())
    if not torch.cuda.is_available():
        kinds = cells["gptj-6b/sums/lora/seed0"]["memory"]["train"]
        counted = kinds["total"] + int(0.6 * 2**30) + kinds["activations"] + kinds["logits"]
        assert cells["gptj-6b/sums/lora/seed0"]["resident_bytes"] == counted
        most = max(c["resident_bytes"] for c in cells.values())
        assert made["total"]["resident_bytes"] == most > made["total"]["peak_memory_bytes"]
        assert f"a process on the CPU takes about {most / 2**30:.2f} GiB" in plan.text(made)
    json.dumps(made)


@pytest.mark.parametrize("name", ["", "paper", "mofo-math"])
def test_stated_sizes_are_those_of_the_architecture(name):
    models = YAML(typ="safe").load((HERE / "experiments" / "studies" / name if name else HERE) / "params.yaml")[
        "models"
    ]
    described = {model: block for model, block in models.items() if "architecture" in block}
    assert described
    for model, block in described.items():
        shape = shape_of(model, Model(**block), HERE / "nowhere")
        assert shape.parameters == block["parameters"], model
        assert (shape.config.num_hidden_layers, shape.config.hidden_size) == (block["layers"], block["width"]), model


def test_training_time_is_flops_over_the_rate_of_earlier_cells(tmp_path):
    with_rows(tmp_path, count=6)
    here = study(tmp_path, train={"batch": 8, "micro_batch": 8, "length": 128, "epochs": 2.0})
    shape = shape_of("llama-tiny", here.models["llama-tiny"], tmp_path / "nowhere")
    earlier = {
        "cell": "llama-tiny/sums/full/seed0",
        "hardware": hardware.describe(torch.device("cpu")),
        "seconds_train": 4.0,
        "tokens_trained": 10,
        "flops": 8e6,
    }
    path = tmp_path / "results" / "runs" / "llama-tiny" / "sums" / "full" / "seed0" / "train.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(earlier))
    made = plan.make(here)
    assert made["basis"]["llama-tiny"] == "1 earlier cells on this machine"
    for cell, method in zip(made["cells"], ("full", "lora", "ewc")):
        model = shape.build(parts=memory.adapting(here.methods[method].parts))
        flops = 2 * Flops(model).step(lengths=[60] * 6, labelled=60)
        assert cell["seconds_train"] == pytest.approx(flops / 2e6, abs=0.06)
        assert cell["tokens"] == 2 * 6 * 60
    path.write_text(json.dumps(earlier | {"hardware": {"cpu": "another"}}))
    assert plan.make(here)["basis"]["llama-tiny"].endswith("TFLOP/s (matrix product measured here)")
    path.write_text(json.dumps(earlier)[:40])  # cut off
    assert plan.make(here)["basis"]["llama-tiny"].endswith("TFLOP/s (matrix product measured here)")
    path.write_text(
        json.dumps({k: v for k, v in earlier.items() if k != "flops"})
    )  # as records were before they had FLOPs
    flops = Flops(shape.build())
    rate = 10 * flops.step(lengths=(1,), labelled=0) / 4.0
    assert plan.make(here)["cells"][0]["seconds_train"] == pytest.approx(
        2 * flops.step(lengths=[60] * 6, labelled=60) / rate, rel=0.01
    )


def test_a_fraction_of_an_epoch_is_planned_as_it_is_trained(tmp_path):
    with_rows(tmp_path, count=6)  # in batches of 4 two an epoch, in batches of 8 one
    for batch, epochs, trained in ((4, 1.4, 1.5), (4, 1.2, 1.0), (8, 1.2, 1.0), (8, 0.1, 1.0)):
        settings = {"batch": batch, "micro_batch": 4, "length": 128, "epochs": epochs}
        made = plan.make(study(tmp_path, train=settings, grid={"methods": ["full"]}))
        assert made["cells"][0]["tokens"] == trained * 6 * 60


def test_long_rows_are_cut_and_all_rows_are_a_guess(tmp_path):
    with_rows(tmp_path, count=3)
    short = study(tmp_path, train={"batch": 8, "micro_batch": 8, "length": 32, "epochs": 1.0})
    assert plan.make(short)["cells"][0]["tokens"] == 3 * 32
    domains = copy.deepcopy(DEMO["domains"])
    domains["sums"]["split"]["train"] = "all"
    (tmp_path / "elsewhere").mkdir()
    unknown = study(
        tmp_path / "elsewhere", train={"batch": 8, "micro_batch": 8, "length": 32, "epochs": 1.0}, domains=domains
    )
    assert plan.make(unknown)["cells"][0]["tokens"] == plan.expected.ROWS * 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_study_on_cuda_is_planned_where_there_is_none(tmp_path):
    made = plan.make(study(tmp_path, device="cuda", grid={"models": ["llama3-8b"], "methods": ["full"]}))
    assert (
        made["basis"]["llama3-8b"] == "40% of 989.00 TFLOP/s (data sheet of NVIDIA H200; there is no CUDA device here)"
    )
    (cell,) = made["cells"]
    assert cell["fits"] is None and made["total"]["available_memory_bytes"] is None
    assert cell["memory"]["train"]["weights"] == 2 * 8_030_261_248  # bf16, as a GPU computes
    assert "free here" not in plan.text(made) and made["total"]["resident_bytes"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_processes_share_memory_and_time(tmp_path):
    block = DEFAULT["models"]["llama3-8b"]
    cells = []
    for model in (block, block | {"processes": 4}):
        made = plan.make(
            study(tmp_path, device="cuda", grid={"models": ["big"], "methods": ["full"]}, models={"big": model})
        )
        cells += made["cells"]
    alone, shared = cells
    assert made["basis"]["big"].startswith("40% of 4 times 989.00 TFLOP/s")
    assert shared["seconds_train"] == pytest.approx(alone["seconds_train"] / 4, abs=0.1)
    assert shared["memory"]["train"]["gradients"] == alone["memory"]["train"]["gradients"] // 4


def test_text_marks_what_does_not_fit(tmp_path):
    made = plan.make(study(tmp_path))
    assert "does not fit" not in plan.text(made)
    made["cells"][1]["fits"], made["total"]["too_large"] = False, 1
    lines = plan.text(made).splitlines()
    assert [line.endswith("does not fit") for line in lines[3:6]] == [False, True, False]
    assert "1 cells do not fit here" in plan.text(made)
    assert "free here" in plan.text(made)


def test_disk_of_thirty_cells_of_full_size(tmp_path, monkeypatch):
    # memory and time have tests of their own
    monkeypatch.setattr(plan.memory, "predict", lambda **_: dict.fromkeys(memory.KINDS, 0))
    monkeypatch.setattr(plan._Model, "flops", lambda self, method: SimpleNamespace(step=lambda **_: 0.0))
    monkeypatch.setattr(plan._Model, "bare", SimpleNamespace(forward=lambda **_: 0.0))
    methods = DEMO["methods"] | {"more": {"ewc": {"strength": 1.0, "samples": 16}}}
    domains = {name: copy.deepcopy(DEMO["domains"]["sums"]) for name in ("one", "two", "three")}
    grid = {
        "models": ["gptj-6b", "llama3-8b"],
        "domains": list(domains),
        "methods": ["full", "lora", "ewc", "mofo", "more"],
    }
    made = plan.make(study(tmp_path, grid=grid, domains=domains, methods=methods))
    full = 3 * 4 * (6_050_882_784 + 8_030_261_248) // 2
    assert (
        len(made["cells"]) == 30
        and full < made["total"]["disk_bytes_all"] == made["total"]["disk_bytes"] < 1.001 * full
    )
    text = plan.text(made)
    assert "disk of all 30 cells: 78.7" in text and "about 4 bits a weight in bf16" in text
    assert any(line.endswith("3.74 GiB") or "3.74 GiB " in line for line in text.splitlines()) and "MiB" in text


def test_the_base_is_scored_once_on_the_tasks_of_every_domain(tmp_path):
    domains = DEMO["domains"] | {"more": DEMO["domains"]["sums"]}
    made = plan.make(study(tmp_path, domains=domains, grid={"models": ["gptj-6b"], "domains": ["sums", "more"]}))
    first, *_, last = made["cells"]
    assert first["cell"].split("/")[1:3] == ["sums", "full"] and last["cell"].split("/")[1:3] == ["more", "ewc"]
    scores = first["seconds_evaluate"] + last["seconds_evaluate"] + sum(made["seconds_improvable"].values())
    assert made["seconds_base"] == {"gptj-6b": pytest.approx(scores, abs=0.2)} and scores > 1
    cells = sum(cell["seconds"] for cell in made["cells"])
    assert made["total"]["seconds"] == pytest.approx(cells + scores, abs=0.5)


def test_only_the_cells_that_are_asked_for(tmp_path):
    made = plan.make(study(tmp_path), patterns=["*/full/seed0", "*/ewc/*"])
    assert [c["cell"].split("/")[2] for c in made["cells"]] == ["full", "ewc"] and made["total"]["cells"] == 2
    with pytest.raises(UserError, match="no cell of the grid matches nothing: cells are MODEL"):
        plan.make(study(tmp_path), patterns=["nothing", "else"])


def test_a_preparation_reads_its_parts_documents_whatever_the_rows_are_cut_at(tmp_path, monkeypatch):
    methods = {
        "ewc": {"ewc": {"samples": 3, "length": 40}},
        "hierarchical": {"hierarchical": {"samples": 4, "length": 40, "epochs": 2.0}},
    }
    step = SimpleNamespace(step=lambda lengths, labelled: sum(lengths))
    model = SimpleNamespace(flops=lambda method: step, characters=plan.expected.BYTES)
    for length in (16, 512):
        train = {"batch": 2, "micro_batch": 2, "length": length}
        here = study(tmp_path, train=train, methods=methods, grid={"methods": list(methods)})
        found = {}
        for method in methods:
            settings = here.prepare_settings(model="llama-tiny", method=method)
            cell, read = Cell("llama-tiny", "sums", method, 0), []
            for documents in ([100, 10, 30, 50, 60], None):
                monkeypatch.setattr(
                    plan.expected, "general_text", lambda study, characters, documents=documents: documents
                )
                tokens, flops = plan._preparation(here, cell, model, settings)
                assert tokens == flops
                read.append(tokens)
            found[method] = tuple(read)
        assert found == {"ewc": (40 + 10 + 30, 3 * 20), "hierarchical": (2 * (40 + 10 + 30 + 40), 2 * 4 * 20)}
