"""Roles of a causal language model's modules and parameters, by structure and not by name.

`ln_f` is a norm in GPT-J and `norm` is one in Llama, so rules about names fail (`docs/decisions.md`). The functions
here ask transformers for the role or look at the structure of a module.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import transformers  # whose models are imported where they are first used: that takes seconds
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from methods.errors import UserError


def plain(model: nn.Module) -> nn.Module:
    """The transformers model itself, without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_name(parameter: str) -> str:
    """A parameter's name in the base model, from its name there or in peft's wrapper."""
    return parameter.removeprefix("base_model.model.").replace(".base_layer.", ".")


def backbone(model: nn.Module) -> nn.Module:
    """The decoder without its head: token ids to the last hidden state (batch, tokens, width)."""
    return getattr(plain(model), _backbone_name(model))


def _backbone_name(model: nn.Module) -> str:
    """The attribute that has the decoder: as the class says, or, where that is something else, the only model in it."""
    inner = plain(model)
    models = [name for name, child in inner.named_children() if isinstance(child, transformers.PreTrainedModel)]
    for name in (getattr(inner, "base_model_prefix", ""), models[0] if len(models) == 1 else ""):
        if name and isinstance(getattr(inner, name, None), nn.Module):
            return name
    raise UserError(
        f"model {type(inner).__name__} is not a decoder with a head on top of it: "
        "Holdfast trains causal language models"
    )


def logits_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model's map from last hidden states, (rows, width) or (batch, tokens, width), to logits over the vocabulary.

    It runs the model's own `forward` with a stand-in for the decoder that returns the given hidden states, so that the
    class's own code does whatever comes after the decoder (a head with a bias, a scale, a cap, a cast).
    """
    inner, name, decoder = plain(model), _backbone_name(model), backbone(model)
    # a copy that shares everything with the model except the decoder, so that the model itself is not changed
    twin = object.__new__(type(inner))
    vars(twin).update(vars(inner))
    vars(twin)["_modules"] = inner._modules | {name: _StandIn(decoder)}

    def compute(hidden: Tensor) -> Tensor:
        whole = hidden if hidden.dim() == 3 else hidden[None]
        vars(twin)["_modules"][name] = _StandIn(decoder, whole)
        ids = torch.zeros(whole.shape[:2], dtype=torch.long, device=whole.device)
        logits = type(inner).forward(twin, input_ids=ids, use_cache=False).logits
        return logits if hidden.dim() == 3 else logits[0]

    return compute


class _StandIn(nn.Module):
    """Returns the given hidden states and has all other attributes of the decoder.

    Some models call a module inside their decoder or read a number of it; such a module is again a stand-in.
    """

    def __init__(self, decoder: nn.Module, hidden: Tensor | None = None):
        super().__init__()
        vars(self)["decoder_"], vars(self)["hidden_"] = decoder, hidden  # not registered as a submodule

    def __getattr__(self, name: str) -> Any:
        value = getattr(vars(self)["decoder_"], name)
        return _StandIn(value, vars(self)["hidden_"]) if isinstance(value, nn.Module) else value

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return _Output(last_hidden_state=vars(self)["hidden_"])


class _Output(BaseModelOutputWithPast):
    """A decoder's output; any further attribute that some decoders return is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def head(model: nn.Module) -> nn.Linear:
    """The linear layer before the logits. What a model does to them afterwards (a scale, a cap) is in `logits_of`."""
    layer = plain(model).get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"model {type(plain(model)).__name__} has no plain linear head "
            f"(found {type(layer).__name__}): Holdfast trains causal language models with one"
        )
    return layer


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks in order, each with its module path in `model`."""
    depth = plain(model).config.get_text_config(decoder=True).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and _is_stack(module):
            return [(f"{name}.{i}", block) for i, block in enumerate(module)]
    raise UserError(
        f"model {type(plain(model)).__name__}: no list of {depth} equal blocks found (num_hidden_layers of its config)"
    )


def alike(blocks: Sequence[nn.Module]) -> bool:
    """Whether blocks have the same modules and parameters (names, shapes), of which the same ones are trained."""
    kinds = {
        (
            tuple(type(m) for m in block.modules()),
            tuple((name, p.shape, p.requires_grad) for name, p in block.named_parameters()),
        )
        for block in blocks
    }
    return len(kinds) <= 1


def _is_stack(modules: nn.ModuleList) -> bool:
    return len({type(m) for m in modules}) == 1 and any(True for _ in modules[0].parameters())


def units(block: nn.Module) -> dict[str, list[list[str]]]:
    """The parameters of a transformer block by role: "attention", "ffn" and "norm", each a list of units.

    A unit is a matrix with the biases beside it, or all parameters of a module without a matrix, a norm. Attention is
    the module that keeps keys and values, which transformers gives the index of its layer; all other matrices are ffn.
    """
    roles: dict[str, list[list[str]]] = {"attention": [], "ffn": [], "norm": []}
    keeping = [name for name, module in block.named_modules() if name and hasattr(module, "layer_idx")]
    keeping = keeping or [name for name, module in block.named_modules() if name and hasattr(module, "layer_id")]
    for path, module in block.named_modules():
        own = {f"{path}.{name}".lstrip("."): p.dim() for name, p in module.named_parameters(recurse=False)}
        matrices, vectors = ([name for name, dims in own.items() if (dims > 1) == wide] for wide in (True, False))
        attends = any(path == name or path.startswith(f"{name}.") for name in keeping)
        role = "norm" if not matrices else "attention" if attends else "ffn"
        for matrix in matrices or [[]][: bool(vectors)]:
            roles[role].append([matrix, *vectors] if matrices else vectors)
            vectors = [] if matrices else vectors
    return roles


def linear_weights(model: nn.Module) -> dict[str, int]:
    """The weights of linear layers in the blocks by parameter name, each with its dimension of inputs.

    That is 1, and 0 where the model stores in × out (GPT-2's Conv1D).
    """
    return {
        f"{path}.{name}.weight": int(not isinstance(module, Conv1D))
        for path, block in blocks(model)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


@contextmanager
def first_blocks(model: nn.Module, count: int | None) -> Iterator[None]:
    """Within the context the model has only its first `count` blocks; all of them for None."""
    if count is None:
        yield
        return
    stack = model.get_submodule(blocks(model)[0][0].rpartition(".")[0])
    whole = stack._modules
    stack._modules = dict(list(whole.items())[:count])
    try:
        yield
    finally:
        stack._modules = whole


def recompute_activations(model: nn.Module) -> None:
    """Activation checkpointing: keep only each block's input, and compute the rest again in the backward pass."""
    # the second is the name before transformers 5.20
    enable = (
        getattr(plain(model), "activation_checkpointing_enable", None) or plain(model).gradient_checkpointing_enable
    )
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"train.checkpointing is true, but {type(plain(model)).__name__} cannot recompute activations: set "
            "train.checkpointing: false"
        ) from error


def compile_blocks(model: nn.Module) -> None:
    """Compile each block's `forward`: all blocks share a graph, and hooks are not part of it."""
    for _, block in blocks(model):
        block.forward = torch.compile(block.forward)


def group_of(model: nn.Module, parameter: str) -> str:
    """The group of a parameter: `block.3`, `embedding`, `final_norm` or `head`; a tied embedding is in `embedding`."""
    for index, (path, _) in enumerate(blocks(model)):
        if parameter.startswith(path + "."):
            return f"block.{index}"
    inner = plain(model)
    owner = dict(model.named_parameters())[parameter]
    if any(owner is p for p in inner.get_input_embeddings().parameters()):
        return "embedding"
    if any(owner is p for p in inner.get_output_embeddings().parameters()):
        return "head"
    return "final_norm"


def hidden_states(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The backbone's last hidden state, (batch, tokens, width), computed without a cache.

    The batch is padded or packed. If packed, `position_ids` begin at 0 in each example and there is no attention mask.
    """
    # transformers looks for packed examples only if it gets neither a mask nor a cache
    packed = {} if position_ids is None else {"position_ids": position_ids}
    return backbone(model)(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **packed
    ).last_hidden_state


@contextmanager
def numberless(*, packed: bool = False) -> Iterator[None]:
    """For models whose tensors have no numbers: keep transformers from looking for padding and for packed examples.

    packed   the batch is packed, so that positions may be read
    """

    def nothing(*_: Any, **__: Any) -> None:
        return None

    with mock.patch.object(transformers.PreTrainedModel, "warn_if_padding_and_no_attention_mask", nothing):
        # transformers would take a position without a number for that of a packed row
        masks, looking = transformers.masking_utils, "find_packed_sequence_indices"
        with nullcontext() if packed else mock.patch.object(masks, looking, nothing):
            yield


@torch.no_grad()
def keeps_apart(model: nn.Module) -> bool:
    """Whether examples packed in one row do not attend to each other; tried on six tokens in evaluation mode.

    False for GPT-J with flash_attention_2, which transformers does not tell where an example begins, and for models
    that take no positions.
    """
    device = next(model.parameters()).device
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    row = torch.tensor([[0, 1, 2, 3, 4, 5]], device=device)
    other = torch.tensor([[5, 4, 3, 3, 4, 5]], device=device)  # another first example
    was_training = model.training
    model.eval()
    try:
        one, two = (hidden_states(model, ids, None, positions)[:, 3:] for ids in (row, other))
    except TypeError:
        return False
    finally:
        model.train(was_training)
    # a key that is masked out has a weight of exactly 0
    return torch.equal(one, two)
