"""Finished cells of other studies that a report shows beside its own (`also:`): described, never pooled or tested."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from analysis.load import Loaded, load_cells
from methods.errors import UserError

SAME = {"base": "base_sha256", "data": "data_sha256"}


def beside(loaded: Loaded, studies: Mapping[str, tuple[Path, Sequence[str]]]) -> dict[str, Loaded]:
    """The finished cells of `studies` on the models and domains of `loaded`, by study.

    studies  name of a study -> its folder of results and the names of its cells

    Raises UserError by the study's name if its base, data or scoring is another: numbers would not be comparable.
    """
    shown = {}
    for name, (root, cells) in studies.items():
        other = load_cells(root, cells)
        other = other.without([cell for cell, row in other.cells.iterrows() if _pair(row) not in loaded.comparisons])
        for pair in other.comparisons:
            _refuse_other(name, _rules(loaded.of(*pair)), _rules(other.of(*pair)), pair=pair)
        if other.comparisons:
            shown[name] = other
    return shown


def _pair(cell: pd.Series) -> tuple[str, str]:
    return cell["model"], cell["domain"]


def _rules(cells: pd.DataFrame) -> dict[str, set[str]]:
    """The values of everything that has to be equal, by name."""
    values = {name: set(map(str, cells[key])) for name, key in SAME.items()}
    return values | {"SCORING": {str(scoring.get("scoring")) for scoring in cells["scoring"]}}


def _refuse_other(study: str, here: dict[str, set], there: dict[str, set], *, pair: tuple[str, str]) -> None:
    for name, values in here.items():
        if there[name] - values:
            mine, other = (", ".join(value[:12] for value in sorted(each)) for each in (values, there[name]))
            raise UserError(
                f"also names the study {study}, but its {name} on {'/'.join(pair)} is {other} and here it is {mine}: "
                "bring both studies up to date, or leave it out of `also`"
            )
