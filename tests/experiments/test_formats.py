"""Domains of documents, pairs and conversations: from a file to rows, to what training and probes read."""

import json
import re

import pytest

from evaluation.rendered import read_jsonl
from experiments.data import expected, formats
from experiments.data.prepared_rows import write_data
from experiments.model import vocabulary
from experiments.model.random_models import byte_tokenizer
from experiments.stages import resolve
from experiments.study import ahead, config
from experiments.study.paths import Paths
from experiments.training.examples import IGNORED, encoded
from methods.errors import UserError

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
        "general": {"rows": general, "importance": 8, "replay": 8, "probe": 2, "test": 8},
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
    told = {"domain": "d", "file": train / "train.jsonl", "tokenizer": tokenizer, "where": "train"}
    vocabulary.refuse_answers(**told, length=64)
    if format != "text":
        with pytest.raises(UserError, match=r"domain d: 51 of 51 rows .*in train.length \(2 tokens\) \(the row '"):
            vocabulary.refuse_answers(**told, length=2)


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
    for given in (turns, json.dumps(turns), str(turns)):
        ((row,), _, _) = formats.standard([{"conversations": given}], format="chat", where="d")
        assert row["messages"] == conversation("u", "a", system="s")


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [{"role": "Human", "content": "u"}, {"role": "bot", "content": "a"}]}, conversation("u", "a")),
        (
            {"messages": [{"role": "developer", "content": "s"}, *conversation("u", "a")]},
            conversation("u", "a", system="s"),
        ),
        (  # parts, as OpenAI's API and multimodal templates write them
            {
                "messages": [
                    turn | {"content": [{"type": "text", "text": part} for part in turn["content"]]}
                    for turn in conversation("u 1", "a, b")
                ]
            },
            conversation("u 1", "a, b"),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "input_text", "text": "u"}]},
                    *conversation("u", "a")[1:],
                ]
            },
            conversation("u", "a"),
        ),
        (  # a table of two kinds of files has the columns of both
            {
                "messages": None,
                "conversations": [
                    {"role": None, "content": None, "from": "human", "value": "u"},
                    {"role": "assistant", "content": "a", "from": None, "value": None, "tool_calls": None},
                ],
            },
            conversation("u", "a"),
        ),
        ({"system": "s", "conversations": conversation("u", "a")}, conversation("u", "a", system="s")),
        ({"system": "t", "messages": conversation("u", "a", system="s")}, conversation("u", "a", system="s")),
    ],
)
def test_conversations_are_read_in_the_dialects_that_people_have(row, messages):
    ((made,), _, left_out) = formats.standard([row], format="chat", where="d")
    assert made["messages"] == messages and not left_out.facts()


BROKEN = {
    "chat": [
        ({"messages": [{"content": "a"}]}, "a turn without a role"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "a turn has the role 'narrator', not one of system"),
        ({"messages": conversation("a", "")}, "an empty answer"),
        ({"messages": conversation(" ", "a")}, "an empty turn of the user"),
        ({"messages": conversation("a")}, "no turn of the assistant"),
        ({"messages": []}, "`messages` is no list of turns"),
        ({"messages": "[{'role': f()}]"}, "`messages` is a text, not a list of turns"),
        ({"messages": "hello"}, "`messages` is a text, not a list of turns"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "the content of a turn is not a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "the content of a turn is not a text"),
        ({"messages": [*conversation("a", "b"), {"role": "tool", "content": "c"}]}, "a turn has the role 'tool', not"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "a turn calls tools"),
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
    assert found.startswith(reason) and facts == {"n": 1, "rows": [f"{tmp_path}/rows.jsonl line 21"]}
    assert f"1 of 61 rows cannot be used: {reason}" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"^domains.d: 11 of 71 rows .*{re.escape(reason)}.*more than one in ten"):
        study_of_many = study(tmp_path, [*rows, *[row] * 11], format)
        write_data(study_of_many, tmp_path / "out")


def test_turns_without_an_answer_at_the_end_are_left_out_of_the_conversation(tmp_path, capsys):
    rows = [{"messages": conversation("a", "b", "c")}, *CHATS]
    rows[1] = {"messages": [turn | {"weight": 0} for turn in rows[1]["messages"]]}
    report = write_data(study(tmp_path, rows, "chat"), tmp_path / "out")
    weighed, facts = report["left_out"]["domains.d"]["changed"].values()
    assert facts["n"] == weighed["n"] == 1 and "domains.d: the last turns have no answer" in capsys.readouterr().out
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


def test_own_test_rows_are_all_scored_where_no_split_is_written(tmp_path, capsys):
    tests = write(tmp_path / "test.jsonl", TEXTS[:4])
    made = study(tmp_path, TEXTS, "text", test_rows=tests)
    facts = write_data(made, tmp_path / "out")["domains"]["d"]
    assert facts["n"] == {"train": 53, "probe": 3, "test": 4} and facts["duplicates"]["between"] == 4
    assert "no `split`: all of `test_rows` are scored, and 3 probed (a twentieth" in capsys.readouterr().out


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
        ({}, "domains.d is of the format chat, and the tokenizer of tiny has no chat template: name a file"),
        ({"chat_template": "none.jinja"}, "chat_template is 'none.jinja': there is no such file"),
        (
            {"chat_template": str(tmp_path / "rows.jsonl")},
            r"the row 'ask \d+\?', the row '.*, …[)][.] That is most: name another `chat_template`",
        ),
    ):
        with pytest.raises(UserError, match=message):
            ahead.look(study(tmp_path, CHATS, "chat", **block))
    (tmp_path / "wrong.jinja").write_text("{% for m in messages %}\n{{ m[ }}{% endfor %}")
    with pytest.raises(UserError, match=r"domains.d.chat_template: .*wrong.jinja line 2 is not valid Jinja"):
        ahead.look(study(tmp_path, CHATS, "chat", chat_template=str(tmp_path / "wrong.jinja")))
    (tmp_path / "wrong.json").write_text('{"chat_template": [{"name": "default"}]}')
    with pytest.raises(UserError, match=r"domains.d.chat_template: .*wrong.json has no text `chat_template`: name"):
        ahead.look(study(tmp_path, CHATS, "chat", chat_template=str(tmp_path / "wrong.json")))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    write_data(study(tmp_path, CHATS, "chat", chat_template=str(tmp_path / "tokenizer_config.json")), tmp_path / "out")
    assert (tmp_path / "out" / "train" / "d" / "chat_template.jinja").read_text() == TEMPLATE
    assert any("no retention tasks" in line for line in ahead.look(study(tmp_path, PAIRS, "pairs")))
    with pytest.raises(UserError, match="chat_template: rows of the format pairs have no turns"):
        ahead.look(study(tmp_path, PAIRS, "pairs", chat_template=template(tmp_path)))


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
