"""`plan` and `resolve` refuse what cannot work, with its block or file, and print a line for what is only unwise."""

import json
import re

import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML

from evaluation.chance import below_chance
from experiments.commands import plan
from experiments.data.prepared_rows import write_data
from experiments.model.random_models import build
from experiments.stages import collect, evaluate, model, resolve, train
from experiments.study import ahead, config
from experiments.study.cells import parse
from experiments.study.paths import HERE, Paths
from methods.errors import UserError
from methods.tools.files import write_json

DEMO = YAML(typ="safe").load(HERE / "experiments" / "studies" / "demo" / "params.yaml")
CELL = "llama-tiny/sums/full/seed0"


def study(root, *changes):
    """The demo with plain fine-tuning alone and `changes`, (path, value) pairs."""
    raw = json.loads(json.dumps(DEMO))
    raw["grid"]["methods"] = ["full"]
    for path, value in changes:
        *way, last = path.split("/")
        block = raw
        for key in way:
            block = block[key]
        block[last] = value
    return config.build(raw, paths=Paths(root=root))


def rows(path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return {"jsonl": str(path)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [("domains/sums/rows", {"jsonl": "nowhere.jsonl"})],
            "domains.sums.rows.jsonl is 'nowhere.jsonl': there is no such file",
        ),
        (
            [("tasks/colours/rows", {"hub": {"path": "a/b", "split": "test"}})],
            "tasks.colours.rows has no 'pypi' source (it has hub)",
        ),
        (
            [("general/rows", {"pypi": {"package": "a==1", "path": "x"}})],
            "general.rows.pypi: package 'a==1' has no checksum",
        ),
        ([("general/rows", {"pypi": {"package": "a==1"}})], "general.rows.pypi has neither `path` nor `requests`"),
        ([("tasks/colours/task", "sciqq")], "tasks.colours.task: "),
        (
            [("methods/alone", {"ist": {}}), ("grid/methods", ["full", "alone"])],
            "methods.alone.ist: it runs beside another part: add `lora` to the method's block",
        ),
        (
            [("tasks/colours/task", "SciQ")],
            "tasks.colours.task: task 'SciQ' is not shipped with lm-eval: did you mean 'sciq'?",
        ),
        ([("tasks/colours/task/doc_to_txt", "x")], "tasks.colours.task: "),
        ([("domains/sums/metric", "accuracy")], "metric 'accuracy' is not one of its metrics"),
        ([("domains/sums/question", "questoin")], "domains.sums: no column 'questoin'"),
        ([("domains/sums/split/train", 10_000)], "domains.sums: 10000 train rows are requested"),
        ([("general/test", 10_000)], "general.test is 10000 texts"),
        ([("train/stop", {"general_nl": 0.1})], "unknown probe 'general_nl' in train.stop: did you mean 'general_nll'"),
        (
            [("train/stop", {"general_nll": 0.1}), ("general/probe", 0)],
            "unknown probe 'general_nll' in train.stop: known: colours, colours_nll, sums, sums_nll",
        ),
        ([("domains/sums/train", {"stop": {"sums": 0.1}})], "domains.sums.train.stop.sums is 0.1, but accuracy is"),
        (
            [("methods/full", {"train": {"keep": "best"}}), ("train/probes", 0)],
            "methods.full.train has a rule on probes, but `probes` is 0",
        ),
        ([("train/keep", "best"), ("domains/sums/split/probe", 0)], "train.keep is 'best', which is the probed step"),
        ([("models/llama-tiny/source", "random:lama")], "models.llama-tiny: there is no random architecture 'lama'"),
        (
            [("models/llama-tiny/config", {"hiden_size": 32})],
            "models.llama-tiny: random:llama has no setting hiden_size",
        ),
        (
            [("models/llama-tiny/config", {"hidden_act": "nope"})],
            "models.llama-tiny: random:llama cannot be built from {'hidden_act': 'nope'}",
        ),
        (
            [("models/llama-tiny/config", {"num_attention_heads": 3})],
            "models.llama-tiny: random:llama cannot be built from",
        ),
        (
            [
                ("models/llama-tiny/source", "hub:a/b"),
                ("models/llama-tiny/architecture", {"model_type": "llama", "hidden_size": "3"}),
            ],
            "models.llama-tiny.architecture: transformers cannot make a config of it",
        ),
        (
            [("domains/sums/task/num_fewshot", "3")],
            "domains.sums.task: task sums: num_fewshot is '3': it must be a whole number; write 3 without quotes",
        ),
        ([("domains/sums/task/fewshot_config", 3)], "task sums: fewshot_config is 3: it must be a mapping"),
        (
            [("domains/sums/task/metric_list", [{"metric": 1}])],
            "domains.sums.task: task sums: metric_list names 1: write a metric's name",
        ),
        (
            [("domains/sums/task/metric_list", [{"metric": "acc", "higher_is_better": "yes"}])],
            "higher_is_better of acc in metric_list is 'yes': it must be true or false",
        ),
        (
            [("domains/sums/task/filter_list", [{"name": "a", "filter": [{"function": "nope"}]}])],
            "Unknown filter 'nope'. Available: ",
        ),
        (
            [("domains/sums/task/doc_to_choice", None)],
            "domains.sums.task: task sums: it is a task of choices without `doc_to_choice`",
        ),
        ([("domains/sums/task", {})], "domains.sums.task: task sums: it has no `doc_to_text`"),
        ([("domains/sums/task/include", 3)], "task sums: include is 3: it must be text"),
        ([("domains/sums/task/output_type", "choice")], "task sums: output_type is 'choice': it must be one of"),
        (
            [("models/llama-tiny/source", "path:nowhere")],
            "models.llama-tiny.source is 'path:nowhere': nowhere is not a model folder",
        ),
        (
            [("models/llama-tiny/source", "pypi:a==1/x.gguf"), ("models/llama-tiny/sha256", "a" * 64)],
            "models.llama-tiny.source: package 'a==1' has no checksum",
        ),
        (
            [("methods/full", {"lora": {"targets": ["q_porj"]}})],
            "methods.full.lora.targets: 'q_porj' is no linear layer",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_plan(tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        plan.make(study(tmp_path, *changes))


def test_a_checkpoint_made_elsewhere_is_refused_by_plan_where_it_is_none_of_the_base(tmp_path):
    asked = study(tmp_path, ("methods/full", {"given": {"path": str(tmp_path / "given")}}))
    with pytest.raises(UserError, match="methods.full.given.path is '.*given': no such folder"):
        plan.make(asked)
    build("llama", seed=1, num_hidden_layers=1).save_pretrained(tmp_path / "given")
    plan.make(asked)  # the base is not made yet: its tensors are not known
    model.main(asked, model="llama-tiny")
    with pytest.raises(
        UserError,
        match="methods.full.given.path: .* lacks model.layers.1.input_layernorm.weight and 8 more: "
        "it is not a checkpoint of this",
    ):
        plan.make(asked)
    build("llama", seed=1).to(torch.float8_e4m3fn).save_pretrained(tmp_path / "given")
    with pytest.raises(UserError, match="methods.full.given.path: .* is quantised or damaged: .* is stored as F8_E4M3"):
        plan.make(asked)
    build("llama", seed=1).save_pretrained(tmp_path / "given")
    plan.make(asked)
    file = tmp_path / "given" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match=r"methods.full.given.path: .* is quantised \(awq"):
        plan.make(asked)


def test_an_adapter_in_a_models_place_is_refused_by_plan(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(UserError, match="models.llama-tiny: .* holds an adapter of org/base .*, not a model: merge it"):
        plan.make(study(tmp_path / "root", ("models/llama-tiny/source", f"path:{tmp_path}")))


def test_resolve_refuses_the_same_and_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="questoin"):
        resolve.main(study(tmp_path, ("domains/sums/question", "questoin")))
    assert not (tmp_path / "work").exists()


def test_a_wrong_row_is_named_by_its_own_file_and_line(tmp_path):
    """Not by a copy of it."""
    good = [json.loads(line) for line in (HERE / DEMO["domains"]["sums"]["rows"]["jsonl"]).read_text().splitlines()]
    good[6]["gold"] = 7
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / 'mine.jsonl'))} line 7\b.*7"):
        plan.make(study(tmp_path, ("domains/sums/rows", rows(tmp_path / "mine.jsonl", good))))


@pytest.mark.parametrize(
    "architecture", [("random:gptj", {"n_positions": 32}), ("random:llama", {"max_position_embeddings": 32})]
)
def test_rows_longer_than_the_models_positions(tmp_path, architecture):
    """The byte tokenizer makes a token of each byte, so the longest row that is trained on can be counted by hand."""
    source, sizes = architecture
    small = [("models/llama-tiny/source", source), ("models/llama-tiny/config", sizes)]
    write_data(study(tmp_path), tmp_path / "data")
    trained = [json.loads(line) for line in (tmp_path / "data/train/sums/train.jsonl").read_text().splitlines()]
    longest = max(len((row["context"] + row["choices"][row["gold"]]).encode()) for row in trained)
    assert 32 < longest < 64
    for path in ("train", "domains/sums/train", "models/llama-tiny/train", "methods/full/train"):
        block = {**DEMO["train"], "length": 64} if path == "train" else {"length": 64}
        where = path.replace("/", ".")
        said = f"{where}.length is 64, llama-tiny has 32 positions, and a training row of sums has {longest} tokens"
        with pytest.raises(UserError, match=re.escape(said)):
            ahead.look(study(tmp_path, *small, (path, block)))
    ahead.look(
        study(tmp_path, *small, ("train/length", 32))
    )  # longer rows lose their beginning, and the model takes the rest
    ahead.look(study(tmp_path, ("models/llama-tiny/config", {"max_position_embeddings": longest})))


def test_long_rows_are_refused_by_base_and_training_too(tmp_path):
    """A tokenizer that has to be fetched is known there first."""
    found = study(
        tmp_path, ("models/llama-tiny/source", "random:gptj"), ("models/llama-tiny/config", {"n_positions": 32})
    )
    model.main(found, model="llama-tiny")
    write_data(found, found.paths.data)
    for run in (lambda: evaluate.base(found, model="llama-tiny"), lambda: train.main(found, parse(CELL, found))):
        with pytest.raises(
            UserError, match="train.length is 128, llama-tiny has 32 positions, and a training row of sums has"
        ):
            run()


def test_answers_that_leave_no_room_for_their_prompt(tmp_path):
    """The tiny Llama takes 512 tokens; lm-eval's answers may have 256 where nothing else is said."""
    task = DEMO["tasks"]["colours"]["task"] | {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "doc_to_choice": None,
    }
    for settings, tokens, positions in (({"max_gen_toks": 512}, 512, 512), ({}, 256, 256)):
        found = study(
            tmp_path,
            ("tasks/colours/task", task | {"generation_kwargs": {"until": ["\n"], "do_sample": False} | settings}),
            ("models/llama-tiny/config", {"max_position_embeddings": positions}),
        )
        with pytest.raises(
            UserError,
            match=f"tasks.colours.task: an answer may have {tokens} tokens, but llama-tiny takes {positions} in all",
        ):
            ahead.look(found)


@pytest.mark.parametrize(("probes", "passages"), [(0, 0), (2, 0), (2, 4)])
def test_without_probe_rows_a_cell_trains(tmp_path, probes, passages):
    found = study(
        tmp_path,
        ("domains/sums/split/probe", 0),
        ("domains/sums/probes", []),
        ("general/probe", passages),
        ("train/probes", probes),
        ("domains/sums/split/train", 8),
    )
    plan.make(found)
    model.main(found, model="llama-tiny")
    write_data(found, found.paths.data)
    (found.paths.prepared(model="llama-tiny", method="full", seed=0)).mkdir(parents=True)
    train.main(found, parse(CELL, found))
    columns = (found.paths.run(parse(CELL, found)) / "curve.csv").read_text().splitlines()[0].split(",")
    assert [c for c in columns if c.startswith("probe_")] == (
        ["probe_general_nll", "probe_perplexity"] if probes and passages else []
    )


def test_a_cell_that_a_rule_ends_says_so_in_its_record(tmp_path, capsys):
    found = study(tmp_path, ("train/stop", {"general_nll": 0}), ("train/keep", "best"), ("train/learning_rate", 0.05))
    ahead.look(found)
    model.main(found, model="llama-tiny")
    write_data(found, found.paths.data)
    (found.paths.prepared(model="llama-tiny", method="full", seed=0)).mkdir(parents=True)
    train.main(found, parse(CELL, found))
    record = json.loads((found.paths.run(parse(CELL, found)) / "train.json").read_text())
    stopped, curve = record["stopped"], pd.read_csv(found.paths.run(parse(CELL, found)) / "curve.csv")
    probed = curve.dropna(subset="probe_general_nll").set_index("step")
    rise = probed["probe_general_nll"] - probed["probe_general_nll"][0]
    assert stopped["stopped_at"] == record["steps"] == rise.index[rise > 0][0] < stopped["steps_planned"]
    assert stopped["kept_step"] == probed["probe_sums_nll"][rise <= 0].idxmin() < record["steps"]
    assert record["tokens_trained"] == curve["tokens"].max() < stopped["tokens_planned"]
    assert record["settings"]["stop"] == {"general_nll": 0} and record["settings"]["keep"] == "best"
    assert f"{CELL}: stopped at step {record['steps']} of " in capsys.readouterr().out
    prepared = dict.fromkeys(("seconds_prepare", "tokens_prepare", "bytes_importance", "peak_memory_bytes"), 0)
    assert collect._costs(record, prepared, {"seconds_evaluate": 1.0})["stopped"] == stopped


def test_a_domain_of_conversations_needs_a_template_and_is_probed_by_nats_alone(tmp_path):
    talk = [{"messages": [{"role": r, "content": f"{r} {k}"} for r in ("user", "assistant")]} for k in range(40)]
    (tmp_path / "template").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    block = {"format": "chat", "rows": rows(tmp_path / "talk.jsonl", talk), "chat_template": f"{tmp_path}/template"}
    chat = ("domains/sums", block), ("train/stop", {"sums_nll": 0.1, "general_nll": 1}), ("train/keep", "best")
    ahead.look(study(tmp_path, *chat))
    with pytest.raises(UserError, match="unknown probe 'sums' in train.stop: did you mean 'sums_nll'"):
        ahead.look(study(tmp_path, *chat, ("train/stop", {"sums": -0.1})))
    del block["chat_template"]
    with pytest.raises(UserError, match="domains.sums is of the format chat, and the tokenizer of llama-tiny has no"):
        ahead.look(study(tmp_path, *chat))


def test_trials_are_refused_where_nothing_judges_them(tmp_path):
    from experiments.commands import tune

    tried = ("tune", {"methods": {"full": {"train.learning_rate": [1e-3]}}})
    with pytest.raises(UserError, match="domains.sums.split.probe is 0: trials are judged"):
        tune.main(study(tmp_path, ("domains/sums/split/probe", 0), tried), [])
    found = study(tmp_path)
    with pytest.raises(UserError, match="tune.methods does not name full: add a setting with the values to try"):
        tune.main(found, [])
    with pytest.raises(UserError, match="unknown method 'ful': did you mean 'full'?"):
        tune.main(found, ["ful"])


def test_a_domain_without_retention_tasks_is_a_line(tmp_path):
    assert plan.make(study(tmp_path))["warnings"] == []
    made = plan.make(study(tmp_path, ("domains/sums/retention", [])))
    assert made["warnings"] == [
        "warning: domains.sums has no retention tasks: only the perplexity of general text shows forgetting"
    ]
    assert plan.text(made).endswith(made["warnings"][0])


def test_choices_with_a_space_behind_the_delimiters_are_a_line(tmp_path):
    colours = [json.loads(line) for line in (HERE / DEMO["tasks"]["colours"]["rows"]["jsonl"]).read_text().splitlines()]
    spaced = rows(
        tmp_path / "spaced.jsonl", [row | {"choices": [f" {choice}" for choice in row["choices"]]} for row in colours]
    )
    (line,) = ahead.look(study(tmp_path, ("tasks/colours/rows", spaced)))
    assert line.startswith(
        "warning: tasks.colours: in 40 of 40 rows a choice begins with a space after target_delimiter ' '"
    )
    assert (
        ahead.look(study(tmp_path, ("tasks/colours/rows", spaced), ("tasks/colours/task/target_delimiter", ""))) == []
    )


def test_a_base_below_chance_is_a_line(tmp_path):
    found = study(tmp_path)
    assert below_chance(found, "llama-tiny") == []  # not scored yet
    entry = {"chance": 0.5, "n": 40, "role": "retention"}
    write_json(
        found.paths.base("llama-tiny") / "scores.json",
        {
            "tasks": {
                "colours": entry | {"value": 0.475},
                "sums": entry | {"value": 0.3, "chance": 0.25},
                "other": entry | {"value": 0.0},
            }
        },
    )
    (line,) = plan.make(found)["warnings"]
    assert line.startswith("warning: llama-tiny scores 0.475 on colours, below its chance of 0.5 (n 40)")
    assert below_chance(found, "llama-tiny", ["sums"]) == []
