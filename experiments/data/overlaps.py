"""Rows that are in two sets of a study, whatever file or task they come from.

Two rows are the same if they ask the same (`sameness`), with or without the words that every prompt of their set begins
and ends with, or if their texts are the same. A row that begins with, or holds, the first words of a document of
another set is that document, too: BoolQ's prompts hold the passages that general text is made of.
"""

from collections.abc import Iterable, Iterator, Sequence
from os.path import commonprefix

from experiments.data import formats, splits
from experiments.data.reader import Row
from experiments.data.sameness import sameness
from methods.errors import UserError

WORDS = 12  # at the beginning of a document, by which a text that holds it is known


class Held:
    """Sets of rows, to find those that another set has as well."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[str, Row]] = {}
        self._documents: dict[tuple[str, ...], tuple[str, Row]] = {}

    def hold(self, name: str, rows: Sequence[Row]) -> None:
        for row, keys in zip(rows, _keys(rows)):
            for key in keys:
                self._rows.setdefault(key, (name, row))
            if "text" in row and len(words := splits.normalised(row["text"]).split()) >= WORDS:
                self._documents.setdefault(tuple(words[:WORDS]), (name, row))

    def shared(self, rows: Sequence[Row], *, asked: Iterable[str] = ()) -> Iterator[tuple[int, str, Row]]:
        """(number of a row, the set that has it as well, the row there) for each row that is in a set.

        asked   what each row asks, where the rows do not say it alone
        """
        others = map(sameness, asked) if asked else [""] * len(rows)
        for number, (row, keys, other) in enumerate(zip(rows, _keys(rows), others, strict=True)):
            found = [self._rows[key] for key in (*keys, other) if key in self._rows]
            if not found and self._documents:
                words = splits.normalised(_text(row)).split()
                windows = zip(*(words[start:] for start in range(WORDS)))
                found = [self._documents[window] for window in windows if window in self._documents]
            if found:
                yield number, *found[0]

    def refuse(self, name: str, rows: Sequence[Row], *, asked: Iterable[str] = (), remedy: str) -> None:
        """Raises UserError with both sets and a row that they share; rows of different right answers are different."""
        same = [(n, other, row) for n, other, row in self.shared(rows, asked=asked) if _one_answer(rows[n], row)]
        if same:
            number, other, row = same[0]
            raise UserError(
                f"{name} and {other} have {len(same)} row{'s'[: len(same) != 1]} in common, such as "
                f"{_text(rows[number])[-splits.SHOWN :]!r}: {remedy}"
            )


def _keys(rows: Sequence[Row]) -> list[set[str]]:
    """What each row of a set asks: whole, and without the words of the prompt."""
    texts = [_text(row) for row in rows]
    keys = [{sameness(text)} for text in texts]
    if len(texts) > 1 and "context" in rows[0]:
        shared = commonprefix(texts)
        begin = max(shared.rfind("\n") + 1, shared.rfind(": ") + 2)
        begin = 0 if begin == 1 else begin
        shared = commonprefix([text[begin:][::-1] for text in texts])[::-1]
        end = len(shared) - shared.find("\n") if "\n" in shared else 0
        for own, text in zip(keys, texts):
            own.add(sameness(text[begin : len(text) - end]))
    return [own - {""} for own in keys]


def _text(row: Row) -> str:
    """What a row asks, without the few-shot examples before it, or its whole text."""
    return row["asked"] if "asked" in row else formats.question(row)


def _one_answer(one: Row, other: Row) -> bool:
    """Whether two rows with the same question have the same right answer, as far as they state one."""
    answers = {sameness(row["choices"][row["gold"]]) for row in (one, other) if "choices" in row}
    return len(answers) < 2
