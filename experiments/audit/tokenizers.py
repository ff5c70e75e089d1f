"""In what two tokenizers differ, in sentences, and a hash of everything in one that decides the ids of a text."""

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from experiments.audit import kept

SHOWN = 5  # tokens that a sentence names
_STEPS = {  # parts of tokenizer.json between a text and its ids
    "normalizer": "they normalise a text differently",
    "pre_tokenizer": "they cut a text into words differently",
    "post_processor": "they add different tokens around a text",
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What differs.

    sentences        each a whole sentence; empty where nothing does
    same_vocabulary  whether both have the same tokens with the same numbers
    """

    sentences: list[str]
    same_vocabulary: bool


def facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides the ids of a text, as JSON; padding and truncation, which no score uses, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = json.loads(backend.to_str()) if backend is not None else {}
    model = dict(whole.get("model") or {})
    model.pop("vocab", None)  # with the added tokens it is get_vocab()
    special = ("bos_token", "eos_token", "unk_token")
    return {
        "class": None if backend is not None else type(tokenizer).__name__,
        "vocabulary": tokenizer.get_vocab(),
        "model": model,
        "added_tokens": sorted((token["content"], token) for token in whole.get("added_tokens") or ()),
        "steps": {step: whole.get(step) for step in _STEPS},
        "special": {name: None if (token := getattr(tokenizer, name)) is None else str(token) for name in special},
        "template": tokenizer.chat_template,
    }


def sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    return kept.digest(facts(tokenizer))


def compare(base: PreTrainedTokenizerBase, tuned: PreTrainedTokenizerBase) -> Difference:
    """The differences of the tuned model's tokenizer from the base's."""
    one, other = facts(base), facts(tuned)
    before, after = one["vocabulary"], other["vocabulary"]
    added = sorted((token for token in after if token not in before), key=after.get)
    gone = sorted((token for token in before if token not in after), key=before.get)
    moved = [token for token in before if token in after and before[token] != after[token]]
    sentences = []
    if added:
        sentences.append(f"The tuned model's tokenizer has {_tokens(added)} that the base's lacks.")
    if gone:
        sentences.append(f"The tuned model's tokenizer lacks {_tokens(gone)} of the base's.")
    if moved:
        sentences.append(f"{len(moved):,} tokens have other numbers in the tuned model's tokenizer.")
    if one["model"] != other["model"]:
        merges = [len(each["model"].get("merges") or ()) for each in (one, other)]
        counts = f" ({merges[0]:,} and {merges[1]:,} merges)" if merges[0] != merges[1] else ""
        sentences.append(f"The tokenizers join characters to tokens differently{counts}.")
    elif not added and not gone and one["added_tokens"] != other["added_tokens"]:
        sentences.append("The tokenizers treat their added tokens differently.")
    steps = [said for step, said in _STEPS.items() if one["steps"][step] != other["steps"][step]]
    sentences += [f"The tokenizers differ: {said}." for said in steps]
    for name, token in one["special"].items():
        if token != other["special"][name]:
            said = f"{token!r} in the base and {other['special'][name]!r} in the tuned model"
            sentences.append(f"The {name.replace('_', ' ')} is {said}.")
    if one["class"] != other["class"]:
        sentences.append(f"The tokenizers are of different kinds ({one['class']} and {other['class']}).")
    if one["template"] != other["template"]:
        alone = next((who for who, own in (("base", other), ("tuned model", one)) if own["template"] is None), None)
        sentences.append(f"Only the {alone} has a chat template." if alone else "The chat templates differ.")
    return Difference(sentences=sentences, same_vocabulary=before == after)


def _tokens(tokens: list[str]) -> str:
    named = ", ".join(map(repr, tokens[:SHOWN]))
    if len(tokens) == 1:
        return f"the token {named}"
    return f"{len(tokens):,} tokens ({named}{', …' if len(tokens) > SHOWN else ''})"
