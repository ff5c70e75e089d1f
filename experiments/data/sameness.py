"""Decide whether two texts are the same text written in two ways.

Two texts are the same if they differ only in the case of letters, in white space, in the form of quotes, dashes and
letters (curly or straight, full width or half width, composed or decomposed), in the punctuation that ends a clause or
the text, and in the space around a sign. They are different if an operator, a bracket, a currency sign or another sign,
a digit, a superscript, an emoji or a combining mark differs: "7 + 3" is not "7 - 3", C++ is not C#, x² is not x2, and a
vowel sign of Hindi or Thai is part of its word.
"""

import functools
import re
import unicodedata

_SIGNED = re.compile(r" [-+]\w")
# marks with the same meaning, mapped to the one that a keyboard has
_ALIKE = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛′`´ʼ", "'"),
        **dict.fromkeys("“”„‟″«»", '"'),
        **dict.fromkeys("‐‑‒–—―−﹘﹣", "-"),
        **dict.fromkeys("∗⁎", "*"),
        **dict.fromkeys("⁄∕", "/"),
        "∶": ":",
        "…": "...",
        **dict.fromkeys("。।॥۔", "."),
        **dict.fromkeys("、،", ","),
        "؛": ";",
        "؟": "?",
        # layout only: soft hyphens, zero-width joiners, direction marks, variation selectors, stretched letters
        **dict.fromkeys(
            "¿¡\u00ad\u200b\u200c\u200e\u200f\u2060\ufeff\u0640\ufe0e\ufe0f"
            "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
            "",
        ),
    }
)
# forms of the same letter; <super>, <sub> and <font> change the meaning
_FORMS = {"<wide>", "<narrow>", "<initial>", "<medial>", "<final>", "<isolated>"}


def sameness(text: str) -> str:
    """A key that is equal for two texts that are the same."""
    text = re.sub(r"[^\x00-\x7f]", lambda match: _letter(match[0]), unicodedata.normalize("NFC", text))
    text = unicodedata.normalize("NFC", text.translate(_ALIKE).casefold())
    text = re.sub(r"[.,;:?!]+(?= )", _clause, " ".join(text.split()))
    whole = text.rstrip(".,;:?! ")
    text = whole + _operators(whole, text[len(whole) :].lstrip()) if whole else text
    words = text.split(" ")
    return words[0] + "".join(
        word if _sign(before[-1:]) or _sign(word[:1]) else " " + word for before, word in zip(words, words[1:])
    )


@functools.cache
def _letter(character: str) -> str:
    form = unicodedata.decomposition(character).partition(" ")[0]
    return unicodedata.normalize("NFKC", character) if form in _FORMS else character


@functools.cache
def _sign(character: str) -> bool:
    """Whether a character is neither part of a word nor a space; a combining mark belongs to its letter."""
    return bool(character) and not (
        character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")
    )


def _clause(match: re.Match) -> str:
    """Remove punctuation after a word; after an operator it has a meaning and stays."""
    if _SIGNED.match(match.string, match.end()):  # "1, -2" is not "1 - 2"
        return match[0]
    before = match.string[max(0, match.start() - 2) : match.start()]
    ends = before and (not _sign(before[-1]) or before[-1] in ")]}\"'%") and before[-1] != " "
    return _operators(before, match[0]) if ends else match[0]


def _operators(before: str, signs: str) -> str:
    """The part of the punctuation after a text that is an operator: the ! of 5! and n!."""
    word = len(before) > 1 and before[-2:].isalpha()
    return "" if word else signs[: len(signs) - len(signs.lstrip("!"))]
