"""Which texts are one text written in two ways, and which differ in what they say."""

import random

import pytest

from experiments.data.sameness import sameness
from experiments.data.splits import normalised

SAME = [
    ("What is number 3?", "  what IS number 3 "),
    ("How much is 35+35?", "how much is 35 + 35"),
    ("It’s “so”", 'it\'s "so"'),
    ("5 \u2212 3 = ?", "5-3=?"),
    ("5 + 3 =", "5 + 3 = ?"),
    ("a, b and c", "a b and c"),
    ("Ｗhat？", "what"),
    ("Stop !", "stop"),
    ("é", "e\u0301"),
    ("ﬁne", "fine"),
    ("really?!", "really"),
    ("Who? Me.", "who me"),
    ("a\u00a0\n b", "a b"),
    ("x…", "x"),
    ("ﾊﾟ", "パ"),
    ("1–5", "1-5"),
    ("5!?", "5!"),
    ("हिन्दी क्या है?", "हिन्दी क्या है।"),
    ("कि + त", "कि+त"),
    ("❤\ufe0f", "❤"),
    ("soft\u00adly", "softly"),
]
DIFFERENT = [
    ("7 + 3", "7 - 3"),
    ("7 × 3", "7 ÷ 3"),
    ("-5", "5"),
    ("C++?", "C#?"),
    ("C++", "C"),
    ("x²", "x2"),
    ("H₂O", "H2O"),
    ("5! + 3", "5 + 3"),
    ("What is 5!", "What is 5?"),
    ("n!", "n"),
    ("(n+1)!", "n+1"),
    ("1.5", "15"),
    (".5", "5"),
    ("1, 2", "12"),
    ("(2+3)*4", "2+(3*4)"),
    ("$5", "€5"),
    ("50%", "50"),
    ("5 + ? = 8", "5 = 8"),
    ("? + 5 = 8", "5 + ? = 8"),
    ("[0, 1)", "[0, 1]"),
    ("5 > 3", "5 < 3"),
    ("a != b", "a = b"),
    ("a & b", "a | b"),
    ("x_1", "x_2"),
    ("a b", "ab"),
    ("😀", "😢"),
    ("कि", "की"),
    ("किताब", "कताब"),
    ("कि ताब", "किताब"),
    ("กิน", "กน"),
    ("مُدرِّسة", "مَدرَسة"),
    ("\U0001f3f4\U000e0067", "\U0001f3f4\U000e0073"),
    ("?", "!"),
    ("", "."),
    ("(1, -2)", "(1 - 2)"),
]


@pytest.mark.parametrize("one, other", SAME)
def test_typography_makes_no_other_text(one, other):
    assert sameness(one) == sameness(other)


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_what_says_something_makes_another_text(one, other):
    assert sameness(one) != sameness(other)


def test_texts_that_are_the_same_are_dealt_alike():
    """Of ASCII text: what is one text here has one key in the coarse normalising that rows are dealt by."""
    draw, pieces = (
        random.Random(0),
        ["a", "B", "word", "5", "3.5", " ", "  ", "\n", "+", "-", "?", "!", ".", ",", "(", ")", '"', "'", "_x", "="],
    )
    for _ in range(2000):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 9)))
        assert normalised(sameness(text)) == normalised(text)
        assert sameness(sameness(text)) == sameness(text)
