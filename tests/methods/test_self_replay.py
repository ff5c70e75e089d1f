"""Self-replay: the texts are the base's own, the loss is that of whole logits, and what sampling costs is stated."""

import pytest
import torch
from torch.nn import functional as F

from experiments.commands import plan
from experiments.model.random_models import build
from experiments.model.shape import Shape
from experiments.stages import data, model, prepare, train
from experiments.study.cells import Cell
from experiments.training.activations import activations
from experiments.training.flops import Flops
from experiments.training.progress import bar
from experiments.training.services import Sampling
from methods import registry
from methods.errors import UserError
from methods.self_replay import SelfReplay
from methods.tools.files import read_json
from methods.tools.process_group import Shards
from tests.experiments.test_prepare import load

LORA = {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}}
KL = {"objective": "kl"}
END = 1  # of text, of the models of these tests


def prepared(part, own, general=(), progress=None):
    """What the part prepares with the sampler of the stage, and the FLOPs that it counts."""
    sample = Sampling(None, seed=0, size=8, shards=Shards())
    about = {"general": general, "seed": 0, "progress": progress}
    return part.calibrate(model=own, sample=sample, **about), sample.flops


def rows_of(carry):
    """(ids, tokens of the prompt) of each text."""
    return list(zip(carry["ids"].long().split(carry["lengths"].tolist()), carry["prompts"].tolist(), strict=True))


@pytest.fixture
def general():
    draw = torch.Generator().manual_seed(9)
    return [
        {"input_ids": ids, "labels": ids} for ids in (torch.randint(2, 31, (n,), generator=draw) for n in (7, 2, 9))
    ]


def test_texts_continue_general_text_as_the_base_would(make, general):
    """At temperature 0 each token is the likeliest of a whole forward pass; a text ends with the end of text."""
    own = make()
    with torch.no_grad():  # so that one of the texts ends early
        own.lm_head.weight[END] += 0.2 * own.lm_head.weight[8]
    made, flops = prepared(SelfReplay(texts=5, tokens=6, prompt=3, temperature=0.0), own, general)
    for number, (ids, prompt) in enumerate(rows_of(made.carry)):
        wanted = general[number % 3]["input_ids"][:3].tolist()  # more texts than documents: they begin again
        assert prompt == len(wanted)
        while len(wanted) < prompt + 6 and END not in wanted[prompt:]:
            wanted.append(int(own(torch.tensor([wanted])).logits[0, -1].argmax()))
        assert ids.tolist() == wanted
    lengths = made.carry["lengths"].tolist()
    written = sum(lengths) - sum(made.carry["prompts"].tolist())
    assert made.tokens == sum(lengths)
    assert flops == [Flops(own).forward(lengths=lengths, predicted=written)]
    assert made.notes == {"texts": 5, "tokens": written, "ended": sum(END in ids[p:] for ids, p in rows_of(made.carry))}


def test_texts_begin_with_the_models_own_token(make):
    own, bars = make(), []

    def progress(**about):
        bars.append(bar(**about))
        return bars[-1]

    texts, _ = prepared(SelfReplay(texts=40, tokens=5), own, progress=progress)
    assert [(one.n, one.total, one.unit) for one in bars] == [(40, 40, "text")]  # in two batches
    assert {int(ids[0]) for ids, _ in rows_of(texts.carry)} == {END}  # there is no beginning of text
    assert len({tuple(ids.tolist()) for ids, _ in rows_of(texts.carry)}) > 20  # each draws for itself
    assert any(len(ids) < 6 and ids[-1] == END for ids, _ in rows_of(texts.carry))
    own.generation_config.bos_token_id = 7
    texts, _ = prepared(SelfReplay(texts=3, tokens=5), own)
    assert {int(ids[0]) for ids, _ in rows_of(texts.carry)} == {7}
    own.generation_config.bos_token_id, own.generation_config.eos_token_id = None, [99, 3]  # there are 31 tokens
    with pytest.raises(UserError, match="the model names neither a beginning-of-text token nor an end-of-text token"):
        prepared(SelfReplay(), own)


def loss_of(own, base, rows, part):
    """The loss of a step by whole logits: mean nll of the other rows, and the mean over the sampled tokens."""
    nll, sampled, count = [], [], 0
    for row in rows:
        ours, theirs = (m(row["input_ids"][None]).logits[0, :-1].double() for m in (own, base))
        if row["self_replay"].any():
            mark, targets = row["self_replay"][1:], row["input_ids"][1:]
            p, q = torch.log_softmax(theirs, -1), torch.log_softmax(ours, -1)
            each = (p.exp() * (p - q)).sum(-1) if part.objective == "kl" else -q.gather(1, targets[:, None])[:, 0]
            sampled.append(each[mark])
        else:
            nll.append(F.cross_entropy(ours, row["labels"][1:], reduction="sum"))
            count += int((row["labels"][1:] != -100).sum())
    return sum(nll) / count + part.strength * torch.cat(sampled).mean()


@pytest.mark.parametrize("also", [{}, LORA, {"stm": {"threshold": 60.0}}], ids=["full", "lora", "stm"])
@pytest.mark.parametrize(("mode", "pack"), [("add", 0), ("swap", 0), ("add", 24)])
@pytest.mark.parametrize("objective", ["kl", "nll"])
def test_a_steps_gradient_is_that_of_whole_logits(make, documents, general, train, objective, mode, pack, also):
    seen = {}

    class Watched(SelfReplay):
        key = "self_replay"

        def examples(self, **arguments):
            rows = super().examples(**arguments)
            seen.setdefault(arguments["step"], rows)
            return rows

        def before_clip(self, *, run, state, step):
            if step == 1:  # the weights have moved: the KL is not at its minimum, where its gradient is 0
                seen["gradient"] = {name: w.grad.clone() for name, w in run.weights.items()}
                seen["weights"] = {name: w.detach().clone() for name, w in run.weights.items()}

    part = Watched(texts=5, tokens=7, prompt=3, objective=objective, strength=2.5, share=0.4, mode=mode)
    states = {"self_replay": {"carry": prepared(part, make(), general)[0].carry}}
    settings = {"batch": 4, "micro_batch": 2, "pack": pack, "learning_rate": 5e-2}
    result = train(make(), (*registry.build(also), part), documents, states=states, **settings)
    own = result.run.model
    with torch.no_grad():
        for name, p in own.named_parameters():
            if name in seen["weights"]:
                p.copy_(seen["weights"][name])
    rows = seen[1]
    parameters = dict(own.named_parameters())
    wanted = torch.autograd.grad(loss_of(own, make(), rows, part), [parameters[n] for n in seen["gradient"]])
    for (name, gradient), other in zip(seen["gradient"].items(), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-8, msg=name)
    sampled = [row for step in (0, 1) for row in seen[step] if "index" not in row]
    text = sum(len(row["input_ids"]) for row in sampled)
    read = result.added["self_replay"]["tokens"] - text  # with a token of each micro-batch that has no text
    assert text <= read < text + 8 if objective == "kl" else read == 0
    assert all(row["self_replay"].sum() > 0 for row in sampled)


@pytest.mark.parametrize("also", [{}, LORA], ids=["full", "lora"])
def test_at_the_base_the_kl_has_no_gradient(make, documents, general, train, also):
    gradients = []

    class Watched(SelfReplay):
        key = "self_replay"

        def before_clip(self, *, run, state, step):
            if step == 0:
                gradients.append({name: w.grad.clone() for name, w in run.weights.items()})

    for strength in (0.0, 1e6):
        part = Watched(texts=5, tokens=7, prompt=3, strength=strength, share=0.4)
        states = {"self_replay": {"carry": prepared(part, make(), general)[0].carry}}
        train(make(), (*registry.build(also), part), documents, states=states, batch=4, micro_batch=4)
    without, held = gradients
    assert all(torch.equal(held[name], gradient) for name, gradient in without.items())


def test_a_step_without_a_text_is_a_plain_one(make, documents, general, train):
    """A thousandth of a step of about twenty tokens is seldom a text of ten."""
    part, counts = SelfReplay(texts=3, tokens=8, prompt=2, share=0.001), []

    class Watched(SelfReplay):
        key = "self_replay"

        def examples(self, **arguments):
            rows = super().examples(**arguments)
            counts.append(sum("index" not in row for row in rows))
            return rows

    states = {"self_replay": {"carry": prepared(part, make(), general)[0].carry}}
    settings = {name: getattr(part, name) for name in ("texts", "tokens", "prompt", "share")}
    result = train(make(), [Watched(**settings)], documents, states=states)
    assert counts == [0, 0, 0] and result.added["self_replay"]["tokens"] == 0
    plain = train(make(), [], documents)
    assert all(torch.equal(weight, plain.run.weights[name]) for name, weight in result.run.weights.items())


def test_without_a_share_nothing_is_replayed(make, documents, general, train):
    part = SelfReplay(texts=3, tokens=4, share=0.0)
    states = {"self_replay": {"carry": prepared(part, make(), general)[0].carry}}
    result = train(make(), [part], documents, states=states)
    assert result.added["self_replay"]["tokens"] == 0 and part.added().trained == part.added().read == 0
    plain = train(make(), [], documents)
    assert all(torch.equal(weight, plain.run.weights[name]) for name, weight in result.run.weights.items())


def test_what_sampling_states_before_it_runs():
    (made,) = SelfReplay(texts=5, tokens=10, prompt=4).preparation()
    assert made.cut([9, 3]) == [14, 13, 14, 13, 14] and made.cut([]) == [11] * 5
    assert SelfReplay(texts=5, tokens=10).preparation()[0].cut([9, 3]) == [11] * 5
    assert SelfReplay(tokens=10, prompt=4).added().length == 14
    # keys and values of two layers of four times 8, of two heads each, in float32, for 3 texts of 11 tokens
    about = {"parts": (), "dtype": torch.float32, "rows": 3, "length": 11, "gradients": "none"}
    shape = Shape(config=build("llama", seed=0).config)
    kept, plain = (activations(shape, **about, cached=cached)[0] for cached in (True, False))
    assert kept - plain == 2 * 2 * (2 * 8) * 4 * 3 * 11


def test_prepared_once_for_all_seeds_and_adapters_and_trained_by_the_stages(tmp_path):
    block = {"self_replay": {"texts": 6, "tokens": 9, "prompt": 2, "share": 0.3, "objective": "nll"}}

    def change(raw):
        lora = {"lora": {"rank": 2, "targets": ["q_proj"], "dora": True}, "self_replay": block["self_replay"] | KL}
        raw["methods"] = {"full": {}, "own": block, "own-lora": lora}
        raw["grid"] |= {"methods": [*raw["methods"]], "seeds": [0, 1]}

    study = load(tmp_path, change)
    model.main(study, model="llama-tiny")
    data.main(study)
    planned = {one["cell"]: one for one in plan.make(study)["cells"]}
    costs, files = [], []
    for method, seed in (("own", 0), ("own-lora", 0), ("own", 1)):
        cell = Cell("llama-tiny", "sums", method, seed)
        prepare.main(study, model="llama-tiny", method=method, seed=seed, cell=cell)
        costs.append(read_json(study.paths.prepare_costs(model="llama-tiny", method=method, seed=seed)))
        folder = study.paths.prepared(model="llama-tiny", method=method, seed=seed)
        files.append((folder / "self_replay.carry.safetensors").read_bytes())
    first, *others = costs
    assert [one["reused"] for one in costs] == [False, True, True] and len(set(files)) == 1
    notes = read_json(folder / "prepared.json")["self_replay"]
    assert notes["texts"] == 6 and first["added"]["self_replay"]["flops"] > 0
    assert first["tokens_prepare"] == notes["tokens"] + 6 * 2 <= planned[cell.name]["tokens_prepare"] == 6 * (2 + 9)
    assert first["bytes_carry"] == first["added"]["self_replay"]["bytes"] == len(files[0])
    train.main(study, cell)
    trained = read_json(study.paths.run(cell) / "train.json")
    share = trained["added"]["self_replay"]["tokens"] / trained["tokens_trained"]
    assert share == pytest.approx(0.3 / 0.7, rel=0.2)


def test_more_tokens_than_positions_are_refused(tmp_path):
    def change(raw):
        raw["methods"] = {"own": {"self_replay": {"tokens": 600, "prompt": 20}}}
        raw["grid"]["methods"] = ["own"]

    with pytest.raises(UserError, match="own.self_replay.tokens is 600, .* 512 positions: write `tokens: 492` or less"):
        plan.make(load(tmp_path, change))
