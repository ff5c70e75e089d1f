"""Gold answers and choices as lm-eval reads them, with ambiguous ones resolved or refused.

lm-eval takes a template that renders digits for an index, whatever the choices are: '{{answer}}' with the answer "0" of
the choices "1", "2", "0" would be the choice "1". Here a text is matched to the choices first. A row whose answer is
one choice as a text and another as an index is refused, because only its author can decide. An expression whose value
is a whole number, and not a text of digits, is an index. Numbers among the choices are read as texts.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from lm_eval.utils import apply_template

from evaluation.templates import environment
from methods.errors import UserError

_EXPRESSION = re.compile(r"\{\{-?((?:(?!\{\{|\}\}).)*?)-?\}\}", re.DOTALL)


class Ambiguous(UserError):
    """A gold answer that can be read in two ways."""


def is_text(template: str, doc: Mapping[str, Any]) -> bool:
    """Whether a template is nothing but one expression, whose value is a text in this row."""
    return isinstance(_value(template, doc), str)


def of_template(template: str, doc: Mapping[str, Any], choices: list[str], *, indices: bool) -> int | str | None:
    """The gold of a template, an index or the text of a choice; None if it is neither, which is left to lm-eval.

    indices: return an index where a text would be valid too.
    """
    text, value = apply_template(template, doc), _value(template, doc)
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    index = int(text) if text.isascii() and text.isdigit() else None
    if isinstance(value, bool) and text not in choices:
        text = json.dumps(value)  # as choices that are truth values are written
    place = choices.index(text) if text in choices else None
    if index is not None and (number or place is None):
        return index
    if place is None:
        return None
    if index is not None and index < len(choices) and choices[index] != text:
        raise Ambiguous(_both(text, place=place, index=index, choices=choices))
    return place if index is not None or indices else text


def _value(template: str, doc: Mapping[str, Any]) -> Any:
    """What the one expression that a template consists of gives, before it is written out; None of other templates."""
    match = _EXPRESSION.fullmatch(template)
    return _compiled(match[1].strip())(**doc) if match else None


@functools.lru_cache(maxsize=256)
def _compiled(expression: str) -> Callable[..., Any]:
    return environment.compile_expression(expression, undefined_to_none=False)


def refuse_marks(gold: Any, choices: list[str]) -> None:
    """Refuse a list of 0 and 1 for each choice, or of truth values: such marks would be read as indices."""
    if not isinstance(gold, list):
        return
    marks = len(gold) == len(choices) > 1 and all(isinstance(one, int) and one in (0, 1) for one in gold)
    if marks or any(isinstance(one, bool) for one in gold):
        raise Ambiguous(
            f"the gold answer {gold!r} can be a mark for each of the {len(choices)} choices, right or wrong, and is "
            "read as a list of indices: write the index of the right choice (`doc_to_target: "
            '"{{labels.index(1)}}"`), or a list of the right texts'
        )


def of_value(gold: Any, given: Any, choices: list[str]) -> Any:
    """The gold of a column or function, where it is a number: an index, or one of the choices `given` as numbers."""
    gold = gold.item() if isinstance(gold, np.generic) else gold
    if isinstance(gold, list):
        return [
            choices.index(one) if isinstance(one, str) and one in choices else of_value(one, given, choices)
            for one in gold
        ]
    if isinstance(gold, bool):
        return _of_truth(gold, choices)
    if not isinstance(gold, int | float):
        return gold
    values = [choice for choice in given if isinstance(choice, int | float) and not isinstance(choice, bool)]
    place = list(given).index(gold) if gold in values else None
    index = int(gold) if float(gold).is_integer() else None
    if place is None:
        return gold if index is None else index
    if index is not None and 0 <= index < len(choices) and given[index] != gold:
        raise Ambiguous(_both(gold, place=place, index=index, choices=choices))
    return place


def _of_truth(gold: bool, choices: list[str]) -> int:
    """The choice that a truth value names: of true and false that one, otherwise false the first, true the second."""
    words = [choice.strip().casefold() for choice in choices]
    if words.count("true") == words.count("false") == 1:
        return words.index(str(gold).casefold())
    places = [number for number, word in enumerate(words) if word == ("yes" if gold else "no")]
    if places and places != [int(gold)]:
        raise Ambiguous(
            f"the gold answer {gold!r} is choice {int(gold)} of {[choice[:40] for choice in choices]} as an index, and "
            f"{choices[places[0]]!r} by what it says: write the right choice's text or index in its place"
        )
    return int(gold)


def _both(gold: Any, *, place: int, index: int, choices: list[str]) -> str:
    return (
        f"the gold answer {gold!r} is choice {place} of {[choice[:40] for choice in choices]} as a text and choice "
        f"{index} as an index: write the column's name alone (`doc_to_target: answer`) where a text is meant, and a "
        "whole number (`{{answer | int}}`, beside choices that are texts) where an index is"
    )
