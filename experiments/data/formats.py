"""The formats of a domain beside lm-eval's tasks, and how a row of each becomes one that training and scoring read.

    text    `text`                                             {"id", "text"}
    pairs   `prompt` and `completion`, or Alpaca's columns      {"id", "context", "choices", "gold", "end"}
    chat    `messages` (or ShareGPT's `conversations`)          {"id", "messages"}

A row that does not fit is left out and counted by its reason (experiments/data/left_out.py).
"""

import ast
import contextlib
import json
from collections.abc import Callable, Iterable
from typing import Any

from evaluation.chance import WARNING
from evaluation.chat import ROLES
from experiments.data import splits
from experiments.data.left_out import LeftOut
from methods.errors import UserError
from methods.tools.jsonl import Row, place

# as its authors publish it: https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
OTHER_NAMES = {"human": "user", "developer": "system"} | dict.fromkeys(
    ("gpt", "bot", "chatbot", "ai", "model"), "assistant"
)  # of roles: of ShareGPT, OpenAI, LangChain and Gemini
NEEDED = {
    "text": "`text`",
    "pairs": "`prompt` and `completion`, or `instruction` and `output`",
    "chat": "`messages`, or `conversations`",
}


class _Unfit(Exception):
    """Why a row does not fit the format."""


def standard(rows: Iterable[Row], *, format: str, where: str) -> tuple[list[Row], list[Row], LeftOut]:
    """The rows in the form that training and scoring read, the rows that each was made from, and what was left out.

    Raises UserError where no row has the columns of the format, and where too many rows do not fit it.
    """
    shape: Callable[[Row, str, LeftOut], dict[str, Any]] = {"text": _text, "pairs": _pairs, "chat": _chat}[format]
    given, left_out = list(rows), LeftOut()
    made, sources, without = [], [], 0
    for number, row in enumerate(given, 1):
        at = place(row, number)
        if not _has_columns(format, row):
            without += 1
            left_out.add(f"no columns {NEEDED[format]}", at)
            continue
        try:
            content = shape(row, at, left_out)
        except _Unfit as error:
            left_out.add(str(error), at)
            continue
        made.append(Row({"id": _id(row, content)} | content, at=at))
        sources.append(row)
    if without == len(given):
        raise UserError(
            f"{where}: format {format} reads the columns {NEEDED[format]}, and {place(given[0], 1)} has "
            f"{', '.join(given[0])}: name yours in `columns`, such as `columns: {{{NEEDED[format].split('`')[1]}: "
            f"{next(iter(given[0]), 'old')}}}`"
        )
    left_out.settle(where=where, of=len(given), remedy=f"correct the rows, or the columns that {format} reads")
    if format == "pairs":
        _warn_of_joined(made, where)
    return made, sources, left_out


def question(row: Row) -> str:
    """What identifies a row of each format: the text, the prompt, or the first turn of the user."""
    if "messages" in row:
        turns = row["messages"]
        return next((turn["content"] for turn in turns if turn["role"] == "user"), turns[0]["content"])
    return row["text"] if "text" in row else row["context"]


def _has_columns(format: str, row: Row) -> bool:
    if format == "pairs":
        return {"prompt", "completion"} <= row.keys() or {"instruction", "output"} <= row.keys()
    return bool(row.keys() & {"text": {"text"}, "chat": {"messages", "conversations"}}[format])


def _text(row: Row, at: str, left_out: LeftOut) -> dict[str, Any]:
    return {"text": _filled(row, "text")}


def _pairs(row: Row, at: str, left_out: LeftOut) -> dict[str, Any]:
    if {"prompt", "completion"} <= row.keys():
        prompt, completion = _filled(row, "prompt"), _filled(row, "completion")
    else:
        columns = {name: _filled(row, name) for name in ("instruction", "output")}
        context = row.get("input")
        columns["input"] = "" if context is None else _written(context, "input")
        prompt = (ALPACA_INPUT if columns["input"] else ALPACA).format_map(columns)
        completion = columns["output"]
    return {"context": prompt, "choices": [completion], "gold": 0, "end": True}


def _chat(row: Row, at: str, left_out: LeftOut) -> dict[str, Any]:
    column = "conversations" if row.get("messages") is None and "conversations" in row else "messages"
    turns = row[column]
    if isinstance(turns, str) and (turns := turns_in(turns)) is None:
        raise _Unfit(f"`{column}` is a text, not a list of turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise _Unfit(f"`{column}` is no list of turns")
    messages = [_turn(turn) for turn in turns]
    if isinstance(system := row.get("system"), str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if any(turn.get("weight") == 0 for turn in turns):  # OpenAI's mark of an answer that is not to be learned
        left_out.change("an answer of `weight` 0 is learned as any other", at)
    answers = [number for number, turn in enumerate(messages, 1) if turn["role"] == "assistant"]
    if not answers:
        raise _Unfit("no turn of the assistant")
    if answers[-1] < len(messages):
        left_out.change("the last turns have no answer and are cut off", at)
    return {"messages": messages[: answers[-1]]}


def turns_in(text: str) -> Any:
    """The turns that a table holds as text: JSON, or a list as Python writes it (pandas' `to_csv`); None if neither."""
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return parse(text)
    return None


def _turn(turn: dict[str, Any]) -> dict[str, str]:
    role = turn.get("from") if turn.get("role") is None else turn["role"]
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if role is None:
        raise _Unfit("a turn without a role")
    known = role.strip().lower() if isinstance(role, str) else ""
    if (known := OTHER_NAMES.get(known, known)) not in ROLES:
        raise _Unfit(f"a turn has the role {role!r:.40}, not one of {', '.join(ROLES)}")
    if turn.get("tool_calls"):
        raise _Unfit("a turn calls tools")
    if isinstance(content, list) and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    content = "" if content is None else content
    if not isinstance(content, str):
        raise _Unfit("the content of a turn is not a text")
    if known != "system" and not content.strip():
        raise _Unfit("an empty answer" if known == "assistant" else "an empty turn of the user")
    return {"role": known, "content": content}


def _is_text(part: Any) -> bool:
    """Whether a part of a turn's content is a text: OpenAI's types are text, input_text and output_text."""
    return isinstance(part, dict) and str(part.get("type")).endswith("text") and isinstance(part.get("text"), str)


def _filled(row: Row, column: str) -> str:
    """A column's text. Raises _Unfit where it is empty."""
    value = row[column]
    text = "" if value is None else _written(value, column)
    if not text.strip():
        raise _Unfit("an empty answer" if column in ("completion", "output") else f"`{column}` is empty")
    return text


def _written(value: Any, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _Unfit(f"`{column}` is not a text")
    return str(value)


def _id(row: Row, content: dict[str, Any]) -> str:
    given = row.get("id")
    return str(given) if isinstance(given, str | int) else splits.row_hash(content)


def _warn_of_joined(rows: list[Row], where: str) -> None:
    """Warn of completions that go on in the middle of the prompt's last word."""
    joined = [row for row in rows if row["context"][-1:].isalnum() and row["choices"][0][:1].isalnum()]
    if len(joined) > len(rows) / 2:
        row = joined[0]
        print(
            f"{WARNING}{where}: nothing stands between prompt and completion, such as "
            f"{row['context'][-20:] + row['choices'][0][:20]!r} ({place(row, 1)}): begin the completions with a space "
            'or a line, such as `set: {completion: " {{completion}}"}`, by the name that the column has in the file',
            flush=True,
        )
