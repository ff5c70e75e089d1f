"""A domain of documents, pairs or conversations: its score is the nats of its labelled tokens, from the model's own."""

import json
import math

import pytest
import torch

from evaluation import encode, harness
from evaluation.labelled import encode_row
from evaluation.retention import change
from experiments.model.random_models import build
from experiments.model.random_models import byte_tokenizer as tokenizer
from methods.errors import UserError
from tests.evaluation.conftest import TEXT, write_rows

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TURNS = [("user", "What is wet?"), ("assistant", "Water."), ("user", "And dry?"), ("assistant", "Sand, Müller says.")]
CHAT = [
    {"id": "a", "messages": [{"role": role, "content": text} for role, text in TURNS]},
    {"id": "b", "messages": [{"role": role, "content": text} for role, text in TURNS[:2]]},
]
PAIRS = [{"id": str(i), "context": f"Q{i}?\nA:", "choices": [" yes" * i], "gold": 0, "end": True} for i in (1, 2, 3)]
ROWS = {"text": [{"id": row["id"], "text": row["text"]} for row in TEXT], "pairs": PAIRS, "chat": CHAT}


@pytest.fixture
def folder(tmp_path, request):
    kind = request.param
    entry = {"name": "own", "role": "domain", "format": kind, "task": None, "metric": "nats_per_token"}
    entry |= {"chance": None, "file": "own.jsonl"} | ({"template": "chat_template.jinja"} if kind == "chat" else {})
    general = {"name": "general", "role": "perplexity", "task": "general_text", "metric": "perplexity"}
    write_rows(tmp_path / "own.jsonl", ROWS[kind])
    write_rows(tmp_path / "general.jsonl", TEXT)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    listed = [entry, general | {"chance": None, "file": "general.jsonl"}]
    (tmp_path / "tasks.json").write_text(json.dumps(listed))
    return tmp_path


@pytest.mark.parametrize("folder", ROWS, indirect=True)
@torch.no_grad()
def test_score_of_a_domain_is_the_nats_of_its_labelled_tokens(folder, tiny_gptj, byte_tokenizer):
    (kind,) = (entry["format"] for entry in harness.entries(folder) if "format" in entry)
    scores, items = harness.score(model=tiny_gptj, tokenizer=byte_tokenizer, tasks_dir=folder, reference=tiny_gptj)
    found, own = scores["tasks"]["own"], items[items.task == "own"]
    nats, tokens, size = [], [], 0
    for row in ROWS[kind]:
        ids, labels, count = encode_row(byte_tokenizer, row, template=TEMPLATE)
        total, at = 0.0, 1
        for context, piece in encode.windows(ids[1:], prefix=ids[0], max_length=512):
            logits = tiny_gptj(torch.tensor([context + piece[:-1]])).logits[0, len(context) - 1 :]
            cost = -logits.double().log_softmax(-1).gather(1, torch.tensor(piece)[:, None])[:, 0]
            total += cost[torch.tensor(labels[at : at + len(piece)])].sum().item()
            at += len(piece)
        nats, tokens, size = [*nats, total], [*tokens, sum(labels)], size + count
    assert found["value"] == pytest.approx(sum(nats) / sum(tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / size / math.log(2), rel=1e-5)
    assert (found["tokens"], found["bytes"], found["n"]) == (sum(tokens), size, len(ROWS[kind]))
    about = {"role": "domain", "format": kind, "unit": "nats", "higher_is_better": False, "per_item": True}
    assert about.items() <= found.items() and found["compared"] == -found["value"]
    assert own.score.mean() == pytest.approx(found["compared"], rel=1e-12)
    assert own.log_likelihood.tolist() == pytest.approx([-each for each in nats], rel=1e-5)
    assert own.tokens.tolist() == tokens and own.kl.isna().all()
    assert scores["general"]["kl"] == 0
    other, _ = harness.score(model=build("gptj", seed=5), tokenizer=byte_tokenizer, tasks_dir=folder)
    gain = change(other["tasks"]["own"], found)
    assert gain == {"change": other["tasks"]["own"]["value"] - found["value"], "unit": "nats"}


@pytest.mark.parametrize("folder", ["chat"], indirect=True)
def test_the_template_of_prompts_is_not_that_of_a_domain_of_conversations(folder, tiny_llama):
    """It is scored in the tokenizer's own template, in which it was trained, and prompts are written on one day."""
    (entry, general), own = harness.entries(folder), tokenizer()
    (folder / "tasks.json").write_text(json.dumps([entry | {"template": None}, general]))
    own.chat_template = TEMPLATE
    scores, _ = harness.score(model=tiny_llama, tokenizer=own, tasks_dir=folder)
    prompts = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    other, _ = harness.score(model=tiny_llama, tokenizer=own, tasks_dir=folder, chat_template=prompts)
    assert other["tasks"]["own"] == scores["tasks"]["own"]
    assert own.apply_chat_template(CHAT[1]["messages"], tokenize=False).startswith("26 Jul 2024user: ")


@pytest.mark.parametrize("folder", ["chat"], indirect=True)
def test_rows_that_a_tokenizer_does_not_take_are_counted_and_the_others_scored(
    folder, tiny_llama, byte_tokenizer, capsys
):
    strange = {"id": "c", "messages": [{"role": "user", "content": "Only a question?"}]}
    write_rows(folder / "own.jsonl", [CHAT[0], strange, CHAT[1], strange])
    scores, items = harness.score(model=tiny_llama, tokenizer=byte_tokenizer, tasks_dir=folder)
    assert items[items.task == "own"].doc_id.tolist() == [0, 2] and scores["tasks"]["own"]["n"] == 2
    problem = "row 2: no token of it is written by the assistant (and rows 4)"
    assert f"warning: own: 2 of 4 rows of own.jsonl are not scored, {problem}" in capsys.readouterr().out
    write_rows(folder / "own.jsonl", [strange])
    with pytest.raises(UserError, match="own: none of its rows can be scored with this tokenizer, row 1"):
        harness.score(model=tiny_llama, tokenizer=byte_tokenizer, tasks_dir=folder)
