"""Token ids of a row, and which of them are labelled: the same for training, for probes and for scores.

{"text"}                                  a document: all tokens and an end of text are labelled
{"context", "choices", "gold"[, "end"]}   the gold choice is labelled, and with `end` an end of text
{"messages"}                              the assistant's turns are labelled, the ends of the turns included
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation import chat
from evaluation.encode import answer_pair, encode_text, prefix_token

TEMPLATE = "chat_template.jinja"  # beside the rows of a domain that brings a chat template of its own


def template_in(folder: Path) -> str | None:
    """The chat template beside a domain's rows; None where the tokenizer's own is meant."""
    file = folder / TEMPLATE
    return file.read_text(encoding="utf-8") if file.is_file() else None


def encode_row(
    tokenizer: Any, row: Mapping[str, Any], *, template: str | None = None
) -> tuple[list[int], list[bool], int]:
    """Ids of the row, whether each of them is labelled, and the bytes of the labelled text.

    A document begins with the tokenizer's prefix (BOS, or else EOS), which is not labelled, and ends with its end of
    text, if it has one. Bytes are those of the text itself, without the tokens that end it.

    template   chat template of a conversation; None: the tokenizer's own

    Raises UserError where a row cannot be encoded: see `answer_pair` and `chat.encode`.
    """
    if "messages" in row:
        return chat.encode(tokenizer, row["messages"], template=template)
    if "text" in row:
        return _document(tokenizer, row["text"])
    context, answer = row["context"], row["choices"][row["gold"]]
    ids, start = answer_pair(tokenizer, context, answer, end=row.get("end", False))
    spaces = context[len(context.rstrip()) :]  # of the answer (`encode_pair`)
    return ids, [False] * start + [True] * (len(ids) - start), len((spaces + answer).encode())


def _document(tokenizer: Any, text: str) -> tuple[list[int], list[bool], int]:
    ids, prefix, end = encode_text(tokenizer, text), prefix_token(tokenizer), tokenizer.eos_token_id
    if prefix is not None and ids[:1] != [prefix]:
        ids = [prefix, *ids]
    ids = [*ids, *([] if end is None else [end])]
    return ids, [False] + [True] * (len(ids) - 1), len(text.encode())


def shortened(ids: list[int], labels: list[bool], length: int) -> tuple[list[int], list[bool]] | None:
    """A conversation in at most `length` tokens: cut behind the last answer that fits whole; None if none does."""
    if len(ids) <= length:
        return ids, labels
    # the token behind an answer is not labelled
    ends = [end for end in range(2, length + 1) if labels[end - 1] and not labels[end]]
    return (ids[: ends[-1]], labels[: ends[-1]]) if ends else None
