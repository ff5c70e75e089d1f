"""When two texts are the same one written in two ways, and when they are not.

The same are texts that differ in the case of letters, in white space, in the form of quotes, dashes and letters (curly or
straight, full width or half, composed or decomposed), in the punctuation that ends a clause or the text, and in space around a
sign. Not the same are texts that differ in an operator, a bracket, a currency or other sign, a digit, a superscript, an emoji
or a combining mark: "7 + 3" is not "7 - 3", C++ is not C#, x² is not x2, and a vowel sign of Hindi or Thai is part of a word.
"""

import functools
import re
import unicodedata

_SIGNED = re.compile(r" [-+]\w")
# marks of one meaning, each as a keyboard writes it
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
        # nothing but how a text is set: soft hyphens, joiners without width, marks of direction, variants of a sign, stretched letters
        **dict.fromkeys(
            "¿¡\u00ad\u200b\u200c\u200e\u200f\u2060\ufeff\u0640\ufe0e\ufe0f"
            "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
            "",
        ),
    }
)
_FORMS = (
    "<wide>",
    "<narrow>",
    "<initial>",
    "<medial>",
    "<final>",
    "<isolated>",
)  # of one letter; <super>, <sub>, <font> say something


def sameness(text: str) -> str:
    """A key that two texts have in common where they are the same one."""
    text = re.sub(r"[^\x00-\x7f]", lambda found: _letter(found[0]), unicodedata.normalize("NFC", text))
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
    """Whether it is neither part of a word nor a space; a mark belongs to its letter."""
    return bool(character) and not (
        character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")
    )


def _clause(found: re.Match) -> str:
    """Nothing in place of punctuation behind a word; behind an operator it stands for something."""
    if _SIGNED.match(found.string, found.end()):  # "1, -2" is not "1 - 2"
        return found[0]
    before = found.string[max(0, found.start() - 2) : found.start()]
    ends = before and (not _sign(before[-1]) or before[-1] in ")]}\"'%") and before[-1] != " "
    return _operators(before, found[0]) if ends else found[0]


def _operators(before: str, signs: str) -> str:
    """What of the punctuation behind a text is an operator: the ! of 5! and n!."""
    word = len(before) > 1 and before[-2:].isalpha()
    return "" if word else signs[: len(signs) - len(signs.lstrip("!"))]
