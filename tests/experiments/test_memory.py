"""Predicted memory against what real modules save, and against bytes a weight by hand."""

import dataclasses
import gc
import itertools
from pathlib import Path

import pytest
import torch

from experiments.model.random_models import build
from experiments.model.shape import shape_of
from experiments.study.schema import Model
from experiments.training import loss, memory
from experiments.training.engine import fit
from experiments.training.settings import TrainSettings
from methods import registry
from methods.errors import UserError
from methods.part import overrides
from methods.tools import architecture
from methods.tools.adam import CHUNK, CPU_CHUNK
from methods.tools.importance import encode
from methods.tools.process_group import Shards
from methods.tools.selection import HISTOGRAM
from tests.experiments import worlds

LLAMA3 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
GPTJ = {
    "model_type": "gptj",
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "rotary_dim": 64,
    "vocab_size": 50400,
    "n_positions": 2048,
}
METHODS = {
    name: registry.build(block)
    for name, block in {
        "full": {},
        "mofo": {"mofo": {"fraction": 0.1}},
        "ewc": {"ewc": {}},
        "hierarchical": {"hierarchical": {}},
        "lora": {"lora": {}},
        "ewc-lora": {"lora": {}, "ewc": {}},
        "hierarchical-lora": {"lora": {}, "hierarchical": {}},
        "muon": {"muon": {}},
    }.items()
}
HERE = Path("nowhere")


@pytest.fixture(scope="module")
def llama3():
    return shape_of("llama3-8b", Model(source="hub:x", architecture=LLAMA3), HERE)


@pytest.fixture(scope="module")
def gptj():
    return shape_of("gptj-6b", Model(source="hub:x", architecture=GPTJ), HERE)


def tiny(family, **config):
    return shape_of("tiny", Model(source=f"random:{family}", config=config), HERE)


def predict(
    shape,
    method,
    *,
    phase="train",
    dtype=torch.bfloat16,
    device="cuda",
    processes=None,
    parts=None,
    longest=None,
    **settings,
):
    chosen = TrainSettings(**({"batch": 8, "micro_batch": 8, "length": 64} | settings))
    return memory.predict(
        phase=phase,
        shape=shape,
        parts=parts or METHODS[method],
        settings=chosen,
        checkpoint_dtype=dtype,
        compute_dtype=dtype,
        device_type=device,
        processes=processes,
        longest=longest,
    )


# activations


def saved_bytes(model, rows, length, position_ids=None):
    """Bytes of the storages that autograd keeps in a forward pass, without weights, and of the final hidden states."""
    ids = torch.randint(0, 200, (rows, length), generator=torch.Generator().manual_seed(0))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = architecture.hidden_states(model, ids, None, position_ids)
    kept[hidden.untyped_storage().data_ptr()] = hidden.untyped_storage()
    return sum(storage.nbytes() for storage in kept.values())


SIZES = [  # and the shape of a batch
    ("llama", {}, (1, 48)),
    (
        "llama",
        {
            "hidden_size": 96,
            "intermediate_size": 128,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
        },
        (4, 32),
    ),
    ("llama", {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 3, "num_key_value_heads": 4}, (2, 80)),
    ("gptj", {}, (4, 32)),
    ("gptj", {"n_embd": 64, "n_layer": 4, "n_head": 2, "rotary_dim": 8}, (1, 48)),
    ("gptj", {"n_embd": 48, "n_layer": 1, "n_head": 3, "n_inner": 80}, (3, 24)),
]


@pytest.mark.parametrize(("family", "config", "batch"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", [(), ("q_proj", "v_proj")])
def test_activations_are_what_autograd_keeps(family, config, batch, dtype, adapters):
    rows, length = batch
    parts = registry.build({"lora": {"rank": 4, "targets": adapters}}) if adapters else ()
    model = build(family, seed=0, dtype=dtype, **config).train()
    for part in parts:
        model = part.adapt(model, seed=0)
    alive, _ = memory.activations(tiny(family, **config), parts=parts, dtype=dtype, rows=rows, length=length)
    assert alive == pytest.approx(saved_bytes(model, rows, length), rel=0.03)


def test_packed_rows_keep_a_mask_a_layer():
    shape = tiny("llama", num_hidden_layers=3)
    positions = torch.cat([torch.arange(20), torch.arange(28)])[None]
    measured = saved_bytes(build("llama", seed=0, num_hidden_layers=3).train(), 1, 48, positions)
    packed, _ = memory.activations(shape, dtype=torch.float32, rows=1, length=48, packed=True)
    assert packed == pytest.approx(measured, rel=0.03)
    assert packed > memory.activations(shape, dtype=torch.float32, rows=1, length=48)[0]


def test_fisher_pass_keeps_only_what_its_tensors_need():
    shape, parts = tiny("llama", num_hidden_layers=4), METHODS["lora"]
    model = parts[0].adapt(build("llama", seed=0, num_hidden_layers=4), seed=0).requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj.base" in name or "v_proj.base" in name)
    alive, _ = memory.activations(shape, parts=parts, dtype=torch.float32, rows=1, length=40, gradients="adapted")
    assert alive == pytest.approx(saved_bytes(model, 1, 40), rel=0.03)
    whole, _ = memory.activations(shape, parts=parts, dtype=torch.float32, rows=1, length=40, gradients="whole-model")
    assert whole > alive


def test_activations_grow_with_tokens_and_layers(llama3):
    """SDPA keeps nothing that grows with the square of the length: bytes for a token of LLaMA-3-8B's block, by hand."""
    width, ffn, kv = 4096, 14336, 1024
    norms = 2 * (4 * width + 4 + 2 * width + 2 * width)  # float32 input, its root, normalised and scaled in bf16
    attention = 2 * (2 * width + 2 * kv) + 4 * 32  # q, k, v, their mix, a float32 number a head
    block = norms + attention + 2 * 4 * ffn  # gate, its activation, up, their product
    for rows, length in ((1, 2048), (4, 4096)):
        alive, _ = memory.activations(llama3, dtype=torch.bfloat16, rows=rows, length=length)
        assert alive / (rows * length) == pytest.approx(32 * block, rel=0.01)


def allocated(run):
    """The most that the CPU allocator held while `run` ran, beyond what it held before."""
    gc.collect()  # what an earlier test left would be freed meanwhile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(held))


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_pass_is_the_allocators(family, checkpointing):
    """Long rows through narrow blocks, so that gradients of weights are small beside activations."""
    layers = {"llama": "num_hidden_layers", "gptj": "n_layer"}[family]
    model = build(family, seed=0, **{layers: 6}).train()
    if checkpointing:
        architecture.recompute_activations(model)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids = torch.randint(0, 200, (4, 256), generator=torch.Generator().manual_seed(0))

    def run():
        hidden = architecture.hidden_states(model, ids, None)  # named, so that it is held as in the engine's loop
        hidden.sum().backward()

    alive, beyond = memory.activations(
        tiny(family, **{layers: 6}), dtype=torch.float32, rows=4, length=256, checkpointing=checkpointing
    )
    assert alive + beyond == pytest.approx(allocated(run), rel=0.03)
    if checkpointing:
        assert alive < 0.2 * memory.activations(tiny(family, **{layers: 6}), dtype=torch.float32, rows=4, length=256)[0]


def test_logits_are_one_chunk(llama3):
    assert predict(llama3, "full", length=64)["logits"] == 12 * 128256 * 512
    rows = 8 * 512
    several = 12 * 128256 * loss.CHUNK + 2 * 2 * 4096 * rows  # and the hidden rows with their gradient
    assert predict(llama3, "lora", length=512)["logits"] == several
    assert predict(llama3, "full", length=512)["logits"] == several + 2 * 128256 * 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [700, 2500])
def test_bytes_of_logits_are_the_allocators(dtype, rows):
    head = torch.nn.Linear(8, 3000, bias=False, dtype=dtype).requires_grad_(False)
    hidden, labels = (
        torch.randn(1, rows + 1, 8, dtype=dtype, requires_grad=True),
        torch.zeros(1, rows + 1, dtype=torch.long),
    )
    measured = allocated(lambda: loss.summed_nll(hidden, labels, head).backward())
    assert measured == pytest.approx(12 * 3000 * min(rows, loss.CHUNK), rel=0.03)


# what is held


@pytest.mark.parametrize(
    ("method", "processes", "by_weight"),
    [
        ("full", None, 14),
        ("mofo", None, 14),
        ("ewc", None, 17),
        ("hierarchical", None, 17),
        ("full", 1, 12),
        ("ewc", 1, 15),
        ("full", 2, 6),
        ("ewc", 4, 3.75),
    ],
)
def test_bytes_a_weight_with_moments_in_bfloat16(llama3, gptj, method, processes, by_weight):
    for shape, parameters in ((llama3, 8_030_261_248), (gptj, 6_050_882_784)):
        assert shape.parameters == parameters
        kinds = predict(shape, method, processes=processes, moments="bfloat16")
        held = sum(kinds[k] for k in ("weights", "masters", "gradients", "moments", "anchor", "importance"))
        assert held == pytest.approx(by_weight * parameters, rel=1e-6)


def test_bytes_of_real_state(tiny_llama):
    """A bf16 run of the engine's own classes: masters, gradients and both moments, by their tensors."""
    from experiments.training.master_weights import MasterWeights
    from methods.tools.adam import AdamW, Moments

    model = tiny_llama.to(torch.bfloat16)
    masters = MasterWeights(model, base={})
    hidden = architecture.hidden_states(model, torch.zeros(1, 4, dtype=torch.long), None)
    loss.summed_nll(hidden, torch.zeros(1, 4, dtype=torch.long), architecture.head(model)).backward()
    for dtype in ("float32", "bfloat16"):
        moments = Moments(dtype=dtype)
        for name, weight in masters.weights.items():
            moments.place(weight, name=name)
        optimizer = AdamW(masters.weights.values(), moments=moments)
        optimizer.step()
        kinds = predict(tiny("llama"), "full", moments=dtype)
        assert kinds["weights"] == sum(p.nbytes for p in model.parameters())
        assert kinds["masters"] == sum(w.nbytes for w in masters.weights.values())
        assert kinds["gradients"] == sum(w.grad.nbytes for w in masters.weights.values())
        assert kinds["moments"] == sum(
            state[k].nbytes for state in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")
        )


def test_muon_holds_one_moment_of_each_matrix_of_the_blocks(tiny_llama):
    ids, base = torch.arange(8), {name: p.detach().clone() for name, p in tiny_llama.named_parameters()}
    example, chosen = {"input_ids": ids, "labels": ids}, TrainSettings(batch=1, micro_batch=1, length=8, probes=0)
    result = fit(model=tiny_llama, parts=METHODS["muon"], examples=[example] * 2, settings=chosen, seed=0, base=base)
    state = [value for state in result.optimizer.state.values() for value in state.values()]
    assert predict(tiny("llama"), "muon", dtype=torch.float32)["moments"] == sum(m.nbytes for m in state if m.dim())
    shared = predict(tiny("llama"), "muon", dtype=torch.float32, processes=2)["moments"]
    assert shared == predict(tiny("llama"), "muon", dtype=torch.float32)["moments"] // 2


def test_muons_scratch_is_that_of_the_largest_matrix_not_of_the_block(llama3):
    assert predict(llama3, "muon")["scratch"] == 7 * 4 * 4096 * 14336


def test_masters_are_the_parameters_where_they_are_wide():
    shape = tiny("llama")
    kinds = predict(shape, "full", dtype=torch.float32)
    assert (kinds["weights"], kinds["masters"], kinds["gradients"]) == (4 * shape.parameters, 0, 4 * shape.parameters)
    kinds = predict(shape, "full", dtype=torch.float64)
    assert (kinds["weights"], kinds["moments"]) == (8 * shape.parameters, 16 * shape.parameters)


def test_the_best_steps_weights_are_held_where_the_model_is_on_the_cpu():
    shape = tiny("llama")
    for dtype, masters in ((torch.float32, 0), (torch.bfloat16, 4)):
        kept, last = (predict(shape, "full", dtype=dtype, device="cpu", keep=keep) for keep in ("best", "last"))
        assert last["masters"] == masters * shape.parameters
        assert kept["masters"] == (4 + masters) * shape.parameters
        assert kept["total"] - last["total"] == 4 * shape.parameters
    shared = predict(shape, "full", dtype=torch.float32, device="cpu", keep="best", processes=2)
    assert shared["masters"] == 2 * shape.parameters
    assert predict(shape, "full", keep="best") == predict(shape, "full")  # on a GPU they are in main memory
    parts = [part for part in METHODS["hierarchical"] if part.preparation()]
    assert parts and predict(shape, "hierarchical", phase="prepare", device="cpu", keep="best") == predict(
        shape, "hierarchical", phase="prepare", device="cpu"
    )


def test_adapters(llama3):
    """LoRA of rank 8 on q and v: everything but the frozen weights is of the factors; importance is of the matrices."""
    factors = 32 * 8 * ((4096 + 4096) + (4096 + 1024))
    matrices = 32 * 4096 * (4096 + 1024)
    kinds = predict(llama3, "ewc-lora")
    assert kinds["weights"] == 2 * (llama3.parameters + factors)
    assert (kinds["masters"], kinds["gradients"], kinds["moments"]) == (4 * factors, 4 * factors, 8 * factors)
    assert (kinds["anchor"], kinds["importance"]) == (0, matrices)
    assert predict(llama3, "hierarchical-lora")["anchor"] == 4 * factors
    whole = predict(llama3, "", parts=registry.build({"lora": {}, "ewc": {"bits": 32}}))
    assert whole["importance"] == 4 * matrices


def test_scratch_of_mofo_is_of_the_largest_tensor(llama3):
    largest = 128256 * 4096
    assert predict(llama3, "mofo")["scratch"] == 8 * CHUNK + 28 * CHUNK + HISTOGRAM
    assert predict(llama3, "mofo", device="cpu")["scratch"] == 4 * largest + 8 * CPU_CHUNK
    assert predict(llama3, "full")["scratch"] == 0


def test_sharing_gathers_the_root_and_two_blocks(llama3):
    root = 2 * 128256 * 4096 + 4096
    block = (llama3.parameters - root) // 32
    alone, shared = predict(llama3, "full"), predict(llama3, "full", processes=4)
    assert shared["transient"] - alone["transient"] == 2 * (root + 2 * block) + (2 + 4) * root
    lora = predict(llama3, "lora", processes=4)  # only blocks have anything trained
    assert lora["transient"] < shared["transient"] - 5 * root


def test_a_given_checkpoint_is_only_held(llama3, tmp_path):
    kinds = predict(llama3, "", parts=registry.build({"given": {"path": str(tmp_path)}}))
    assert (kinds["weights"], kinds["masters"]) == (2 * llama3.parameters, 4 * llama3.parameters)
    assert kinds["total"] == kinds["weights"] + kinds["masters"]


# the two moments that a peak can fall on


def test_total_is_the_larger_of_two_moments(llama3):
    """With one pass in a step activations are freed before all gradients exist; with several, gradients wait."""
    head = 128256 * 4096
    once = predict(llama3, "full", batch=8, micro_batch=8, length=64)
    held = sum(once[k] for k in memory.HELD)
    assert once["gradients"] > once["activations"] + once["logits"]
    assert once["total"] == held + once["gradients"] + 2 * head  # the embedding's bf16 gradient on its way
    longer = predict(llama3, "full", batch=8, micro_batch=8, length=1024)
    assert longer["activations"] > longer["gradients"]
    assert longer["total"] == held + longer["activations"] + max(longer["logits"], longer["transient"] + 4 * head)
    several = predict(llama3, "full", batch=64, micro_batch=8, length=1024)
    assert (
        several["total"]
        == held + longer["activations"] + max(longer["logits"], longer["transient"]) + longer["gradients"]
    )


LARGE, SMALL = 4000, 258  # vocabularies: logits outweigh activations, or the other way round


@pytest.mark.parametrize(
    ("method", "settings", "vocabulary"),
    [
        ("full", {"batch": 4}, LARGE),
        ("full", {"batch": 8}, LARGE),
        ("full", {"batch": 4, "checkpointing": True}, LARGE),
        ("full", {"batch": 4}, SMALL),
        ("mofo", {"batch": 8}, SMALL),
        ("mofo", {"batch": 4, "pack": 256}, LARGE),
        ("ewc", {"batch": 8, "moments": "bfloat16"}, LARGE),
        ("ewc", {"batch": 4, "pack": 256}, SMALL),
        ("lora", {"batch": 4, "checkpointing": True}, SMALL),
        ("ewc-lora", {"batch": 8}, SMALL),
    ],
)
def test_total_is_the_peak_of_a_real_run(method, settings, vocabulary):
    """What the engine's own loop allocates on the CPU; the model and the base are there before."""
    config = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": vocabulary}
    model, parts = build("llama", seed=0, dtype=torch.bfloat16, **config), METHODS[method]
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    states = (
        {"ewc": {"importance": {name: encode(torch.ones(p.shape)) for name, p in base.items()}}}
        if "ewc" in method
        else {}
    )
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 200, (128,), generator=draw) for _ in range(16)]
    chosen = TrainSettings(**({"micro_batch": 4, "length": 128, "probes": 0, "learning_rate": 1e-5} | settings))

    def run():
        fit(
            model=model,
            parts=parts,
            examples=[{"input_ids": row, "labels": row} for row in ids],
            settings=chosen,
            seed=0,
            base=base,
            states=states,
        )

    kinds = memory.predict(
        phase="train",
        shape=tiny("llama", **config),
        parts=parts,
        settings=chosen,
        checkpoint_dtype=torch.bfloat16,
        compute_dtype=torch.bfloat16,
        device_type="cpu",
    )
    # on the CPU anchor and importance are the very tensors that were there before
    before = sum(p.nbytes for p in base.values()) + kinds["anchor"] + kinds["importance"]
    assert kinds["total"] - before == pytest.approx(allocated(run), rel=0.03)


@pytest.mark.parametrize(("method", "computing"), [("ewc", torch.bfloat16), ("lora", torch.float32)])
def test_a_shared_run_grows_with_the_model_as_predicted(method, computing):
    """By fully_shard in one process: what each further block takes is held, so a run copies nothing in passing."""
    measured, predicted = [], []
    for layers in (2, 6):
        config = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": layers}
        base = {
            name: p.detach() for name, p in build("llama", seed=0, dtype=torch.bfloat16, **config).named_parameters()
        }
        states = (
            {"ewc": {"importance": {name: torch.ones(p.shape) for name, p in base.items()}}} if method == "ewc" else {}
        )
        draw = torch.Generator().manual_seed(0)
        ids = [torch.randint(0, 200, (48,), generator=draw) for _ in range(8)]
        chosen = TrainSettings(batch=4, micro_batch=4, length=48, probes=0, learning_rate=1e-5)
        parts = registry.build({"ewc": {"bits": 32}}) if method == "ewc" else METHODS[method]

        def run(config=config, base=base, states=states, ids=ids, chosen=chosen, parts=parts):
            with worlds.of_one() as shards:
                fit(
                    model=build("llama", seed=0, dtype=torch.bfloat16, **config),
                    parts=parts,
                    settings=chosen,
                    seed=0,
                    base=base,
                    states=states,
                    examples=[{"input_ids": row, "labels": row} for row in ids],
                    shards=shards,
                    compute_dtype=computing,
                )

        kinds = memory.predict(
            phase="train",
            shape=tiny("llama", **config),
            parts=parts,
            settings=chosen,
            checkpoint_dtype=torch.bfloat16,
            compute_dtype=computing,
            device_type="cpu",
            processes=1,
        )
        if not measured:
            run()  # what is loaded and made once a process is not of the run
        measured.append(allocated(run))
        predicted.append(kinds["total"] - kinds["anchor"] - kinds["importance"])  # these were there before
        assert measured[-1] < 1.01 * predicted[-1]
    assert measured[1] - measured[0] == pytest.approx(predicted[1] - predicted[0], rel=0.03)


def test_processes_on_the_cpu_begin_with_a_whole_copy_in_another_dtype(llama3):
    given = {
        "phase": "train",
        "shape": llama3,
        "parts": METHODS["lora"],
        "settings": TrainSettings(batch=1, micro_batch=1, length=16),
        "compute_dtype": torch.float32,
        "processes": 8,
    }
    whole = 4 * (llama3.parameters + 32 * 8 * ((4096 + 4096) + (4096 + 1024)))
    assert memory.predict(checkpoint_dtype=torch.bfloat16, device_type="cpu", **given)["total"] == whole
    assert memory.predict(checkpoint_dtype=torch.float32, device_type="cpu", **given)["total"] < whole
    assert memory.predict(checkpoint_dtype=torch.bfloat16, device_type="cuda", **given)["total"] < whole


# preparation


def test_preparations(llama3):
    n = llama3.parameters
    assert predict(llama3, "full", phase="prepare") == dict.fromkeys(memory.KINDS, 0)
    fisher = predict(llama3, "ewc", phase="prepare", longest=64)
    assert (fisher["weights"], fisher["importance"], fisher["gradients"], fisher["moments"]) == (2 * n, 4 * n, 0, 0)
    assert fisher["scratch"] == 6 * 128256 * 4096 and fisher["logits"] == 12 * 128256 * 512  # eight documents of 64
    assert predict(llama3, "ewc", phase="prepare", processes=8)["weights"] == 2 * n  # a Fisher is of whole weights
    general = predict(llama3, "hierarchical", phase="prepare", longest=64)
    train = predict(llama3, "full")
    assert general["importance"] == 4 * n
    assert all(general[k] == train[k] for k in ("weights", "masters", "gradients", "moments", "activations"))
    assert predict(llama3, "hierarchical", phase="prepare", processes=2)["importance"] == 2 * n


def test_batched_fisher_holds_a_batch(llama3):
    one = predict(llama3, "", phase="prepare", parts=registry.build({"ewc": {"estimator": "batched", "batch_size": 1}}))
    batch = predict(
        llama3, "", phase="prepare", parts=registry.build({"ewc": {"estimator": "batched", "batch_size": 4}})
    )
    assert batch["logits"] == 4 * one["logits"]
    assert batch["activations"] == pytest.approx(4 * one["activations"], rel=0.01)
    whole = predict(llama3, "", phase="prepare", parts=registry.build({"lora": {}, "ewc": {"scope": "whole-model"}}))
    assert whole["importance"] == 4 * llama3.parameters


@pytest.mark.parametrize(
    "block",
    [
        {"ewc": {}},
        {"lora": {}, "ewc": {}},
        {"lora": {}, "ewc": {"scope": "whole-model", "estimator": "batched", "batch_size": 4}},
        {"hierarchical": {}},
        {"lora": {}, "hierarchical": {}},
    ],
)
def test_total_is_the_peak_of_a_real_preparation(block):
    """Long documents and a small model: what a part does with the finished importance is then not the peak."""
    config = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "vocab_size": 2000}
    model, parts = build("llama", seed=0, dtype=torch.bfloat16, **config), registry.build(block)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    for part in parts:
        model = part.adapt(model, seed=0)
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 200, (256,), generator=draw) for _ in range(8)]
    settings = TrainSettings(batch=4, micro_batch=4, length=256, probes=0)

    def fitting(*, learning_rate, epochs, **arguments):
        return fit(settings=dataclasses.replace(settings, epochs=epochs), base=base, **arguments)

    def run():
        part.prepare(
            model=model,
            base=base,
            general=[{"input_ids": row, "labels": row} for row in ids],
            seed=0,
            fit=fitting,
            progress=None,
            shards=Shards(),
            resume=None,
        )

    (part,) = (part for part in parts if overrides(part, "prepare"))
    kinds = memory.predict(
        phase="prepare",
        shape=tiny("llama", **config),
        parts=parts,
        settings=settings,
        longest=256,
        checkpoint_dtype=torch.bfloat16,
        compute_dtype=torch.bfloat16,
        device_type="cpu",
    )
    assert kinds["total"] - kinds["weights"] == pytest.approx(allocated(run), rel=0.03)


# refusing


def inputs(shape, method, **settings):
    return {
        "phase": "train",
        "shape": shape,
        "parts": METHODS[method],
        "checkpoint_dtype": torch.bfloat16,
        "compute_dtype": torch.bfloat16,
        "device_type": "cuda",
        "settings": TrainSettings(**({"batch": 64, "micro_batch": 16, "length": 512} | settings)),
    }


def test_what_fits_is_not_refused(gptj):
    found = memory.predict(**inputs(gptj, "full"))
    assert memory.refuse(what="x", available=found["total"], **inputs(gptj, "full")) == found
    assert memory.refuse(what="x", available=None, **inputs(gptj, "full")) == found


def test_refusal_says_by_how_much_and_what_helps(gptj):
    given = inputs(gptj, "ewc")
    now, available = memory.predict(**given)["total"], 139 * 2**30
    with pytest.raises(UserError) as refused:
        memory.refuse(what="train gptj-6b/science/ewc/seed0", available=available, **given)
    said = str(refused.value)
    assert f"train gptj-6b/science/ewc/seed0 would take {now / 2**30:.1f} GiB" in said
    assert f"{(now - available) / 2**30:.1f} GiB more than the 139.0 GiB free" in said
    for change, words in (
        ({"checkpointing": True}, "checkpointing: true"),
        ({"moments": "bfloat16"}, "moments: bfloat16"),
    ):
        left = memory.predict(**(given | {"settings": dataclasses.replace(given["settings"], **change)}))["total"]
        fits = " and fits" if left <= available else ""
        assert f"`train.{words}` saves {(now - left) / 2**30:.1f} GiB{fits};" in said
    for size in (8, 4):  # the largest that fits is named
        fits = (
            memory.predict(**(given | {"settings": dataclasses.replace(given["settings"], micro_batch=size)}))["total"]
            <= available
        )
        assert (f"`train.micro_batch: {size}` fits" in said) == fits
        if fits:
            break
    assert "`processes: 2` in the model's block fits" in said


def test_refusal_where_nothing_helps(gptj):
    given = inputs(gptj, "lora", checkpointing=True, moments="bfloat16", micro_batch=1, length=16, batch=1) | {
        "device_type": "cpu"
    }
    with pytest.raises(UserError, match="No setting helps"):
        memory.refuse(what="x", available=2**30, **given)


def test_shape_of_a_model_that_is_not_there():
    with pytest.raises(UserError, match="models.m: not fetched yet.*architecture"):
        shape_of("m", Model(source="hub:x"), HERE)
    with pytest.raises(UserError, match="models.m.architecture"):
        shape_of("m", Model(**{"source": "hub:x", "architecture": {"model_type": "no-such"}}), HERE)


def test_shape_from_a_folder(tiny_llama_untied, tmp_path):
    tiny_llama_untied.config.save_pretrained(tmp_path)
    shape = shape_of("m", Model(source="hub:x"), tmp_path)
    assert shape.parameters == sum(p.numel() for p in tiny_llama_untied.parameters())
