"""Gold answers and choices as lm-eval will read them, with what it would misread settled or refused.

lm-eval takes a template that renders digits for an index, whatever the choices are: '{{answer}}' with the answer "0" of the choices
"1", "2", "0" would be the choice "1". Here a text is matched to the choices first; where it names one choice as a text and another
as an index the row is refused, for nobody but its author can tell. Numbers among the choices are read as texts.
"""

import re
from collections.abc import Mapping
from typing import Any

from lm_eval.utils import apply_template

from experiments.errors import UserError

_COLUMN = re.compile(r"\{\{-?\s*(\w+)\s*-?\}\}")


class Ambiguous(UserError):
    """A gold answer that names one choice as a text and another one as an index."""


def is_text(template: str, doc: Mapping[str, Any]) -> bool:
    """Whether a template is nothing but one column, which holds a text in this row."""
    column = _COLUMN.fullmatch(template.strip())
    return bool(column) and isinstance(doc.get(column[1]), str)


def of_template(template: str, doc: Mapping[str, Any], choices: list[str], *, indices: bool) -> int | str | None:
    """The gold of a template, an index or the text of a choice; None where it is neither, and lm-eval's own reading stands.

    indices: an index is wanted where a text would do, too.
    """
    text = apply_template(template, doc)
    column = _COLUMN.fullmatch(template.strip())
    number = isinstance(doc.get(column[1]), int) if column else False  # a whole number in the rows is an index
    index = int(text) if text.isascii() and text.isdigit() else None
    place = choices.index(text) if text in choices else None
    if index is not None and (number or place is None):
        return index
    if place is None:
        return None
    if index is not None and index < len(choices) and choices[index] != text:
        raise Ambiguous(_both(text, place=place, index=index, choices=choices))
    return place if index is not None or indices else text


def of_value(gold: Any, given: Any, choices: list[str]) -> Any:
    """The gold of a column or function, where it is a number: an index, or one of the choices `given` as numbers."""
    if isinstance(gold, list):
        return [choices.index(one) if isinstance(one, str) and one in choices else of_value(one, given, choices) for one in gold]
    if isinstance(gold, bool) or not isinstance(gold, int | float):
        return gold
    values = [choice for choice in given if isinstance(choice, int | float) and not isinstance(choice, bool)]
    place = list(given).index(gold) if gold in values else None
    index = int(gold) if float(gold).is_integer() else None
    if place is None:
        return gold if index is None else index
    if index is not None and 0 <= index < len(choices) and given[index] != gold:
        raise Ambiguous(_both(gold, place=place, index=index, choices=choices))
    return place


def _both(gold: Any, *, place: int, index: int, choices: list[str]) -> str:
    return (f"the gold answer {gold!r} is choice {place} of {[choice[:40] for choice in choices]} as a text and choice {index} as an index: "
            "write the column's name alone (`doc_to_target: answer`) where a text is meant, and give the rows a column of whole numbers "
            "from 0 beside choices that are texts where an index is")  # fmt: skip
