"""Check a model's tokenizer before anything is encoded with it."""

import contextlib
import io
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.encode import appended, encode_text, prefix_token, shown
from evaluation.labelled import template_in
from evaluation.rendered import read_jsonl
from experiments.data.formats import question
from experiments.training.examples import examples_of
from methods.errors import UserError
from methods.tools.jsonl import Row

AHEAD = 500  # training rows that are encoded as a check before training
TRIED = ("a", "A b.", "Question: 1 + 1?\nAnswer:")


def embedded(model: PreTrainedModel) -> int:
    """The number of tokens that have a row in the model's embedding and in its head."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(
        (layer.weight.shape[0] for layer in layers if getattr(layer, "weight", None) is not None),
        default=model.config.vocab_size,
    )


def check(*, rows: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Facts about the encoding that a user should know, a sentence each; usually none.

    Raises UserError if a token has no row, if equal texts may be encoded differently, and if the tokens that the
    tokenizer adds cannot be separated from the text.

    rows  number of tokens in the model's embedding
    """
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        raise UserError(
            f"its tokenizer has {len(beyond)} tokens for which the model has no embedding: {beyond[0][1]!r} is number "
            f"{beyond[0][0]} and the embedding ends with number {rows - 1}. Resize the model's embedding to "
            f"{max(beyond)[0] + 1} rows (`resize_token_embeddings` of transformers), or use the model's own tokenizer"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(getattr(backend, "model", None), "dropout", None):
        raise UserError(
            f"its tokenizer draws the tokens of a text at random (dropout {backend.model.dropout} in tokenizer.json), "
            "so equal weights would score differently: set it to null"
        )
    for text in TRIED:
        own = tokenizer.encode(text, add_special_tokens=False)
        if own and encode_text(tokenizer, text)[-len(own) :] != own:
            raise UserError(
                f"its tokenizer encodes {text!r} as {tokenizer.encode(text)} with the tokens that it adds and as {own} "
                "without them: what it adds cannot be separated from the text"
            )
    notes = []
    if added := appended(tokenizer):
        notes.append(
            f"its tokenizer adds {tokenizer.decode(added)!r} to the end of every text; it is left out, because it "
            "would be between prompt and answer"
        )
    if prefix_token(tokenizer) is None:
        notes.append(
            "its tokenizer has neither a BOS nor an EOS token: texts are scored from their second token on, and "
            "generated answers cannot be trained or scored"
        )
    return notes


def refuse_answers(*, domain: str, file: Path, tokenizer: PreTrainedTokenizerBase, length: int, where: str) -> None:
    """Raise UserError where training would refuse the first rows of a file (sorted by a hash).

    where   the block that states `length`
    """
    rows = read_jsonl(file)[:AHEAD]
    named = [Row(row, at=f"the row {shown(question(row))}") for row in rows]  # their file may be a temporary one
    with contextlib.redirect_stdout(io.StringIO()):  # training itself says what it leaves out
        examples_of(named, tokenizer, length, domain=domain, where=where, template=template_in(file.parent))
