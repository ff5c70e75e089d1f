"""What training reads of documents, pairs and conversations: examples, probes, trials, and runs with parts."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from evaluation.encode import encode_text
from evaluation.labelled import encode_row
from evaluation.probe import load_probes, probe
from evaluation.rendered import read_jsonl
from evaluation.token_losses import token_losses
from experiments.data import formats
from experiments.data.prepared_rows import write_data
from experiments.model import positions
from experiments.model.random_models import EOS_ID, build, byte_tokenizer
from experiments.training.engine import fit
from experiments.training.examples import IGNORED, examples_of, packed
from experiments.training.settings import TrainSettings
from methods import registry
from methods.errors import UserError
from methods.tools.jsonl import Row
from tests.experiments.test_formats import CHATS, PAIRS, TEMPLATE, TEXTS, conversation, study, template, write


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
    with pytest.raises(UserError, match=r"domain d: 3 of 5 rows .*That is most: .*raise `train.length`"):
        examples_of(rows[:1] * 3 + rows[1:3], tokenizer, 64, domain="d", template=TEMPLATE)


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


def test_a_completion_without_a_token_of_its_own_is_left_out_and_many_are_refused(tmp_path, capsys):
    """A token of this tokenizer runs over the border between prompt and completion."""
    tokenizer = Tokenizer(BPE(vocab={"a": 0, ":": 1, ")": 2, ":)": 3, "<e>": 4}, merges=[(":", ")")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")
    made, _, _ = formats.standard(
        [{"prompt": "a:", "completion": completion} for completion in ["a"] * 19 + [")"]], format="pairs", where="d"
    )
    assert len(examples_of(made, tokenizer, 8, domain="d")) == 19
    assert "domain d: 1 of 20 rows cannot be used: the answer ')' has no token of its own" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"domain d: 1 of 1 rows cannot be used: the answer '.' .*That is most"):
        examples_of([row for row in made if row["choices"] == [")"]], tokenizer, 8, domain="d")
    (tmp_path / "probe").mkdir()
    write(tmp_path / "probe" / "d.jsonl", made[-2:])
    (probed,) = load_probes(tmp_path / "probe", tokenizer)["d"]
    assert probed.requests == (([0, 1], [0, 4]),)
    assert "d: 1 of 2 probe rows cannot be encoded (the answer ')' has no token of" in capsys.readouterr().out
    write(tmp_path / "probe" / "d.jsonl", made[-1:])
    with pytest.raises(UserError, match="d: 1 of 1 probe rows cannot be encoded"):
        load_probes(tmp_path / "probe", tokenizer)
