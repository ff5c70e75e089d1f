"""Models with random weights and a tokenizer built in code, for tests and cost measurements, never for scores.

model = build("llama", seed=0)                                                # tiny, tied embeddings
model = build("gptj", seed=0, n_embd=4096, n_layer=28, n_head=16, rotary_dim=64, vocab_size=50400, n_positions=2048)
"""

import math

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from experiments.model.attention import with_sdpa
from methods.errors import UserError, shortened

EOS, PAD = "<|eos|>", "<|pad|>"
EOS_ID, PAD_ID = 256, 257
VOCABULARY = 258  # 256 bytes, EOS and PAD

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
# The dimensions differ from each other where possible, so that a test notices a transposed matrix.
_GPTJ = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
_LLAMA = {
    "max_position_embeddings": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
_TINY = {"gptj": (GPTJConfig, _TOKENS | _GPTJ), "llama": (LlamaConfig, _TOKENS | _LLAMA)}


def build(architecture: str, *, seed: int, dtype: torch.dtype = torch.float32, **config) -> PreTrainedModel:
    """A model of `architecture` ("gptj" or "llama") with weights drawn from `seed`, in evaluation mode.

    `config` takes the names of transformers; the defaults are tiny (width 32, 2 layers, 4 heads, the vocabulary of the
    byte tokenizer). Weights are normal with standard deviation 1/sqrt(width) unless `initializer_range` is given, so
    that gradients of small models are larger than rounding. The caller's random state is unchanged. Raises UserError
    for an unknown architecture or config name, and for sizes that do not fit together.
    """
    if architecture not in _TINY:
        raise UserError(f"there is no random architecture {architecture!r}: use one of {', '.join(sorted(_TINY))}")
    config_class, tiny = _TINY[architecture]
    known = config_class().to_dict().keys() | config_class.attribute_map.keys()
    if unknown := sorted(set(config) - known):
        raise UserError(
            f"random:{architecture} has no setting {', '.join(unknown)}; "
            f"use the names of transformers' {config_class.__name__}"
        )
    # GPT-J has two names for some sizes; a default under the other name must not override a given value
    given = {config_class.attribute_map.get(name, name): value for name, value in config.items()}
    settings = tiny | given
    width = settings.get("n_embd") or settings.get("hidden_size")
    try:
        model_config = config_class(**({"initializer_range": 1 / math.sqrt(width)} | settings))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # the type of error depends on the sizes
        raise UserError(f"random:{architecture} cannot be built from {given}: {shortened(error)}") from error
    return with_sdpa(model).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte (the id is the byte), <|eos|> and <|pad|>; it adds nothing to a text."""
    model = BPE(vocab={_byte_symbol(byte): byte for byte in range(256)} | {EOS: EOS_ID, PAD: PAD_ID}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _byte_symbol(byte: int) -> str:
    """GPT-2's printable character for a byte: visible Latin-1 characters are themselves, the others count from 256."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte if byte in visible else 256 + [b for b in range(256) if b not in visible].index(byte))
