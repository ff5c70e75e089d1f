"""Domains of documents, pairs and conversations: from a file to rows, to what training and probes read."""

import json
import math
import re

import pytest
import torch

from evaluation.encode import encode_text
from evaluation.labelled import encode_row
from evaluation.probe import load_probes, probe
from evaluation.rendered import read_jsonl
from evaluation.token_losses import token_losses
from experiments.commands import show, tune
from experiments.data import expected, formats
from experiments.data.prepared_rows import write_data
from experiments.model import positions, vocabulary
from experiments.model.random_models import EOS_ID, build, byte_tokenizer
from experiments.stages import resolve
from experiments.study import ahead, config
from experiments.study.paths import Paths
from experiments.training.engine import fit
from experiments.training.examples import IGNORED, encoded, examples_of, packed
from experiments.training.settings import TrainSettings
from methods import registry
from methods.errors import UserError
from methods.tools.jsonl import Row

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def conversation(*texts, system=None):
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(texts), texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


CHATS = [
    {"messages": conversation(f"ask {i}?", f"say {i}.", f"more {i}?", f"yes {i}.", system="s" * (i % 2))}
    for i in range(60)
]
PAIRS = [{"prompt": f"Number {i}?", "completion": f" It is {i}."} for i in range(60)]
TEXTS = [{"text": f"Document {i} has {'words ' * i}and ends."} for i in range(60)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def study(folder, rows, format, **block):
    """A study of one domain `d`."""
    general = write(folder / "general.jsonl", [{"text": f"Passage {i} of {i * i} things."} for i in range(60)])
    raw = {
        "grid": {"models": ["tiny"], "domains": ["d"], "methods": ["full"], "seeds": [0]},
        "models": {"tiny": {"source": "random:llama"}},
        "methods": {"full": {}},
        "train": {"length": 64},
        "general": {"rows": general, "importance": 8, "perplexity": 8, "probe": 2},
        "domains": {"d": {"format": format, "rows": write(folder / "rows.jsonl", rows)} | block},
    }
    return config.build(raw, paths=Paths(root=folder))


def template(folder):
    (folder / "t.jinja").write_text(TEMPLATE)
    return str(folder / "t.jinja")


@pytest.mark.parametrize(("format", "rows"), [("chat", CHATS), ("pairs", PAIRS), ("text", TEXTS)])
def test_from_a_file_to_training_rows_probes_and_scored_rows(tmp_path, capsys, format, rows):
    more = {"chat_template": template(tmp_path)} if format == "chat" else {}
    made = study(tmp_path, rows, format, **more)
    facts = write_data(made, made.paths.data)["domains"]["d"]
    assert facts["n"] == {"train": 51, "probe": 3, "test": 6}
    assert "no `split`: 6 rows are scored (a tenth, at most 500), and 3 probed" in capsys.readouterr().out
    train, folder = made.paths.data / "train" / "d", made.paths.data / "evaluate" / "d"
    (entry,) = [entry for entry in json.loads((folder / "tasks.json").read_text()) if entry["role"] == "domain"]
    about = {"name": "d", "role": "domain", "format": format, "task": None, "metric": "nats_per_token", "chance": None}
    assert entry == about | {"file": "d.jsonl"} | ({"template": "chat_template.jinja"} if more else {})
    parts = [read_jsonl(path) for path in (train / "train.jsonl", train / "probe" / "d.jsonl", folder / "d.jsonl")]
    written = [
        row.get("messages") or row.get("text") or [row["context"], row["choices"]] for part in parts for row in part
    ]
    given = [row.get("messages") or row.get("text") or [row["prompt"], [row["completion"]]] for row in rows]
    assert sorted(json.dumps(row, sort_keys=True) for row in written) == sorted(
        json.dumps(row, sort_keys=True) for row in given
    )
    if format == "pairs":
        assert all(row["gold"] == 0 and row["end"] is True for part in parts for row in part)
    if more:
        assert (train / entry["template"]).read_text() == (folder / entry["template"]).read_text() == TEMPLATE
    tokenizer = byte_tokenizer()
    examples = encoded(train / "train.jsonl", tokenizer, 64)
    assert all(len(e["input_ids"]) <= 64 and bool((e["labels"][1:] != IGNORED).any()) for e in examples)
    lengths, labelled = expected.train_rows(made, "d", length=64)
    assert 0.1 < sum(lengths) / sum(len(e["input_ids"]) for e in examples) < 1 and 0 < labelled <= 2 * sum(lengths)
    vocabulary.refuse_answers(domain="d", file=train / "train.jsonl", tokenizer=tokenizer)


@pytest.mark.parametrize(("format", "rows"), [("chat", CHATS), ("text", TEXTS)])
def test_probes_are_the_nats_of_the_labelled_tokens(tmp_path, format, rows):
    more = {"chat_template": template(tmp_path)} if format == "chat" else {}
    made = study(tmp_path, rows, format, **more)
    write_data(made, made.paths.data)
    folder, tokenizer = made.paths.data / "train" / "d" / "probe", byte_tokenizer()
    model = build("llama", seed=0)
    report = probe(model=model, sets=load_probes(folder, tokenizer))
    assert set(report) == {"d_nll", "general_nll", "perplexity"}
    nats, count = 0.0, 0
    for row in read_jsonl(folder / "d.jsonl"):
        ids, labels, _ = encode_row(tokenizer, row, template=TEMPLATE)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        each = -torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        nats += each[torch.tensor(labels[1:])].sum().item()
        count += sum(labels[1:])
    assert report["d_nll"] == pytest.approx(nats / count, rel=1e-5)


def test_documents_are_packed_without_loss():
    tokenizer = byte_tokenizer()
    texts = ["ab", "cdé" * 9, "f"]
    examples = examples_of([{"text": text} for text in texts], tokenizer, 10, domain="d")
    learned = [token for e in examples for token in e["labels"][1:].tolist() if token != IGNORED]
    assert learned == [token for text in texts for token in [*encode_text(tokenizer, text), EOS_ID]]
    assert examples[0]["input_ids"][0] == EOS_ID and all(len(e["input_ids"]) == 10 for e in examples[:-1])
    for before, after in zip(examples, examples[1:]):
        assert before["input_ids"][-1] == after["input_ids"][0]
    begins, ends = 1, 2  # a tokenizer with a BOS: it is read, and never learned
    documents = [([begins, 7, 8, ends], [False, True, True, True])] * 2
    (block,) = packed(documents, 16)
    assert block["input_ids"].tolist() == [1, 7, 8, 2, 1, 7, 8, 2]
    assert block["labels"].tolist() == [IGNORED, 7, 8, 2, IGNORED, 7, 8, 2]


def test_conversations_that_are_too_long_are_cut_at_a_turn_or_left_out_and_named(capsys):
    tokenizer = byte_tokenizer()
    long = conversation("a" * 5, "b" * 5, "c" * 60, "d" * 5)
    rows = [Row({"messages": long}, at="rows line 1")] + [Row({"messages": conversation("a", "b")}, at="x")] * 20
    first, *_ = examples_of(rows, tokenizer, 64, domain="d", template=TEMPLATE)
    assert tokenizer.decode(first["input_ids"]) == "user: aaaaa<|eos|>assistant: bbbbb<|eos|>"
    said = capsys.readouterr().out
    assert "domain d: turns behind train.length (64 tokens) are cut off" in said and "(rows line 1)" in said
    rows[0] = Row({"messages": conversation("a" * 99, "b")}, at="rows line 1")
    assert len(examples_of(rows, tokenizer, 64, domain="d", template=TEMPLATE)) == 20
    assert "1 of 21 rows cannot be used: no answer ends within train.length" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"domain d: 3 of 5 rows .*more than one in ten: .*raise `train.length`"):
        examples_of(rows[:1] * 3 + rows[1:3], tokenizer, 64, domain="d", template=TEMPLATE)


def test_alpaca_and_sharegpt_are_read_as_their_authors_write_them():
    made, _, _ = formats.standard(
        [
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {"instruction": "Greet.", "input": "", "output": "Hi."},
            {"prompt": "p", "completion": 7},
        ],
        format="pairs",
        where="d",
    )
    assert made[0]["context"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### "
        "Response:"
    )
    assert made[1]["context"].endswith("completes the request.\n\n### Instruction:\nGreet.\n\n### Response:")
    assert [row["choices"] for row in made] == [["3"], ["Hi."], ["7"]]
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    for given in (turns, json.dumps(turns)):
        ((row,), _, _) = formats.standard([{"conversations": given}], format="chat", where="d")
        assert row["messages"] == conversation("u", "a", system="s")


BROKEN = {
    "chat": [
        ({"messages": [{"content": "a"}]}, "a turn without a role"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "a turn has the role 'narrator', not one of system"),
        ({"messages": conversation("a", "")}, "an empty answer"),
        ({"messages": conversation(" ", "a")}, "an empty turn of the user"),
        ({"messages": conversation("a")}, "no turn of the assistant"),
        ({"messages": []}, "`messages` is no list of turns"),
        ({"messages": "hello"}, "`messages` is a text, not a list of turns"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "the content of a turn is not a text"),
        ({"other": 1}, "no columns `messages`, or `conversations`"),
    ],
    "pairs": [
        ({"prompt": "a", "completion": " "}, "an empty answer"),
        ({"prompt": "a", "completion": None}, "an empty answer"),
        ({"prompt": "", "completion": "a"}, "`prompt` is empty"),
        ({"prompt": ["a"], "completion": "a"}, "`prompt` is not a text"),
        ({"prompt": "a"}, "no columns `prompt` and `completion`, or `instruction` and `output`"),
    ],
    "text": [({"text": "\n"}, "`text` is empty"), ({"text": None}, "`text` is empty"), ({"txt": "a"}, "no columns")],
}


@pytest.mark.parametrize(
    ("format", "row", "reason"), [(format, *case) for format, cases in BROKEN.items() for case in cases]
)
def test_a_few_rows_that_do_not_fit_are_left_out_by_reason_and_many_are_refused(tmp_path, capsys, format, row, reason):
    rows = {"chat": CHATS, "pairs": PAIRS, "text": TEXTS}[format]
    made = study(tmp_path, [*rows[:20], row, *rows[20:]], format)
    report = write_data(made, tmp_path / "out")
    ((found, facts),) = report["left_out"]["domains.d"]["left_out"].items()
    assert found.startswith(reason) and facts == {"n": 1, "first": [f"{tmp_path}/rows.jsonl line 21"]}
    assert f"1 of 61 rows cannot be used: {reason}" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"^domains.d: 7 of 67 rows .*{re.escape(reason)}.*more than one in ten"):
        study_of_many = study(tmp_path, [*rows, *[row] * 7], format)
        write_data(study_of_many, tmp_path / "out")


def test_turns_without_an_answer_at_the_end_are_left_out_of_the_conversation(tmp_path, capsys):
    rows = [{"messages": conversation("a", "b", "c")}, *CHATS]
    report = write_data(study(tmp_path, rows, "chat"), tmp_path / "out")
    (facts,) = report["left_out"]["domains.d"]["changed"].values()
    assert facts["n"] == 1 and "domains.d: the last turns have no answer" in capsys.readouterr().out
    kept = [row for path in (tmp_path / "out").rglob("*.jsonl") for row in read_jsonl(path) if "messages" in row]
    assert sum(row["messages"] == conversation("a", "b") for row in kept) == 1 and len(kept) == 61


def test_columns_of_another_name_are_asked_for_by_name(tmp_path):
    made = study(tmp_path, [{"question": "a", "answer": "b"}] * 3, "pairs")
    with pytest.raises(UserError, match=r"format pairs reads .* line 1 has question, answer: name yours in `columns`"):
        write_data(made, tmp_path / "out")
    rows = [{"q": row["prompt"], "a": row["completion"]} for row in PAIRS]
    made = study(tmp_path, rows, "pairs", columns={"prompt": "q", "completion": "a"}, question="prompt")
    assert write_data(made, tmp_path / "out")["domains"]["d"]["n"]["train"] == 51


def test_no_first_turn_prompt_or_text_is_in_two_sets(tmp_path):
    rows = [{"messages": conversation(f"Ask {i % 20}", f"say {i}")} for i in range(60)]
    made = study(tmp_path, rows, "chat", split={"train": "all", "probe": 10, "test": 10})
    write_data(made, tmp_path / "out")
    parts = ("train/d/train.jsonl", "train/d/probe/d.jsonl", "evaluate/d/d.jsonl")
    asked = [{row["messages"][0]["content"] for row in read_jsonl(tmp_path / "out" / part)} for part in parts]
    assert sum(map(len, asked)) == len(set.union(*asked)) <= 20


def test_own_test_rows_are_all_scored_where_no_split_is_written(tmp_path):
    tests = write(tmp_path / "test.jsonl", TEXTS[:4])
    made = study(tmp_path, TEXTS, "text", test_rows=tests)
    facts = write_data(made, tmp_path / "out")["domains"]["d"]
    assert facts["n"] == {"train": 53, "probe": 3, "test": 4} and facts["duplicates"]["between"] == 4


@pytest.mark.parametrize(
    ("format", "block", "message"),
    [
        ("chat", {"metric": "acc"}, "domains.d.metric: a domain of the format chat is scored in nats per token"),
        ("text", {"task": "sciq"}, "domains.d.task: a domain of the format text .* name lm-eval's tasks under `score`"),
        ("task", {}, "domains.d has no `task`: add it, or name the `format` of its rows"),
        ("dialog", {}, "domains.d.format is 'dialog': it must be one of task, text, pairs, chat"),
    ],
)
def test_keys_of_another_format_are_refused_by_name(tmp_path, format, block, message):
    with pytest.raises(UserError, match=message):
        study(tmp_path, TEXTS, format, **block)


def test_a_mistake_in_a_chat_domain_is_told_before_anything_runs(tmp_path):
    for block, message in (
        ({}, "models.tiny: the model's tokenizer has no chat template: name a file"),
        ({"chat_template": "none.jinja"}, "chat_template is 'none.jinja': there is no such file"),
        ({"chat_template": str(tmp_path / "rows.jsonl")}, "more than one in ten: name another `chat_template`"),
    ):
        with pytest.raises(UserError, match=message):
            ahead.look(study(tmp_path, CHATS, "chat", **block))
    (tmp_path / "wrong.jinja").write_text("{% for m in messages %}\n{{ m[ }}{% endfor %}")
    with pytest.raises(UserError, match=r"domains.d.chat_template: .*wrong.jinja line 2 is not valid Jinja"):
        ahead.look(study(tmp_path, CHATS, "chat", chat_template=str(tmp_path / "wrong.jinja")))
    assert any("no retention tasks" in line for line in ahead.look(study(tmp_path, PAIRS, "pairs")))
    with pytest.raises(UserError, match="chat_template: rows of the format pairs have no turns"):
        ahead.look(study(tmp_path, PAIRS, "pairs", chat_template=template(tmp_path)))


def test_rows_longer_than_the_model_has_positions(tmp_path):
    tokenizer = byte_tokenizer()
    texts = [{"text": "a" * 100}] * 5
    assert positions.longest_row(_file(tmp_path, texts), tokenizer, 600) == 0
    assert positions.longest_row(_file(tmp_path, texts), tokenizer, 300) == 3 * 102
    chats = [{"messages": conversation("a" * 400, "b")}, {"messages": conversation("a" * 200, "b")}]
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert positions.longest_row(_file(tmp_path, chats), tokenizer, 2000) == 0
    assert positions.longest_row(_file(tmp_path, chats), tokenizer, 300) == len("user: assistant: b") + 402


def _file(folder, rows):
    write(folder / "train.jsonl", rows)
    return folder / "train.jsonl"


def test_show_prints_what_is_learned_and_what_is_left_out(tmp_path, capsys):
    rows = [*CHATS, {"messages": conversation("a", "")}]
    made = study(tmp_path, rows, "chat", chat_template=template(tmp_path))
    show.main(made, domain="d", rows=2, model="")
    said = capsys.readouterr().out
    assert re.search(r"^system: s<\|eos\|>user: ask \d+\?<\|eos\|>assistant: «say \d+\.<\|eos\|>»$", said, re.MULTILINE)
    assert "1 of 61 rows cannot be used: an empty answer (" in said and said.count("---") == 2
    assert "d: chat; 51 train, 3 probe, 6 test rows; 51 training examples of at most 64 tokens" in said
    example = {"input_ids": torch.tensor([*b"abc", EOS_ID]), "labels": torch.tensor([IGNORED, IGNORED, 99, EOS_ID])}
    assert show.marked(example, byte_tokenizer(), colour=True) == "ab\033[32mc<|eos|>\033[0m"
    with pytest.raises(UserError, match="unknown domain 'e'"):
        show.main(made, domain="e", rows=1, model="")
    away = made.model_copy(update={"models": {"tiny": made.models["tiny"].model_copy(update={"source": "hub:a/b"})}})
    with pytest.raises(UserError, match="the tokenizer of tiny is not on this machine yet: `dvc repro model@tiny`"):
        show.main(away, domain="d", rows=1, model="")


def test_a_changed_file_folder_or_template_makes_the_data_stale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "version", lambda name: "1.0")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("a")
    made = study(tmp_path, TEXTS, "chat", chat_template=template(tmp_path), test_rows={"local": "docs"})
    assert set(resolve.local_inputs(made)) == {
        "docs",
        *(str(tmp_path / name) for name in ("rows.jsonl", "general.jsonl", "t.jinja")),
    }
    before = resolve.contents(made)
    for file in ("rows.jsonl", "docs/a.md", "t.jinja"):
        (tmp_path / file).write_text((tmp_path / file).read_text() + " ")
        after = resolve.contents(made)
        assert {name for name in before if before[name] != after[name]} == {"data.json"}, file
        before = after


def test_trials_on_a_domain_without_accuracy_are_judged_in_nats():
    base = {"d_nll": 3.0, "general_nll": 2.0, "perplexity": math.e**2}
    found = [(2.0, 2.5), (1.0, 2.9), (1.0, 3.2), (2.5, 2.006)]  # gains less losses: 0.5, 1.1, 0.8, 0.494
    trials = [{"method": "full", "d_nll": d, "general_nll": g, "perplexity": math.exp(g)} for d, g in found]
    record = {"base": base, "trials": trials + [{"method": "full", "failed": "nan"}]}
    tune._judge(record, "d")
    assert [trial["objective"] for trial in trials] == pytest.approx([0.5, 1.1, 0.8, 0.494])
    assert [trial["chosen"] for trial in record["trials"]] == [False, True, False, False, False]


@pytest.mark.parametrize(("format", "rows"), [("chat", CHATS), ("pairs", PAIRS), ("text", TEXTS)])
def test_parts_train_on_every_format_and_the_loss_is_of_the_labelled_tokens(format, rows):
    """One step over all rows: before it the KL to the base is 0, so the loss is the held-out score of the same rows."""
    tokenizer, model = byte_tokenizer(), build("llama", seed=0)
    made, _, _ = formats.standard(rows[:12], format=format, where="d")
    examples = examples_of(made, tokenizer, 512, domain="d", template=TEMPLATE)
    sequences = [encode_row(tokenizer, row, template=TEMPLATE)[:2] for row in made]
    if format == "text":  # packed: one text, with an end between the documents
        assert len(examples) < len(made)
        sequences = [(e["input_ids"].tolist(), (e["labels"] != IGNORED).tolist()) for e in examples]
    losses = token_losses(model, sequences)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = {"examples": examples, "seed": 0, "base": base, "general": examples[:1]}
    settings = TrainSettings(learning_rate=1e-3, batch=len(examples), micro_batch=2, length=512, probes=0)
    kl = registry.build({"kl": {"strength": 1.0, "text": "domain"}})
    result = fit(model=model, parts=kl, settings=settings, **run)
    assert result.tokens == sum(len(e["input_ids"]) for e in examples)
    nats, tokens = (sum(getattr(one, name) for one in losses) for name in ("nats", "tokens"))
    assert result.curve[-1]["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    replay = registry.build({"replay": {"share": 0.5, "mode": "add"}})
    added = fit(model=build("llama", seed=0), parts=replay, settings=settings, **run).added["replay"]
    assert added["tokens"] > 0
