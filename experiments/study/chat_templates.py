"""Whether a model is asked in the form that it was tuned for: `evaluate.chat_template` and what the model says."""

import re
from pathlib import Path
from typing import Any

from evaluation.chance import WARNING
from experiments.study import local_files
from methods.errors import UserError

# words of names of models that were tuned on conversations
_TUNED = re.compile(r"(?i)(?<![a-z])(instruct|chat|it|sft|dpo|rlhf)(?![a-z])")


def look(study, *, model: str, tokenizer: Any | None) -> list[str]:
    """A warning where an instruct model is scored without its chat template.

    tokenizer  the model's, None where it is not on this machine: then its name alone tells. Raises UserError for
               settings that cannot work.
    """
    chosen = study.evaluate.chat_template
    if study.evaluate.fewshot_as_multiturn and not chosen:
        raise UserError(
            "evaluate.fewshot_as_multiturn is true without a chat template, which writes the turns: set "
            "`chat_template: true`, or leave it out"
        )
    if isinstance(chosen, str):
        local_files.text(chosen, where="evaluate.chat_template")
    own = tokenizer is not None and bool(tokenizer.chat_template)
    if chosen is True and tokenizer is not None and not own:
        raise UserError(
            f"evaluate.chat_template is true, and the tokenizer of {model} has no chat template: name a file with one, "
            "such as `chat_template: chat.jinja`, or leave the key out"
        )
    for domain in study.grid.domains:
        block = study.domains[domain]
        if block.format == "chat" and not block.chat_template and tokenizer is not None and not own:
            raise UserError(
                f"domains.{domain} is of the format chat, and the tokenizer of {model} has no chat template: name a "
                "file with one, such as `chat_template: chat.jinja`"
            )
    tuned = _TUNED.search(f"{model} {Path(study.models[model].source.partition('@')[0]).name}")
    if chosen or not tuned or (tokenizer is not None and not own):
        return []
    return [
        f"{WARNING}{model} seems to be an instruct model ({tuned[0]!r} in its name), and its tasks are asked without "
        "its chat template: if it is used in conversations, set `chat_template: true` under `evaluate:`"
    ]
