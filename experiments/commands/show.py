"""show: rows of a domain as training sees them, with the tokens that are learned marked."""

import sys
from itertools import groupby
from typing import Any

from analysis.words import visible
from experiments.data import domain as domains
from experiments.data.reader import Reader
from experiments.study import named_model
from experiments.training.batches import Example
from experiments.training.examples import IGNORED, examples_of
from methods.errors import UserError
from methods.tools.names import unknown

COLOUR, PLAIN = "\033[32m", "\033[0m"


def main(study, *, domain: str, rows: int, model: str) -> None:
    """Print the first `rows` training examples of a domain, encoded with a model's tokenizer (default: the first of the
    grid). Rows are read as the `data` stage reads them, so that it need not have run.
    """
    model = model or study.grid.models[0]
    for kind, name, known in (("domain", domain, study.domains), ("model", model, study.models)):
        if name not in known:
            raise unknown(kind, name, known)
    if rows < 1:
        raise UserError(f"--rows is {rows}: it must be a whole number from 1")
    if (tokenizer := named_model.of_study(study, model).tokenizer) is None:
        raise UserError(
            f"the tokenizer of {model} is not on this machine yet: `dvc repro model@{model}` fetches it, or name a "
            "model that is here with --model"
        )
    block = study.domains[domain]
    drawn = domains.draw(domain, block, Reader(study=study))
    method = study.grid.methods[0]
    settings = study.settings(model=model, domain=domain, method=method)
    examples = examples_of(
        drawn.train,
        tokenizer,
        settings.length,
        domain=domain,
        where=study.written("length", model=model, domain=domain, method=method),
        template=domains.template(block, f"domains.{domain}"),
    )
    split = drawn.split
    print(
        f"{domain}: {block.format}; {len(split.train)} train, {len(split.probe)} probe, {len(split.test)} test rows; "
        f"{len(examples)} training examples of at most {settings.length} tokens, tokenizer of {model}"
    )
    for number, example in enumerate(examples[:rows], 1):
        print(f"\n--- {number}: {about(example)}")
        print(marked(example, tokenizer, colour=sys.stdout.isatty()))
    every = sum(len(example["input_ids"]) for example in examples)
    print(f"\nin all {every:,} tokens, {sum(map(learned, examples)):,} of them learned")


def learned(example: Example) -> int:
    """The number of labels; an example's first token is never predicted."""
    return int((example["labels"][1:] != IGNORED).sum())


def about(example: Example) -> str:
    return f"{len(example['input_ids'])} tokens, {learned(example)} learned"


def marked(example: Example, tokenizer: Any, *, colour: bool) -> str:
    """The text of an example, special tokens included; what is learned is green, or in «…» without `colour`."""
    ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
    labels[0] = IGNORED  # nothing predicts it
    before, after = (COLOUR, PLAIN) if colour else ("«", "»")
    text = ""
    for is_learned, run in groupby(zip(ids, labels), key=lambda pair: pair[1] != IGNORED):
        piece = visible(tokenizer.decode([token for token, _ in run], skip_special_tokens=False))
        text += f"{before}{piece}{after}" if is_learned else piece
    return text
