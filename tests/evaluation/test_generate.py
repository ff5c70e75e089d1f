"""Answers that are written: equal to HFLM's texts, scored as lm-eval scores them, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance

from evaluation import encode, generate, harness, lm
from evaluation.task import make_task, render
from experiments.model.random_models import EOS_ID, build
from methods.errors import UserError
from tests.evaluation.conftest import write_rows

ROWS = [
    {"question": f"Ann has {a} pens and buys {b}. How many?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"}
    for a, b in ((1, 2), (3, 5), (20, 4), (7, 7), (9, 1))
]
GSM8K = {
    "include": "gsm8k",
    "num_fewshot": 0,
    "generation_kwargs": {"until": ["Question:", "</s>"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 24},
}


def task(tmp_path, change=None, metric="exact_match,strict-match", rows=ROWS):
    return make_task("math", GSM8K | (change or {}), write_rows(tmp_path / "math.jsonl", rows), metric=metric)


@pytest.fixture(scope="module")
def learned():
    """A tiny Llama that has learned the rows by heart, labels and end of text as training has them."""
    from experiments.model.random_models import byte_tokenizer

    tokenizer, model = byte_tokenizer(), build("llama", seed=0)
    examples = []
    for row in ROWS:
        ids, start = encode.encode_pair(
            tokenizer, f"Question: {row['question']}\nAnswer:", f" {row['answer']}", end=True
        )
        examples.append((torch.tensor([ids]), torch.tensor([[-100] * start + ids[start:]])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        for ids, labels in examples:
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def requests(prompts, **settings):
    return [
        Instance(
            request_type="generate_until", doc={}, arguments=(prompt, settings), idx=0, metadata=("math", number, 1)
        )
        for number, prompt in enumerate(prompts)
    ]


PROMPTS = [
    "Question: one?\nAnswer:",
    "a much longer prompt, so that the others are padded\nA:",
    "x",
    "Question: one?\nAnswer: and",
]


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_are_hflms(architecture, batch_size, byte_tokenizer):
    model = build(architecture, seed=1)
    ours, _ = lm.build(model, byte_tokenizer, scorer="shared-prefix", batch_size=batch_size)
    theirs, _ = lm.build(model, byte_tokenizer, scorer="hflm", batch_size=batch_size)
    free = theirs.generate_until(requests(PROMPTS, until=[], max_gen_toks=30))
    assert ours.generate_until(requests(PROMPTS, until=[], max_gen_toks=30)) == free
    assert len(set(free)) > 1 and all(len(text) > 2 for text in free)
    stops = [free[0][3:5], free[1][6]]  # met at another place in each row, or not at all
    cut = ours.generate_until(requests(PROMPTS, until=stops, max_gen_toks=30))
    assert cut == theirs.generate_until(requests(PROMPTS, until=stops, max_gen_toks=30))
    assert all(whole.startswith(text) for text, whole in zip(cut, free)) and len(cut[0]) <= 3 and cut != free


def test_a_text_is_the_argmax_token_by_token(byte_tokenizer, tiny_gptj):
    ids = list(b"Question: one?\nAnswer:")
    written = []
    with torch.no_grad():
        for _ in range(20):
            written.append(tiny_gptj(torch.tensor([ids + written])).logits[0, -1].argmax().item())
    prompts = [
        generate.Prompt(ids=tuple(ids), until=(), tokens=20),
        generate.Prompt(ids=tuple(b"much longer " * 9), until=(), tokens=20),
    ]
    text = generate.texts(model=tiny_gptj, tokenizer=byte_tokenizer, prompts=prompts, max_length=512, batch_size=2)[0]
    end = written.index(EOS_ID) if EOS_ID in written else None
    assert text == byte_tokenizer.decode(written[:end], skip_special_tokens=True)


def test_a_row_stops_when_it_has_met_a_stop_string(learned, byte_tokenizer, monkeypatch):
    """Two rows that meet different strings end the batch at the later of the two, not at the limit."""
    prompts = [f"Question: {row['question']}\nAnswer:" for row in ROWS[:2]]
    asked, _ = lm.build(learned, byte_tokenizer, scorer="shared-prefix", batch_size=2)
    widths, real = [], learned.generate

    def watched(**call):
        out = real(**call)
        widths.append((call["input_ids"].shape[1], out.shape[1]))
        return out

    monkeypatch.setattr(learned, "generate", watched)
    assert asked.generate_until(requests(prompts, until=["+2=", "+5"], max_gen_toks=200)) == [" 1", " 3"]
    ((before, after),) = widths
    assert after - before == len(" 1+2=")


def test_a_long_prompt_loses_its_beginning(learned, byte_tokenizer):
    end = b"Question: " + ROWS[0]["question"].encode() + b"\nAnswer:"
    asked = [generate.Prompt(ids=tuple(b"x" * n + end), until=("#",), tokens=30) for n in (600, 900)]
    short = [generate.Prompt(ids=prompt.ids[-(512 - 30) :], until=("#",), tokens=30) for prompt in asked]
    settings = {"model": learned, "tokenizer": byte_tokenizer, "max_length": 512, "batch_size": 2}
    assert generate.texts(prompts=asked, **settings) == generate.texts(prompts=short, **settings)


@pytest.mark.parametrize("scorer", lm.SCORERS)
def test_exact_match_through_lm_evals_filters(scorer, learned, byte_tokenizer, tmp_path):
    entry = {
        "name": "math",
        "role": "domain",
        "task": GSM8K,
        "metric": "exact_match,strict-match",
        "chance": 0.0,
        "file": "math.jsonl",
    }
    wrong = ROWS[2] | {"answer": "20-4=16\n#### 16"}  # what the model learned is 24
    write_rows(tmp_path / "math.jsonl", [*ROWS[:2], wrong, *ROWS[3:]])
    (tmp_path / "tasks.json").write_text(json.dumps([entry]))
    scores, items = _scored(learned, byte_tokenizer, tmp_path, scorer)
    assert scores["tasks"]["math"] | {"version": 0, "prompt": ""} == {
        "role": "domain",
        "metric": "exact_match,strict-match",
        "value": 0.8,
        "n": 5,
        "chance": 0.0,
        "version": 0,
        "prompt": "",
        "unit": "share",
        "higher_is_better": True,
        "per_item": True,
        "compared": 0.8,
        "metrics": {"exact_match,strict-match": 0.8, "exact_match,flexible-extract": 0.8},
    }
    items = items[items.task == "math"]
    assert items.score.tolist() == [1, 1, 0, 1, 1]
    assert items[["choice", "gold", "log_likelihood"]].isna().all(axis=None)
    untaught, _ = _scored(build("llama", seed=0), byte_tokenizer, tmp_path, scorer)
    assert untaught["tasks"]["math"]["value"] == 0


def _scored(model, tokenizer, folder, scorer):
    """Scores with the general text that every domain has."""
    listed = json.loads((folder / "tasks.json").read_text())
    if not any(entry["role"] == "perplexity" for entry in listed):
        listed.append(
            {
                "name": "general",
                "role": "perplexity",
                "task": "general_text",
                "metric": "perplexity",
                "chance": None,
                "file": "general.jsonl",
            }
        )
        write_rows(folder / "general.jsonl", [{"text": "Water is wet."}])
        (folder / "tasks.json").write_text(json.dumps(listed))
    return harness.score(model=model, tokenizer=tokenizer, tasks_dir=folder, scorer=scorer, batch_size=2)


def test_the_metrics_filter_is_the_one_that_counts(learned, byte_tokenizer, tmp_path):
    """A solution without `####` has no strict answer, and its last number is still found."""
    cut = GSM8K | {"generation_kwargs": {"until": ["#"], "max_gen_toks": 24}}
    write_rows(tmp_path / "math.jsonl", ROWS)
    values = {}
    for name in ("strict-match", "flexible-extract"):
        entry = {
            "name": "math",
            "role": "domain",
            "task": cut,
            "metric": f"exact_match,{name}",
            "chance": 0.0,
            "file": "math.jsonl",
        }
        (tmp_path / "tasks.json").write_text(json.dumps([entry]))
        scores, items = _scored(learned, byte_tokenizer, tmp_path, "shared-prefix")
        values[name] = scores["tasks"]["math"]["value"]
        assert items[items.task == "math"].score.mean() == values[name]
    assert values == {"strict-match": 0.0, "flexible-extract": 1.0}


def test_rendered_with_the_whole_solution_and_its_end(tmp_path, byte_tokenizer):
    row = render(task(tmp_path))[0]
    assert {k: v for k, v in row.items() if k != "id"} == {
        "context": "Question: Ann has 1 pens and buys 2. How many?\nAnswer:",
        "choices": [" 1+2=3\n#### 3"],
        "gold": 0,
        "end": True,
    }
    ids, start = encode.encode_pair(byte_tokenizer, row["context"], row["choices"][0], end=True)
    assert bytes(ids[start:-1]) == b" 1+2=3\n#### 3" and ids[-1] == EOS_ID
    assert encode.encode_pair(byte_tokenizer, row["context"], row["choices"][0]) == (ids[:-1], start)


def test_several_right_answers_render_as_the_first(tmp_path):
    several = {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "answers",
        "metric_list": [{"metric": "exact_match"}],
    }
    rows = [{"q": "a", "answers": ["yes", "y"]}]
    made = make_task("qa", several, write_rows(tmp_path / "qa.jsonl", rows), metric="exact_match")
    assert render(made)[0]["choices"] == [" yes"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"generation_kwargs": {"do_sample": True}}, "math: generation_kwargs.do_sample is True.*greedily"),
        ({"generation_kwargs": {"temperature": 0.7}}, "generation_kwargs.temperature is 0.7"),
        (
            {"generation_kwargs": {"max_gen_toks": "24"}},
            "generation_kwargs.max_gen_toks is '24': it must be a whole number of tokens",
        ),
        ({"generation_kwargs": {"max_gen_toks": 0}}, "generation_kwargs.max_gen_toks is 0"),
        ({"generation_kwargs": {"until": ["\n", ""]}}, r"generation_kwargs.until is \['\\n', ''\]: it must be a text"),
        (
            {"filter_list": [{"name": "strict-match", "filter": [{"function": "regex", "regex_pattern": "("}]}]},
            "filter 'strict-match' of filter_list cannot work on answers",
        ),
        ({"generation_kwargs": {"top_p": 0.9}}, "generation_kwargs.top_p is not supported"),
        ({"repeats": 8}, "repeats is 8"),
        ({"num_fewshot": 5}, "num_fewshot is 5"),
        ({"doc_to_text": "{{query}}"}, "no column 'query'"),
    ],
)
def test_what_cannot_be_followed_is_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        task(tmp_path, change)


def test_a_filter_that_the_task_does_not_have(tmp_path):
    with pytest.raises(
        UserError, match=r"'exact_match,strict' names none of its filters \['strict-match', 'flexible-extract'\]"
    ):
        task(tmp_path, metric="exact_match,strict")


@pytest.mark.parametrize("scorer", lm.SCORERS)
def test_answers_longer_than_the_model_are_refused(scorer, byte_tokenizer, tiny_llama):
    asked, _ = lm.build(tiny_llama, byte_tokenizer, scorer=scorer, batch_size=2)
    with pytest.raises(UserError, match="task math: an answer may have 512 tokens, but the model takes 512"):
        asked.generate_until(requests(["x"], until=[], max_gen_toks=512))


@pytest.mark.parametrize("scorer", lm.SCORERS)
def test_answers_are_not_written_by_logits_that_are_no_numbers(scorer, byte_tokenizer):
    model = build("llama", seed=0)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    asked, _ = lm.build(model, byte_tokenizer, scorer=scorer, batch_size=2)
    with pytest.raises(UserError, match="task math: the model's logits are NaN"):
        asked.generate_until(requests(["x"], until=[], max_gen_toks=4))


def test_lm_evals_own_scorer_is_not_asked_to_write_behind_nothing(byte_tokenizer, tiny_llama):
    asked, _ = lm.build(tiny_llama, byte_tokenizer, scorer="hflm", batch_size=2)
    with pytest.raises(
        UserError,
        match="task math, row 1 of those scored: lm-eval's HFLM writes nothing after a prompt without a token",
    ):
        asked.generate_until(requests([""], until=[], max_gen_toks=4))


def test_both_ends_of_text_count(byte_tokenizer, tiny_llama):
    tiny_llama.generation_config.eos_token_id = [10, EOS_ID]
    assert generate.ends_of_text(tiny_llama, byte_tokenizer) == [10, EOS_ID]
    assert generate.ends_of_text(tiny_llama, SimpleNamespace(eos_token_id=7)) == [7, 10, EOS_ID]
    tiny_llama.generation_config.eos_token_id = None
    assert generate.ends_of_text(tiny_llama, byte_tokenizer) == [EOS_ID]


@pytest.mark.parametrize("scorer", lm.SCORERS)
def test_quiet_where_nobody_watches(scorer, byte_tokenizer, tiny_llama, capfd):
    tiny_llama.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)  # as LLaMA-3's own file has it
    asked, _ = lm.build(tiny_llama, byte_tokenizer, scorer=scorer, batch_size=2)
    asked.generate_until(requests(PROMPTS, until=["zz"], max_gen_toks=4))
    assert capfd.readouterr() == ("", "")
