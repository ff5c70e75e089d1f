"""General text in five disjoint sets of articles.

settle       a model is settled on it before any method starts
importance   parts prepare on it: importance, covariances, adapters of their own
replay       parts read it while they train: replay, KL on general text
probe        scored during training, by `tune`, and by parts that measure finished weights
test         scored before and after training
"""

from pathlib import Path
from typing import Any

from experiments.data import rows, splits
from experiments.data.reader import Reader, Row, write_rows
from experiments.study.schema import General
from methods.errors import UserError
from methods.tools.jsonl import place

SETS = ("test", "settle", "importance", "replay", "probe")  # in the order in which they are filled
READ = ("settle", "importance", "replay")  # what is written for stages other than scoring and probing


def write(block: General, reader: Reader, out: Path) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Write the sets that no domain has beside it; all sets, and their facts for data.json."""
    drawn, copies = lines(block, reader)
    for name in READ:
        write_rows(out / "general" / f"{name}.jsonl", drawn[name])
    return drawn, {
        "source": reader(block, block.rows, where="general").source,
        "licence": block.licence,
        "n": {name: len(drawn[name]) for name in SETS},
        "duplicates": {"within": copies, "between": 0},
    }


def lines(block: General, reader: Reader) -> tuple[dict[str, list[Row]], int]:
    """The texts of each set, {"id", "text"}, and the number of copies that were dropped.

    Raises UserError for a set that is larger than what is left for it.
    """
    loaded = reader(block, block.rows, where="general")
    for number, row in enumerate(loaded.rows, 1):
        if isinstance(row.get(block.text), list | dict):
            raise UserError(
                f"general: {place(row, number)}, column {block.text!r} is a list or an object, not a text: "
                f"write a template as `text`, such as \"{{{{{block.text} | join(' ')}}}}\""
            )
    texts = [rows.text(row, block.text, where="general").strip() for row in loaded.rows]
    if limit := block.max_words:
        texts = [" ".join(text.split()[:limit]) if len(text.split()) > limit else text for text in texts]
    articles = [rows.text(row, block.article, where="general").strip() if block.article else "" for row in loaded.rows]
    sizes = {name: getattr(block, name) for name in SETS}
    pairs = [(article, text) for article, text in zip(articles, texts) if text]
    sets, left, copies = splits.by_article(pairs, sizes=sizes)
    for name, drawn in sets.items():
        if len(drawn) < sizes[name]:
            others = ", ".join(f"{other} {len(sets[other])}" for other in SETS if other != name and sets[other])
            raise UserError(
                f"general.{name} is {sizes[name]} texts, and {len(drawn)} of {len(pairs) - copies} are left for it "
                f"({others or 'no other set has any'}): lower one of them, or add more text"
            )
    made = {name: [{"id": splits.text_hash(text), "text": text} for text in drawn] for name, drawn in sets.items()}
    return made, copies
