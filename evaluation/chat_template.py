"""Prompts of tasks in a model's chat template, as lm-eval's --apply_chat_template writes them."""

import hashlib
from typing import Any

from evaluation.chat import dated
from methods.errors import UserError, shortened


def choose(tokenizer: Any, template: bool | str) -> str:
    """Let lm-eval write prompts in the tokenizer's own template (True) or in the text of one; return its digest.

    A template that writes the day is given one date: the base and a cell are scored on different days, and on the same
    prompts. Raises UserError where the tokenizer has none, and for one that cannot write a question.
    """
    if isinstance(template, str):
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise UserError(
            "evaluate.chat_template is true, and the model's tokenizer has no chat template: name a file with one, "
            "such as `chat_template: chat.jinja`, or leave the key out"
        )
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = dated(tokenizer.chat_template)
    asked = [{"role": "user", "content": "Why?"}]
    try:
        written = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything
        raise UserError(
            f"the template of evaluate.chat_template cannot write the user's turn {asked[0]['content']!r} "
            f"({shortened(error)}): correct the template"
        ) from error
    if asked[0]["content"] not in written:
        raise UserError(
            f"the template of evaluate.chat_template writes {written[:60]!r} for the user's turn "
            f"{asked[0]['content']!r}, which is missing: correct the template"
        )
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]
