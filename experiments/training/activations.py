"""Count the bytes of activations by running the real modules on fake tensors, which have shapes and no numbers."""

from __future__ import annotations

import contextlib
import functools
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import moe

from experiments.model.attention import only_sdpa
from methods.errors import UserError
from methods.part import Part
from methods.tools import architecture
from methods.tools.effective import adapted_names, base_parameters

if TYPE_CHECKING:
    from experiments.model.shape import Shape


class Unknown(Exception):
    """The memory of this architecture cannot be predicted."""


@functools.cache
def activations(shape: Shape, **inputs: Any) -> tuple[int, int]:
    """Bytes alive after a forward pass of the backbone, and the most that backward adds; `inputs` of `_FakePasses`.

    Weights, their gradients and logits are not counted. Where all blocks but the first are equal, models of one and of
    two blocks are run, else the whole model. Raises Unknown for an architecture that fake tensors cannot run.
    """
    passes = _FakePasses(shape=shape, **inputs)
    blocks = _blocks(shape.build(parts=passes.parts))
    if blocks and architecture.alike(blocks[1:]):
        try:
            one, _ = passes.run(layers=1)
            two, peak = passes.run(layers=min(len(blocks), 2))
            return one + (len(blocks) - 1) * (two - one), max(0, peak - two)
        except Exception:  # some configs cannot be shortened, and a part may adapt only later blocks: run them all
            pass
    try:
        whole, peak = passes.run(layers=None)
    except Exception as error:  # whatever fails here, the model may still train
        raise Unknown from error
    return whole, max(0, peak - whole)


def _blocks(model: nn.Module) -> list[nn.Module]:
    try:
        return [block for _, block in architecture.blocks(model)]
    except UserError:
        return []


@dataclass(frozen=True, kw_only=True)
class _FakePasses:
    """A forward and a backward pass on (rows, length) tokens of a model that `parts` adapt.

    gradients  the tensors that get one: "trained" (in training mode), or in evaluation mode "adapted" or "whole-model"
               tensors of the base or "none", as in methods/tools/costs.py
    device     its type; on another one than the CPU attention is SDPA
    cached     the keys and values of all tokens are kept, as for text that is continued
    """

    shape: Shape
    parts: tuple[Part, ...] = ()
    dtype: torch.dtype
    rows: int
    length: int
    checkpointing: bool = False
    packed: bool = False
    gradients: str = "trained"
    device: str = "cpu"
    cached: bool = False

    def run(self, *, layers: int | None) -> tuple[int, int]:
        """Bytes alive after the forward pass of the first `layers` blocks (None: all), and the peak of both passes."""
        model = self.shape.build(parts=self.parts, layers=layers, dtype=self.dtype).train(self.gradients == "trained")
        with FakeTensorMode(), only_sdpa() if self.device != "cpu" else contextlib.nullcontext():
            _fake(model)
            if self.gradients != "trained":
                base, names = base_parameters(model), adapted_names(model)
                model.requires_grad_(False)
                for name in {"whole-model": base, "adapted": names, "none": ()}[self.gradients]:
                    base[name].requires_grad_(True)
            if self.checkpointing:
                architecture.recompute_activations(model)
            for p in model.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(_forget)
            # fake tensors have a grouped product of experts in bfloat16 only; the plain product works in every dtype
            plainly = mock.patch.object(moe, "_can_use_grouped_mm", lambda *_: False)
            with plainly, architecture.numberless(packed=self.packed):
                return self._bytes(model)

    def _bytes(self, model: nn.Module) -> tuple[int, int]:
        trained = architecture.plain(model).get_input_embeddings().weight.requires_grad
        positions = {"position_ids": torch.empty(1, self.length, dtype=torch.long)} if self.packed else {}
        with _Alive(*model.parameters(), *model.buffers()) as alive:
            # rows as an embedding returns them; the embedding's own gradient comes after all activations are freed
            row = torch.empty(self.shape.config.hidden_size, dtype=self.dtype, requires_grad=trained)
            embedded = row.expand(self.rows, self.length, -1).clone()
            run = architecture.backbone(model)
            made = run(inputs_embeds=embedded, use_cache=self.cached, **positions)
            hidden = made.last_hidden_state
            del embedded
            after_forward = alive.now
            if hidden.requires_grad:
                hidden.sum().backward()
        return after_forward, alive.peak


def _fake(model: nn.Module) -> None:
    """Replace the model's tensors by new ones of the active mode. Tied tensors become two, which is the same here."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


class _Alive(TorchDispatchMode):
    """Bytes of living storages that were made in this mode: `now`, and their maximum `peak`."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage._cdata)
        return made

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
