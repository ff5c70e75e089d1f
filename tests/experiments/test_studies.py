"""The studies that need a GPU and the hub: all that can be held true of them without either."""

import copy
import json
import re
from math import log

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoConfig, AutoModelForCausalLM

from analysis.load import record
from evaluation.shipped import shipped_yaml
from evaluation.task import make_task
from experiments.commands import tune
from experiments.stages import collect, data, evaluate, prepare, resolve, train
from experiments.stages import model as model_stage
from experiments.study import cells, config, controls, inheritance, pipeline
from experiments.study.params_text import read_yaml
from experiments.study.paths import Paths
from experiments.study.schema import Data
from methods.tools.files import read_json
from tests.evaluation.conftest import COPA, HELLASWAG, LAMBADA, SCIQ, WINOGRANDE, write_rows

NAMES = ("paper", "mofo-math")
FIELD = {  # words that no subject of a domain's MMLU retention task has in its name
    "science": "anatomy astronomy biology chemistry physics nutrition virology genetics medicine mathematics computer",
    "medical": "anatomy biology medicine medical clinical nutrition virology genetics aging sexuality psychology",
    "physical": "physics astronomy electrical",
}
EXTRA = {  # words of the other subjects that are left out: for science health and every formal science
    "science": "clinical aging sexuality algebra statistics learning security engineering",
    "medical": "",
    "physical": "engineering",
}
ROWS = {  # one row of each data set, with the columns it has on the hub
    "Rowan/hellaswag": HELLASWAG[0],
    "allenai/sciq": SCIQ[0],
    "EleutherAI/lambada_openai": LAMBADA[0],
    "aps/super_glue": COPA[0],
    "allenai/winogrande": WINOGRANDE[0],
    "baber/piqa": {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Turn the table.", "label": 0},
    "allenai/ai2_arc": {
        "id": "a",
        "question": "What is wet?",
        "answerKey": "A",
        "choices": {"text": ["water", "sand"], "label": ["A", "B"]},
    },
    "allenai/openbookqa": {
        "id": "a",
        "question_stem": "Water is",
        "answerKey": "A",
        "choices": {"text": ["wet", "dry"], "label": ["A", "B"]},
    },
    "tau/commonsense_qa": {
        "id": "a",
        "question": "Where is water?",
        "question_concept": "water",
        "answerKey": "E",
        "choices": {"label": list("ABCDE"), "text": ["sun", "fire", "sand", "dust", "sea"]},
    },
    "lighteval/siqa": {
        "context": "Ann ran.",
        "question": "Why?",
        "answerA": "late",
        "answerB": "tall",
        "answerC": "red",
        "label": "1",
    },
    "cais/mmlu": {
        "question": "What is wet?",
        "subject": "world_religions",
        "choices": ["sun", "sea", "sand", "dust"],
        "answer": 1,
    },
    "openlifescienceai/medmcqa": {
        "id": "a",
        "question": "What beats?",
        "opa": "heart",
        "opb": "nail",
        "opc": "hair",
        "opd": "tooth",
        "cop": 0,
    },
    "meta-math/MetaMathQA": {
        "query": "1+1?",
        "response": "2\nThe answer is: 2",
        "type": "GSM_SV",
        "original_question": "1+1?",
    },
    "openai/gsm8k": {"question": "1+1?", "answer": "1+1=2\n#### 2"},
}


def own(study):
    """The domains and tasks that the study writes itself."""
    return study.domains | {name: study.tasks[name] for name in read_yaml(study.paths.params)["tasks"]}


def hub_sources(study):
    blocks = [*own(study).values(), study.general]
    rows = [rows for block in blocks for rows in (block.rows, getattr(block, "test_rows", None)) if rows]
    return [source.hub for source in rows if source.hub]


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_every_name_resolves(name):
    study = config.load(name)
    assert resolve.contents(study) and not pipeline.behind(study)
    assert study.data.source == "hub" and not study.not_a_result
    for block in own(study).values():
        assert block.licence
        task = block.task
        assert shipped_yaml(task if isinstance(task, str) else task["include"])


def test_the_papers_grid():
    study = config.load("paper")
    assert len(cells.grid(study)) == 2 * 3 * 7 * 3
    assert set(study.tune.methods) == {"full", "lora", "ewc", "ewc-lora", "mofo", "hierarchical"}
    assert set(study.grid.methods) - set(study.tune.methods) == {"lora-warm"}
    assert controls.of_grid(study)["hierarchical"] == "lora-warm"
    assert {len(values) for knob in study.tune.methods.values() for values in knob.values()} == {4}
    for cell in cells.grid(study):  # held equal over methods: the budget and the precision of the optimizer's state
        settings = study.settings(model=cell.model, domain=cell.domain, method=cell.method)
        assert (settings.epochs, settings.batch, settings.length, settings.moments) == (3.0, 80, 512, "bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_sources_are_pinned(name):
    study = config.load(name)
    loose = {source.path for source in hub_sources(study) if not re.fullmatch("[0-9a-f]{40}", source.revision or "")}
    assert loose <= {"lighteval/siqa"}
    for name in read_yaml(study.paths.params)["models"]:
        block = study.models[name]
        assert re.fullmatch(r"hub:[^@]+@[0-9a-f]{40}", block.source) or block.source.startswith("pypi:")
    root = config.load()
    for shared in set(study.models) & set(root.models):
        for key in ("source", "sha256", "bin_sha256", "parameters", "layers", "width"):
            assert getattr(study.models[shared], key) == getattr(root.models[shared], key), (shared, key)


@pytest.mark.parametrize(("name", "model"), [("paper", "gptj-6b"), ("paper", "llama3-8b"), ("mofo-math", "llama3-8b")])
def test_the_architecture_is_the_models(name, model):
    """Built without memory, it has the parameters, layers and width that the block states."""
    block = config.load(name).models[model]
    asked = dict(block.architecture)
    made = AutoConfig.for_model(asked.pop("model_type"), **asked)
    assert {key: getattr(made, key) for key in asked if key != "rope_theta"} == {
        k: v for k, v in asked.items() if k != "rope_theta"
    }
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(made)
    assert sum(p.numel() for p in built.parameters()) == block.parameters
    assert (made.num_hidden_layers, made.hidden_size) == (block.layers, block.width)


@pytest.mark.parametrize("name", NAMES)
def test_every_task_takes_the_rows_of_its_data_set(name, tmp_path):
    """Columns, prompt and metric fit; a metric or column that does not exist is refused by make_task."""
    from experiments.data.rows import shape

    study = config.load(name)
    for where, block in own(study).items():
        for named in (block.rows, getattr(block, "test_rows", None)):
            if source := named and named.hub:
                rows = shape(shape([ROWS[source.path]], source, where=where), block, where=where)
                made = make_task(where, block.task, write_rows(tmp_path / "rows.jsonl", rows), metric=block.metric)
                assert made.config.num_fewshot == 0 and len(made.eval_docs) == 1
                if source.path == "cais/mmlu":
                    said = "about world religions" if name == "mofo-math" else "(with answers).\n\nWhat is wet?"
                    assert said in made.fewshot_context(made.eval_docs[0], num_fewshot=0)
        if where in study.domains:
            assert block.question in rows[0]


@pytest.mark.parametrize("domain", FIELD)
def test_mmlu_for_retention_has_no_subject_of_the_domains_field(domain):
    study = config.load("paper")
    name = f"mmlu_not_{domain}"
    assert name in study.domains[domain].retention
    subjects = study.tasks[name].rows.hub.name
    known = {path.stem.removeprefix("mmlu_") for path in shipped_yaml("mmlu_anatomy").parent.glob("mmlu_*.yaml")}
    assert set(subjects) < known and len(set(subjects)) == len(subjects) and "miscellaneous" not in subjects
    assert not [s for s in subjects if any(word in s.split("_") for word in FIELD[domain].split())]
    left_out = known - set(subjects)
    words = {"miscellaneous", *FIELD[domain].split(), *EXTRA[domain].split()}
    assert all(words & set(s.split("_")) for s in left_out), left_out


def local(study_name, root, change):
    """A study's params.yaml, with what it takes over, changed and in a root of its own."""
    paths = Paths(study=study_name)
    raw = copy.deepcopy(inheritance.completed(read_yaml(paths.params), paths=paths))
    change(raw)
    with open(root / "params.yaml", "w") as file:
        YAML().dump(raw, file)
    return config.load(root=root)


def test_a_study_with_written_answers_runs_from_rows_to_forgetting(tmp_path, monkeypatch):
    """mofo-math on a tiny random model and rows written here, through the stages' own code."""
    pairs = [(i, j) for i in range(6) for j in range(6)]
    solved = [
        {"question": f"Ann has {i} pens and buys {j}. How many?", "answer": f"{i}+{j}={i + j}\n#### {i + j}"}
        for i, j in pairs
    ]
    write_rows(tmp_path / "solved.jsonl", [{"query": row["question"], "response": row["answer"]} for row in solved])
    write_rows(tmp_path / "test.jsonl", solved[:4])
    write_rows(tmp_path / "other.jsonl", [HELLASWAG[i % 6] | {"ctx_a": f"A man has {i} cups. He"} for i in range(12)])
    write_rows(tmp_path / "ends.jsonl", [{"text": f"The cat saw {i} dogs and ran to the house"} for i in range(6)])
    write_rows(tmp_path / "text.jsonl", [{"passage": f"Passage {i} tells of {i * i} things."} for i in range(30)])

    def change(raw):
        raw |= {"device": "cpu", "data": {"source": "pypi"}, "not_a_result": True}
        raw["grid"] = {"models": ["tiny"], "domains": ["math"], "methods": ["full", "mofo"], "seeds": [0]}
        raw["models"] = {"tiny": {"source": "random:llama", "seed": 0, "dtype": "float32"}}
        raw["train"] |= {"batch": 8, "micro_batch": 8, "length": 128, "epochs": 0.25, "probes": 1}
        math = raw["domains"]["math"]
        math["task"]["generation_kwargs"]["max_gen_toks"] = 12
        math |= {
            "split": {"train": "all", "probe": 4, "test": "all"},
            "retention": ["hellaswag", "ends"],
            "probes": ["hellaswag"],
        }
        math["rows"] = {"jsonl": {"path": str(tmp_path / "solved.jsonl"), "columns": math["rows"]["hub"]["columns"]}}
        math["test_rows"] = {"jsonl": str(tmp_path / "test.jsonl")}
        raw["domains"] = {"math": math}
        raw["tasks"] = {
            "hellaswag": raw["tasks"]["hellaswag"]
            | {"rows": {"jsonl": str(tmp_path / "other.jsonl")}, "test": 6, "probe": 4}
        }
        raw["tasks"]["ends"] = {
            "task": "lambada_openai",
            "metric": "perplexity",
            "chance": 0.0,
            "rows": {"jsonl": str(tmp_path / "ends.jsonl")},
            "test": 6,
        }
        raw["tune"] = {"methods": {"full": {"train.learning_rate": [1.0e-3]}}}
        raw["general"] |= {
            "rows": {"jsonl": str(tmp_path / "text.jsonl")},
            "text": "passage",
            "article": "{{passage}}",
            "settle": 0,
            "importance": 4,
            "replay": 4,
            "probe": 2,
            "test": 4,
        }

    monkeypatch.chdir(tmp_path)
    study = local("mofo-math", tmp_path, change)
    data.main(study)
    said = read_json(study.paths.data / "data.json")["domains"]["math"]
    assert said["n"] == {"train": 28, "probe": 4, "test": 4} and said["duplicates"]["between"] == 4
    model_stage.main(study, model="tiny")
    evaluate.base(study, model="tiny")
    for cell in cells.grid(study):
        prepare.main(study, model=cell.model, method=cell.method, seed=cell.seed, cell=cell)
        train.main(study, cell)
        evaluate.main(study, cell)
        collect.main(study, cell)
        metrics = record(study.paths.run(cell))
        math = metrics["scores_by_task"]["math"]
        assert math | {"version": 0, "prompt": ""} == {
            "value": 0.0,
            "base": 0.0,
            "n": 4,
            "chance": 0.0,
            "metric": "exact_match,flexible-extract",
            "role": "domain",
            "version": 0,
            "prompt": "",
            "unit": "share",
            "higher_is_better": True,
            "per_item": True,
            "change": 0.0,
        }
        ends = metrics["scores_by_task"]["ends"]  # of which lower is better: its rise is forgetting, beside the mean
        rise = log(ends["value"] / ends["base"])
        assert (
            metrics["forgetting_apart"] == {"ends": {"forgetting": pytest.approx(rise, rel=1e-6), "unit": "nats"}}
            and rise != 0
        )
        assert "ends" not in metrics["forgetting_by_task"] and "ends" not in metrics["at_chance"]
        curve = (study.paths.run(cell) / "curve.csv").read_text().splitlines()[0].split(",")
        assert {"probe_math_nll", "probe_hellaswag", "probe_perplexity"} <= set(curve) and "probe_math" not in curve
        assert read_json(study.paths.run(cell) / "train.json")["steps"] == 1
        assert metrics["general_kl"] > 0 and metrics["general_nll_lost"] != 0
        assert metrics["domain_nll_gained"] is None  # the answers are the model's own
    scored = [study.paths.run(cell) / name for name in ("scores.json", "items.csv.gz")]
    before = [file.read_bytes() for file in scored]
    (kept,) = (study.paths.local / "reference").iterdir()
    for content in (kept.read_bytes(), b"damaged"):  # the base's predictions are read, and then made again
        kept.write_bytes(content)
        evaluate.main(study, cell)
        assert [file.read_bytes() for file in scored] == before
    tune.main(study, ["full"])  # by the nats of the whole solutions, for probes do not generate
    assert read_json(study.paths.tuning("tiny", "math"))["trials"][0]["chosen"]
    rows = [json.loads(line) for line in (study.paths.data / "train/math/train.jsonl").read_text().splitlines()]
    assert all(row["end"] and row["choices"][0].startswith(" ") for row in rows)


def test_the_small_variant_needs_no_hub():
    study = config.load("mofo-math")
    grid = study.grid.model_copy(update={"models": ["smollm2-135m"], "domains": ["math-small"]})
    small = study.model_copy(update={"data": Data(source="pypi"), "grid": grid})
    used = resolve.data(small)
    assert all(
        "pypi" in block["rows"] for block in (*used["domains"].values(), *used["tasks"].values(), used["general"])
    )
    assert small.settings(model="smollm2-135m", domain="math-small", method="full").moments == "float32"
