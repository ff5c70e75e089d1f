"""A run that is interrupted and resumed equals the uninterrupted run bit for bit, for every part and kind of state."""

import collections
import dataclasses
import random
import re
import signal
import typing

import numpy as np
import pytest
import torch

from experiments.model.random_models import build
from experiments.training import resume
from experiments.training.engine import fit
from experiments.training.resume import Resume
from methods import registry
from methods.part import Part, Prepared, Run
from methods.settings import declared, fits, inside
from tests import goldens
from tests.experiments import worlds

LORA = {"rank": 2, "targets": ["q_proj", "v_proj"], "dropout": 0.1}
SMALL = {
    "ewc": {"strength": 10.0, "samples": 6, "length": 32},
    "hierarchical": {"samples": 6, "length": 32, "epochs": 2.0},
    "lora": LORA,
    "mofo": {},
}
ENGINE = ({"moments": "bfloat16"}, {"pack": 64}, {"checkpointing": True}, {"micro_batch": 1})


def same(a, b) -> bool:
    """Whether two nested values are equal to the bit; the run, models and functions are not looked into."""
    if isinstance(a, Run | torch.nn.Module | torch.optim.Optimizer) or callable(a):
        return type(a) is type(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | collections.deque):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, random.Random):
        return a.getstate() == b.getstate()
    if isinstance(a, torch.Generator):
        return torch.equal(a.get_state(), b.get_state())
    return a == b


def moments(run, optimizer) -> dict:
    return {name: optimizer.state[weight] for name, weight in run.weights.items() if weight in optimizer.state}


def watched(prepared, result):
    """Everything that a run has at its end."""
    return {"prepared": prepared, "states": result.states, "optimizer": moments(result.run, result.optimizer)}


def stops(blocks: dict, **settings) -> tuple[dict, list[int]]:
    """The whole cell, and where to stop it: with one step, half of them, or all but one done, in each phase."""
    whole = worlds.cell("llama", "", blocks=blocks, watch=watched, **settings)
    trained, prepared = len(whole["curve"]), 0
    for key, block in blocks.items():
        if key == "ewc":
            prepared += block.get("samples", 0)
        if key == "hierarchical":
            prepared += round(block.get("epochs", 1.0) * -(-block["samples"] // goldens.SETTINGS.batch))
    found = {
        before + kept + 1
        for before, count in ((0, prepared), (prepared, trained))
        for kept in (1, count // 2, count - 1)
        if 0 < kept < count
    }
    return whole, sorted(found)


def resumes(blocks: dict, folder, *, few: bool = False, **settings) -> None:
    """Stop and resume at every place of `stops`; with `few` only in the middle of the preparation and of training."""
    whole, places = stops(blocks, **settings)
    done = []
    for stop in sorted({places[1], places[-2]}) if few else places:
        here = folder / str(stop)
        with pytest.raises(worlds.Stopped):
            worlds.cell("llama", "", blocks=blocks, folder=here, stop=stop, **settings)
        again = worlds.cell("llama", "", blocks=blocks, folder=here, watch=watched, **settings)
        done.append(again["resumed"])
        for key in ("final", "reports", "watched", "curve"):
            assert same(again[key], whole[key]), f"{blocks} {settings} stopped after {stop}: {key}"
    wanted = len(whole["curve"]) // 2 if few else len(whole["curve"]) - 1
    assert done[-1] == wanted, "no checkpoint was used"


def variations(part: type[Part]) -> list[dict]:
    """Every other value of each setting by its declaration: literals, bools, and the middle of a bounded interval."""
    kinds, found = typing.get_type_hints(part), []
    for field in declared(part):
        kind, default = kinds[field.name], field.metadata["default"]
        choices = [
            choice
            for option in (kind, *typing.get_args(kind))
            if typing.get_origin(option) is typing.Literal
            for choice in typing.get_args(option)
        ]
        if kind is bool:
            choices = [True, False]
        within = field.metadata["within"]
        if within and "inf" not in within and fits(0.5, kind) and inside(0.5, within):
            choices = [0.5]
        found += [{field.name: choice} for choice in choices if choice != default]
    return found


def test_variations_are_those_of_the_declarations():
    found = variations(registry.parts()["hierarchical"])
    assert {"groups": "blocks"} in found and {"consolidate": "epoch"} in found and {"bits": 32} in found
    assert {"carry_optimizer": True} in found and {"clamp": "step"} in found and {"consolidate": "end"} not in found
    assert {"dropout": 0.5} in variations(registry.parts()["lora"]) and {"fraction": 0.5} in variations(
        registry.parts()["mofo"]
    )


OFTEN = {name: (blocks, {}) for name, blocks in goldens.METHODS.items()} | {
    "official": ({"lora": LORA, "hierarchical": SMALL["hierarchical"] | worlds.OFFICIAL}, {}),
    "official, filtered": (
        {"hierarchical": SMALL["hierarchical"] | worlds.OFFICIAL, "mofo": {}},
        {"moments": "bfloat16"},
    ),
}


@pytest.mark.parametrize("name", OFTEN)
def test_a_run_resumes_where_it_was_stopped(tmp_path, name):
    blocks, settings = OFTEN[name]
    resumes(blocks, tmp_path, few=True, **settings)


def product() -> list:
    """Every registered part that trains, alone and with an adapter, with each value of its and the loop's settings."""
    found = []
    for key, part in registry.parts().items():
        if "provides_weights" in part.capabilities:
            continue
        base = SMALL.get(key, {})
        for change in [{}, *variations(part)]:
            block = {key: base | change}
            for blocks in [block] if key == "lora" else [block, block | {"lora": LORA}]:
                found.append((blocks, {}))
        for settings in ENGINE:
            found.append(({key: base}, settings))
    found += [
        ({"hierarchical": SMALL["hierarchical"] | worlds.OFFICIAL, "mofo": {}, **more}, settings)
        for more in ({}, {"lora": LORA})
        for settings in ({}, *ENGINE)
    ]
    return [pytest.param(*one, id=f"{'+'.join(one[0])} {list(one[0].values())[0]} {one[1]}"[:120]) for one in found]


@pytest.mark.thorough
@pytest.mark.parametrize(("blocks", "settings"), product())
def test_every_part_resumes_with_every_choice(tmp_path, blocks, settings):
    try:
        registry.build(blocks)
    except Exception:
        pytest.skip("these settings exclude each other")
    resumes(blocks, tmp_path, **settings)


class Tally:
    """An object of a kind that cannot be restored."""

    def __init__(self):
        self.calls = 0


@dataclasses.dataclass
class Window:
    losses: list
    mean: torch.Tensor
    fixed: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hoard(Part):
    """Keeps values of every kind, changes them in every way, and lets the weights depend on them."""

    key = "hoard"
    odd: str = ""

    def begin(self, *, run, state, examples, general):
        name = next(iter(run.weights))
        shared = torch.zeros(6)
        state |= {
            "calls": 0,
            "ratio": 0.5,
            "on": False,
            "said": "",
            "nothing": None,
            "seen": [],
            "pair": (1, 2.0),
            "names": {"a"},
            "last": collections.deque(maxlen=3),
            "nested": {"deep": [{"count": 0}, {"tensor": torch.zeros(3)}]},
            "window": Window([], torch.zeros(2), torch.ones(2)),
            "in place": torch.zeros(4),
            "through data": torch.ones(4),
            "array": np.zeros(3),
            "number": np.float32(1),
            "view": shared[2:4],
            "whole": shared,
            "still": torch.arange(5.0),
            "expanded": torch.zeros(1).expand(3),
            "draws": random.Random(3),
            "torch draws": torch.Generator().manual_seed(4),
            "numpy draws": np.random.default_rng(5),
            "head": torch.nn.Linear(2, 2),
            "weight": run.weights[name],
            "optimizer": None,
            7: "by number",
            "twice": shared,
            "gone": [1, 2],
            "iterator": iter([1, 2, 3]) if self.odd == "iterator" else None,
            "tally": Tally(),
        }
        torch.nn.init.constant_(state["head"].weight, 1.0)
        state["head optimizer"] = torch.optim.Adam(state["head"].parameters(), lr=0.1)

    def before_clip(self, *, run, state, step):
        scale = (
            state["calls"]
            + state["draws"].random()
            + state["in place"].sum()
            + state["nested"]["deep"][0]["count"]
            + state["head"].weight.sum()
        )
        scale = (
            scale
            + torch.rand(1, generator=state["torch draws"]).item()
            + state["numpy draws"].random()
            + sum(state["seen"])
            + state["array"].sum()
        )
        for weight in run.weights.values():
            weight.grad.add_(weight.detach(), alpha=1e-4 * float(scale))
        return 1e-3 * float(scale)

    def after_step(self, *, run, state, step, gradient):
        value = float(next(iter(run.weights.values())).detach().sum())
        state["calls"] += 1
        state["ratio"] *= 1 / 3
        state["on"], state["said"], state["nothing"] = not state["on"], state["said"] + "é", [None, 3][step % 2]
        state["seen"].append(value)
        state["pair"] = (step, state["pair"])
        state["names"].add(f"step {step}")
        state["last"].append(value)
        state["nested"]["deep"][0]["count"] += 1
        state["nested"]["deep"][1]["tensor"][step % 3] = value
        state["nested"][f"new {step}"] = torch.full((step + 1,), value, dtype=torch.bfloat16)
        state["window"].losses.append(value)
        state["window"].mean += value
        state["in place"].add_(1e-3)
        state["through data"].data.mul_(0.5)
        state["array"][step % 3] += 0.1
        state["number"] = state["number"] / np.float32(3)
        state["view"].add_(1.0)
        state["later"] = state.get("later", torch.zeros(2, dtype=torch.float64)) + value
        state["later alias"] = state["later"]
        state.pop("gone", None)
        with torch.enable_grad():
            state["head"](torch.ones(2)).sum().backward()
        state["head optimizer"].step()
        state["head optimizer"].zero_grad()
        if self.odd == "tally":
            state["tally"].calls += 1
        if self.odd == "iterator" and step == 0:
            next(state["iterator"])


def run(parts, folder=None, stop=worlds.NEVER, *, every=0.0, examples=18, **settings):
    """Seven steps of a tiny model; with `folder` a checkpoint after every step."""
    model = build("llama", seed=1)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    resume = Resume(folder / "run", identity={}, every=every) if folder else None
    chosen = dataclasses.replace(goldens.SETTINGS, **settings)
    return fit(
        model=model,
        parts=(*parts, worlds.Stop(left=[stop])),
        examples=goldens.texts(examples, seed=12, labelled=True),
        settings=chosen,
        seed=5,
        base=base,
        resume=resume,
    )


def weights(result):
    return {name: weight.detach().clone() for name, weight in result.run.weights.items()}


def test_whatever_changes_in_a_state_is_kept(tmp_path):
    whole = run([Hoard()])
    for stop in (2, 5, 7):
        with pytest.raises(worlds.Stopped):
            run([Hoard()], tmp_path / str(stop), stop)
        again = run([Hoard()], tmp_path / str(stop))
        assert again.resumed == stop - 1 and same(weights(again), weights(whole))
        for key, wanted in whole.states["hoard"].items():
            found = again.states["hoard"][key]
            if key in ("head", "head optimizer"):
                found, wanted = found.state_dict(), wanted.state_dict()
            assert key in ("tally", "numpy draws") or same(found, wanted), key
        found = again.states["hoard"]
        assert found.keys() == whole.states["hoard"].keys()
        assert found["numpy draws"].random() == run([Hoard()]).states["hoard"]["numpy draws"].random()
        assert found["twice"] is found["whole"] and found["later alias"] is found["later"]
        assert found["view"].data_ptr() == found["whole"][2:].data_ptr() and found["weight"] is next(
            iter(again.run.weights.values())
        )


class Signals(Part):
    """Sends this process a signal in the middle of a step, as Ctrl-C does."""

    key = "signals"

    def __init__(self, at, numbers):
        self.at, self.numbers = at, numbers

    def before_clip(self, *, run, state, step):
        if step == self.at:
            for number in self.numbers:
                signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_the_end_of_the_step_and_loses_none(tmp_path, number, capsys):
    before, whole = signal.getsignal(number), run([Hoard()])
    signal.signal(number, signal.default_int_handler)
    try:
        for step in (0, 3, 6):  # the last of seven, too
            with pytest.raises(KeyboardInterrupt):
                run([Hoard(), Signals(step, [number])], tmp_path / str(step), every=900.0)
            assert signal.getsignal(number) is signal.default_int_handler
            again = run([Hoard()], tmp_path / str(step), every=900.0)
            assert again.resumed == step + 1 and same(weights(again), weights(whole))
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err.count("stopping after this step, with a checkpoint") == 3


def test_a_stop_is_heeded_where_nothing_can_be_printed(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as gone:
        gone.setattr(resume, "print", broken, raising=False)
        with pytest.raises(KeyboardInterrupt):
            run([Hoard(), Signals(3, [signal.SIGTERM])], tmp_path, every=900.0)
    assert run([Hoard()], tmp_path, every=900.0).resumed == 4


@pytest.fixture
def heeded():
    """Ctrl-C is heeded, also where the tests run in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_stops_at_once(tmp_path, heeded):
    with pytest.raises(KeyboardInterrupt):
        run([Hoard(), Signals(3, [signal.SIGTERM, signal.SIGTERM, signal.SIGINT])], tmp_path, every=900.0)
    assert not list(tmp_path.glob("**/save-*"))
    with pytest.raises(KeyboardInterrupt):  # no checkpoints, so that nothing is waited for
        run([Hoard(), Signals(3, [signal.SIGINT])])


@pytest.mark.parametrize(
    ("odd", "said"),
    [("tally", r'hoard: state\["tally"\] is a .*Tally'), ("iterator", r'hoard: state\["iterator"\] is a .*iterator')],
)
def test_what_cannot_be_restored_is_named_and_no_checkpoint_is_written(tmp_path, capfd, odd, said):
    whole = run([Hoard(odd=odd)], tmp_path)
    err = capfd.readouterr().err
    assert err.count("no checkpoint was written") == 1
    assert re.search(said, err), err
    assert not list(tmp_path.glob("run/save-*")) and whole.steps == 7


class Mixed(torch.optim.Optimizer):
    """Holds its state in every way that optimizers out there do."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "steps": 0, "d": 1.0})
        self.total, self.slow, self.momenta = 0, [], {}

    @torch.no_grad()
    def step(self, closure=None):
        self.total += 1
        for group in self.param_groups:
            group["steps"], group["d"] = group["steps"] + 1, group["d"] * 0.9
            for index, p in enumerate(group["params"]):
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state.setdefault("past", collections.deque(maxlen=2)).append(p.grad.clone())
                state["none"] = None
                state["flat"] = torch.tensor(float(self.total))
                if self.total > 2:  # appears on the way
                    state.setdefault("late", torch.zeros_like(p)).add_(p.grad)
                    self.momenta.setdefault(index, torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                    p.add_(state["late"] + self.momenta[index], alpha=-0.1 * group["lr"])
                p.add_(sum(state["past"]), alpha=-group["lr"] * group["d"] * self.total / state["step"])
        self.state["calls"] = self.total
        self.slow = [self.total, *self.slow[:2]]


class Around(torch.optim.Optimizer):
    """Steps by another optimizer, whose groups are its own, and draws the weights back every other step."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.inner = torch.optim.AdamW(params, lr=lr)
        self.param_groups, self.steps, self.slow = self.inner.param_groups, 0, [p.detach().clone() for p in params]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        self.steps += 1
        for p, slow in zip(self.param_groups[0]["params"], self.slow):
            state = self.inner.state[p]
            state["kept"] = state.get("kept", torch.zeros_like(p, dtype=torch.bfloat16)) * 0.9 + p.grad.bfloat16()
            p.sub_(state["kept"], alpha=self.param_groups[0]["lr"])
            if self.steps % 2 == 0:
                p.copy_(slow.lerp_(p, 0.5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brings(Part):
    key = "brings"
    kind: str

    def optimizer(self, *, run, learning_rate, betas, eps, weight_decay):
        given = list(run.weights.values())
        if self.kind == "own tensor":
            given.append(torch.ones(3, requires_grad=True))
        return {
            "mixed": Mixed,
            "around": Around,
            "plain": torch.optim.SGD,
            "own tensor": torch.optim.Adam,
            "adadelta": torch.optim.Adadelta,
            "nadam": torch.optim.NAdam,
            "momentum": lambda given, lr: torch.optim.SGD(given, lr=lr, momentum=0.9, nesterov=True),
            "rprop": torch.optim.Rprop,
            "asgd": torch.optim.ASGD,
            "adafactor": torch.optim.Adafactor,
            "amsgrad": lambda given, lr: torch.optim.Adam(given, lr=lr, amsgrad=True),
        }[self.kind](given, lr=learning_rate)

    def before_clip(self, *, run, state, step):
        if "own" in state:
            state["own"].grad = torch.full((3,), float(step))

    def optimizer_ready(self, *, run, state, optimizer):
        if self.kind == "own tensor":
            state["own"] = optimizer.param_groups[0]["params"][-1]

    def report(self, *, run, state):
        return {"own": state["own"].tolist()} if "own" in state else {}


OTHERS = ["plain", "momentum", "adadelta", "nadam", "rprop", "asgd", "adafactor", "amsgrad"]


@pytest.mark.parametrize(
    "kinds",
    [["mixed"], ["around"], ["own tensor"], pytest.param(OTHERS, marks=pytest.mark.thorough)],
    ids=["mixed", "around", "own tensor", "every other"],
)
def test_whatever_an_optimizer_holds_is_kept(tmp_path, kinds):
    for kind in kinds:
        whole = run([Brings(kind=kind)])
        for stop in (2, 4, 7):
            here = tmp_path / f"{kind} {stop}"
            with pytest.raises(worlds.Stopped):
                run([Brings(kind=kind)], here, stop)
            again = run([Brings(kind=kind)], here)
            assert again.resumed == stop - 1 and same(weights(again), weights(whole)), f"{kind} {stop}"
            assert same(moments(again.run, again.optimizer), moments(whole.run, whole.optimizer))
            groups = [
                [{k: v for k, v in g.items() if k != "params"} for g in r.optimizer.param_groups]
                for r in (again, whole)
            ]
            assert same(*groups) and same(again.states["brings"], whole.states["brings"])
            if kind == "mixed":
                found, wanted = again.optimizer, whole.optimizer
                assert (
                    (found.total, found.slow, found.state["calls"])
                    == (wanted.total, wanted.slow, wanted.state["calls"])
                    == (7, [7, 6, 5], 7)
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merges(Part):
    """Changes what is not trained: a frozen tensor, and a buffer that becomes another one."""

    key = "merges"

    def adapt(self, model, *, seed, state):
        model.model.norm.weight.requires_grad_(False)
        model.register_buffer("seen", torch.zeros(2))
        return model

    def after_step(self, *, run, state, step, gradient):
        run.model.model.norm.weight.data.mul_(1.01)
        run.model.seen = torch.full((step + 1,), float(step))


def test_what_a_part_changes_in_the_model_is_kept(tmp_path):
    whole = run([Merges()])
    with pytest.raises(worlds.Stopped):
        run([Merges()], tmp_path, 4)
    again = run([Merges()], tmp_path)
    assert again.resumed == 3 and same(dict(again.run.model.state_dict()), dict(whole.run.model.state_dict()))
    norm, started = whole.run.model.model.norm.weight, build("llama", seed=1).model.norm.weight
    assert torch.allclose(norm, started * 1.01**7)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoPhases(Part):
    """Trains twice on general text before it sees the domain, and has a pass of its own between."""

    key = "two_phases"

    def prepare(self, *, model, base, general, seed, fit, progress, shards=None, resume=None, sample=None):
        first = fit(model=model, parts=(), examples=general, seed=seed, epochs=2.0, learning_rate=None)
        before = resume.load({}) if resume else None
        total = before[0]["total"] if before else torch.zeros(1)
        for turn in range(before[1]["turn"] if before else 0, 3):
            total += 1
            if resume and resume.due():
                resume.save({"total": total}, {"turn": turn + 1})
        second = fit(model=model, parts=(), examples=general, seed=seed + 1, epochs=2.0, learning_rate=5e-3)
        assert (first.steps, second.steps) == (4, 4) and total == 3
        return Prepared(start={name: second.run.whole(name).clone() for name in second.run.weights})


def test_a_preparation_of_several_phases_resumes(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.REGISTERED, "two_phases", TwoPhases)
    whole = worlds.cell("llama", "", blocks={"two_phases": {}}, watch=watched)
    for stop in (3, 6, 8):  # in the first phase, at the beginning of the second and at its end
        with pytest.raises(worlds.Stopped):
            worlds.cell("llama", "", blocks={"two_phases": {}}, folder=tmp_path / str(stop), stop=stop)
        again = worlds.cell("llama", "", blocks={"two_phases": {}}, folder=tmp_path / str(stop), watch=watched)
        assert same(again["final"], whole["final"]) and same(
            again["watched"]["prepared"], whole["watched"]["prepared"]
        ), stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keeps(Part):
    """Holds a tensor of its own outside its state, and with `grows` another one after the third step."""

    key = "keeps"
    own: list = dataclasses.field(default_factory=list, repr=False)
    grows: bool = False

    def begin(self, *, run, state, examples, general):
        self.own[:] = [torch.zeros(2)]

    def after_step(self, *, run, state, step, gradient):
        self.own[0] += step
        if self.grows and step == 2:
            self.own.append(torch.ones(3))

    def keep(self, *, run, state):
        return {f"own {index}": tensor for index, tensor in enumerate(self.own)}


def test_what_a_part_keeps_outside_its_state(tmp_path, capfd):
    part = Keeps()
    with pytest.raises(worlds.Stopped):
        run([part], tmp_path / "a", 5)
    again = run([part], tmp_path / "a")
    assert again.resumed == 4 and part.own[0].tolist() == [21.0, 21.0]  # 0 + 1 + … + 6
    run([Keeps(grows=True)], tmp_path / "b")
    assert "the part's `keep` names keeps/own 1 at one step and not at another" in capfd.readouterr().err
