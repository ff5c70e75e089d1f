"""What a part says of its costs before anything runs: `plan` shows it, and a run whose memory cannot fit is refused.

The answers follow from settings and sizes alone. What a run really takes is measured and recorded beside them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

CHUNK = 1024  # rows of logits that are held at once


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A pass of the model over documents of general text, made while a part prepares; or texts that it continues.

    documents  how many it reads; None: all there are
    length     tokens that each document is cut at; None: none is cut
    cut_by     the setting that gives `length`, which is named where the model has fewer positions
    training   settings of training with which the part calls `fit`; None: the part runs the model itself
    rows       documents in one forward pass of the part's own
    tokens     above 0: as many documents as so many tokens hold take the place of `rows`
    gradients  which base tensors get a gradient: those that the method changes, all, or none: forward, without logits
    bare       the model is the base itself, which no part has adapted (`calibrate`)
    generated  above 0: the model writes at most so many tokens behind each of `documents` beginnings of `length`
               tokens; where general text has fewer documents, several texts begin alike
    """

    documents: int | None = None
    length: int | None = None
    cut_by: str = ""
    training: Mapping[str, Any] | None = None
    rows: int = 1
    tokens: int = 0
    gradients: Literal["adapted", "whole-model", "none"] = "adapted"
    bare: bool = False
    generated: int = 0

    def cut(self, lengths: Sequence[int]) -> list[int]:
        """Tokens that are read of each document, of documents of these lengths; with those that are written."""
        if self.generated:
            begun = itertools.islice(itertools.cycle(lengths or [1]), self.documents)
            return [min(length, self.length or length) + self.generated for length in begun]
        return [min(length, self.length or length) for length in lengths[: self.documents]]

    def rows_at(self, length: int) -> int:
        """Documents of `length` tokens in one forward pass."""
        return max(1, min(self.documents or self.tokens, self.tokens // length)) if self.tokens else self.rows


@dataclass(frozen=True, kw_only=True)
class Added:
    """What a part adds to training, in tokens for each token of the domain in every step.

    begin     tokens that pass forward once, before the first step, for each token of the training rows
    trained   tokens that pass forward and backward, such as replayed text
    read      tokens that pass forward only, such as those that a reference model reads
    pooled    tokens that pass forward only, where a step is cut into several micro-batches or shared by processes:
              for a statistic of the whole step
    replaced  tokens of the domain whose place they take
    length    tokens of the longest example that the part brings; None: it brings none, or none longer than the domain's
    cut_by    the setting that gives `length`
    """

    begin: float = 0.0
    trained: float = 0.0
    read: float = 0.0
    pooled: float = 0.0
    replaced: float = 0.0
    length: int | None = None
    cut_by: str = ""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a part holds and takes in one process in one phase, beside what the engine takes for every method.

    anchor      held: weights that the trained ones are compared with
    importance  held: importance of the weights
    state       held: anything else
    moments     held: by the optimizer that the part brings, in place of two moments of each trained weight; None: those
    kept        scratch that is made once and kept
    forward     scratch taken in the forward and backward pass of a micro-batch
    gradient    scratch taken for one gradient at a time, in a pass of the part's own
    update      scratch taken in a step, before and after the optimizer's own
    optimizer   scratch taken in the step of the optimizer that the part brings
    """

    anchor: int = 0
    importance: int = 0
    state: int = 0
    moments: int | None = None
    kept: int = 0
    forward: int = 0
    gradient: int = 0
    update: int = 0
    optimizer: int = 0


@dataclass(frozen=True, kw_only=True)
class Entries:
    """Numbers of weights of a model as its parts adapt it.

    Regularised: base tensors that are trained, and matrices under adapters. Root: what stands outside the blocks.
    Block: the largest one. Every `largest_…` is of one tensor.
    """

    all: int
    base: int
    trained: int
    trained_base: int
    adapters: int
    adapted: int  # entries of the matrices under adapters
    regularised: int
    largest_base: int
    largest_trained: int
    largest_adapted: int
    largest_regularised: int
    squares: int  # of the inputs of each matrix under an adapter
    largest_square: int
    root: int
    block: int
    root_trained: int
    block_trained: int
    matrices: int  # entries of the trained matrices in the blocks
    largest_matrix: int  # of those
    head_trained: int
    vocabulary: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Counts(Entries):
    """What the memory of a part is computed from: numbers of weights, bytes a number has, and where they lie.

    checkpoint, compute  bytes of a number in the checkpoint's dtype and in the dtype that the model computes in
    device               "cpu" or "cuda"
    processes            how many share the model; None: one process, which does not share it
    """

    checkpoint: int
    compute: int
    device: str
    processes: int | None

    @property
    def wide(self) -> int:
        """Bytes of a number of the trained weights: 4, or 8 for float64 models."""
        return max(4, self.compute)

    @property
    def half(self) -> bool:
        """Whether the model computes in fewer bits than its trained weights have."""
        return self.compute < self.wide

    @property
    def frozen_base(self) -> int:
        """Bytes of a copy of the base; 0 where nothing but adapters is trained, which are switched off instead."""
        return self.share(self.compute * self.base) if self.trained_base else 0

    @property
    def distributions(self) -> int:
        """Bytes that are taken while whole distributions over the vocabulary are compared."""
        return 5 * self.wide * self.vocabulary * CHUNK

    def share(self, count: int) -> int:
        """What one process has of `count` bytes or entries that are cut evenly."""
        return -(-count // (self.processes or 1))

    def piece(self, entries: int, *, cpu: int, cuda: int) -> int:
        """Entries worked on at once: no more than `entries`, nor than the limit of the device."""
        return min(entries, cpu if self.device == "cpu" else cuda)
