"""Conversations as a model reads them: its chat template rendered once, and the tokens that the assistant writes.

Labelled is what a model would write after the template's generation prompt: each answer and the end of its turn. Where
a template marks that with {% generation %}, its marks are taken (transformers' `return_assistant_tokens_mask`).
Elsewhere the place of an answer is found by rendering the conversation up to it, which shows what the template writes
before an answer. A conversation whose earlier turns a template writes differently once later ones follow is refused,
because no text would then be what the model has seen before its answer.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from evaluation.encode import shown
from methods.errors import UserError, shortened

Message = Mapping[str, str]  # {"role": system, user or assistant, "content": text}
ROLES = ("system", "user", "assistant")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Templates of Llama and Mistral write the day on which they are rendered. They get the date that Llama's own falls back
# to: a macro in front of a template stands in the way of transformers' `strftime_now`.
_DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
_DATE |= {"%H": "00", "%M": "00", "%S": "00"}
_REPLACED = "".join(f".replace('{sign}', '{text}')" for sign, text in _DATE.items())
_MACRO = "{%- macro strftime_now(format) -%}{{- format" + _REPLACED + " -}}{%- endmacro -%}"


def template_of(tokenizer: Any, template: str | None = None) -> str:
    """The given template, or else the tokenizer's own. Raises UserError where there is neither."""
    if template is None and not tokenizer.chat_template:
        raise UserError(
            "the model's tokenizer has no chat template: name a file with one as `chat_template` in the domain's block"
        )
    return tokenizer.get_chat_template(template)


def dated(template: str) -> str:
    """The template with one date in place of the day on which it is rendered."""
    written = "strftime_now" in template and not template.startswith(_MACRO)
    return _MACRO + template if written else template


def refuse_template(template: str) -> None:
    """Raises UserError where a template is not valid Jinja; whether it takes a conversation depends on the turns."""
    try:
        render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"line {error.lineno} is not valid Jinja: {error.message}") from error
    except Exception:  # what it says of this conversation does not matter
        return


def encode(
    tokenizer: Any, messages: Sequence[Message], *, template: str | None = None
) -> tuple[list[int], list[bool], int]:
    """Ids of the rendered conversation, whether each is labelled, and bytes of the assistant's text.

    The ids are those of `apply_chat_template` (but for a date): nothing is added to what the template writes, so that a
    BOS that it writes is there once. A token that lies partly in an answer is labelled. Raises UserError for a
    conversation that the template does not take, or does not write as a text that grows turn by turn.
    """
    text, spans = marked(tokenizer, messages, template=template)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, labels, places = list(encoded["input_ids"]), [], iter(spans)
    start, end = next(places, (len(text), len(text)))
    for first, last in encoded["offset_mapping"]:
        while first >= end and end < len(text):
            start, end = next(places, (len(text), len(text)))
        labels.append(first < end and last > start)
    if not any(labels[1:]):
        raise UserError("no token of it is written by the assistant")
    return ids, labels, sum(len(turn["content"].encode()) for turn in messages if turn["role"] == "assistant")


def learns_to_stop(tokenizer: Any, ids: Sequence[int], labels: Sequence[bool]) -> bool:
    """Whether the last answer is labelled together with the token that ends its turn, where there is one."""
    last = max(place for place, labelled in enumerate(labels) if labelled)
    special = _special(tokenizer)
    return ids[last] in special or special.isdisjoint(ids[last + 1 :])


def marked(
    tokenizer: Any, messages: Sequence[Message], *, template: str | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and (first character, end) of each piece of it that the assistant writes."""
    if not tokenizer.is_fast:
        raise UserError("its tokenizer does not tell where in a text its tokens are, which labels of a chat need")
    template = template_of(tokenizer, template)
    if _MARKS.search(template):
        text, spans = _render(tokenizer, template, messages, marks=True)
        if not spans:
            raise UserError("the template marks nothing of this conversation with {% generation %}")
        return text, spans
    text, _ = _render(tokenizer, template, messages)
    turns = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
    starts = [_start(tokenizer, template, messages, number, text) for number in turns]
    ends = [*starts[1:], len(text)]
    return text, [
        (start, _end(tokenizer, template, messages, number, text, start=start, end=end))
        for number, start, end in zip(turns, starts, ends)
    ]


def _start(tokenizer: Any, template: str, messages: Sequence[Message], number: int, text: str) -> int:
    """Where the answer of turn `number` begins: after all that the model reads when it is asked for it."""
    try:
        before, _ = _render(tokenizer, template, messages[:number], generation_prompt=True)
        if not number and before == _render(tokenizer, template, [])[0]:
            before = None  # it asks only behind a turn
    except UserError:
        if number:
            raise
        before = None  # a template that looks at the first turn
    if before is not None and text.startswith(before):
        return len(before)
    if not number:
        raise UserError("it begins with a turn of the assistant, for which this template cannot ask: take it out")
    common = len(os.path.commonprefix([before, text]))
    asked, written = before[common:], text[common:]
    raise UserError(
        f"the template writes {shown(asked) if asked else 'nothing'} where the model is asked for turn {number + 1}, "
        f"and {shown(written)} there in the whole conversation: earlier turns are rewritten, or the answer lacks what "
        "the template asks for (such as thinking). Train on conversations of one answer, or name another template as "
        "`chat_template`"
    )


def _end(
    tokenizer: Any, template: str, messages: Sequence[Message], number: int, text: str, *, start: int, end: int
) -> int:
    """Where the answer of turn `number`, which begins at `start`, ends: after the token that ends the turn, or after
    all that the template writes for the turn if it has no such token. `end` is the beginning of the next answer.
    """
    content = messages[number]["content"].strip()
    place = text.find(content, start, end)
    if place < 0:
        raise UserError(
            f"the template leaves out or rewrites a part of the answer {shown(content)} (turn {number + 1}): take that "
            "part out of the rows, or name another template as `chat_template`"
        )
    place += len(content)
    if number + 1 < len(messages):  # of the turn is what follows its answer where it is the last turn, too
        alone, _ = _render(tokenizer, template, messages[: number + 1])
        behind = alone.rpartition(content)[2]
        common = os.path.commonprefix([behind, text[place:end]])
        if (
            common != behind
        ):  # something else ends a conversation, and may begin as the next turn does: only whole lines
            common = common[: common.rfind("\n") + 1] or common
        end = place + len(common)
    after = tokenizer(text[place:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    special = _special(tokenizer)
    ends = (last for (_, last), token in zip(after["offset_mapping"], after["input_ids"]) if token in special)
    return place + next(ends, end - place)


def _special(tokenizer: Any) -> set[int]:
    return {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


def _render(
    tokenizer: Any, template: str, messages: Sequence[Message], *, generation_prompt: bool = False, marks: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The text as `apply_chat_template` renders it, and with `marks` the places of {% generation %} in it."""
    try:
        texts, spans = render_jinja_template(
            [list(messages)],
            chat_template=dated(template),
            add_generation_prompt=generation_prompt,
            return_assistant_tokens_mask=marks,
            **tokenizer.special_tokens_map,
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses it: {error}") from error
    except Exception as error:  # a template is a program, and may raise anything
        raise UserError(f"the chat template fails on it ({shortened(error)})") from error
    return texts[0], [tuple(span) for span in spans[0]] if marks else []
