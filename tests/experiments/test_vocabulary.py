"""What a model and its tokenizer must have in common, and what a training row must have."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from experiments.model import vocabulary
from experiments.model.random_models import build
from experiments.model.random_models import byte_tokenizer as make_tokenizer
from experiments.model.weights import materialise
from experiments.stages.train import encoded
from experiments.study import ahead
from experiments.study.schema import Model
from experiments.training.prepared import encoded_text
from methods.errors import UserError
from tests.evaluation.test_encode import with_bos, with_end, with_merges, without_specials
from tests.experiments.test_ahead import rows, study


def test_tokens_beyond_the_embedding_are_counted_and_named(tiny_llama, tiny_llama_untied):
    added = make_tokenizer()
    assert vocabulary.check(rows=vocabulary.embedded(tiny_llama), tokenizer=added) == []
    added.add_tokens(["<one>", "<two>"])
    for model in (tiny_llama, tiny_llama_untied):
        with pytest.raises(
            UserError,
            match="2 tokens for which.*'<one>' is number 258 and the embedding ends with number 257.*to 260 rows",
        ):
            vocabulary.check(rows=vocabulary.embedded(model), tokenizer=added)
    tiny_llama.resize_token_embeddings(260)  # as the message says
    assert vocabulary.check(rows=vocabulary.embedded(tiny_llama), tokenizer=added) == []


def test_the_model_stage_refuses_by_name_and_keeps_nothing(tmp_path):
    block = {"source": "random:llama", "config": {"vocab_size": 200, "pad_token_id": None}}
    with pytest.raises(UserError, match="model 'small': its tokenizer has 58 tokens"):
        materialise(name="small", block=Model(**block), packages={}, out_dir=tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_what_a_tokenizer_adds_or_lacks_is_said(tiny_llama):
    large = build("llama", seed=0, vocab_size=330)
    (behind,) = vocabulary.check(rows=vocabulary.embedded(tiny_llama), tokenizer=with_end())
    assert "adds '<|eos|>' to the end of every text" in behind
    (neither,) = vocabulary.check(rows=vocabulary.embedded(tiny_llama), tokenizer=without_specials())
    assert "neither a BOS nor an EOS" in neither
    assert (
        vocabulary.check(rows=vocabulary.embedded(large), tokenizer=with_bos())
        == vocabulary.check(rows=vocabulary.embedded(large), tokenizer=with_merges())
        == []
    )


def test_a_tokenizer_that_draws_is_refused():
    drawing = json.loads(with_merges().backend_tokenizer.to_str())
    drawing["model"]["dropout"] = 0.1
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(drawing)), eos_token="<|eos|>")
    with pytest.raises(UserError, match="at random .dropout 0.1"):
        vocabulary.check(rows=vocabulary.embedded(build("llama", seed=0, vocab_size=330)), tokenizer=tokenizer)


def training(tmp_path, rows):
    path = tmp_path / "sums" / "train.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "".join(json.dumps({"context": context, "choices": [answer], "gold": 0}) + "\n" for context, answer in rows)
    )
    return path


def test_training_rows_keep_their_answers_whole(tmp_path, capsys):
    path = training(tmp_path, [("Question?", " yes")] * 18 + [("A long question?", " no"), ("Q", " a long answer")])
    examples = encoded(path, make_tokenizer(), 14)
    assert len(examples) == 19 and bytes(examples[18]["input_ids"].tolist()) == b"ng question? no"[-14:]
    assert [(e["labels"] >= 0).sum().item() for e in examples] == [4] * 18 + [3]
    said = capsys.readouterr().out
    problem = "the answer leaves no room for its prompt in train.length (14 tokens)"
    assert f"1 of 20 rows cannot be used: {problem} ({path} line 20). They are left out" in said
    problem = "the prompt loses its beginning, to fit into train.length (14 tokens), in 1 of 20 rows"
    assert f"{problem} ({path} line 19)" in said
    with pytest.raises(UserError, match="domain sums: 20 of 20 rows .*: set `train.length` to 15 or more"):
        encoded(path, make_tokenizer(), 3)
    assert len(encoded(path, make_tokenizer(), 15)) == 20


def test_a_training_answer_without_a_token_is_told_by_its_domain(tmp_path):
    with pytest.raises(
        UserError,
        match="domain sums, a training row: the answer ' water' has no token of its own after.*runs over the border",
    ):
        encoded(training(tmp_path, [("Question: what?\nAnswer:", " water")]), with_merges(), 64)


def test_training_and_general_text_have_no_end_that_the_tokenizer_adds(tmp_path):
    path, text = training(tmp_path, [("Question?", " yes"), ("Q", " no")]), tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "Water is wet."}) + "\n")
    for read, file in (
        (lambda tokenizer: encoded(path, tokenizer, 32), path),
        (lambda tokenizer: encoded_text(text, tokenizer, 32), text),
    ):
        for found, right in zip(read(with_end()), read(make_tokenizer()), strict=True):
            assert (
                found["input_ids"].tolist() == right["input_ids"].tolist()
                and found["labels"].tolist() == right["labels"].tolist()
            ), file


def folder_of(path, tokenizer):
    build("llama", seed=0, vocab_size=330).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return ("models/llama-tiny/source", f"path:{path}")


def test_plan_already_refuses_a_tokenizer_that_does_not_fit(tmp_path):
    added = make_tokenizer()
    added.add_tokens([f"<{i}>" for i in range(80)])
    with pytest.raises(
        UserError,
        match="models.llama-tiny: its tokenizer has 8 tokens for which the model has no embedding: "
        "'<72>' is number 330",
    ):
        ahead.look(study(tmp_path, folder_of(tmp_path / "added", added)))
    crossing = (
        "domains/sums/rows",
        rows(
            tmp_path / "rows.jsonl",
            [{"question": f"what? {i}", "choices": [" water", " no"], "gold": 0} for i in range(120)],
        ),
    )
    prompt = (
        "domains/sums/task",
        {
            "doc_to_text": "{{question}}\nAnswer:",
            "target_delimiter": "",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}],
        },
    )
    with pytest.raises(
        UserError, match="models.llama-tiny: domain sums, a training row: the answer ' water' has no token of its own"
    ):
        ahead.look(study(tmp_path, folder_of(tmp_path / "merges", with_merges()), crossing, prompt))
    ahead.look(study(tmp_path, folder_of(tmp_path / "bytes", make_tokenizer()), crossing, prompt))
