"""FLOPs of a step against torch's own counter of the products that run."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.gptj.modeling_gptj import GPTJAttention

from experiments.model.random_models import build
from experiments.training import hardware, loss
from experiments.training.flops import Flops
from experiments.training.hardware import mfu
from methods.tools import architecture

MODELS = {
    "llama-tied": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 1, "num_hidden_layers": 3}),
    "gptj": ("gptj", {}),
}
LENGTHS, LABELLED = (11, 11, 11), 12  # no padding: the counter would count it


def adapted(model, targets):
    if not targets:
        return model
    return get_peft_model(
        model, LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM"), autocast_adapter_dtype=False
    )


def counted(model):
    """FLOPs by operation of one forward and backward pass of the engine's own loss."""
    ids = torch.randint(0, 200, (len(LENGTHS), LENGTHS[0]), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : -LABELLED // len(LENGTHS)] = -100
    with FlopCounterMode(display=False) as counter:
        hidden = architecture.hidden_states(model, ids, None)
        loss.summed_nll(hidden, labels, architecture.head(model)).backward()
    found = {
        str(operation).removeprefix("aten."): flops for operation, flops in counter.get_flop_counts()["Global"].items()
    }
    return found.get("mm", 0) + found.get("addmm", 0), found.get("bmm", 0)


TARGETS = [
    (),
    ("q_proj", "v_proj"),
    ("k_proj",),
    ("mlp-out",),
    ("attention-out",),
    ("q_proj", "v_proj", "mlp-out", "attention-out"),
]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("targets", TARGETS)
def test_matrices_equal_the_counters(kind, targets):
    architecture_name, config = MODELS[kind]
    names = (
        {"mlp-out": "fc_out", "attention-out": "out_proj"}
        if kind == "gptj"
        else {"mlp-out": "down_proj", "attention-out": "o_proj"}
    )
    model = adapted(build(architecture_name, seed=0, **config), [names.get(t, t) for t in targets])
    matrices, _ = counted(model)
    assert without_attention(Flops(model))(LENGTHS, LABELLED) == matrices


def without_attention(flops):
    """The part of `step` that does not grow with the square of a length, by its values at three lengths."""
    one, two = flops.step(lengths=(1,), labelled=0), flops.step(lengths=(2,), labelled=0)
    square = (two - 2 * one) / 2
    return lambda lengths, labelled: (
        flops.step(lengths=lengths, labelled=labelled) - square * sum(n * n for n in lengths)
    )


def eager(model):
    model.set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(module, GPTJAttention):
            module.__class__ = GPTJAttention
    return model


@pytest.mark.parametrize(
    ("kind", "trained"),
    [(kind, trained) for kind in MODELS for trained in ("all", "second block's adapters")]
    + [("llama-untied", "head"), ("gptj", "head")],
)
def test_attention_is_half_of_what_eager_attention_multiplies(kind, trained):
    architecture_name, config = MODELS[kind]
    model = eager(build(architecture_name, seed=0, **config))
    if trained == "head":
        model.requires_grad_(False)
        architecture.head(model).requires_grad_(True)
    if trained == "second block's adapters":
        model = get_peft_model(
            model,
            LoraConfig(
                r=3, target_modules=["q_proj", "k_proj", "v_proj"], layers_to_transform=[1], task_type="CAUSAL_LM"
            ),
        )
    flops = Flops(model)
    _, attention = counted(model)
    whole = flops.step(lengths=LENGTHS, labelled=0) - without_attention(flops)(LENGTHS, 0)
    assert 2 * whole == attention


def test_first_block_with_adapters_needs_less():
    """LoRA on q and v: in the first block no input gradient at all, in the others one for every matrix."""
    model = adapted(build("llama", seed=0), ["q_proj", "v_proj"])
    width, kv, ffn, rank, heads = 32, 16, 48, 3, 32
    matrices = 2 * width * width + 2 * width * kv + 3 * width * ffn
    adapters = rank * (width + heads) + rank * (width + kv)
    behind = width * width + 3 * width * ffn  # o, gate, up and down: what comes after the scores
    first = 2 * (matrices + behind) + 2 * 2 * adapters + 2 * rank * (heads + kv)  # A's input needs no gradient
    second = 2 * 2 * matrices + 2 * 3 * adapters
    linear = without_attention(Flops(model))
    assert linear((1,), 0) == first + second
    assert linear((1,), 1) - linear((1,), 0) == 2 * 2 * 258 * width  # the head: forward and its input's gradient


def test_model_is_left_as_it_was(tiny_llama):
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in tiny_llama.named_parameters()}
    state = torch.get_rng_state()
    Flops(tiny_llama)
    for name, p in tiny_llama.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1] and p.grad is None
    assert not any(module._forward_hooks for module in tiny_llama.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_sizes_of_the_targets_on_the_meta_device():
    """LLaMA-3-8B, trained in full: 6 FLOPs a weight of its blocks' matrices and token, and attention's causal half."""
    with torch.device("meta"):
        model = build(
            "llama",
            seed=0,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            tie_word_embeddings=False,
        )
    flops = Flops(model)
    in_blocks = 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    square = 32 * 3 * 2 * 4096
    assert (
        flops.step(lengths=(1024,), labelled=100) == 6 * in_blocks * 1024 + 6 * 128256 * 4096 * 100 + square * 1024**2
    )


def test_mfu():
    assert mfu(2e12, 4.0, 1e12) == 0.5
    assert mfu(2e12, 4.0, None) is None
    assert mfu(2e12, 0.0, 1e12) is None


@pytest.mark.parametrize(
    ("name", "bf16", "float32"),
    [
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA A10G", None, None),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("Tesla V100-SXM2-16GB", 125e12, 15.7e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
    ],
)
def test_peaks_of_data_sheets(name, bf16, float32):
    for dtype, stated in ((torch.bfloat16, bf16), (torch.float32, float32)):
        found = hardware.data_sheet_peak(name, dtype)
        assert found is None if stated is None else found == pytest.approx(stated)
    assert hardware.data_sheet_peak(name, torch.float64) is None


def test_peak_of_the_cpu_is_measured_once_and_draws_nothing():
    state = torch.get_rng_state()
    first = hardware.dense_peak(torch.device("cpu"), torch.float32)
    assert first == hardware.dense_peak(torch.device("cpu"), torch.float32)
    assert first[0] > 1e8 and first[1] == "matrix product measured here"
    assert torch.equal(torch.get_rng_state(), state)
