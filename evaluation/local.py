"""lm-eval's task class on rows held in memory, where a text stays a text."""

import contextlib
import functools
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import apply_template

from evaluation import gold as golds
from evaluation import measure, nulls
from evaluation.definition import SPLIT
from methods.tools.jsonl import Row, place


class Unfit(ValueError):
    """What is wrong with one row, for a message to its author."""


class Quiet:
    """Beside a class of lm-eval's tasks: no bars, and a chat template only where the task's prompts may have one.

    chat   whether prompts are written in a chat template where `evaluate` asks for it
    """

    chat = True

    def build_all_requests(self, **settings: Any) -> None:
        if not self.chat:
            settings |= {"apply_chat_template": False, "chat_template": None}
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each task
            super().build_all_requests(**settings)


class LocalTask(Quiet, ConfigurableTask):
    """An lm-eval task whose documents are rows held in memory: nothing is downloaded, nothing is cached.

    Texts, choices and golds are lm-eval's, except that a text stays a text: numbers among the choices or in a column of
    texts are written out, and digits that a template renders are matched to the choices before they are read as an
    index.
    """

    metric: str

    def __init__(self, *, rows: Sequence[Row], config: dict[str, Any]) -> None:
        self.rows = rows
        self.measure: measure.Measure | None = None
        with quiet():
            super().__init__(config=config)
        self._aggregation_list = measure.bounded(self._aggregation_list)

    def doc_to_text(self, doc: Mapping[str, Any], doc_to_text: Any = None) -> str | int:
        template = self.config.doc_to_text if doc_to_text is None else doc_to_text
        text = nulls.refuse(super().doc_to_text(doc, doc_to_text))
        if isinstance(text, str) or (self.config.doc_to_choice is not None and self._inputs_chosen):
            return text
        if isinstance(text, list | tuple | Mapping):
            raise Unfit(
                f"doc_to_text ({template!r:.60}) gives {str(text)[:60]}, not a text: write a template that selects the "
                "question, such as '{{messages[0].content}}'"
            )
        written = isinstance(template, str) and template not in self.features
        return apply_template(template, doc) if written else str(text)

    def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> list[str]:
        """The choices as text: numbers and truth values as JSON writes them."""
        choices = super().doc_to_choice(doc, doc_to_choice)
        nulls.refuse(choices)
        if not isinstance(choices, list | tuple) or not choices:
            raise Unfit(
                f"doc_to_choice ({self.config.doc_to_choice!r}) gives {str(choices)[:60]!r}, not a list of choices"
            )
        texts = []
        for number, choice in enumerate(choices, 1):
            if not isinstance(choice, str | int | float):
                raise Unfit(
                    f"choice {number} of {len(choices)} is {json.dumps(choice, default=str)[:60]}, neither text nor a "
                    f"number (doc_to_choice: {self.config.doc_to_choice!r})"
                )
            texts.append(choice if isinstance(choice, str) else json.dumps(choice))
            if not texts[-1]:
                raise Unfit(
                    f"choice {number} of {len(choices)} is empty (doc_to_choice: {self.config.doc_to_choice!r})"
                )
        return texts

    def doc_to_target(self, doc: Mapping[str, Any], doc_to_target: Any = None) -> int | str | list:
        gold = self._target(doc, doc_to_target)
        if isinstance(gold, int) and self.config.doc_to_choice is not None and not self.multiple_input:
            choices = self.doc_to_choice(doc)
            if gold >= len(choices):
                raise Unfit(
                    f"the gold answer {gold} is not one of its {len(choices)} choices "
                    f"{[choice[:40] for choice in choices]}, which count from 0"
                )
        return gold

    def _target(self, doc: Mapping[str, Any], doc_to_target: Any) -> int | str | list:
        template = self.config.doc_to_target if doc_to_target is None else doc_to_target
        written = isinstance(template, str) and template not in self.features
        if self.config.doc_to_choice is None or self.multiple_input:
            if written and (self.OUTPUT_TYPE != "generate_until" or golds.is_text(template, doc)):
                return apply_template(template, doc)
            target = nulls.refuse(super().doc_to_target(doc, doc_to_target))
            if isinstance(target, list | tuple | Mapping) and (not target or isinstance(target, Mapping)):
                kind = "an object" if isinstance(target, Mapping) else "a list without an answer"
                raise Unfit(f"doc_to_target ({self.config.doc_to_target!r:.60}) gives {str(target)[:60]}, {kind}")
            return target if isinstance(target, str | list) else str(target)
        if written:
            generated = self.OUTPUT_TYPE == "generate_until"
            gold = golds.of_template(template, doc, self.doc_to_choice(doc), indices=generated)
            if gold is not None:
                return gold
        gold = nulls.refuse(super().doc_to_target(doc, doc_to_target))
        if isinstance(template, str):
            golds.refuse_marks(gold, self.doc_to_choice(doc))
        return golds.of_value(gold, super().doc_to_choice(doc), self.doc_to_choice(doc))

    @functools.cached_property
    def _inputs_chosen(self) -> bool:
        """Whether `doc_to_text` is the index of the right context (WinoGrande) in every row, and not a question."""
        texts = [(ConfigurableTask.doc_to_text(self, doc), doc) for doc in self.eval_docs]
        return all(isinstance(text, int) and 0 <= text < len(self.doc_to_choice(doc)) for text, doc in texts)

    def place(self, number: int) -> str:
        """Where the row of document `number` (from 1) was read from."""
        if len(self.eval_docs) == len(self.rows):
            return place(self.rows[number - 1], number)
        return f"document {number} that its process_docs makes of the rows"

    def download(self, dataset_kwargs: dict | None = None, **_: Any) -> None:
        self.dataset = {SPLIT: dataset(self.rows)}

    @functools.cached_property
    def eval_docs(self) -> datasets.Dataset:  # lm-eval reads it several times and would process the rows each time
        with quiet():
            return self.test_docs()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's and datasets' advice and bars off the screen."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def filled(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every row with every column in order of appearance, because datasets takes those of the first row."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column) for column in columns} for row in rows]


def dataset(rows: Sequence[Row]) -> datasets.Dataset:
    """The rows with their values as they are: a column of several types, which Arrow refuses, is held as JSON.

    So is a column of integers and floats, which Arrow would make floats: a choice 3 stays "3" and not "3.0".
    """
    whole = filled(rows)
    mixed = [column for column in whole[0] if not _one_type([row[column] for row in whole])]
    if not mixed:
        return datasets.Dataset.from_list(whole)
    others = [{column: value for column, value in row.items() if column not in mixed} for row in whole]
    typed = datasets.Dataset.from_list(others).features
    features = {column: datasets.Json() if column in mixed else typed[column] for column in whole[0]}
    return datasets.Dataset.from_list(whole, features=datasets.Features(features))


def _one_type(values: Sequence[Any]) -> bool:
    """Whether the values other than null are of one type, and so are the entries of lists and of objects by name."""
    values = [value for value in values if value is not None]
    kinds = {type(value) for value in values}
    if kinds == {list}:
        return _one_type([inner for value in values for inner in value])
    if kinds == {dict}:
        names = values[0].keys()
        # with different names, Arrow would give every object all of them, with nulls that nobody wrote
        same = all(value.keys() == names for value in values)
        return same and all(_one_type([value[name] for value in values]) for name in names)
    return len(kinds) <= 1
