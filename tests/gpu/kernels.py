"""Does the device compute what the CPU, float64 or the plain way computes? One piece of a step at a time, on random
numbers.

Each check returns {"status": "passed" or "failed", its numbers}; what "passed" asks for stands in its docstring.
"""

import copy
import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from experiments.bench import sizes
from experiments.bench.sizes import Skipped
from experiments.training import batches, loss
from methods.tools import adam as moments
from methods.tools import architecture, importance, selection
from methods.tools.process_group import Shards
from tests.gpu import models
from tests.gpu.verdict import judged

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def attention(device: torch.device, *, tiny: bool, dtype: torch.dtype) -> dict:
    """GPT-J on SDPA against transformers' eager attention: logits, and the gradient that reaches the embeddings.

    float32: both within a relative 1e-4 of eager's (2-norms). bfloat16: as near to float32 as eager is, times 1.5.
    """
    ours = sizes.build("gptj", device=device, dtype=dtype, **models.medium("gptj", tiny))
    theirs, truth = _copy(ours, "eager", dtype), _copy(ours, "eager", torch.float32)
    ids = _ids(ours, rows=2, tokens=48 if tiny else 384)
    found = {
        name: _logits_and_gradient(model, ids)
        for name, model in (("sdpa", ours), ("eager", theirs), ("float32", truth))
    }
    numbers, right = {}, True
    for i, what in enumerate(("logits", "gradient")):
        off = {name: _relative(values[i], found["float32"][i]) for name, values in found.items()}
        numbers |= {f"{what}_sdpa": off["sdpa"], f"{what}_eager": off["eager"]}
        right &= off["sdpa"] <= (1e-4 if dtype == torch.float32 else 1.5 * off["eager"])
    return judged(right, numbers)


def packed(device: torch.device, *, tiny: bool, kind: str, name: str) -> dict:
    """Rows of several examples against each example alone, hidden states and gradient, with one attention of
    transformers.

    Equal within a relative 1e-4 in float32, 2e-2 in bfloat16 (of attentions made for it); or told apart by
    `architecture.keeps_apart`, so that the engine refuses to pack.
    """
    dtype = torch.bfloat16 if name in ("flash_attention_2", "flex_attention") else torch.float32
    if tiny and name == "flex_attention":
        raise Skipped("flex_attention is compiled for minutes: left out with --tiny")
    model = sizes.build(kind, device=device, dtype=dtype, **models.medium(kind, tiny))
    if not (kind == "gptj" and name == "sdpa"):  # that is the model as it is built
        try:
            model = _copy(model, name, dtype)
            architecture.hidden_states(model, _ids(model, rows=1, tokens=8), None)
        except (ImportError, ValueError, RuntimeError, OSError) as error:
            raise Skipped(f"{name} is not to be had here for {kind}: {' '.join(str(error).split())[:200]}") from error
    if not architecture.keeps_apart(model):
        return judged(True, {"keeps_apart": False})
    lengths = (5, 17, 2, 9) if tiny else (40, 130, 3, 77, 1, 200)
    ids = _ids(model, rows=1, tokens=sum(lengths))[0].cpu()
    examples = [{"input_ids": piece, "labels": piece} for piece in ids.split(lengths)]
    row = batches.collate_packed(examples, device)
    together, gradient = _hidden_and_gradient(model, [(row["input_ids"], row["position_ids"])])
    alone, wanted = _hidden_and_gradient(model, [(e["input_ids"][None].to(device), None) for e in examples])
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    numbers = {"keeps_apart": True, "hidden": _relative(together, alone), "gradient": _relative(gradient, wanted)}
    return judged(numbers["hidden"] <= limit and numbers["gradient"] <= limit, numbers | {"limit": limit})


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
            value = F.cross_entropy(
                logits.float() if dtype == torch.bfloat16 else logits, labels[0, 1:], reduction="sum"
            )
        value.backward()
        return [value.detach(), inside.grad, head.weight.grad]

    hidden, weight = hidden.bfloat16().float(), weight.bfloat16().float()  # the same numbers for every dtype
    wanted = run(torch.float64, chunked=False)
    numbers, right = {}, True
    for dtype, said in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        chunks, whole = run(dtype, chunked=True), run(dtype, chunked=False)
        for what, chunk, all_at_once, exact in zip(("loss", "hidden_gradient", "head_gradient"), chunks, whole, wanted):
            off, limit = (
                _relative(chunk, exact),
                1.5 * math.sqrt(-(-rows // loss.CHUNK)) * _relative(all_at_once, exact) + 1e-6,
            )
            if dtype == torch.float32:
                limit = 1e-5 if what == "loss" else 1e-4
            numbers |= {f"{what}_{said}": off, f"{what}_{said}_limit": limit}
            right &= off <= limit
    return judged(right, numbers)


def random_bits(device: torch.device, *, tiny: bool) -> dict:
    """The bits that round bfloat16 moments, and what they round to, against the CPU's: every one equal."""
    entries = 5000 if tiny else 20_000_000
    equal = True
    for start in (0, moments.BLOCK - entries // 2):  # the second run crosses into the next block of indices
        here, there = (
            moments.random_bits(seed=3, step=7, name="a.b", start=start, entries=entries, device=d)
            for d in (device, "cpu")
        )
        equal &= torch.equal(here.cpu(), there)
        value = torch.randn(entries, generator=torch.Generator().manual_seed(0)) * 1e-3
        value[:4] = torch.tensor([0.0, math.inf, -math.inf, math.nan])
        rounded = []
        for bits in (here, there):
            out = torch.empty(entries, dtype=torch.bfloat16, device=bits.device)
            moments.round_stochastically(value.to(bits.device, copy=True), bits & 0xFFFF, out=out)
            rounded.append(out.view(torch.int16).cpu())
        equal &= torch.equal(*rounded)
    return judged(equal, {"entries": entries})


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
            ways = {
                "one": selection.kth_largest(size.clone(), k),
                "several": selection.kth_by_histogram(
                    lambda size=size: size.split(selection.COUNTED), k, device=device, shards=Shards()
                ),
            }
            for path, found in ways.items():
                if float(found) != wanted:
                    wrong.append(f"{what}, k={k}, {path}: {float(found)!r} for {wanted!r}")
    return judged(not wrong, {"entries": entries, "wrong": wrong})


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
    there, here = importance.encode(values), importance.encode(values.to(device))
    apart = (there.codes.int() - here.codes.cpu().int()).abs()
    exact = torch.where(there.codes == 0, 0.0, 2.0 ** (there.low + (there.codes.double() - 1) * there.step))
    moved = weight.double() - anchor.bfloat16().double()
    coded = dataclasses.replace(there, codes=there.codes.to(device))
    out = torch.zeros(entries, device=device)
    value = importance.penalise(
        weight=weight.to(device), anchor=anchor.bfloat16().to(device), importance=coded, gradient=out, scale=0.5
    )
    numbers = {
        "entries": entries,
        "codes_apart": int((apart > 0).sum()),
        "gradient": _relative(out, 0.5 * exact * moved),
        "value": _relative(value, (exact * moved.square()).sum()),
    }
    same = numbers["codes_apart"] <= 1e-5 * entries and int(apart.max()) <= 1
    return judged(same and numbers["gradient"] <= 1e-5 and numbers["value"] <= 1e-4, numbers)


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
    """Hidden states of all rows behind one another, and what a fixed function of them gives the embeddings as
    gradient.
    """
    model.zero_grad()
    hidden = torch.cat([architecture.hidden_states(model, ids, None, positions)[0] for ids, positions in rows]).float()
    hidden.square().mul(torch.linspace(0, 1, hidden.shape[-1], device=hidden.device)).sum().backward()
    return hidden.detach(), model.get_input_embeddings().weight.grad.float()


def _relative(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64; inf where something is not a number."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    off = ((found - wanted).norm() / wanted.norm()).item()
    return off if math.isfinite(off) else math.inf
