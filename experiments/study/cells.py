"""A cell: one (model, domain, method, seed), written `model/domain/method/seed0`."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from methods.errors import UserError
from methods.tools.names import unknown


@dataclass(frozen=True, order=True)
class Cell:
    model: str
    domain: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}/{self.domain}/{self.method}/seed{self.seed}"

    @property
    def stage(self) -> str:
        """Its name after the `@` of a DVC stage, which is matched against the grid and never split."""
        return f"{self.model}-{self.domain}-{self.method}-{self.seed}"


def grid(study) -> list[Cell]:
    """All cells of the study's grid in its order. Raises UserError if two have the same stage name."""
    names = study.grid
    cells = [Cell(*c) for c in itertools.product(names.models, names.domains, names.methods, names.seeds)]
    by_stage: dict[str, Cell] = {}
    for cell in cells:
        if (other := by_stage.setdefault(cell.stage, cell)) is not cell:
            raise UserError(f"cells {other.name} and {cell.name} share the stage name {cell.stage}: rename one")
    return cells


def matching(study, patterns: Sequence[str]) -> list[Cell]:
    """The grid's cells whose names match one of `patterns` (`*/full/seed0`, see fnmatch); all if none is given.

    Raises UserError for a pattern that matches no cell, because a check would then pass without checking anything.
    """
    every = grid(study)
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in every):
            raise UserError(
                f"no cell of the grid matches {pattern}: cells are MODEL/DOMAIN/METHOD/seed0, `*` stands for any text"
            )
    return [cell for cell in every if not patterns or any(fnmatchcase(cell.name, pattern) for pattern in patterns)]


def parse(text: str, study) -> Cell:
    """The cell written `model/domain/method/seed0`. Raises UserError for an unknown name, with the nearest one."""
    pieces = text.strip("/").split("/")
    if len(pieces) != 4 or not re.fullmatch("seed[0-9]{1,19}", pieces[3]):
        raise UserError(f"cell {text!r} must be written model/domain/method/seed0")
    for kind, name, known in zip(("model", "domain", "method"), pieces, (study.models, study.domains, study.methods)):
        if name not in known:
            raise unknown(kind, name, known, where=f"cell {text}")
    return Cell(*pieces[:3], int(pieces[3][4:]))
