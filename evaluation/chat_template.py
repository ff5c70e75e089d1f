"""Prompts of tasks in a model's chat template, as lm-eval's --apply_chat_template writes them."""

import hashlib
from typing import Any

from evaluation.chat import dated
from methods.errors import UserError


def choose(tokenizer: Any, template: bool | str) -> str:
    """Let lm-eval write prompts in the tokenizer's own template (True) or in the text of one; return its digest.

    A template that writes the day is given one date: the base and a cell are scored on different days, and on the same
    prompts. Raises UserError where the tokenizer has none.
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
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]
