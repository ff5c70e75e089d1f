"""In which format the rows of a file are, and which of their columns are which, from the columns' names and values."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.data.formats import turns_in
from methods.errors import UserError
from methods.tools.jsonl import Row

FORMATS = ("chat", "task", "pairs", "text")  # in the order in which they are tried
# the format's own name first
MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
PROMPT = ("prompt", "instruction", "question", "query", "problem", "input", "source")
COMPLETION = ("completion", "response", "output", "answer", "solution", "target")
CONTEXT = ("input", "context")  # beside an instruction
TEXT = ("text", "content", "document", "passage", "body", "article")
QUESTION = ("question", "query", "stem", "goal", "prompt")
CHOICES = ("choices", "options", "answers", "endings")
GOLD = ("answer", "gold", "label", "answerKey", "answer_key", "answer_idx", "answer_index", "correct", "target")
LETTERS = "ABCDEFGHIJ"
LOOKED_AT = 1000  # rows
COLUMNS = {"chat": ["messages"], "task": ["question"], "pairs": ["prompt", "completion"], "text": ["text"]}
NEEDED = {
    "chat": "messages, a list of turns with role and content",
    "task": "a question, its choices and the answer",
    "pairs": "prompt and completion, or instruction and output",
    "text": "text",
}


@dataclass(frozen=True, kw_only=True)
class Guess:
    """What rows seem to be.

    reads    the columns that are read, as the file calls them
    columns  {new: old}, as `columns:` of a domain takes it, where the file calls them otherwise
    block    further keys of the domain, for the format task
    """

    format: str
    reads: tuple[str, ...]
    columns: dict[str, str] = field(default_factory=dict)
    block: dict[str, Any] = field(default_factory=dict)


def guess(rows: Sequence[Row], *, where: str, format: str | None = None) -> Guess:
    """What the rows are; only `format` is considered where it is given.

    Raises UserError that names the columns if no format fits them.
    """
    looked_at = rows[:LOOKED_AT]
    counts = Counter(name for row in looked_at for name in row)
    usual = [name for name, count in counts.items() if count > len(looked_at) / 2]
    filled = {name: value for row in reversed(looked_at) for name, value in row.items() if value is not None}
    examples = {name: filled[name] for name in usual if name in filled}
    tried = {
        "chat": lambda: _chat(examples),
        "task": lambda: _task(examples, looked_at),
        "pairs": lambda: _pairs(examples),
        "text": lambda: _text(examples, alone=len(counts) == 1),
    }
    for name in [format] if format else FORMATS:
        if found := tried[name]():
            return found
    needed = [f"{name} ({NEEDED[name]})" for name in ([format] if format else FORMATS)]
    turns = [name for name, value in examples.items() if _turns(value)]
    hint = f"; `{turns[0]}` is a list of turns: give a whole conversation in one column" if turns else ""
    wanted = COLUMNS[format or "pairs"]
    new = next((name for name in wanted if name not in counts), wanted[0])
    old = next((name for name in sorted(counts) if name not in wanted), "old")
    raise UserError(
        f"{where} has the columns {', '.join(sorted(counts)) or 'none'}, which are not those of "
        f"{' or '.join(needed)}{hint}. Say which are meant with --columns NEW=OLD, such as --columns "
        f"{new}={old}"
    )


def _first(names: Sequence[str], examples: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in examples), None)


def _turns(value: Any) -> bool:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = turns_in(value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in value)
    )


def _chat(examples: Mapping[str, Any]) -> Guess | None:
    column = next((name for name in MESSAGES if name in examples and _turns(examples[name])), None)
    if column is None:
        return None
    own = column in MESSAGES[:2]  # the second is ShareGPT's, which is read as well
    return Guess(format="chat", reads=(column,), columns={} if own else {"messages": column})


def _pairs(examples: Mapping[str, Any]) -> Guess | None:
    plain = {name: value for name, value in examples.items() if not isinstance(value, list | dict | bool)}
    if {"prompt", "completion"} <= plain.keys():
        return Guess(format="pairs", reads=("prompt", "completion"))
    if "instruction" in plain and (answer := _first(("output", *COMPLETION), plain)):
        context = _first(CONTEXT, plain)
        named = {"output": answer} | ({"input": context} if context else {})
        return Guess(format="pairs", reads=("instruction", *named.values()), columns=_renamed(named))
    answer = _first(COMPLETION, plain)
    prompt = _first([name for name in PROMPT if name != answer], plain)
    if not (prompt and answer):
        return None
    return Guess(format="pairs", reads=(prompt, answer), columns=_renamed({"prompt": prompt, "completion": answer}))


def _renamed(named: Mapping[str, str]) -> dict[str, str]:
    return {new: old for new, old in named.items() if new != old}


def _text(examples: Mapping[str, Any], *, alone: bool) -> Guess | None:
    plain = [name for name, value in examples.items() if isinstance(value, str)]
    column = _first(TEXT, dict.fromkeys(plain)) or (plain[0] if plain and alone else None)
    return Guess(format="text", reads=(column,), columns=_renamed({"text": column})) if column else None


def _task(examples: Mapping[str, Any], rows: Sequence[Row]) -> Guess | None:
    """A question with choices and the right one: its place, its letter or label, or the choice itself."""
    question, gold = _first(QUESTION, examples), _first(GOLD, examples)
    column = next((name for name in CHOICES if isinstance(examples.get(name), list | dict)), None)
    letters = [letter for letter in LETTERS if letter in examples]
    if question is None or gold in (None, question):
        return None
    if column is None and letters[:2] == ["A", "B"]:  # a column for each choice
        reads, choices, labels = letters, f"[{', '.join(letters)}]", repr(LETTERS)
        texts_of = [[row.get(letter) for letter in letters] for row in rows]
        labels_of = [list(LETTERS)] * len(rows)
    elif column and isinstance(examples[column], list):
        reads, choices, labels = [column], column, repr(LETTERS)
        texts_of, labels_of = [_list(row.get(column)) for row in rows], [list(LETTERS)] * len(rows)
    elif column and examples[column].keys() >= {"text", "label"}:  # as ARC has them
        reads, choices, labels = [column], f"{column}.text", f"{column}.label"
        inside = [value if isinstance(value := row.get(column), dict) else {} for row in rows]
        texts_of, labels_of = ([_list(value.get(key)) for value in inside] for key in ("text", "label"))
    else:
        return None
    answers = [row.get(gold) for row in rows]
    places = [int(value) if re.fullmatch("[0-9]{1,9}", str(value)) else -1 for value in answers]
    counts = [len(texts) for texts in texts_of]
    if all(0 <= place < count for place, count in zip(places, counts)):
        target = gold
    elif all(0 < place <= count for place, count in zip(places, counts)):
        target = f"{{{{{gold} | int - 1}}}}"
    elif all(value in texts for value, texts in zip(answers, texts_of)):
        target = f"{{{{({choices}).index({gold})}}}}"
    elif all(value in known for value, known in zip(answers, labels_of)):
        target = f"{{{{({labels}).index({gold})}}}}"
    else:
        return None
    task = {
        "doc_to_text": f"Question: {{{{{question}}}}}\nAnswer:",
        "doc_to_choice": f"{{{{{choices}}}}}",
        "doc_to_target": target,
        "metric_list": [{"metric": "acc"}],
    }
    block = {"task": task, "metric": "acc", "question": question}
    return Guess(format="task", reads=(question, *reads, gold), block=block)


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []
