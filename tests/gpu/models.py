"""The models that the checks compute with: heads as wide as real ones, and a few layers."""

import torch
from transformers import PreTrainedModel

from experiments.bench.sizes import build

MEDIUM = {
    "gptj": {"n_embd": 1024, "n_layer": 4, "n_head": 4, "rotary_dim": 64, "vocab_size": 4096, "n_positions": 512},
    "llama": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    },
}
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def medium(kind: str, tiny: bool) -> dict:
    return {} if tiny else MEDIUM[kind]


def llama(device: torch.device, tiny: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return build("llama", device=device, dtype=dtype, **medium("llama", tiny))
