"""Replay: shares of tokens, draws that depend on seed, step and row alone, rows of the user's, and what is counted."""

import json
import re
from statistics import mean, stdev

import pytest
import torch

from experiments.commands import plan, tune
from experiments.model.random_models import byte_tokenizer
from experiments.stages import data, model, prepare, resolve, train
from experiments.study.cells import Cell
from experiments.training.engine import fit
from experiments.training.flops import Flops
from experiments.training.settings import TrainSettings
from methods.errors import UserError
from methods.part import Run
from methods.replay import Replay
from methods.tools.files import read_json
from tests.experiments.test_prepare import load


def rows_of(count, *, seed, longest=30, labelled=None):
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(2, 31, (int(torch.randint(3, longest + 1, (), generator=draw)),), generator=draw)
        labels = ids.clone()
        labels[: len(ids) - labelled if labelled else 0] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


DOMAIN, GENERAL = rows_of(40, seed=0, labelled=2), rows_of(25, seed=1, longest=90)


def tokens(rows):
    return sum(len(row["input_ids"]) for row in rows)


def begun(part, *, seed=0, domain=DOMAIN, general=GENERAL):
    """(run, state) of a run that has begun, with bytes for tokens."""
    run = Run(model=None, weights={}, base={}, seed=seed, device="cpu", encode=byte_tokenizer().encode)
    state = {}
    part.begin(run=run, state=state, examples=domain, general=general)
    return run, state


def step_of(part, step, *, rows=None, **about):
    run, state = begun(part, **about)
    rows = rows or [DOMAIN[(3 * step + i) % 40] | {"index": (3 * step + i) % 40} for i in range(8)]
    return rows, part.examples(run=run, state=state, rows=list(rows), step=step)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("mode", ["swap", "add"])
def test_the_share_of_replayed_tokens(mode, share):
    part = Replay(share=share, mode=mode)
    run, state = begun(part)
    off, longer = [], []
    for step in range(600):
        rows = [DOMAIN[(3 * step + i) % 40] | {"index": (3 * step + i) % 40} for i in range(8)]
        actual = part.examples(run=run, state=state, rows=list(rows), step=step)
        own = [row for row in actual if "index" in row]
        assert all(any(row is other for other in rows) for row in own)
        assert mode == "swap" or len(own) == len(rows)
        replayed = tokens(actual) - tokens(own)
        off.append(replayed - share * (tokens(rows) if mode == "swap" else tokens(rows) / (1 - share)))
        longer.append(tokens(actual) - (tokens(rows) if mode == "swap" else tokens(rows) / (1 - share)))
    assert max(map(abs, longer)) < 30  # to within one row: none is longer than the domain's longest
    for difference in (off, longer):  # on average exactly
        assert abs(mean(difference)) < 3 * stdev(difference) / len(difference) ** 0.5


def test_draws_depend_on_seed_step_and_row_alone():
    part = Replay(share=0.5)

    def shown(step, seed):
        return [row["input_ids"].tolist() for row in step_of(part, step, seed=seed)[1]]

    assert shown(7, 3) == shown(7, 3)  # whatever was drawn before: each call begins anew
    assert shown(7, 3) != shown(8, 3) and shown(7, 3) != shown(7, 4)


def test_a_row_is_cut_to_the_longest_of_the_domain():
    part, kinds = Replay(share=0.9, mode="add"), set()
    for step in range(10):
        for row in step_of(part, step)[1][8:]:
            ids = row["input_ids"].tolist()
            assert len(ids) <= 30 and torch.equal(row["input_ids"], row["labels"])
            (whole,) = [text for one in GENERAL if str(ids)[1:-1] in str(text := one["input_ids"].tolist())][
                :1
            ]  # any part of a text
            kinds.add(whole[: len(ids)] == ids)
    assert kinds == {True, False}  # not its beginning alone


def test_at_no_share_nothing_is_read_or_changed():
    part = Replay(share=0.0, path="nowhere.jsonl")
    rows, actual = step_of(part, 0, general=())
    assert actual == rows and part.added().trained == 0


def test_the_users_rows(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    long = "c" * 30
    lines = [
        {"text": "some text"},
        {"prompt": "p" * 40 + " ", "completion": "yes"},
        {"prompt": "a", "completion": long},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part = Replay(share=0.9, mode="add", path=str(path))
    drawn = [row for step in range(20) for row in step_of(part, step, general=())[1][8:]]
    encode = byte_tokenizer().encode
    texts = {(tuple(row["input_ids"].tolist()), tuple(row["labels"].tolist())) for row in drawn}
    text, pair = tuple(encode("some text")), encode("p" * 40) + encode("p" * 40 + " yes")[len(encode("p" * 40)) :]
    pair = tuple(pair[-30:])  # the prompt loses its beginning
    assert texts == {(text, text), (pair, (-100,) * 26 + pair[26:])}
    assert f"replay: 1 of 3 rows of {path} cannot be learned in 30 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not JSON"),
        ('{"question": "q"}', "line 2 must have either `text` or `prompt` and `completion`"),
        ('{"text": "t", "prompt": "p"}', "line 2 must have either `text` or `prompt` and `completion`"),
        ('{"prompt": "p"}', "line 2 must have either"),
        ('{"text": " "}', "line 2: `text` must be text that is not empty"),
        ('{"prompt": "p", "completion": 4}', "line 2: `completion` must be text"),
    ],
)
def test_a_wrong_line_is_named_before_anything_runs(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match="^" + re.escape(f"replay.path: {path} {message}")):
        Replay(path=str(path)).look(shapes={})
    path.write_text("")
    with pytest.raises(UserError, match=f"{path} has no rows"):
        Replay(path=str(path)).look(shapes={})
    with pytest.raises(UserError, match=f"^replay.path: {tmp_path} cannot be read"):
        Replay(path=str(tmp_path)).look(shapes={})


def test_without_text_it_says_what_to_set():
    with pytest.raises(UserError, match="set `general.replay`, or name rows in replay.path"):
        begun(Replay(), general=())
    with pytest.raises(UserError, match="no row of the general text can be learned in 30 tokens"):
        begun(Replay(), general=[{"input_ids": torch.tensor([5]), "labels": torch.tensor([5])}])


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("mode", ["swap", "add"])
def test_what_the_domain_and_the_replay_cost(make, mode, batch):
    settings = TrainSettings(batch=batch, micro_batch=2, probes=0, learning_rate=1e-3)
    base = {name: p.detach().clone() for name, p in make().named_parameters()}
    part, seen = Replay(share=0.4, mode=mode), []
    original = Replay.examples

    class Watched(Replay):
        def examples(self, *, run, state, rows, step):
            actual = original(self, run=run, state=state, rows=rows, step=step)
            seen.append(
                [("index" in row, len(row["input_ids"]), int((row["labels"][1:] != -100).sum())) for row in actual]
            )
            return actual

    result = fit(
        model=make(),
        parts=[Watched(share=0.4, mode=mode)],
        examples=DOMAIN,
        general=GENERAL,
        settings=settings,
        seed=0,
        base=base,
    )
    flops = Flops(make())
    for own, tokens_, flops_ in (
        (True, result.tokens, result.flops),
        (False, result.added[part.key]["tokens"], result.added[part.key]["flops"]),
    ):
        rows = [row for step in seen for row in step if row[0] == own]
        assert tokens_ == sum(size for _, size, _ in rows)
        wanted = flops.step(lengths=[size for _, size, _ in rows], labelled=sum(count for *_, count in rows))
        assert flops_ == pytest.approx(wanted, rel=1e-12)
    assert result.steps == -(-40 // batch) and len(seen) == result.steps
    left_out = result.added[part.key]["left_out"]
    assert result.tokens + left_out == tokens(DOMAIN) and (left_out > 0) == (mode == "swap")


def test_planned_prepared_and_trained_by_the_stages(tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"Say {i}.", "completion": f" It is {i}."}) + "\n" for i in range(20)))
    blocks = {
        "full": {},
        "general": {"replay": {"share": 0.4}},
        "more": {"replay": {"share": 0.5, "mode": "add", "path": str(own)}},
    }

    def change(raw):
        raw["methods"] = blocks
        raw["grid"]["methods"] = list(blocks)
        raw["tune"] = {"methods": {"general": {"replay.share": [0.1, 0.4]}}}

    study = load(tmp_path, change)
    model.main(study, model="llama-tiny")
    data.main(study)
    planned = {one["cell"].split("/")[2]: one for one in plan.make(study)["cells"]}
    trained = {}
    for method in blocks:
        cell = Cell("llama-tiny", "sums", method, 0)
        prepare.main(study, model="llama-tiny", method=method, seed=0, cell=cell)
        train.main(study, cell)
        trained[method] = read_json(study.paths.run(cell) / "train.json")
    full, general, more = (trained[method] for method in blocks)
    # a block that begins to replay is prepared again, for its folder then has the text
    assert resolve.prepare(study, "llama-tiny", "full") == {} != resolve.prepare(study, "llama-tiny", "general")
    tune.main(study, ["general"])
    assert len(read_json(study.paths.tuning("llama-tiny", "sums"))["trials"]) == 2
    before = resolve.train(study, "llama-tiny", "sums", "more")
    assert full["added"] == {} and more["tokens_trained"] == full["tokens_trained"]
    longest = full["tokens_trained"] / 64 * 2  # sums are nearly of one length
    for actual, share, rows in ((general, 0.4, full["steps"]), (more, 1.0, full["steps"])):
        added = actual["added"]["replay"]
        total = full["tokens_trained"] * (1.0 if actual is general else 2.0)
        assert abs(actual["tokens_trained"] + added["tokens"] - total) < longest * rows**0.5 * 3
        assert added["tokens"] == pytest.approx(share * full["tokens_trained"], rel=0.3) and added["flops"] > 0
    for method, kept, added in (("full", 1.0, 0.0), ("general", 0.6, 0.4), ("more", 1.0, 1.0)):
        assert planned[method]["tokens"] == pytest.approx(kept * planned["full"]["tokens"], abs=1)
        assert planned[method]["tokens_added"] == pytest.approx(added * planned["full"]["tokens"], abs=1)
    own.write_text(own.read_text().replace("It is", "That is"))
    assert resolve.train(study, "llama-tiny", "sums", "more") != before  # the rows themselves are a setting
