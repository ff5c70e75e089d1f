"""Every law of experiments/laws on every registered part, every pair of parts, and wrong parts that the laws catch."""

import itertools
import os
import random
import re
import subprocess
import sys
import typing
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from experiments.laws import processes
from experiments.laws.laws import LAWS, ONCE, PROCESSES, judge
from experiments.laws.trial import ARCHITECTURES, Trial
from experiments.study.paths import HERE
from methods import listing, registry
from methods.errors import UserError
from methods.lora import LoRA
from methods.part import Part, overrides, setting
from methods.settings import declared
from methods.tools.effective import effective_weights, lora_layers

PARTS = registry.parts()


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """trial(part class, architecture): one trial for all laws, so that its ordinary run is trained once."""
    made = {}

    def trial_of(kind, architecture="llama"):
        if (kind, architecture) not in made:
            folder = tmp_path_factory.mktemp(f"{kind.__name__}-{architecture}")
            made[kind, architecture] = Trial(kind=kind, architecture=architecture, folder=folder)
        return made[kind, architecture]

    return trial_of


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("law", "architecture"),
    [
        pytest.param(law, a, marks=[] if a == ARCHITECTURES[0] else pytest.mark.thorough)
        for law in LAWS
        for a in (ARCHITECTURES[:1] if law in ONCE else ARCHITECTURES)
    ],
)
def test_law(trial, part, law, architecture):
    verdict = judge(law, trial(PARTS[part], architecture))
    assert verdict.status != "failed", str(verdict)


def choices():
    """Each part with each value of a setting that is one of a few, but for the values that the other tests have."""
    for part, kind in PARTS.items():
        types = typing.get_type_hints(kind)
        for setting_of in declared(kind):
            name, default = setting_of.name, setting_of.metadata["default"]
            values = (False, True) if types[name] is bool else typing.get_args(types[name])
            for value in values if typing.get_origin(types[name]) is Literal or types[name] is bool else ():
                if value != kind.trial.get(name, default):
                    yield pytest.param(part, {name: value}, id=f"{part}-{name}-{value}")


@pytest.mark.thorough
@pytest.mark.parametrize(("part", "chosen"), choices())
def test_laws_hold_for_every_choice(tmp_path, part, chosen):
    chosen = Trial(kind=PARTS[part], architecture="llama", folder=tmp_path, chosen=chosen)
    assert not [str(verdict) for law in LAWS if (verdict := judge(law, chosen)).status == "failed"]


@pytest.mark.thorough
def test_two_processes_give_the_numbers_of_one(trial, tmp_path):
    verdicts = processes.judge([trial(kind, a) for kind in PARTS.values() for a in ARCHITECTURES], tmp_path)
    assert not [str(verdict) for verdict in verdicts if verdict.status == "failed"]


# every pair of parts

ADAPTERS = ("corda", "lora", "lora_null", "mica", "milora", "pissa")
ON_LORA = ("ist", "o_lora")
WEIGHS = ("asft", "dft", "eaft", "flow", "profit", "stm", "talr")
MASKS = ("gmt", "hft", "lisa", "mofo", "random_mask", "spider", "ssu")
REFUSED = [  # parts of the one group beside those of the other, and words of the reason
    (("given",), tuple(PARTS), "given weights are not trained"),
    (ADAPTERS, ADAPTERS, "each wraps linear layers with an adapter"),
    (ON_LORA, tuple(set(ADAPTERS) - {"lora"}), "each wraps linear layers with an adapter"),
    (("hft", "muon", "osf", "spider", "ssu"), (*ADAPTERS, *ON_LORA), "adapter"),
    (("osf",), MASKS, "a mask freezes entries of a matrix, which the projection moves together"),
    (("muon",), ("mofo",), "each brings an optimizer"),
    (("asft",), ("dft",), "asft weighs tokens with their probability itself"),
    (("sdft",), WEIGHS, "sdft does not learn the domain's answers, on which the other acts"),
    (("sdft",), ("self_sft",), "each puts sampled answers in the place of the domain's"),
    (("self_sft",), ("flow", "stm"), "self_sft draws its rows anew in each epoch"),
]


def reason_against(one, two):
    """Words of the reason why two parts cannot go together; empty where they can."""
    return next((why for a, b, why in REFUSED if (one in a and two in b) or (two in a and one in b)), "")


ACTING = set(listing.ACTS_ON) - {"calibrate", "prepare"}  # hooks in which the order of two parts matters


def hooks_of(kind):
    """The hooks by which a part acts on a training, or on its weights afterwards."""
    return {hook for hook in ACTING if overrides(kind, hook)}


PAIRS = [
    pytest.param(*pair, marks=[] if hooks_of(PARTS[pair[0]]) & hooks_of(PARTS[pair[1]]) else pytest.mark.thorough)
    for pair in itertools.combinations(PARTS, 2)
]


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_a_pair_trains_or_is_refused_with_the_reason(trial, one, two):
    trials = [trial(PARTS[key]) for key in (one, two)]
    block = {**trials[0].kind.beside, **trials[1].kind.beside, **{t.kind.key: t.settings() for t in trials}}
    if reason := reason_against(one, two):
        with pytest.raises(UserError, match=f"cannot be combined: .*{re.escape(reason)}"):
            registry.build(block)
        return
    parts = registry.build(block)
    trained = trials[0].train(parts, trials[0].prepare(parts), steps=3)
    assert trained.result.steps == 3 and trained.final
    assert all(tensor.isfinite().all() for tensor in trained.final.values())
    assert any(not torch.equal(tensor, trials[0].base[name]) for name, tensor in trained.final.items())


# wrong parts


def wrong(kind):
    """A part that is not registered; its key is the class's name."""
    kind.key = kind.__name__
    kind.title, kind.paper, kind.line = "Wrong", "https://example.org", "Does what no part may do."
    return dataclass(frozen=True, kw_only=True)(kind)


@wrong
class Biased(Part):
    """Not neutral at its neutral setting."""

    neutral = {"strength": 0.0}
    strength: float = setting(1.0, within="[0, inf)", help="of the pull")

    def before_clip(self, *, run, state, step):
        for weight in run.weights.values():
            weight.grad.add_(weight.detach(), alpha=self.strength + 1e-3)


@wrong
class Undeclared(Part):
    """Says nothing of a neutral setting, and nothing of its settings."""

    strength: float = setting(1.0)


@wrong
class Scaling(Part):
    """Changes the base in `adapt`."""

    capabilities = frozenset({"adapts"})

    def adapt(self, model, **_):
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        return model


@wrong
class Shifting(Part):
    """Moves the weights in `begin`."""

    def begin(self, *, run, **_):
        with torch.no_grad():
            for weight in run.weights.values():
                weight.add_(1e-3)


@wrong
class Writing(Part):
    """Writes into the base."""

    def after_step(self, *, run, **_):
        for tensor in run.base.values():
            tensor.mul_(0.9)


@wrong
class Thawing(Part):
    """Freezes the embedding and decays it all the same."""

    capabilities = frozenset({"adapts"})

    def adapt(self, model, **_):
        model.get_input_embeddings().requires_grad_(False)
        return model

    def after_step(self, *, run, **_):
        run.model.get_input_embeddings().weight.mul_(0.99)


@wrong
class Inventing(Thawing):
    """Freezes the embedding and finishes with another one."""

    def after_step(self, **_):
        pass

    def finish(self, *, run, final, **_):
        name = next(name for name, p in run.model.named_parameters() if p is run.model.get_input_embeddings().weight)
        return final | {name: run.base[name] + 1e-4}


@wrong
class Late(Part):
    """Freezes all entries after it has moved them once."""

    def after_step(self, *, run, state, **_):
        state["frozen"] = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in run.weights.items()}


@wrong
class Noisy(Part):
    """Draws from a generator that nothing seeds."""

    def before_clip(self, *, run, **_):
        for weight in run.weights.values():
            weight.grad.mul_(1 + 0.1 * random.random())


STEPS_DONE = [0]  # in the module: no checkpoint has it


@wrong
class Forgetful(Part):
    """Counts its steps where no checkpoint sees it."""

    def begin(self, **_):
        STEPS_DONE[0] = 0

    def before_clip(self, *, run, **_):
        STEPS_DONE[0] += 1
        for weight in run.weights.values():
            weight.grad.mul_(1 / STEPS_DONE[0])


@wrong
class Unkept(Part):
    """Changes something that no checkpoint can keep."""

    def begin(self, *, state, **_):
        state["steps"] = itertools.count()

    def after_step(self, *, state, **_):
        next(state["steps"])


@wrong
class Hoarding(Part):
    """Holds copies of all weights and predicts nothing."""

    def begin(self, *, run, state, **_):
        state["copies"] = [weight.detach().clone() for weight in run.weights.values() for _ in range(3)]


@wrong
class Unstated(Part):
    """Adds rows to each step and states no tokens."""

    def examples(self, *, rows, **_):
        return [*rows, {name: tensor for name, tensor in rows[0].items() if name != "index"}]


@wrong
class Failing(Part):
    """Raises in a hook."""

    def before_clip(self, *, run, **_):
        return run.weights["no.such.weight"]


@wrong
class Ranked(Part):
    """Draws from torch's own generator, which is another one in every process."""

    def batch(self, *, batch, **_):
        return batch | {"labels": batch["labels"].masked_fill(torch.rand(batch["labels"].shape) < 0.3, -100)}


CAUGHT = [
    (
        Biased,
        "neutral",
        "at strength: 0.0 its weights and those of plain fine-tuning differ in .* tensors, most in .* by",
    ),
    (Undeclared, "neutral", "`neutral` is '': declare the settings at which the part is plain fine-tuning"),
    (Undeclared, "described", "it lacks a help text of the setting strength; the interval of the setting strength"),
    (Scaling, "base", "the adapted model's logits and the base's differ in 1 of 1 .* by 0.0"),
    (Shifting, "base", "the logits before the first step and the base's differ"),
    (Writing, "base", "`base` after the run and before it differ in .* tensors"),
    (
        Thawing,
        "frozen",
        "tensors of the model that are not trained and the base's differ in 1 of 1 tensors, .*embed_tokens",
    ),
    (Inventing, "frozen", "finished tensors that are neither trained nor adapted .* differ in 1 of 1 .*embed_tokens"),
    (Late, "frozen", "entries that .* names and the base.s differ in .* of 20 tensors"),
    (Noisy, "repeatable", "the weights of two equal runs differ in .*`run.seed`"),
    (Forgetful, "resumable", "the weights of an interrupted run and of a whole one differ in .*`keep`"),
    (Unkept, "resumable", "Unkept: state.*steps"),
    (
        Hoarding,
        "memory",
        r"training takes \d+.\d MiB at its peak, and \d+.\d MiB are predicted. What to do: return from `memory`",
    ),
    (Unstated, "costs", r"it states 0 tokens beside those of the domain in 3 steps, and \d+ are charged to it"),
    (Failing, "repeatable", "KeyError: 'no.such.weight', line .* of before_clip in tests.test_laws"),
]


@pytest.mark.parametrize(("kind", "law", "said"), CAUGHT, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_part_is_caught(trial, kind, law, said):
    verdict = judge(law, trial(kind))
    assert verdict.status == "failed"
    assert re.search(f"^{kind.__name__}  {law} +failed: .*{said}", str(verdict)), str(verdict)
    assert "\n" not in str(verdict)


@wrong
class Split(Part):
    """Keeps adapted matrices as a low-rank part, which is trained, and the rest in float32, as PiSSA does."""

    capabilities = frozenset({"adapts"})
    neutral = "none: it trains two factors in place of each matrix"

    def adapt(self, model, *, seed, state):
        model = LoRA(rank=2).adapt(model, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, layer in lora_layers(model):
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                b.copy_(0.1 * torch.randn(b.shape, generator=draw))
                layer.base_layer.weight.sub_(layer.scaling["default"] * b @ a)
        return model

    def finish(self, *, run, final, **_):
        return final | {
            weight.name: run.model.get_submodule(weight.layer).base_layer.weight.detach() + weight.value()
            for weight in effective_weights(run)
        }


@wrong
class Declared(Split):
    decomposed = 1e-5


def test_a_decomposed_base_is_held_to_the_rounding_that_is_declared(trial, monkeypatch):
    split, declared = judge("base", trial(Split)), judge("base", trial(Declared))
    assert split.status == "failed" and "they must be equal to the bit" in split.text
    assert declared.status == judge("frozen", trial(Declared)).status == "passed", str(declared)
    monkeypatch.setattr(Declared, "decomposed", 1e-12)
    assert "1e-12 is declared" in judge("base", trial(Declared)).text


@pytest.mark.thorough
def test_draws_by_process_are_caught(trial, tmp_path):
    ranked, failing = processes.judge([trial(Ranked), trial(Failing)], tmp_path)
    assert ranked.status == failing.status == "failed" and ranked.law == PROCESSES
    assert "after 10 steps the weights of two processes differ from those of one by" in ranked.text
    assert "KeyError: 'no.such.weight', line" in failing.text


# the command

STRANGER = """
from dataclasses import dataclass

from methods.part import Part, register, setting
from methods.tools.effective import effective_weights

SEEN = []


@register(title="L2-SP", paper="https://arxiv.org/abs/1802.01483", line="Pull every weight back to the base.")
@dataclass(frozen=True, kw_only=True)
class L2SP(Part):
    neutral = {"strength": 0.0}
    strength: float = setting(1e-2, within="[0, inf)", help="α of α/2·‖θ−θ₀‖²")

    def before_clip(self, *, run, state, step):
        value = 0.0
        for weight in effective_weights(run):
            moved = weight.value()
            weight.pull(moved, scale=self.strength)
            value += self.strength / 2 * moved.square().sum()
        return value


@register(key="faulty", title="Faulty", paper="https://example.org", line="Fails at its second run.")
@dataclass(frozen=True, kw_only=True)
class Faulty(Part):
    neutral = "none: it is wrong"

    def begin(self, *, run, **_):
        SEEN.append(run)

    def before_clip(self, *, run, **_):
        if len(SEEN) > 1:
            raise ValueError("two runs")
"""


@pytest.mark.thorough
def test_check_runs_on_parts_of_another_package(tmp_path):
    (tmp_path / "stranger.py").write_text(STRANGER, encoding="utf-8")
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[holdfast.parts]\nstranger = stranger:L2SP\nfaulty = stranger:Faulty\n")
    outputs = {}
    for part, status in (("stranger", 0), ("faulty", 1)):
        command = [sys.executable, "-m", "experiments", "check", part]
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
        assert done.returncode == status and "Traceback" not in done.stdout + done.stderr, done.stderr
        outputs[part] = [line.split(maxsplit=2)[1:] for line in done.stdout.splitlines()]
    laws = [*LAWS, PROCESSES]
    assert outputs["stranger"] == [[law, "passed"] for law in laws]
    assert [law for law, _ in outputs["faulty"]] == laws
    faulty = dict(outputs["faulty"])
    assert faulty["neutral"] == "does not apply: it has no neutral setting: it is wrong"
    assert faulty["repeatable"].startswith("failed: ValueError: two runs, line ")
    assert " of before_clip in stranger" in faulty["repeatable"]
