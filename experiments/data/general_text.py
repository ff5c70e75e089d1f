"""General text: documents that importance is computed on, that are probed, and whose perplexity is measured."""

from pathlib import Path
from typing import Any

from experiments.data import rows, splits
from experiments.data.reader import Reader, write_rows
from experiments.study.schema import General
from methods.errors import UserError
from methods.tools.jsonl import place


def write(block: General, reader: Reader, out: Path) -> dict[str, Any]:
    drawn = lines(block, reader)
    write_rows(out / "general" / "importance.jsonl", drawn["importance"])
    return {
        "source": reader(block, block.rows, where="general").source,
        "licence": block.licence,
        "n": {name: len(drawn[name]) for name in ("importance", "probe", "perplexity")},
        "duplicates": {"within": drawn["copies"], "between": 0},
    }


def lines(block: General, reader: Reader) -> dict[str, Any]:
    """General text in three disjoint sets: importance and probe from one half, perplexity from the other.

    Each text is {"id", "text"}.
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
    first, second, copies = splits.halves(text for text in texts if text)
    ends = {
        "importance": (first, 0, block.importance),
        "perplexity": (second, 0, block.perplexity),
        "probe": (first, block.importance, block.probe),
    }
    drawn: dict[str, Any] = {"copies": copies}
    for name, (half, start, number) in ends.items():
        chosen = half[start : start + number]
        if len(chosen) < number or (not number and name != "probe"):
            raise UserError(
                f"general.{name} is {number} texts, and {len(chosen)} are available (the text has halves "
                f"of {len(first)} and {len(second)}): lower it, or add more text"
            )
        drawn[name] = [{"id": splits.text_hash(text), "text": text} for text in chosen]
    return drawn
