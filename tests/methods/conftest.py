"""Tiny models and documents for the tests of parts."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from experiments.model.random_models import build

MODELS = {"llama-tied": ("llama", {}), "llama-untied": ("llama", {"tie_word_embeddings": False}), "gptj": ("gptj", {})}


@pytest.fixture
def make():
    """make(kind, dtype, seed=0): a fresh tiny model with a small vocabulary; "gpt2" has its matrices in × out."""

    def fresh(kind="llama-tied", dtype=torch.float64, seed=0, **config):
        tokens = {"vocab_size": 31, "eos_token_id": 1, "pad_token_id": 0}
        if kind != "gpt2":
            return build(MODELS[kind][0], seed=seed, dtype=dtype, **(tokens | MODELS[kind][1] | config))
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
        config = GPT2Config(**(tokens | sizes | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | config))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    return fresh


@pytest.fixture
def made(make):
    """made(kind, dtype): the same tiny model each time; of "gpt2", whose matrices are in × out, too."""

    def build(kind="llama-tied", dtype=torch.float64):
        if kind != "gpt2":
            return make(kind, dtype)
        config = GPT2Config(vocab_size=31, n_embd=12, n_layer=2, n_head=2, n_positions=32, eos_token_id=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    return build


@pytest.fixture
def text():
    """General text, of more tokens than any tiny layer has inputs."""
    draw = torch.Generator().manual_seed(6)
    return [{"input_ids": torch.randint(2, 31, (4 + size % 9,), generator=draw)} for size in range(30)]


@pytest.fixture
def documents():
    """Ragged documents; some tokens carry no label."""
    draw = torch.Generator().manual_seed(5)
    examples = []
    for size in (9, 4, 12, 7, 5, 10):
        ids = torch.randint(2, 31, (size,), generator=draw)
        labels = ids.clone()
        labels[: size // 3] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


@pytest.fixture
def train():
    """train(model, parts, examples, states=…, **settings): the engine's own loop on the CPU."""
    from experiments.training.engine import fit
    from experiments.training.settings import TrainSettings

    def run(model, parts, examples, states=None, seed=0, base=None, **settings):
        base = base or {n: p.detach().clone() for n, p in model.named_parameters()}
        chosen = TrainSettings(
            **({"batch": 2, "micro_batch": 2, "learning_rate": 1e-2, "clip": 0.0, "probes": 0} | settings)
        )
        return fit(model=model, parts=parts, examples=examples, settings=chosen, seed=seed, base=base, states=states)

    return run


@pytest.fixture
def fitting(train):
    """What `prepare` gets as `fit`: training settings beside the loop's arguments, None for the method's own."""

    def bound(base, **own):
        def fit(*, model, parts, examples, seed, **overrides):
            return train(
                model,
                parts,
                examples,
                seed=seed,
                base=base,
                **(own | {k: v for k, v in overrides.items() if v is not None}),
            )

        return fit

    return bound


@pytest.fixture
def run_of():
    """run_of(model, base): the run a part sees before its first step."""
    from methods.part import Run

    return lambda model, base: Run(
        model=model,
        weights={n: p for n, p in model.named_parameters() if p.requires_grad},
        base=base,
        seed=0,
        device="cpu",
    )


@pytest.fixture
def drawn():
    """drawn(model, seed): noise added to every trained tensor, for LoRA's B starts at zero."""

    def draw_into(model, seed=0):
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
        return model

    return draw_into


@pytest.fixture
def dense():
    """dense(importance): the float64 values that codes or tensors stand for, by name."""
    from methods.tools.importance import Codes, decode

    return lambda importance: {
        n: decode(v.codes, low=v.low, step=v.step, dtype=torch.float64) if isinstance(v, Codes) else v.double()
        for n, v in importance.items()
    }
