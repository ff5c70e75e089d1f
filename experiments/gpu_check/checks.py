"""Does the device compute what the CPU, float64 or the plain way computes? Random weights, no data.

Each check returns {"status": "passed" or "failed", its numbers}; what "passed" asks for stands in its docstring.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from experiments import architecture, batches, loss, memory, moments
from experiments.engine import FitResult
from experiments.engine_settings import TrainSettings
from experiments.gpu_check import running, sizes
from experiments.gpu_check.sizes import Skipped
from experiments.paths import HERE
from experiments.resume import Resume
from experiments.sharding import Shards
from methods import importance, registry, selection
from methods.effective import base_parameters
from methods.part import Part

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention")
MEMORY_WITHIN = 0.15
# architecture sizes of the checks: heads as wide as the real ones, a few layers
_MEDIUM = {
    "gptj": {"n_embd": 1024, "n_layer": 4, "n_head": 4, "rotary_dim": 64, "vocab_size": 4096, "n_positions": 512},
    "llama": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
              "vocab_size": 4096, "max_position_embeddings": 512, "tie_word_embeddings": False},
}  # fmt: skip
_LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4,
          "vocab_size": 32000, "max_position_embeddings": 1024, "tie_word_embeddings": False}  # fmt: skip

Check = Callable[..., dict]


def checks(*, tiny: bool, shards: Shards) -> dict[str, Check]:
    """Every check by name, a function of the device."""
    found: dict[str, Check] = {
        "attention-float32": lambda device: attention(device, tiny=tiny, dtype=torch.float32),
        "attention-bfloat16": lambda device: attention(device, tiny=tiny, dtype=torch.bfloat16),
        "cross-entropy": lambda device: cross_entropy(device, tiny=tiny),
        "random-bits": lambda device: random_bits(device, tiny=tiny),
        "mofo-threshold": lambda device: mofo_threshold(device, tiny=tiny),
        "importance-8-bit": lambda device: importance_in_8_bits(device, tiny=tiny),
        "zero-strength": lambda device: zero_strength(device, tiny=tiny),
        "zero-strength-lora": lambda device: zero_strength(device, tiny=tiny, lora=True),
        "sharded-float32": lambda device: sharded(device, tiny=tiny, dtype=torch.float32, shards=shards),
        "sharded-bfloat16": lambda device: sharded(device, tiny=tiny, dtype=torch.bfloat16, shards=shards),
        "no-waiting-plain": lambda device: no_waiting(device, tiny=tiny, shards=Shards()),
        "no-waiting-sharded": lambda device: no_waiting(device, tiny=tiny, shards=shards),
    }
    for method in ("full", "mofo", "ewc"):
        found[f"resume-{method}"] = functools.partial(resumed, tiny=tiny, method=method)
    for kind in _MEDIUM:
        for name in ATTENTIONS:
            found[f"packed-{kind}-{name}"] = functools.partial(packed, tiny=tiny, kind=kind, name=name)
    for method in ("full", "mofo", "ewc"):
        for layout, among in (("plain", Shards()), ("sharded", shards)):
            found[f"memory-{method}-{layout}"] = functools.partial(memory_predicted, method=method, shards=among)
    return found


def attention(device: torch.device, *, tiny: bool, dtype: torch.dtype) -> dict:
    """GPT-J on SDPA against transformers' eager attention: logits, and the gradient that reaches the embeddings.

    float32: both within a relative 1e-4 of eager's (2-norms). bfloat16: as near to float32 as eager is, times 1.5.
    """
    ours = sizes.build("gptj", device=device, dtype=dtype, **_size("gptj", tiny))
    theirs, truth = _copy(ours, "eager", dtype), _copy(ours, "eager", torch.float32)
    ids = _ids(ours, rows=2, tokens=48 if tiny else 384)
    found = {name: _logits_and_gradient(model, ids) for name, model in (("sdpa", ours), ("eager", theirs), ("float32", truth))}
    numbers, right = {}, True
    for i, what in enumerate(("logits", "gradient")):
        off = {name: _relative(values[i], found["float32"][i]) for name, values in found.items()}
        numbers |= {f"{what}_sdpa": off["sdpa"], f"{what}_eager": off["eager"]}
        right &= off["sdpa"] <= (1e-4 if dtype == torch.float32 else 1.5 * off["eager"])
    return _judged(right, numbers)


def packed(device: torch.device, *, tiny: bool, kind: str, name: str) -> dict:
    """Rows of several examples against each example alone, hidden states and gradient, with one attention of transformers.

    Equal within a relative 1e-4 in float32, 2e-2 in bfloat16 (of attentions made for it); or told apart by
    `architecture.keeps_apart`, so that the engine refuses to pack.
    """
    dtype = torch.bfloat16 if name in ("flash_attention_2", "flex_attention") else torch.float32
    if tiny and name == "flex_attention":
        raise Skipped("flex_attention is compiled for minutes: left out with --tiny")
    model = sizes.build(kind, device=device, dtype=dtype, **_size(kind, tiny))
    if not (kind == "gptj" and name == "sdpa"):  # that is the model as it is built
        try:
            model = _copy(model, name, dtype)
            architecture.hidden_states(model, _ids(model, rows=1, tokens=8), None)
        except (ImportError, ValueError, RuntimeError, OSError) as error:
            raise Skipped(f"{name} is not to be had here for {kind}: {' '.join(str(error).split())[:200]}") from error
    if not architecture.keeps_apart(model):
        return _judged(True, {"keeps_apart": False})
    lengths = (5, 17, 2, 9) if tiny else (40, 130, 3, 77, 1, 200)
    ids = _ids(model, rows=1, tokens=sum(lengths))[0].cpu()
    examples = [{"input_ids": piece, "labels": piece} for piece in ids.split(lengths)]
    row = batches.collate_packed(examples, device)
    together, gradient = _hidden_and_gradient(model, [(row["input_ids"], row["position_ids"])])
    alone, wanted = _hidden_and_gradient(model, [(e["input_ids"][None].to(device), None) for e in examples])
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    numbers = {"keeps_apart": True, "hidden": _relative(together, alone), "gradient": _relative(gradient, wanted)}
    return _judged(numbers["hidden"] <= limit and numbers["gradient"] <= limit, numbers | {"limit": limit})


def cross_entropy(device: torch.device, *, tiny: bool) -> dict:
    """Cross-entropy in chunks against all logits at once in float64: loss and gradients.

    float32: within a relative 1e-5 (1e-4 for gradients). bfloat16: no worse than all logits at once in bfloat16, times
    1.5·√chunks, for the head's gradient is rounded once a chunk.
    """
    rows, width, vocabulary = (2 * loss.CHUNK + 30, 16, 40) if tiny else (4 * loss.CHUNK + 30, 512, 32000)
    draw = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(1, rows + 1, width, device=device, generator=draw)
    weight = torch.randn(vocabulary, width, device=device, generator=draw) / math.sqrt(width)
    labels = torch.randint(0, vocabulary, (1, rows + 1), device=device, generator=draw)

    def run(dtype: torch.dtype, *, chunked: bool) -> list[Tensor]:
        head = torch.nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype)
        head.weight.data.copy_(weight)
        inside = hidden.to(dtype, copy=True).requires_grad_()
        if chunked:
            value = loss.summed_nll(inside, labels, head)
        else:
            logits = head(inside[:, :-1]).flatten(0, 1)
            value = F.cross_entropy(logits.float() if dtype == torch.bfloat16 else logits, labels[0, 1:], reduction="sum")
        value.backward()
        return [value.detach(), inside.grad, head.weight.grad]

    hidden, weight = hidden.bfloat16().float(), weight.bfloat16().float()  # the same numbers for every dtype
    wanted = run(torch.float64, chunked=False)
    numbers, right = {}, True
    for dtype, said in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        chunks, whole = run(dtype, chunked=True), run(dtype, chunked=False)
        for what, chunk, all_at_once, exact in zip(("loss", "hidden_gradient", "head_gradient"), chunks, whole, wanted):
            off, limit = _relative(chunk, exact), 1.5 * math.sqrt(-(-rows // loss.CHUNK)) * _relative(all_at_once, exact) + 1e-6
            if dtype == torch.float32:
                limit = 1e-5 if what == "loss" else 1e-4
            numbers |= {f"{what}_{said}": off, f"{what}_{said}_limit": limit}
            right &= off <= limit
    return _judged(right, numbers)


def random_bits(device: torch.device, *, tiny: bool) -> dict:
    """The bits that round bfloat16 moments, and what they round to, against the CPU's: every one equal."""
    entries = 5000 if tiny else 20_000_000
    equal = True
    for start in (0, moments.BLOCK - entries // 2):  # the second run crosses into the next block of indices
        here, there = (moments.random_bits(seed=3, step=7, name="a.b", start=start, entries=entries, device=d) for d in (device, "cpu"))
        equal &= torch.equal(here.cpu(), there)
        value = torch.randn(entries, generator=torch.Generator().manual_seed(0)) * 1e-3
        value[:4] = torch.tensor([0.0, math.inf, -math.inf, math.nan])
        rounded = []
        for bits in (here, there):
            out = torch.empty(entries, dtype=torch.bfloat16, device=bits.device)
            moments.round_stochastically(value.to(bits.device, copy=True), bits & 0xFFFF, out=out)
            rounded.append(out.view(torch.int16).cpu())
        equal &= torch.equal(*rounded)
    return _judged(equal, {"entries": entries})


def mofo_threshold(device: torch.device, *, tiny: bool) -> dict:
    """MoFO's k-th largest |m|, as one process finds it and as several do, against a sorted copy: equal."""
    entries = 20_000 if tiny else 40_000_000  # beyond what enters one histogram
    draw = torch.Generator(device).manual_seed(0)
    heavy = torch.randn(entries, device=device, generator=draw).exp_().mul_(1e-4)
    mostly_zero = heavy * (torch.rand(entries, device=device, generator=draw) > 0.95)
    tied = (heavy * 1e5).round_()
    wrong = []
    for what, size in (("heavy-tailed", heavy), ("mostly zero", mostly_zero), ("tied", tied)):
        ordered = size.sort(descending=True).values
        for k in (1, entries // 10, entries // 2, entries):
            wanted = ordered[k - 1].item()
            ways = {"one": selection.kth_largest(size.clone(), k), "several": selection.kth_largest_of_all(size.clone(), k, Shards())}
            for path, found in ways.items():
                if float(found) != wanted:
                    wrong.append(f"{what}, k={k}, {path}: {float(found)!r} for {wanted!r}")
    return _judged(not wrong, {"entries": entries, "wrong": wrong})


def importance_in_8_bits(device: torch.device, *, tiny: bool) -> dict:
    """The penalty on 8-bit importance against float64 arithmetic on the decoded values, and codes against the CPU's.

    The gradient within a relative 1e-5, the value, a float32 sum, within 1e-4; at most one code in 10⁵ another than the
    CPU's, and that a neighbour.
    """
    entries = 10_000 if tiny else 20_000_000
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(entries, generator=draw).mul_(5).exp_()
    values[::7] = 0
    weight, anchor = torch.randn(2, entries, generator=draw)
    gradient = torch.randn(entries, generator=draw)
    there, here = importance.encode(values), importance.encode(values.to(device))
    apart = (there.codes.int() - here.codes.cpu().int()).abs()
    exact = torch.where(there.codes == 0, 0.0, 2.0 ** (there.low + (there.codes.double() - 1) * there.step))
    moved = weight.double() - anchor.bfloat16().double()
    coded = dataclasses.replace(there, codes=there.codes.to(device))
    out = torch.zeros(entries, device=device)
    value = importance.penalise(weight=weight.to(device), anchor=anchor.bfloat16().to(device), importance=coded, gradient=out, scale=0.5)
    numbers = {"entries": entries, "codes_apart": int((apart > 0).sum()), "gradient": _relative(out, 0.5 * exact * moved),
               "value": _relative(value, (exact * moved.square()).sum())}  # fmt: skip
    same = numbers["codes_apart"] <= 1e-5 * entries and int(apart.max()) <= 1
    return _judged(same and numbers["gradient"] <= 1e-5 and numbers["value"] <= 1e-4, numbers)


def zero_strength(device: torch.device, *, tiny: bool, lora: bool = False) -> dict:
    """Weights after some steps with a penalty of strength 0 against plain fine-tuning: bit for bit, in deterministic kernels.

    `repeats` says whether plain fine-tuning itself comes out equal twice in torch's ordinary kernels.
    """
    beside = {"lora": {}} if lora else {}
    if lora:
        sizes.parts_of("lora")
    model = _llama(device, tiny)
    adapted = registry.build(beside)
    with _deterministic():
        plain = _weights(_fit(model, registry.build(beside), device))
        wrong = []
        for name in ("ewc", "hierarchical"):
            part = registry.build({name: {"strength": 0.0}})[0]
            state = {"importance": _ones(model, adapted)}
            if name == "hierarchical":
                state["start"] = _start(model, adapted)
            found = _weights(_fit(model, (part, *adapted), device, states={name: state}))
            wrong += [f"{name}: {key}" for key, value in found.items() if not torch.equal(value, plain[key])]
    twice = [_weights(_fit(model, registry.build(beside), device)) for _ in range(2)]
    repeats = all(torch.equal(value, twice[1][key]) for key, value in twice[0].items())
    return _judged(not wrong, {"wrong": wrong[:10], "repeats": repeats})


def resumed(device: torch.device, *, tiny: bool, method: str) -> dict:
    """A run stopped after three steps and gone on with, against one that was not: bit for bit, in deterministic kernels."""
    model, parts = _llama(device, tiny), sizes.parts_of(method)
    states = {"ewc": {"importance": _ones(model, ())}} if method == "ewc" else {}
    with _deterministic(), tempfile.TemporaryDirectory() as folder:
        whole = _weights(_fit(model, parts, device, states=states))
        at = lambda: Resume(Path(folder) / "run", identity={"check": method}, every=0)
        with contextlib.suppress(_Stop):
            _fit(model, (*parts, _StopAfter(steps=3)), device, states=states, resume=at())
        gone_on = _fit(model, parts, device, states=states, resume=at())
        found = _weights(gone_on)
    wrong = [key for key, value in found.items() if not torch.equal(value, whole[key])]
    return _judged(not wrong and gone_on.resumed == 2, {"wrong": wrong[:10], "steps_resumed": gone_on.resumed})


def sharded(device: torch.device, *, tiny: bool, dtype: torch.dtype, shards: Shards) -> dict:
    """fully_shard in one process against the plain layout, after some steps.

    float32: weights within a relative 1e-6. bfloat16: within 1 % of how far the plain run moved.
    """
    _needs(shards)
    model = _llama(device, tiny, dtype)
    base = {name: p.detach().clone() for name, p in base_parameters(model).items()}
    plain, other = (_weights(_fit(model, (), device, shards=s, compute_dtype=dtype, base=base)) for s in (Shards(), shards))
    whole = lambda tensors: torch.cat([tensors[name].double().flatten() for name in plain])
    start = torch.cat([base[name].double().flatten() for name in plain])
    moved, apart = (whole(plain) - start).norm().item(), (whole(other) - whole(plain)).norm().item()
    numbers = {"apart_of_weights": apart / whole(plain).norm().item(), "apart_of_movement": apart / moved}
    return _judged(numbers["apart_of_weights"] <= 1e-6 if dtype == torch.float32 else numbers["apart_of_movement"] <= 1e-2, numbers)


def no_waiting(device: torch.device, *, tiny: bool, shards: Shards) -> dict:
    """Where the host waits for the device inside a step of MoFO with EWC: nowhere. Steps 3 to 5 of 6 are watched."""
    if device.type != "cuda":
        raise Skipped("a CPU computes as it is asked: nothing waits")
    model = _llama(device, tiny, torch.bfloat16)
    parts = registry.build({"ewc": {}, "mofo": {}})
    watcher = _Watcher(first=2, last=4)
    states = {"ewc": {"importance": _ones(model, ())}}
    _fit(model, (*parts, watcher), device, states=states, shards=shards, steps=6, compute_dtype=torch.bfloat16)
    places = {place: count / 3 for place, count in sorted(watcher.places.items())}
    return _judged(not places, {"waits_a_step": sum(places.values()), "places": places})


def memory_predicted(device: torch.device, *, method: str, shards: Shards) -> dict:
    """memory.predict against torch's largest allocation of a fit, a model of 0.5 B weights in bfloat16: within 15 %."""
    if device.type != "cuda":
        raise Skipped("nothing counts what a process allocates on the CPU")
    if shards.active:
        _needs(shards)
    parts = sizes.parts_of(method)
    settings = _settings(steps=4, rows=8, length=512)
    peak = running.Peak(device)
    model = sizes.build("llama", device=device, dtype=torch.bfloat16, **_LARGE)
    shape = memory.Shape(config=model.config)
    base = running.base_of(model, parts)
    states = {"ewc": {"importance": _ones(model, (), device="cpu")}} if method == "ewc" else {}
    examples = sizes.random_examples(4 * 8, 512, vocabulary=_LARGE["vocab_size"])
    running.train(parts=parts, model=model, base=base, states=states, examples=examples, settings=settings, device=device,
                  shards=shards, compute_dtype=torch.bfloat16)  # fmt: skip
    most = peak.bytes()
    predicted = memory.predict(phase="train", shape=shape, parts=parts, settings=settings, checkpoint_dtype=torch.bfloat16,
                               compute_dtype=torch.bfloat16, device_type=device.type, processes=1 if shards.active else None)  # fmt: skip
    ratio = predicted["total"] / most
    return _judged(abs(ratio - 1) <= MEMORY_WITHIN, {"predicted": predicted, "peak": most, "predicted_over_peak": ratio})


class _Stop(Exception):
    """What a killed run stands for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StopAfter(Part):
    key = "~ stop"

    steps: int

    def after_step(self, *, run, state, step, gradient):
        if step + 1 == self.steps:
            raise _Stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Watcher(Part):
    """Counts, by place in the code, what makes the host wait from the end of step `first` − 1 to the end of step `last`."""

    key = "~ watch"

    first: int
    last: int
    places: dict = dataclasses.field(default_factory=dict)
    inside: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def after_step(self, *, run, state, step, gradient):
        if step + 1 == self.first:
            self.inside.enter_context(_told_of_waiting(self.places))
        elif step == self.last:
            self.inside.close()


@contextlib.contextmanager
def _told_of_waiting(places: dict[str, int]) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with places_of_warnings(places):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def places_of_warnings(places: dict[str, int]) -> Iterator[None]:
    """Count torch's warnings of a wait in `places` by where in the code they arise; others are let go."""

    def note(message, category, filename, lineno, file=None, line=None):
        if "synchroniz" in str(message):
            place = _place(traceback.extract_stack()[:-1])
            places[place] = places.get(place, 0) + 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield


def _place(stack: traceback.StackSummary) -> str:
    """`file:line function` of the innermost frame of this project, and of the library's that it called."""
    frames = [frame for frame in stack if Path(frame.filename).name != "warnings.py"]
    own = max((i for i, frame in enumerate(frames) if _is_ours(frame.filename)), default=0)
    said = [f"{short_path(frame.filename)}:{frame.lineno} {frame.name}" for frame in (frames[own], frames[-1])]
    return " → ".join(dict.fromkeys(said))


def short_path(file: str) -> str:
    """A path without this machine's part of it."""
    return Path(file).relative_to(HERE).as_posix() if _is_ours(file) else "/".join(Path(file).parts[-3:])


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(HERE) and "site-packages" not in file


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _size(kind: str, tiny: bool) -> dict:
    return {} if tiny else _MEDIUM[kind]


def _llama(device: torch.device, tiny: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return sizes.build("llama", device=device, dtype=dtype, **_size("llama", tiny))


def _copy(model: PreTrainedModel, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights in transformers' own model with the attention asked for."""
    device = next(model.parameters()).device
    with device:
        made = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation=attention, dtype=dtype)
    made.load_state_dict(model.state_dict())
    return made.eval()


def _ids(model: PreTrainedModel, *, rows: int, tokens: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (rows, tokens), generator=draw).to(next(model.parameters()).device)


def _logits_and_gradient(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), model.get_input_embeddings().weight.grad.float()


def _hidden_and_gradient(model: PreTrainedModel, rows: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """Hidden states of all rows behind one another, and what a fixed function of them gives the embeddings as gradient."""
    model.zero_grad()
    hidden = torch.cat([architecture.hidden_states(model, ids, None, positions)[0] for ids, positions in rows]).float()
    hidden.square().mul(torch.linspace(0, 1, hidden.shape[-1], device=hidden.device)).sum().backward()
    return hidden.detach(), model.get_input_embeddings().weight.grad.float()


def _settings(*, steps: int, rows: int, length: int) -> TrainSettings:
    return TrainSettings(batch=rows, micro_batch=rows, length=length, learning_rate=1e-3, moments="bfloat16", probes=0)


def _fit(model: PreTrainedModel, parts, device: torch.device, *, states: dict | None = None, shards: Shards = Shards(), steps: int = 6,
         compute_dtype: torch.dtype | None = None, base: dict | None = None, **more) -> FitResult:  # fmt: skip
    """A fit of a copy of the model on random tokens, two micro-batches a step."""
    settings = dataclasses.replace(_settings(steps=steps, rows=8, length=32), micro_batch=4)
    examples = sizes.random_examples(8 * steps, 32, vocabulary=model.config.vocab_size)
    base = base if base is not None else {name: p.detach().clone() for name, p in base_parameters(model).items()}
    states = {key: dict(state) for key, state in (states or {}).items()}
    result, _ = running.train(model=copy.deepcopy(model), parts=parts, examples=examples, settings=settings, base=base, states=states,
                              device=device, shards=shards, compute_dtype=compute_dtype, **more)  # fmt: skip
    return result


def _weights(result: FitResult) -> dict[str, Tensor]:
    return {name: result.run.whole(name).clone() for name in result.run.weights}


def _ones(model: PreTrainedModel, adapted, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Importance 1 of every weight that parts can regularise."""
    return {name: torch.ones_like(p, dtype=torch.float32, requires_grad=False, device=device or p.device)
            for name, p in base_parameters(model).items()}  # fmt: skip


def _start(model: PreTrainedModel, adapted) -> dict[str, Tensor]:
    """The weights as they are, adapters' fresh ones included, by the names that a run has for them."""
    model = copy.deepcopy(model)
    for part in adapted:
        model = part.adapt(model, seed=0)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _needs(shards: Shards) -> None:
    if not shards.active:
        raise Skipped("no process group could be started here")


def _relative(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64; inf where something is not a number."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    off = ((found - wanted).norm() / wanted.norm()).item()
    return off if math.isfinite(off) else math.inf


def _judged(right: bool, numbers: dict) -> dict:
    return {"status": "passed" if right else "failed"} | numbers
