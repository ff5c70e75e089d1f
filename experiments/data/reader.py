"""Read the rows of a study's blocks, each block once, and write rows to files."""

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evaluation import nulls
from experiments.data import lm_eval_rows, rows
from experiments.data.data_sets import DataSets
from experiments.data.left_out import LeftOut
from experiments.data.lm_eval_rows import Drawn
from experiments.study import schema
from experiments.study.schema import Domain, General, Scored
from methods.errors import UserError
from methods.tools import jsonl

Row = dict[str, Any]


@dataclass(kw_only=True)
class Reader:
    """Reads each block's rows once, however many domains use them.

    left_out   what was left out while reading, by the path of the block
    """

    study: Any
    read_before: dict[str, rows.Rows] = field(default_factory=dict)
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    drawn_before: dict[str, Drawn] = field(default_factory=dict)

    @functools.cached_property
    def data_sets(self) -> DataSets:
        folder = self.study.data.hub
        return DataSets(folder=Path(folder).expanduser() if folder else None, hashes=self.study.paths.local / "hashes")

    def of_lm_eval(self, name: str) -> Drawn:
        """The documents of a task without `rows`: lm-eval says where they are."""
        if name not in self.drawn_before:
            block = self.study.tasks[name]
            test = block.test or self.study.data.test
            self.drawn_before[name] = lm_eval_rows.draw(name, block, test=test, data_sets=self.data_sets)
        return self.drawn_before[name]

    def of_training(self, domain: str, block: Domain) -> tuple[rows.Rows, rows.Rows | None]:
        """The rows of a domain without `rows` and those that are scored: lm-eval says where they are."""
        where = f"domains.{domain}"

        def shaped(read: rows.Rows | None) -> rows.Rows | None:
            if read is None:
                return None
            given = read.rows
            if block.nulls == "empty":
                given = [jsonl.Row(nulls.emptied(row), at=row.at) for row in given]
            return rows.Rows(rows=rows.shape(given, block, where=where), source=read.source)

        train, scored = lm_eval_rows.training(domain, block, data_sets=self.data_sets)
        return shaped(train), shaped(scored)

    def __call__(self, block: General | Scored, named: schema.Rows, *, where: str) -> rows.Rows:
        if where not in self.read_before:
            source = {"packages": self.study.packages, "prefer": self.study.data.source}
            with_hub = named.hub and self.study.data.source == "hub" and self.data_sets.folder
            read = self._in_folder if with_hub else rows.read
            loaded = read(named, **source, where=where, emptied=block.nulls == "empty")
            shaped = rows.shape(loaded.rows, block, where=where) if isinstance(block, Scored) else loaded.rows
            self.note(loaded.left_out, where=where)
            self.read_before[where] = rows.Rows(rows=shaped, source=loaded.source)
        return self.read_before[where]

    def _in_folder(self, named: schema.Rows, *, where: str, **settings: Any) -> rows.Rows:
        """The rows that a block has on the hub, from `data.hub`."""
        path = named.hub.path
        try:
            at, source = self.data_sets.place(path), self.data_sets.source(path)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        there = named.model_copy(update={"hub": named.hub.model_copy(update={"path": at, "revision": None})})
        loaded = rows.read(there, where=where, **settings)
        return replace(loaded, source=loaded.source.replace(f"hub:{at}@unknown revision", source))

    def note(self, left_out: LeftOut, *, where: str) -> None:
        """Keep what was left out of the rows of a block, for data.json."""
        for kind, found in left_out.facts().items():
            self.left_out.setdefault(where, {}).setdefault(kind, {}).update(found)


def write_rows(path: Path, lines: Iterable[Row]) -> Path:
    """Write one JSON object a line with sorted keys, so that equal rows give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False, sort_keys=True, default=str) + "\n" for line in lines)
    return path
