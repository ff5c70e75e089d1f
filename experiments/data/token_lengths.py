"""How many tokens the rows of a domain have, and the length of training at which nearly all of them fit whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from evaluation.labelled import encode_row
from experiments.data import expected
from methods.errors import UserError
from methods.tools.jsonl import Row

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
MOST = 2000  # rows that are counted
REST = 0.01  # share of the rows that need not fit whole
UNKNOWN = 256  # tokens at least, where the tokenizer is not here
PACKED = 512  # tokens of a block of documents


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of rows, the shortest first.

    counted  whether a tokenizer counted them; else they are estimated from letters
    """

    tokens: list[int]
    counted: bool

    def within(self, share: float) -> int:
        """The tokens that this share of the rows does not exceed."""
        return self.tokens[ceil(share * len(self.tokens)) - 1]

    def share_above(self, length: int) -> float:
        return sum(one > length for one in self.tokens) / len(self.tokens)

    @property
    def words(self) -> str:
        half, most, longest = self.within(0.5), self.within(1 - REST), self.tokens[-1]
        how = "" if self.counted else " (estimated from letters: the tokenizer is not on this machine)"
        return f"tokens of a row: half have at most {half:,}, 99 % {most:,}, the longest {longest:,}{how}"


def count(rows: Sequence[Row], tokenizer: Any, *, template: str | None) -> Lengths:
    """The lengths of rows that training reads.

    tokenizer  None where it is not on this machine
    template   chat template of conversations; None: the tokenizer's own

    Raises UserError if none of the rows can be encoded; training leaves out single ones.
    """
    if tokenizer is None:
        return Lengths(tokens=sorted(expected.of_row(row)[0] for row in rows[:MOST]), counted=False)
    tokens, refused = [], []
    for row in rows[:MOST]:
        try:
            tokens.append(len(encode_row(tokenizer, row, template=template)[0]))
        except UserError as error:
            refused.append(error)
    if not tokens:
        raise UserError(f"{refused[0]} (--chat-template FILE)" if "messages" in rows[0] else str(refused[0]))
    return Lengths(tokens=sorted(tokens), counted=True)


def choose(lengths: Lengths, *, format: str, positions: int | None) -> int:
    """The length of training, at most the `positions` of the model; documents are packed into blocks of it."""
    possible = [length for length in LENGTHS if positions is None or length <= positions] or [positions]
    most = lengths.within(1 - REST)
    wanted = most if lengths.counted else max(2 * most, UNKNOWN)
    return next((length for length in possible if length >= (PACKED if format == "text" else wanted)), possible[-1])
