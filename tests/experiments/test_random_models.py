import pytest
import torch
from transformers import AutoTokenizer

from experiments.model.random_models import EOS_ID, build, byte_tokenizer
from methods.errors import UserError


@pytest.mark.parametrize("architecture", ["gptj", "llama"])
def test_the_seed_alone_decides_the_weights(architecture):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (build(architecture, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    for (name, a), b in zip(one.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_are_made_in_the_dtype_asked_for(dtype):
    assert {p.dtype for p in build("llama", seed=0, dtype=dtype).parameters()} == {dtype}


def test_llama_is_tied_unless_told_otherwise_and_gptj_is_not():
    def tied(model):
        return model.get_input_embeddings().weight is model.get_output_embeddings().weight

    assert tied(build("llama", seed=0))
    assert not tied(build("llama", seed=0, tie_word_embeddings=False))
    assert not tied(build("gptj", seed=0))


def test_sizes_take_transformers_names_and_their_aliases():
    assert build("gptj", seed=0, hidden_size=16, n_head=2).config.n_embd == 16
    assert len(build("llama", seed=0, num_hidden_layers=3).model.layers) == 3


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="'mamba'.*gptj, llama"):
        build("mamba", seed=0)
    with pytest.raises(UserError, match="n_layrs"):
        build("gptj", seed=0, n_layrs=2)
    with pytest.raises(UserError, match="cannot be built"):
        build("gptj", seed=0, n_head=5)


def test_the_tokenizer_is_bytes_and_survives_a_folder(tmp_path):
    tokenizer = byte_tokenizer()
    text = "Zwölf  Boxkämpfer\n\tjagen €"
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert one(text)["input_ids"] == list(text.encode())
        assert one.decode(one(text)["input_ids"]) == text
        assert one.eos_token_id == EOS_ID and one.bos_token_id is None
        assert one("a<|eos|>")["input_ids"] == [97, EOS_ID]
