"""CSV files that people open in a spreadsheet, which takes some texts for formulas and computes them.

A text that begins with =, +, -, @, a tab or a line's end gets an apostrophe in front. Within a text one goes in front
of =, +, - and @ behind a semicolon, a tab or a line's end, because a spreadsheet that splits there begins a cell there.
A carriage return within a text is written as \\n, so that it begins no row. Numbers stay numbers, also those written as
text, such as -0.5.
"""

import re

import pandas as pd

_NO_WIDTH = r"\ufeff\u200b-\u200d\u2060"
_SIGN = r"[=+\-@＝＋－＠]"
_AMOUNT = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?inf"
_FORMULA = re.compile(rf"[\s{_NO_WIDTH}]*{_SIGN}|[\t\r\n]")
_WITHIN = re.compile(
    rf'([;\t\r\n](?:[^\S\t\r\n]|["{_NO_WIDTH}])*)(?={_SIGN})(?!(?:{_AMOUNT})\s*(?:[;\t\r\n]|$))', re.IGNORECASE
)
_NUMBER = re.compile(_AMOUNT, re.IGNORECASE)


def text(frame: pd.DataFrame, *, digits: str | None = None) -> str:
    """The table as CSV, with a head and no index; `digits` is the format of floats."""
    plain = frame.rename(columns=_plain)
    for name, column in plain.items():
        if not pd.api.types.is_numeric_dtype(column) and any(map(_dangerous, column)):
            plain[name] = pd.Series(map(_plain, column), index=plain.index, dtype=object)
    return plain.to_csv(index=False, lineterminator="\n", float_format=digits)


def _plain(value):
    if not _dangerous(value):
        return value
    value = value.replace("\r\n", "\n").replace("\r", "\n")  # pandas puts no quotes around a lone \r
    value = _WITHIN.sub(r"\1'", value)
    return f"'{value}" if _FORMULA.match(value) else value


def _dangerous(value) -> bool:
    if not isinstance(value, str) or _NUMBER.fullmatch(value):
        return False
    return "\r" in value or bool(_FORMULA.match(value) or _WITHIN.search(value))
