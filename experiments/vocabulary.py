"""What is asked of a model's tokenizer before anything is encoded with it."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.encode import appended, encode_text, prefix_token
from experiments.errors import UserError

TRIED = ("a", "A b.", "Question: 1 + 1?\nAnswer:")


def check(*, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a user should know of how texts will be encoded, a sentence each; mostly nothing.

    Raises UserError where a token has no row in the model's embedding or head, where equal texts may be encoded in different
    ways, and where what the tokenizer adds to a text cannot be told from the text.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = min((layer.weight.shape[0] for layer in layers if getattr(layer, "weight", None) is not None), default=model.config.vocab_size)
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        raise UserError(f"its tokenizer has {len(beyond)} tokens for which the model has no embedding: {beyond[0][1]!r} is number {beyond[0][0]} and "
                        f"the embedding ends with number {rows - 1}. Resize the model's embedding to {max(beyond)[0] + 1} rows "
                        "(`resize_token_embeddings` of transformers), or use the tokenizer that the model was trained with")  # fmt: skip
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(getattr(backend, "model", None), "dropout", None):
        raise UserError(f"its tokenizer draws the tokens of a text at random (dropout {backend.model.dropout} in tokenizer.json), so equal weights "
                        "would score differently: set it to null")  # fmt: skip
    for text in TRIED:
        own = tokenizer.encode(text, add_special_tokens=False)
        if own and encode_text(tokenizer, text)[-len(own) :] != own:
            raise UserError(f"its tokenizer encodes {text!r} as {tokenizer.encode(text)} with the tokens that it adds and as {own} without: what it "
                            "adds cannot be told from the text")  # fmt: skip
    notes = []
    if behind := appended(tokenizer):
        notes.append(f"its tokenizer puts {tokenizer.decode(behind)!r} behind every text; it is left out, or it would stand between prompt and answer")
    if prefix_token(tokenizer) is None:
        notes.append("its tokenizer has neither a BOS nor an EOS token: texts are scored from their second token on, and answers that are "
                     "written cannot be trained or scored")  # fmt: skip
    return notes
