"""Self-SFT: which sampled answers take the place of the domain's, and what rows, loss and costs become then."""

import pytest
import torch
from torch.nn import functional as F

from experiments.model.random_models import EOS_ID, build, byte_tokenizer
from experiments.training.engine import fit
from experiments.training.settings import TrainSettings
from methods.errors import UserError
from methods.self_sft import SelfSFT
from methods.tools import answers

PROMPTS = [b"What is it?", b"And why so", b"Who says that then?", b"How many"]
SAMPLES = 5
LETTERS = b"abAB"


def writer(*, end):
    """A model that writes a few letters and ends: with the end of text, or with a line."""
    model = build("gptj", seed=1, dtype=torch.float64)
    model.lm_head.bias.data.fill_(-20.0)
    model.lm_head.bias.data[[*LETTERS, EOS_ID if end else ord("\n")]] = 0
    model.lm_head.weight.data.mul_(0.3)  # so that each of them is as likely as the others, nearly
    return model


def rows_of(golds, *, end):
    rows = []
    for prompt, gold in zip(PROMPTS, golds, strict=True):
        ids = torch.tensor([*prompt, *gold] + [EOS_ID] * end)
        labels = ids.clone()
        labels[: len(prompt)] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


class Watched(SelfSFT):
    key = "self_sft"

    def begin(self, *, run, state, examples, **arguments):
        super().begin(run=run, state=state, examples=examples, **arguments)
        self.seen["run"], self.seen["steps"] = run, []

    def examples(self, *, rows, **arguments):
        made = super().examples(rows=rows, **arguments)
        self.seen["steps"].append({row["index"]: row for row in made})
        return made


def train(part, rows, *, end, batch=4, **settings):
    part = Watched(**({"samples": SAMPLES, "tokens": 6, "temperature": 1.0} | part))
    object.__setattr__(part, "seen", {})
    model = writer(end=end)
    chosen = {"batch": batch, "micro_batch": 2, "learning_rate": 1e-3, "clip": 0.0, "probes": 0}
    result = fit(
        model=model,
        parts=(part,),
        examples=rows,
        settings=TrainSettings(**(chosen | settings)),
        seed=3,
        base={name: p.detach().clone() for name, p in model.named_parameters()},
        tokenizer=byte_tokenizer(),
    )
    return result, part.seen


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.thorough)], ids=["lines", "ended"])
def written(request):
    """(end, samples): what the model writes behind each prompt before the first step, as the part asks it."""
    found = {}

    class Asking(SelfSFT):
        key = "asking"

        def begin(self, *, run, **_):
            prompts = [list(prompt) for prompt in PROMPTS for _ in range(SAMPLES)]
            found["all"] = run.sample(prompts=prompts, tokens=6, key=("self_sft", 0), until=("\n",), ended=True)

    model = writer(end=request.param)
    settings = TrainSettings(batch=4, micro_batch=2, learning_rate=1e-3, probes=0)
    given = {"base": dict(model.named_parameters()), "tokenizer": byte_tokenizer(), "seed": 3}
    fit(model=model, parts=(Asking(samples=0),), examples=rows_of([b"aa"] * 4, end=False), settings=settings, **given)
    own = [found["all"][i : i + SAMPLES] for i in range(0, len(found["all"]), SAMPLES)]
    mark = EOS_ID if request.param else ord("\n")
    # the rows that the tests give an answer to have a finished one, and one that is not has letters to spare
    assert all(any(len(ids) > 1 and ids[-1] == mark for ids in each) for each in own), own
    return request.param, own


def first_finished(own, end):
    mark = EOS_ID if end else ord("\n")
    return next(ids for ids in own if len(ids) > 1 and ids[-1] == mark)


def test_the_first_right_answer_takes_the_place_and_the_others_keep_the_domains(written):
    end, own = written
    right = [first_finished(each, end)[:-1] for each in own[:2]]
    golds = [b" " + bytes(ids).swapcase() + b"." for ids in right] + [b"something else"] * 2
    rows = rows_of(golds, end=end)
    result, seen = train({}, rows, end=end)
    (step,) = seen["steps"]
    sampled = [
        next(ids for ids in each if answers.normalised(bytes(ids[:-1]).decode()) == answers.normalised(gold.decode()))
        for each, gold in zip(own[:2], golds, strict=False)
    ]
    for index, ids in enumerate(sampled):
        ids = ids if end else ids[:-1]
        assert step[index]["input_ids"].tolist() == [*PROMPTS[index], *ids]
        assert step[index]["labels"].tolist() == [-100] * len(PROMPTS[index]) + ids
    assert all(torch.equal(step[index][name], rows[index][name]) for index in (2, 3) for name in rows[index])
    assert result.states["self_sft"]["accepted"] == [0.5]

    lengths = [len(row["input_ids"]) for row in rows]
    change = sum(len(row["input_ids"]) for row in step.values()) - sum(lengths)
    asked = sum(len(prompt) * SAMPLES for prompt in PROMPTS)
    texts = sum(len(ids) for each in own for ids in each)
    assert result.tokens == sum(lengths) and change < 0
    assert result.added["self_sft"]["tokens"] == asked + texts + change
    model = writer(end=end)
    nll, count = 0.0, 0
    for row in step.values():
        logits = model(row["input_ids"][None]).logits[0, :-1]
        nll += F.cross_entropy(logits, row["labels"][1:], reduction="sum").item()
        count += int((row["labels"] != -100).sum())
    assert result.curve[0]["loss"] == pytest.approx(nll / count, rel=1e-6)


def test_rows_without_a_right_answer_can_be_left_out(written, capsys):
    end, own = written
    right = first_finished(own[1], end)[:-1]
    rows = rows_of([b"something else", bytes(right), b"nor this, is it", b"x"], end=end)
    result, seen = train({"otherwise": "leave-out"}, rows, end=end)
    (step,) = seen["steps"]
    left = sum(len(row["input_ids"]) for index, row in enumerate(rows) if index != 1)
    assert list(step) == [1] and result.tokens == len(rows[1]["input_ids"])
    assert result.added["self_sft"]["left_out"] == left
    assert "self_sft" not in capsys.readouterr().out
    nothing, seen = train({"otherwise": "leave-out"}, rows_of([b"something else"] * 4, end=end), end=end)
    assert "self_sft: no sampled answer was accepted in epoch 1" in capsys.readouterr().out
    assert len(seen["steps"][0]) == 1 and nothing.curve[0]["loss"] == 0


def test_answers_are_drawn_anew_in_each_epoch_or_once(written):
    end, _ = written
    rows = rows_of([b"a long answer of the domain"] * 4, end=end)
    texts = {}
    for refresh in ("epoch", "once"):
        result, seen = train({"accept": "any", "refresh": refresh}, rows, end=end, epochs=2.0, learning_rate=1e-9)
        texts[refresh] = [{i: row["input_ids"].tolist() for i, row in step.items()} for step in seen["steps"]]
        assert len(result.states["self_sft"]["accepted"]) == (2 if refresh == "epoch" else 1)
    assert texts["once"][0] == texts["once"][1] == texts["epoch"][0] != texts["epoch"][1]


def test_what_is_compared_is_what_extract_finds_last():
    rows = rows_of([b"1 and 2: #### 3", b"#### 4", b"#### 5", b"#### 6"], end=False)
    _, seen = train({"extract": r"#### (\S+)"}, rows, end=False)
    run, part = seen["run"], SelfSFT(extract=r"#### (\S+)")
    assert part._accepts(run, list(b"So #### 7 is wrong, #### 3."), list(b"1 and 2: #### 3"))
    assert not part._accepts(run, list(b"So #### 3 is wrong, #### 7"), list(b"1 and 2: #### 3"))
    assert not part._accepts(run, list(b"It is 3"), list(b"1 and 2: #### 3"))
    for ended, ids, learned in (
        (True, [*b"ab", EOS_ID], [*b"ab", EOS_ID]),
        (True, [*b"ab\nb"], []),
        (True, [EOS_ID], []),
        (False, [*b"ab\n"], [*b"ab"]),
        (False, [*b"ab", EOS_ID], [*b"ab"]),
        (False, [*b"abab"], []),
    ):
        assert answers.finished(run, ids, end=EOS_ID if ended else None, stop="\n") == learned
    with pytest.raises(UserError, match=r"self_sft.extract is 'Answer .*', which matches no answer of the domain"):
        train({"extract": r"Answer (\d)"}, rows, end=False)
    with pytest.raises(UserError, match=r"self_sft.extract is '\(', which is no regular expression"):
        SelfSFT(extract="(")


def test_later_turns_of_a_conversation_stay_as_they_are(written):
    end, own = written
    right = first_finished(own[0], end)[:-1]
    rows = rows_of([bytes(right).swapcase(), b"b" * 9, b"c" * 9, b"d" * 9], end=end)
    more = torch.tensor(list(b" Next? Yes"))
    labels = more.clone()
    labels[:7] = -100
    rows[0] = {"input_ids": torch.cat([rows[0]["input_ids"], more]), "labels": torch.cat([rows[0]["labels"], labels])}
    _, seen = train({}, rows, end=end)
    row = seen["steps"][0][0]
    ids = [*right, EOS_ID] if end else right
    assert row["input_ids"].tolist() == [*PROMPTS[0], *ids, *more.tolist()]
    assert row["labels"].tolist() == [-100] * len(PROMPTS[0]) + ids + labels.tolist()


def test_domains_of_documents_are_refused():
    ids = torch.tensor(list(b"A document."))
    labels = ids.clone()
    labels[0] = -100
    with pytest.raises(UserError, match="self_sft: the domain's rows have no prompt before what is learned"):
        train({}, [{"input_ids": ids, "labels": labels}] * 4, end=False)


@pytest.mark.parametrize(
    ("text", "part", "found"),
    [
        ("it is 15", "5", False),
        ("it is 5.", "5", True),
        ("it is 5.2", "5", False),
        ("it is 2.5", "5", False),
        ("it is -5", "5", False),
        ("the red cell, mostly", "red cell", True),
        ("infrared cell", "red cell", False),
        ("anything", "", False),
    ],
)
def test_a_part_is_found_as_words_or_as_a_whole_number(text, part, found):
    assert answers.contains(text, part) == found


def test_normalised_answers():
    assert answers.normalised(' "The  Ｃell".\n') == "the cell" and answers.normalised("-5") != answers.normalised("5")
