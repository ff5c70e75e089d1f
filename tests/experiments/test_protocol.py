"""What the protocol promises a part: the order of hooks, rows of a step, token weights, a second gradient, services."""

import importlib.util
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from experiments.model.random_models import build
from experiments.stages import data, prepare
from experiments.stages import model as model_stage
from experiments.stages import train as train_stage
from experiments.study.cells import Cell
from experiments.training import loss, preparation, update
from experiments.training.engine import final_weights, fit
from methods import registry
from methods.errors import UserError
from methods.part import REGISTERED, Part, in_order, phase_of, register
from methods.tools.files import read_json
from methods.tools.process_group import Shards
from methods.tools.token_statistics import TokenStatistics
from tests import goldens
from tests.experiments import worlds
from tests.experiments.test_hooks import odd, run
from tests.experiments.test_prepare import load

LORA = {"rank": 2, "targets": ["q_proj", "v_proj"], "dropout": 0.1}


def train(*parts, dtype=torch.float64, blocks=None, **settings):
    """A few steps of a tiny model with parts and the parts of `blocks`."""
    model = build("llama", seed=1, dtype=dtype)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    return fit(
        model=model,
        parts=(*parts, *registry.build(blocks or {})),
        examples=goldens.texts(18, seed=12, labelled=True),
        general=goldens.texts(5, seed=11, labelled=False),
        settings=replace(goldens.SETTINGS, **({"epochs": 0.4} | settings)),
        seed=5,
        base=base,
    )


# the order of hooks


@pytest.fixture
def interpolate(tmp_path):
    """A third party's part in a file `interpolate.py`: half of the way from the base, of whatever was trained."""
    (tmp_path / "interpolate.py").write_text(
        """
from dataclasses import dataclass
from methods.part import Part, register

@register(title="Half", paper="", line="Half of the way.")
@dataclass(frozen=True, kw_only=True)
class Half(Part):
    def finish(self, *, run, state, final, measure=None):
        return {name: (run.base[name] + tensor) / 2 for name, tensor in final.items()}
"""
    )
    spec = importlib.util.spec_from_file_location("interpolate", tmp_path / "interpolate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["interpolate"] = module
    spec.loader.exec_module(module)
    yield module.Half
    del REGISTERED["interpolate"], sys.modules["interpolate"]


def test_a_part_in_a_file_named_interpolate_acts_on_merged_adapters(interpolate):
    """By key it would come before `lora`, and find nothing to interpolate."""
    assert phase_of(interpolate) == "interpolate" and [p.key for p in registry.build({"interpolate": {}, "lora": LORA})]
    alone, both = (registry.build(blocks) for blocks in ({"lora": LORA}, {"interpolate": {}, "lora": LORA}))
    result = train(*alone)
    merged, half = final_weights(result, alone), final_weights(train(*both), both)
    assert half.keys() == merged.keys() and half
    for name, tensor in half.items():
        base = result.run.base[name]
        assert not torch.equal(merged[name], base)
        torch.testing.assert_close(tensor - base, (merged[name] - base) / 2)


def test_parts_that_share_a_hook_run_by_phase_then_by_key():
    called = []

    def part(key, phase):
        found = odd(before_clip=lambda **_: called.append(key))
        return type(key, (type(found),), {"key": key, "phase": phase})()

    parts = [part("b", "mask"), part("c", "penalty"), part("a", "mask"), part("d", "")]  # d has the hook of penalties
    run(*parts, epochs=0.1)
    assert called[:4] == ["c", "d", "a", "b"]


def test_an_unknown_phase_is_refused():
    with pytest.raises(TypeError, match="the phase is 'late': it must be one of adapt, data,"):

        @register(title="x", paper="", line="x.", key="wrong", phase="late")
        @dataclass(frozen=True, kw_only=True)
        class Late(Part):
            pass


# the rows of a step


def plain_loss(model, rows):
    """nll and labelled tokens of rows, one row at a time by whole logits."""
    nll, count = 0.0, 0
    for row in rows:
        logits = model(row["input_ids"][None]).logits[0, :-1]
        nll = nll + F.cross_entropy(logits, row["labels"][1:], reduction="sum")
        count += int((row["labels"][1:] != -100).sum())
    return nll, count


@pytest.mark.parametrize("pack", [0, 64])
def test_rows_that_a_part_adds_are_trained_on_and_charged_to_it(pack):
    seen = []
    extra = goldens.texts(3, seed=7, labelled=False)

    def examples(rows, step, **_):
        assert len({row["index"] for row in rows}) == len(rows)
        seen.append([*rows[1:], *({**row, "mark": torch.ones_like(row["input_ids"])} for row in extra)])
        return seen[-1]

    def batch(batch, **_):
        marks.append(int(batch["mark"].sum()))
        return batch

    marks = []
    part = odd(examples=examples, batch=batch)
    result = train(part, pack=pack)
    nll, count = plain_loss(build("llama", seed=1, dtype=torch.float64), seen[0])
    assert result.curve[0]["loss"] == pytest.approx(float(nll) / count, rel=1e-6)
    added = len(seen) * sum(len(row["input_ids"]) for row in extra)
    assert sum(marks) == added == result.added["odd"]["tokens"]  # the mark is carried to the tokens of these rows alone
    domain = [row for rows in seen for row in rows if "index" in row]
    assert result.tokens == sum(len(row["input_ids"]) for row in domain)
    without = train(odd(), pack=pack)
    assert without.added == {} and result.added["odd"]["flops"] > 0
    assert result.flops < without.flops  # of a step a row of the domain is missing


def test_rows_that_are_no_rows_are_refused():
    with pytest.raises(UserError, match="odd: a row that its `examples` gives is a dict: give input_ids and labels"):
        run(odd(examples=lambda rows, **_: [{"input_ids": rows[0]["input_ids"]}]))
    short = lambda rows, **_: [rows[0] | {"labels": rows[0]["labels"][:-1]}]  # noqa: E731
    with pytest.raises(UserError, match="odd: a row that its `examples` gives has labels a tensor of int64"):
        run(odd(examples=short))
    with pytest.raises(UserError, match="odd: its `examples` gives no rows at step 0"):
        run(odd(examples=[]))
    with pytest.raises(UserError, match="odd: its `epoch` gives 1 rows where the domain has 18"):
        run(odd(epoch=lambda examples, **_: examples[:1]))


@dataclass(frozen=True, kw_only=True)
class Rewritten(Part):
    """Other ids in each epoch, which depend on the weights at its beginning."""

    key = "rewritten"

    def epoch(self, *, run, state, examples, epoch):
        moved = int(1e6 * sum(float(weight.detach().abs().sum()) for weight in run.weights.values()))
        state.setdefault("moved", []).append(moved)
        draw = run.generator(self.key, epoch, moved)
        return [row | {"input_ids": torch.randint(0, 256, row["input_ids"].shape, generator=draw)} for row in examples]


def test_rows_of_an_epoch_are_drawn_at_its_beginning_and_survive_a_stop(tmp_path):
    whole = worlds.cell("llama", "full", more=(Rewritten(),), epochs=2.0)
    for stop in (3, 4):  # in the middle of an epoch of five steps
        try:
            worlds.cell("llama", "full", more=(Rewritten(),), epochs=2.0, folder=tmp_path, stop=stop)
        except worlds.Stopped:
            pass
    again = worlds.cell("llama", "full", more=(Rewritten(),), epochs=2.0, folder=tmp_path)
    assert again["resumed"] > 0 and again["curve"] == whole["curve"]
    assert all(torch.equal(again["final"][name], tensor) for name, tensor in whole["final"].items())


# token weights


def test_statistics_are_those_of_torchs_distributions():
    draw = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 40, generator=draw), torch.randint(0, 40, (6,), generator=draw)
    nll = F.cross_entropy(logits, targets, reduction="none")
    found = TokenStatistics(logits=logits, targets=targets, rows=targets, columns=targets, nll=nll)
    whole = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(found.probability, whole.probs.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(found.nll, -whole.log_prob(targets))
    torch.testing.assert_close(found.entropy(), whole.entropy())
    largest = torch.distributions.Categorical(probs=whole.probs.topk(20).values)
    torch.testing.assert_close(found.entropy(20), largest.entropy())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_of_several_parts_multiply_and_the_denominator_stays(monkeypatch, checkpointing):
    monkeypatch.setattr(loss, "CHUNK", 2)  # chunks are computed again in backward, with the same weights
    calls, gradients = [], []

    def weigh(statistics, batch, **_):
        calls.append(len(statistics.targets))
        labels = batch["labels"][statistics.rows, statistics.columns]
        assert torch.equal(labels, statistics.targets)
        return statistics.probability

    def keep(run, **_):
        gradients.append({name: weight.grad.clone() for name, weight in run.weights.items()})

    even = type("Even", (type(odd(token_weights=lambda statistics, **_: 2.0 + 0 * statistics.nll)),), {"key": "even"})()
    rows = []
    part = odd(token_weights=weigh, before_clip=keep, examples=lambda **a: rows.append(a["rows"]) or a["rows"])
    result = train(part, even, checkpointing=checkpointing, epochs=0.1)
    assert len(calls) > len(rows[0]) / 2 and sum(calls) == plain_loss(build("llama", seed=1), rows[0])[1]
    model, total, count = build("llama", seed=1, dtype=torch.float64), 0.0, 0
    for row in rows[0]:
        nll = F.cross_entropy(model(row["input_ids"][None]).logits[0, :-1], row["labels"][1:], reduction="none")
        nll = nll[row["labels"][1:] != -100]
        total, count = total + (2 * nll.detach().neg().exp() * nll).sum(), count + len(nll)
    (total / count).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[0][name], p.grad, rtol=1e-6, atol=1e-9)
    nll, count = plain_loss(model, rows[0])
    assert result.curve[0]["loss"] == pytest.approx(
        float(nll.detach()) / count, rel=1e-6
    )  # the curve's loss has no weights


def test_weights_of_none_are_the_plain_loss_to_the_bit():
    plain, none = train(), train(odd(token_weights=None))
    assert all(torch.equal(none.run.weights[name], weight) for name, weight in plain.run.weights.items())
    with pytest.raises(UserError, match="odd: its `token_weights` gives a tensor of float64"):
        train(odd(token_weights=lambda statistics, **_: statistics.nll.sum()), epochs=0.1)


# the second gradient


def test_a_second_gradient_is_that_of_the_moved_weights():
    """Sharpness-aware minimisation in a plain loop of one step."""
    rho, gradients = 0.3, []

    def ascend(run, **_):
        norm = torch.stack([weight.grad.norm() for weight in run.weights.values()]).norm()
        return {name: rho / norm * weight.grad for name, weight in run.weights.items()}

    def keep(run, **_):
        gradients.append({name: weight.grad.clone() for name, weight in run.weights.items()})

    def note(run, rows, **_):
        seen.append(rows)
        weights.append({name: weight.detach().clone() for name, weight in run.weights.items()})
        return rows

    seen, weights = [], []
    result = train(odd(second_gradient=ascend, before_clip=keep, examples=note))
    model = build("llama", seed=1, dtype=torch.float64)
    for step in (0, 1):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[step][name])
        nll, count = plain_loss(model, seen[step])
        first = torch.autograd.grad(nll / count, list(model.parameters()))
        norm = torch.stack([g.norm() for g in first]).norm()
        with torch.no_grad():
            for p, g in zip(model.parameters(), first, strict=True):
                p.add_(rho / norm * g)
        nll, count = plain_loss(model, seen[step])
        second = torch.autograd.grad(nll / count, list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), second, strict=True):
            torch.testing.assert_close(gradients[step][name], g, rtol=1e-6, atol=1e-9)
    assert result.added["odd"]["tokens"] == result.tokens and result.added["odd"]["flops"] == result.flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_offsets_of_zero_it_is_the_first_one_to_the_bit(dtype):
    """With the same dropout, and from weights that are put back exactly."""
    still = odd(second_gradient=lambda run, **_: {name: torch.zeros_like(w) for name, w in run.weights.items()})
    asked = odd(second_gradient=None)
    runs = [train(*parts, blocks={"lora": LORA}, dtype=dtype, epochs=1.0) for parts in ((still,), (asked,), ())]
    twice, once, plain = ((dict(result.run.weights), [row["loss"] for row in result.curve]) for result in runs)
    assert twice[1] == once[1] and all(torch.equal(twice[0][name], weight) for name, weight in once[0].items())
    # a part that asks for a second gradient has both computed in float32
    assert (once[1] == plain[1]) == (dtype == torch.float32)
    assert {p.dtype for p in runs[0].run.model.parameters()} == {dtype}


# entries that do not move


def test_whole_tensors_may_be_frozen_for_a_while():
    """As LISA trains a few layers at a time: what is frozen in one step moves in another."""
    seen = []

    def freeze(run, state, rows, step, **_):
        seen.append({name: weight.detach().clone() for name, weight in run.weights.items()})
        state["frozen"] = {name: torch.tensor((place + step) % 2 == 0) for place, name in enumerate(run.weights)}
        return rows

    result = train(odd(examples=freeze), dtype=torch.float32, weight_decay=0.1)
    seen.append({name: weight.detach() for name, weight in result.run.weights.items()})
    for place, name in enumerate(result.run.weights):
        for step in (0, 1):
            assert torch.equal(seen[step][name], seen[step + 1][name]) == ((place + step) % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_frozen_returns_to_the_bit(dtype):
    """Pieces of bits on the CPU, masks that broadcast, and tensors frozen whole, against a plain selection."""
    draw = torch.Generator().manual_seed(0)
    shape = (700, 500)  # more than a piece
    masks = {
        "entries": torch.rand(shape, generator=draw) < 0.5,
        "strided": torch.rand(shape[::-1], generator=draw).T < 0.5,
        "columns": torch.rand(1, shape[1], generator=draw) < 0.5,
        "whole": torch.tensor(True),
        "none": torch.tensor(False),
    }
    odd = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, 1.0], dtype=dtype)
    before, after, gradients = (
        {name: odd[torch.randint(len(odd), shape, generator=draw)] for name in masks} for _ in range(3)
    )
    weights = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in before.items()}
    for name, weight in weights.items():
        weight.grad = gradients[name].clone()
    with torch.no_grad(), update.unmoved(SimpleNamespace(weights=weights), masks):
        for name, weight in weights.items():
            cleared = torch.where(masks[name], 0.0, gradients[name])
            assert weight.grad is None if name == "whole" else bits(weight.grad).equal(bits(cleared)), name
            weight.copy_(after[name])
    for name, weight in weights.items():
        assert torch.equal(bits(weight), torch.where(masks[name], bits(before[name]), bits(after[name]))), name
    assert not weights["whole"].grad.any()


def bits(tensor):
    return tensor.detach().view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)


def test_a_tensor_that_is_frozen_whole_has_no_optimizer_state():
    def freeze(run, state, **_):
        state["frozen"] = {name: torch.tensor(".layers.0." in name) for name in run.weights}

    result = train(odd(begin=freeze), weight_decay=0.5)
    for name, weight in result.run.weights.items():
        still = ".layers.0." in name
        assert torch.equal(weight, result.run.base[name]) == still == (weight not in result.optimizer.state)


@pytest.mark.parametrize("blocks", [{}, {"mofo": {"fraction": 0.5}}])
def test_frozen_entries_are_the_bases_bit_for_bit_and_count_in_no_norm(blocks):
    norms = []

    def freeze(run, state, **_):
        draw = torch.Generator().manual_seed(3)
        state["frozen"] = {name: torch.rand(w.shape, generator=draw) < 0.5 for name, w in run.weights.items()}

    def norm(run, state, **_):
        left = [weight.grad[~state["frozen"][name]] for name, weight in run.weights.items()]
        norms.append(torch.cat(left).norm().item())

    part = odd(begin=freeze, before_clip=norm)
    result = train(part, blocks=blocks, weight_decay=0.5, dtype=torch.float32, epochs=1.0)
    for name, mask in result.states["odd"]["frozen"].items():
        weight, base = result.run.weights[name].detach(), result.run.base[name]
        assert torch.equal(weight[mask], base[mask]) and not torch.equal(weight[~mask], base[~mask])
    assert [row["grad_norm"] for row in result.curve] == pytest.approx(norms, rel=1e-5)


# from the study to the record of a cell


def test_general_text_reaches_the_part_and_its_costs_the_record(tmp_path):
    def change(raw):
        raw["methods"] = {"kl": {"kl": {"text": "both", "share": 0.5}}, "full": {}}
        raw["grid"]["methods"] = list(raw["methods"])

    study = load(tmp_path, change)
    model_stage.main(study, model="llama-tiny")
    data.main(study)
    records = {}
    for method in study.grid.methods:
        cell = Cell("llama-tiny", "sums", method, 0)
        prepare.main(study, model="llama-tiny", method=method, seed=0, cell=cell)
        train_stage.main(study, cell)
        records[method] = read_json(study.paths.run(cell) / "train.json")
    prepared = study.paths.prepared(model="llama-tiny", method="kl", seed=0) / prepare.GENERAL
    # train depends on the folder of what is prepared: other general text makes the cell stale
    assert prepared.read_bytes() == (study.paths.data / "general" / "replay.jsonl").read_bytes()
    trained, added = records["full"]["tokens_trained"], records["kl"]["added"]["kl"]
    assert records["full"]["added"] == {} and records["kl"]["tokens_trained"] == trained
    # general text is read by the model and by the base, the domain's by the base
    assert added["tokens"] == pytest.approx(trained + 2 * 0.5 * trained, rel=0.02)
    assert added["bytes"] > 0 and 0 < added["seconds"] < records["kl"]["seconds_train"]


# services


def services(function, *, blocks=None, **settings):
    """What `function(run)` gives before the first step."""
    found, part = [], odd(begin=lambda run, **_: found.append(function(run)))
    train(part, dtype=torch.float32, blocks=blocks, epochs=0.1, **settings)
    return found[0]


@pytest.mark.parametrize("blocks", [{}, {"lora": LORA}])
@pytest.mark.parametrize("base", [False, True])
def test_scores_are_log_probabilities_of_labelled_tokens(blocks, base):
    rows = goldens.texts(7, seed=12, labelled=True)
    found = services(lambda run: run.score(rows, base=base), blocks=blocks)
    model = build("llama", seed=1).eval()  # adapters start at zero
    for row, scores in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model(row["input_ids"][None]).logits[0, :-1]
        labels = row["labels"][1:]
        wanted = -F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")
        torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5)


def test_samples_follow_the_softmax_and_depend_on_their_prompts_alone():
    prompts = [[5, 9], [7], [200, 3, 3]]
    greedy = services(lambda run: run.sample(prompts=prompts, tokens=5, temperature=0))
    model = build("llama", seed=1).eval()
    for prompt, row in zip(prompts, greedy, strict=True):
        ids = list(prompt)
        for token in row:
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
    whole, alone, other = (
        services(lambda run, p=p, key=key: run.sample(prompts=p, tokens=4, key=key))
        for p, key in ((prompts, ("a",)), (prompts[:1], ("a",)), (prompts[:1], ("b",)))
    )
    assert whole[0] == alone[0] != other[0]  # whatever else is in the batch
    count = 4000
    many = services(lambda run: run.sample(prompts=[[5]] * count, tokens=1, temperature=0.5), micro_batch=500)
    with torch.no_grad():
        wanted = torch.softmax(model(torch.tensor([[5]])).logits[0, -1] / 0.5, -1)
    end = model.generation_config.eos_token_id  # a text that ends at once is empty
    found = torch.bincount(torch.tensor([row[0] if row else end for row in many]), minlength=len(wanted)) / count
    spread = (wanted * (1 - wanted) / count).sqrt()
    assert ((found - wanted).abs() < 5 * spread + 1 / count).all()


def test_a_preparation_samples_as_a_run_does():
    prompts, texts = [[5, 9], [7]], []

    def prepare(model, sample, **_):
        assert model.training
        texts.append(sample(model=model, prompts=prompts, tokens=5, temperature=0))
        assert model.training

    part = odd(prepare=prepare, preparation=())
    common = {"general": [], "base": {}, "seed": 0, "settings": goldens.SETTINGS}
    made = preparation.prepare([part], make=lambda _: build("llama", seed=1).train(), resume=lambda _: None, **common)
    assert list(made) == []
    assert texts[0] == services(lambda run: run.sample(prompts=prompts, tokens=5, temperature=0))


def test_services_leave_the_training_as_it_is():
    def use(run, **_):
        run.sample(prompts=[[5]], tokens=3)
        run.score(goldens.texts(3, seed=12, labelled=True), base=True)

    plain, used = (train(part, blocks={"lora": LORA}, dtype=torch.float32) for part in (odd(), odd(begin=use)))
    assert all(torch.equal(used.run.weights[name], weight) for name, weight in plain.run.weights.items())
    assert used.added["odd"]["tokens"] > 0 and used.added["odd"]["flops"] > 0


@pytest.mark.parametrize("blocks", [{}, {"lora": LORA}])
def test_the_reference_is_the_base_whatever_has_been_trained(blocks):
    found = []

    def look(run, batch, **_):
        found.append((batch["input_ids"], run.reference.logits(run.reference.hidden(batch))))

    result = train(odd(loss=look), blocks=blocks, dtype=torch.float32, learning_rate=0.1, warmup=0.0, epochs=1.0)
    base = build("llama", seed=1).eval()
    with torch.no_grad():
        for ids, logits in found:
            torch.testing.assert_close(logits, base(ids).logits, rtol=1e-5, atol=1e-5)
        own = result.run.model(found[-1][0]).logits
    assert (own - found[-1][1]).abs().max() > 0.1


# two processes


@dataclass(frozen=True, kw_only=True)
class Everything(Part):
    """Uses every service and every hook of a step."""

    key = "everything"

    def begin(self, *, run, state, examples, general=()):
        state["scores"] = [run.score(list(examples)[:5], base=base) for base in (True, False)]
        prompts = [row["input_ids"][:4].tolist() for row in list(examples)[:3]]
        state["texts"] = [
            run.sample(prompts=prompts, tokens=6, base=base, temperature=t) for base in (True, False) for t in (0, 1)
        ]
        state["frozen"] = {name: torch.tensor(name.endswith("norm.weight")) for name in run.weights}

    def examples(self, *, run, state, rows, step):
        draw = run.generator(self.key, step)
        ids = torch.randint(0, 256, (9,), generator=draw)
        return [*rows[1:], {"input_ids": ids, "labels": ids.clone()}]

    def token_weights(self, *, run, state, batch, statistics):
        return statistics.entropy(20)

    def second_gradient(self, *, run, state, step):
        square = sum(weight.grad.square().sum() for weight in run.weights.values())
        norm = run.shards.sum(square.clone()).sqrt()
        return {name: 0.05 / norm * weight.grad for name, weight in run.weights.items()}

    def report(self, *, run, state):
        return {"scores": [[t.tolist() for t in each] for each in state["scores"]], "texts": state["texts"]}


ADAPTED = {"lora": {"rank": 2, "targets": ["q_proj"]}}
CELLS = [(a, blocks, (Everything(),)) for a in ("llama", "gptj") for blocks in ({}, ADAPTED)]
CELLS += [("llama", ADAPTED, ())]  # the base is first run inside the trained model's forward
KL_BLOCK = {"kl": {"strength": 1.0, "text": "both", "share": 0.4, "length": 20, "temperature": 2.0}}


def cells(shards):
    """Runs of parts that use everything, three rows a step for two processes in micro-batches of one."""
    for architecture, blocks, others in CELLS:
        model = build(architecture, seed=1)
        base = {name: p.detach().clone() for name, p in model.named_parameters()}
        parts = in_order((*registry.build(blocks | KL_BLOCK), *others))
        result = fit(
            model=model,
            parts=parts,
            examples=goldens.texts(14, seed=12, labelled=True),
            general=goldens.texts(6, seed=11, labelled=False),
            settings=replace(goldens.SETTINGS, batch=3, micro_batch=1, epochs=1.0, weight_decay=0.1),
            seed=5,
            base=base,
            shards=shards,
        )
        costs = {key: {kind: each[kind] for kind in ("tokens", "flops", "bytes")} for key, each in result.added.items()}
        yield {
            "final": final_weights(result, parts),
            "reports": [part.report(run=result.run, state=result.states[part.key]) for part in others],
            "losses": [row["loss"] for row in result.curve],
            "costs": costs,
        }


def work(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = list(cells(Shards(rank=rank, world=2, active=True)))
    if rank == 0:
        torch.save(found, f"{folder}/cells.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.thorough
def test_two_processes_give_the_numbers_of_one_whatever_a_part_uses(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    for two, one in zip(torch.load(tmp_path / "cells.pt", weights_only=True), cells(Shards()), strict=True):
        for name, tensor in one["final"].items():
            assert (two["final"][name] - tensor).norm() <= 2e-6 * tensor.norm(), name
        assert two["costs"] == one["costs"]
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
        for mine, its in zip(two["reports"], one["reports"], strict=True):
            assert mine["texts"] == its["texts"]
            for own, other in zip(mine["scores"], its["scores"], strict=True):
                assert [pytest.approx(row, abs=1e-5) for row in other] == own
