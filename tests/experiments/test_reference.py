"""The base's kept hidden states: what is read from them is what the base itself says, and damage is seen."""

import random
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel

from evaluation.token_losses import HiddenRows, token_losses
from experiments.model import weights
from experiments.model.base import load_tensors
from experiments.model.random_models import build, byte_tokenizer
from experiments.model.reference import reference

TOKENS = 64


def texts(seed=0):
    draw = random.Random(seed)
    return [([draw.randrange(256) for _ in range(n)], [False] + [True] * (n - 1)) for n in (9, 1, 30, 30, 17)]


def gemma(**_):
    """A model that caps its logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 258}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": 2.0}
    return AutoModelForCausalLM.from_config(Gemma2Config(**sizes, **heads, initializer_range=0.3)).eval()


BASES = {
    "tied": partial(build, "llama"),
    "untied": partial(build, "llama", tie_word_embeddings=False),
    "bias": partial(build, "gptj"),
    "capped": gemma,
}


@pytest.fixture(params=BASES)
def base(request, tmp_path):
    made = BASES[request.param](seed=1)
    if getattr(made.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(made.lm_head.bias)
    made.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def made(base, **changes):
    about = {"key": ("a", "b"), "tokens": TOKENS, "dtype": torch.float32, "device": torch.device("cpu")}
    return reference(base, **{"sequences": texts(), "kept": base.parent / "kept"} | about | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_from_the_kept_states_is_that_of_the_base_itself(base, dtype, monkeypatch):
    whole = weights.load_model(base, dtype=dtype)
    model = weights.load_model(base, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    losses = partial(token_losses, model, texts(), tokens=TOKENS)
    first = made(base, dtype=dtype)
    monkeypatch.setattr(weights, "load_model", None)  # the second time it is not loaded
    second = made(base, dtype=dtype)
    assert isinstance(first, HiddenRows) and losses(reference=first) == losses(reference=second)
    assert losses(reference=first) == losses(reference=whole)
    assert min(each.kl for each in losses(reference=first) if each.tokens) > 0
    assert {each.kl for each in token_losses(whole, texts(), reference=second, tokens=TOKENS)} == {0.0}


def test_a_damaged_file_is_made_again(tmp_path):
    build("llama", seed=1).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    right = made(tmp_path / "base").rows
    (file,) = (tmp_path / "kept").iterdir()
    good = file.read_bytes()
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    for bad in (flipped, good[: len(good) // 2], b""):
        file.write_bytes(bad)
        assert all(map(torch.equal, made(tmp_path / "base").rows, right))
        assert file.read_bytes() == good


def test_other_texts_weights_batches_and_dtypes_have_files_of_their_own(tmp_path):
    build("llama", seed=1).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    others = [{}, {"sequences": texts(1)}, {"key": ("a", "c")}, {"tokens": 65}, {"dtype": torch.bfloat16}]
    for other in [*others, *others]:
        made(tmp_path / "base", **other)
    assert len(list((tmp_path / "kept").iterdir())) == len(others)


def test_a_base_without_a_head_that_can_be_read_is_loaded_whole(tmp_path):
    """GPT-2's own checkpoint is one: it is of the decoder, whose tensors have no prefix, and its head is tied."""
    folder = tmp_path / "base"
    build("llama", seed=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    bare = {name.removeprefix("model."): tensor for name, tensor in load_tensors(folder).items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    found = made(folder)
    assert isinstance(found, PreTrainedModel) and not (tmp_path / "kept").exists()
    model = build("llama", seed=0)
    assert token_losses(model, texts(), reference=found) == token_losses(
        model, texts(), reference=build("llama", seed=1)
    )


def test_without_texts_there_is_no_reference(tmp_path):
    assert made(tmp_path, sequences=[]) is None
