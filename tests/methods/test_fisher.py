"""The Fisher against one autograd call for each example: batches, padding, order, number of processes."""

import itertools
import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import CTRLConfig, CTRLLMHeadModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from experiments.model.random_models import build
from experiments.training.resume import Resume
from methods.errors import UserError
from methods.lora import LoRA
from methods.tools import fisher, per_example
from methods.tools.architecture import backbone
from methods.tools.effective import base_parameters
from methods.tools.fisher import ESTIMATORS, _drawn, by_length, diagonal_fisher
from methods.tools.per_example import Squares
from methods.tools.process_group import Shards

KINDS = ["llama-tied", "llama-untied", "gptj"]


def brute_force(model, documents, labels=None):
    """Mean over documents of the squared gradient of Σ nll, by torch.autograd.grad; unused tensors are zero."""
    parameters = dict(model.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for i, document in enumerate(documents):
        wanted = document["labels"][1:] if labels is None else labels[i]
        logits = model(input_ids=document["input_ids"][None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
        for name, g in zip(parameters, torch.autograd.grad(loss, parameters.values(), allow_unused=True)):
            total[name] += 0 if g is None else g**2
    return {n: (t / len(documents)).detach() for n, t in total.items()}


def padded(documents, side="right", pad=3):
    width = max(len(d["input_ids"]) for d in documents) + 1
    rows = {"input_ids": [], "labels": [], "attention_mask": []}
    for d in documents:
        gap = width - len(d["input_ids"])
        where = (0, gap) if side == "right" else (gap, 0)
        rows["input_ids"].append(F.pad(d["input_ids"], where, value=pad))
        rows["labels"].append(F.pad(d["labels"], where, value=7))  # a label on padding must not count
        rows["attention_mask"].append(F.pad(torch.ones_like(d["input_ids"]), where))
    return {n: torch.stack(r) for n, r in rows.items()}


def same(actual, wanted, rtol=1e-6):
    """Equal to float32 rounding, float32, and the same names."""
    assert actual.keys() == wanted.keys()
    for name in wanted:
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(
            actual[name].double(), wanted[name].double(), rtol=rtol, atol=rtol * 1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_equals_brute_force_for_every_padding_batch_and_order(make, documents, kind):
    model = make(kind)
    wanted = brute_force(model, documents)
    assert all(w.abs().sum() > 0 for w in wanted.values())
    same(diagonal_fisher(model, [padded(documents)]), wanted)
    same(diagonal_fisher(model, [padded(documents, "left")]), wanted)
    same(diagonal_fisher(model, [padded(documents[3:]), padded(documents[:3], "left")]), wanted)
    same(diagonal_fisher(model, [{n: t[None] for n, t in d.items()} for d in reversed(documents)]), wanted)


def test_tied_tensors_appear_once_with_both_uses(make, documents):
    names = diagonal_fisher(make("llama-tied"), [padded(documents)]).keys()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert "lm_head.weight" in diagonal_fisher(make("llama-untied"), [padded(documents)])


@pytest.fixture
def passes(monkeypatch):
    """(examples, whether they were done together) of each pass by `Squares`."""
    done, add = [], Squares.add

    def spied(self, ids, loss):
        done.append((len(ids), add(self, ids, loss)))
        return done[-1][1]

    monkeypatch.setattr(Squares, "add", spied)
    return done


def test_a_model_that_scales_its_embeddings_in_place(documents, passes):
    """CTRL multiplies the embedding's output in place, which autograd forbids on a view."""
    torch.manual_seed(0)
    config = CTRLConfig(vocab_size=64, n_positions=64, n_embd=16, dff=32, n_layer=2, n_head=2)
    model = CTRLLMHeadModel(config).double()
    same(diagonal_fisher(model, [padded(documents)]), brute_force(model.eval(), documents))
    assert passes == [(6, True)]


@pytest.mark.parametrize("kind", KINDS)
def test_float32_in_groups_and_pieces(make, documents, monkeypatch, passes, kind):
    """A weight in pieces of which the last is smaller; documents of like lengths together; to float32's rounding."""
    monkeypatch.setattr(per_example, "CPU_PIECE", 150)
    monkeypatch.setattr(fisher.by_length, "__defaults__", (22,))
    model = make(kind)
    wanted = brute_force(model, documents)
    actual = diagonal_fisher(model.float(), [padded(documents)])
    assert passes == [(1, True), (2, True), (3, True)]
    for name in wanted:
        assert (actual[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied"])
def test_the_padding_token_as_a_word(make, documents, passes, kind):
    """nn.Embedding has no gradient at its padding_idx, wherever it occurs; a tied head has."""
    model = make(kind)
    for d in documents:
        d["input_ids"][2] = d["labels"][3] = 0
    same(diagonal_fisher(model, [padded(documents)]), brute_force(model, documents))
    assert passes == [(6, True)]


@pytest.mark.parametrize("kind", ["llama-tied", "gptj"])
def test_some_tensors_alone_and_backward_no_further_than_they_need(make, documents, passes, kind):
    model = make(kind)
    wanted = brute_force(model, documents)
    names = [
        name
        for name in wanted
        if any(part in name for part in (".1.self_attn.q_proj.", ".1.attn.q_proj.", ".1.mlp.fc_in.bias"))
    ]
    needed = []
    blocks = model.model.layers if kind == "llama-tied" else model.transformer.h
    for block in blocks:
        block.register_forward_hook(
            lambda module, arguments, output: needed.append(
                (output if kind == "llama-tied" else output[0]).requires_grad
            )
        )
    same(diagonal_fisher(model, [padded(documents)], parameters=names), {name: wanted[name] for name in names})
    assert needed == [False, True] and passes == [(6, True)] and len(names) == (1 if kind == "llama-tied" else 2)


def test_under_an_adapter_the_factors_too(make, documents, drawn, passes):
    model = drawn(LoRA(rank=2, targets=("q_proj", "v_proj")).adapt(make(), seed=1)).requires_grad_(True)
    same(diagonal_fisher(model, [padded(documents)]), brute_force(model, documents))
    assert passes == [(6, True)]


class Gate(nn.Module):
    """A scale that is no factor of the output."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64))

    def forward(self, x):
        return x * torch.tanh(self.weight)


def test_unknown_layers_are_computed_one_example_at_a_time(make, documents, passes):
    model = make()
    model.model.layers[0].input_layernorm = Gate(32)
    same(diagonal_fisher(model, [padded(documents)]), brute_force(model, documents))
    assert passes == []
    model = make()
    model.model.layers[1] = model.model.layers[0]  # its weights are used twice
    same(diagonal_fisher(model, [padded(documents)]), brute_force(model, documents))
    assert passes == [(6, False)]


def test_norms_are_recognised_by_what_they_compute():
    known = [LlamaRMSNorm(8), nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.RMSNorm(8), LlamaRMSNorm(8).bfloat16()]
    assert [per_example._kind(m) for m in known] == ["norm"] * 5
    unknown = [Gate(8), nn.PReLU(8), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 1), nn.Embedding(4, 8, max_norm=1.0)]
    assert [per_example._kind(m) for m in unknown] == ["unknown"] * 5


def test_groups_of_like_lengths():
    assert by_length([5, 9, 4, 100, 8, 5], 18) == [[3], [1, 4], [0, 5, 2]]
    assert by_length([7, 7, 7], 14) == [[0, 1], [2]] and by_length([], 14) == []


@pytest.mark.parametrize("kind", ["llama-tied", "gptj"])
def test_signed_is_the_empirical_fisher_in_the_mean_over_signs(make, documents, monkeypatch, kind):
    model, batch, total = make(kind), [padded(documents[:4])], {}
    for signs in itertools.product((1, -1), repeat=4):
        of = {tuple(d["input_ids"].tolist()): sign for d, sign in zip(documents, signs)}
        monkeypatch.setattr(fisher, "_sign", lambda ids, seed: of[tuple(ids.tolist())])
        for name, f in diagonal_fisher(model, batch, "signed").items():
            total[name] = total.get(name, 0) + f.double() / 16
    same({name: t.float() for name, t in total.items()}, brute_force(model, documents[:4]), rtol=1e-5)


def test_signs_are_of_seed_and_document_alone(make, documents):
    model = make()
    batch, turned = padded(documents), padded(documents[::-1], "left")
    first = diagonal_fisher(model, [batch], "signed", seed=3)
    same(diagonal_fisher(model, [turned], "signed", seed=3), {n: f.double() for n, f in first.items()}, rtol=1e-4)
    others = [diagonal_fisher(model, [batch], "signed", seed=s)["model.norm.weight"] for s in range(4, 8)]
    assert any(not torch.allclose(other, first["model.norm.weight"]) for other in others)
    alone = [{n: t[None] for n, t in d.items()} for d in documents]
    same(diagonal_fisher(model, alone, "signed"), brute_force(model, documents))
    signs = [fisher._sign(torch.tensor([i, 5]), 0) for i in range(400)]
    assert set(signs) == {1, -1} and abs(sum(signs)) < 80


def test_without_labels_every_token_is_one(make, documents):
    model = make()
    everything = [{"input_ids": d["input_ids"], "labels": d["input_ids"]} for d in documents]
    batch = padded(documents)
    del batch["labels"]
    same(diagonal_fisher(model, [batch]), brute_force(model, everything))


def test_an_example_without_a_label_counts_with_zero(make, documents):
    model = make()
    silent = {"input_ids": documents[0]["input_ids"], "labels": torch.full_like(documents[0]["labels"], -100)}
    half = diagonal_fisher(model, [padded([documents[1], silent])])
    same({n: 2 * f for n, f in half.items()}, brute_force(model, documents[1:2]))


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_draws_by_seed_and_document_alone(make, documents, kind):
    model = make(kind)
    draws = []
    for d in documents:
        labels = torch.full((len(d["labels"]) - 1,), -100)
        asked = d["labels"][1:] != -100
        with torch.no_grad():
            labels[asked] = _drawn(model(input_ids=d["input_ids"][None]).logits[0, :-1][asked], d["input_ids"], 3)
        draws.append(labels)
    wanted = brute_force(model, documents, draws)
    same(diagonal_fisher(model, [padded(documents)], "sampled", seed=3), wanted)
    same(diagonal_fisher(model, [padded(documents[::-1], "left")], "sampled", seed=3), wanted)
    state = torch.random.get_rng_state()
    other = diagonal_fisher(model, [padded(documents)], "sampled", seed=4)
    assert any(not torch.allclose(other[n].double(), wanted[n]) for n in wanted)
    assert torch.equal(state, torch.random.get_rng_state())


def test_sampled_estimates_the_true_fisher(make):
    model = make(
        vocab_size=5,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    ids = torch.tensor([2, 3])
    name, parameter = "model.norm.weight", model.model.norm.weight
    chances = model(input_ids=ids[None]).logits[0, 0].log_softmax(-1)
    exact = sum(c.exp().detach() * torch.autograd.grad(-c, parameter, retain_graph=True)[0] ** 2 for c in chances)
    draws = [
        diagonal_fisher(model, [{"input_ids": ids[None]}], "sampled", seed=s, parameters=[name])[name]
        for s in range(600)
    ]
    torch.testing.assert_close(torch.stack(draws).mean(0).double(), exact, rtol=0.25, atol=0.05 * exact.max().item())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_batched_is_the_square_of_the_mean_gradient(make, documents, kind, side):
    model = make(kind)
    groups = [documents[:4], documents[4:]]
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for group in groups:
        mean = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for d in group:
            loss = F.cross_entropy(
                model(input_ids=d["input_ids"][None]).logits[0, :-1], d["labels"][1:], reduction="sum"
            )
            for n, g in zip(mean, torch.autograd.grad(loss, [*model.parameters()])):
                mean[n] += g / len(group)
        for n, g in mean.items():
            total[n] += len(group) * g**2 / len(documents)
    # GPT-J's attention scores are float32 whatever the model's dtype, so padding moves their last bits
    same(
        diagonal_fisher(model, [padded(g, side) for g in groups], "batched"),
        total,
        rtol=1e-3 if kind == "gptj" else 1e-6,
    )


def test_left_over_gradients_do_not_leak_and_everything_is_restored(make, documents):
    model = make(attention_dropout=0.5)
    clean = diagonal_fisher(model, [padded(documents)])
    model.train()
    model.model.layers[0].eval()
    frozen, stale = model.model.norm.weight, model.model.embed_tokens.weight
    frozen.requires_grad_(False)
    stale.grad = gradient = torch.full_like(stale, 9.0)
    same(diagonal_fisher(model, [padded(documents)]), {n: f.double() for n, f in clean.items()})
    assert stale.grad is gradient and (gradient == 9).all() and not frozen.requires_grad
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert all(p.grad is None for p in model.parameters() if p is not stale)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    with torch.no_grad():
        same(diagonal_fisher(model, [padded(documents)]), {n: f.double() for n, f in clean.items()})


def test_restored_after_an_error_too(make, documents):
    model = make()
    model.model.norm.weight.requires_grad_(False)
    ids = documents[0]["input_ids"][None]
    with pytest.raises(IndexError):
        diagonal_fisher(model, [padded(documents), {"input_ids": ids, "labels": ids[:, 1:]}])
    assert not model.model.norm.weight.requires_grad and not any(
        p._post_accumulate_grad_hooks for p in model.parameters()
    )


@pytest.mark.parametrize("at", ["forward", "backward"])
def test_restored_after_an_error_in_a_pass(make, documents, at):
    model = make()
    frozen = model.model.norm.weight.requires_grad_(False)

    def fail(*_):
        raise RuntimeError("no")

    layer = model.model.layers[0].mlp
    handle = layer.register_forward_hook(
        lambda m, a, output: fail() if at == "forward" else output.register_hook(fail) and None
    )
    with pytest.raises(RuntimeError, match="no"):
        diagonal_fisher(model, [padded(documents)])
    handle.remove()
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["llama-tied", "gptj"])
def test_under_a_fresh_adapter_the_base_weights_have_the_bases_fisher(make, documents, kind):
    wanted = diagonal_fisher(make(kind), [padded(documents)])
    adapted = LoRA(rank=2, dropout=0.5).adapt(make(kind), seed=1)
    same(
        diagonal_fisher(adapted, [padded(documents)], parameters=base_parameters(adapted)),
        {n: f.double() for n, f in wanted.items()},
    )
    assert all(p.requires_grad == (".lora_" in n) for n, p in adapted.named_parameters())


def test_bad_input_is_named(make, documents):
    with pytest.raises(UserError, match="estimator is 'exact'.*empirical, sampled, signed, batched"):
        diagonal_fisher(make(), [padded(documents)], "exact")
    with pytest.raises(UserError, match="no examples"):
        diagonal_fisher(make(), [])


def test_bf16_models_accumulate_in_float32(make, documents):
    model = make(dtype=torch.bfloat16)
    actual = diagonal_fisher(model, [padded(documents)])
    wanted = diagonal_fisher(make(dtype=torch.float32), [padded(documents)])
    assert all(f.dtype == torch.float32 for f in actual.values())
    ratio = sum(f.sum() for f in actual.values()) / sum(f.sum() for f in wanted.values())
    assert ratio == pytest.approx(1, rel=0.1)


class Stopped(Exception):
    pass


def stopping(after):
    """A progress callback that stops the pass after `after` examples in all, and the counts it was called with."""
    counts = []

    def progress(count):
        counts.append(count)
        if sum(counts) >= after:
            raise Stopped

    return progress, counts


def counted(model):
    """The examples `model` sees, as a list that grows."""
    seen = []
    backbone(model).register_forward_pre_hook(
        lambda module, arguments, named: seen.extend([0] * len(named["input_ids"])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_pass_that_is_interrupted_twice_gives_the_same_bits(make, documents, tmp_path, estimator, dtype):
    batches = [padded(documents[at : at + 2]) for at in (0, 2, 4)]
    wanted = diagonal_fisher(make(dtype=dtype), batches, estimator)
    seen = []
    for after in (2, 4, math.inf):
        model = make(dtype=dtype)
        part = counted(model)
        progress, counts = stopping(after)
        resume = Resume(tmp_path / "run", identity={}, every=0)
        if after < math.inf:
            with pytest.raises(Stopped):
                diagonal_fisher(model, batches, estimator, resume=resume, progress=progress)
        else:
            actual = diagonal_fisher(model, batches, estimator, resume=resume, progress=progress)
        assert counts == {2: [2], 4: [2, 2], math.inf: [4, 2]}[after]
        seen += part
    assert len(seen) == len(documents)
    assert actual.keys() == wanted.keys() and all(torch.equal(actual[n], wanted[n]) for n in wanted)


def test_without_a_checkpoint_due_nothing_is_kept(make, documents, tmp_path):
    model = make()
    wanted = diagonal_fisher(model, [padded(documents)])
    actual = diagonal_fisher(model, [padded(documents)], resume=Resume(tmp_path / "run", identity={}))
    assert all(torch.equal(actual[n], wanted[n]) for n in wanted) and not (tmp_path / "run").exists()


@pytest.fixture
def two_processes(tmp_path):
    """two_processes(target, *arguments): the results of target(rank, *arguments) in two processes of a gloo group."""
    context = multiprocessing.get_context(
        "forkserver"
    )  # a fork of this process could not use autograd where there is a GPU
    context.set_forkserver_preload([__name__])
    runs = []

    def run(target, *arguments):
        runs.append(target)
        files = [tmp_path / f"{len(runs)}-{rank}.pt" for rank in range(2)]
        store = tmp_path / f"{len(runs)}.store"
        children = [
            context.Process(target=_joined, args=(rank, store, file, target, arguments))
            for rank, file in enumerate(files)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(120)
        assert [child.exitcode for child in children] == [0, 0]
        return [torch.load(file) for file in files]

    return run


def _joined(rank, store, file, target, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(target(rank, *arguments), file)
    dist.destroy_process_group()


def _tiny():
    return build("llama", seed=0, dtype=torch.float64, vocab_size=31, eos_token_id=1, pad_token_id=0)


def _fisher(rank, batches, estimator, folder, after):
    """(F or None where it was stopped, the counts progress was called with, examples this process saw)."""
    model = _tiny()
    seen, (progress, counts) = counted(model), stopping(after)
    shards = Shards(rank=rank, world=2, active=True)
    resume = folder and Resume(folder, identity={}, every=0, shards=shards)
    try:
        actual = diagonal_fisher(model, torch.load(batches), estimator, shards=shards, resume=resume, progress=progress)
    except Stopped:
        actual = None
    return actual, counts, len(seen)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_processes_give_the_same_and_go_on_where_they_stopped(make, documents, tmp_path, two_processes, estimator):
    """Of five batches one process has three and one has two."""
    groups = [documents[:1], documents[1:2], documents[2:4], documents[4:5], documents[5:]]
    batches = [padded(group, side) for group, side in zip(groups, ("left", "right", "right", "left", "right"))]
    torch.save(batches, tmp_path / "batches.pt")
    one = diagonal_fisher(_tiny(), batches, estimator)
    (first, counts, seen), (second, counts_second, seen_second) = two_processes(
        _fisher, tmp_path / "batches.pt", estimator, None, math.inf
    )
    assert counts == counts_second == [2, 3, 1] and (seen, seen_second) == (4, 2)
    same(first, {n: f.double() for n, f in one.items()})
    assert all(torch.equal(first[n], second[n]) for n in one)

    stopped = two_processes(_fisher, tmp_path / "batches.pt", estimator, tmp_path / "run", 4)
    assert stopped == [(None, [2, 3], 3), (None, [2, 3], 2)]
    ended = two_processes(_fisher, tmp_path / "batches.pt", estimator, tmp_path / "run", math.inf)
    assert [seen for _, _, seen in ended] == [1, 0]
    for actual, counts, _ in ended:
        assert counts == [5, 1] and all(torch.equal(actual[n], first[n]) for n in one)


def _refused(rank):
    from torch.distributed.fsdp import fully_shard

    model = _tiny()
    fully_shard(model)
    try:
        diagonal_fisher(
            model, [{"input_ids": torch.tensor([[2, 3, 4]])}], shards=Shards(rank=rank, world=2, active=True)
        )
    except UserError as error:
        return str(error)


def test_weights_cut_into_shards_are_refused(two_processes):
    for message in two_processes(_refused):
        assert message.startswith("model.embed_tokens.weight is cut into shards: ")
        assert "the square of a mean is not the mean of squares" in message
