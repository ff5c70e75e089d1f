"""What `dvc metrics show` and `dvc metrics diff` print of a study: a small JSON file for each method.

DVC prints a line for each file, which begins with its path, and a column for each number, sorted by name. So that a
line fits a terminal of 120 columns the paths and names are short; so that gain and measures stand in their one order
(analysis/measures.py) the names sort in it:

    gain                nats per token of the domain's scored rows
    general, general_kl nats lost per token of general text, and KL(base‖tuned) there
    gold, margin        nats lost of a retention item's right answer, and of its lead
    points              accuracy lost on retention items, in percentage points

Each is the mean over the method's seeds. Every other number is in table.csv, with its interval.
"""

import shutil
from pathlib import Path

import pandas as pd

from analysis import numbers
from analysis.measures import ORDER
from methods.tools.files import write_json

NAMES = {
    "domain_nll_gained": "gain",
    "general_nll_lost": "general",
    "general_kl": "general_kl",
    "gold_nll_lost": "gold",
    "margin_lost": "margin",
    "forgetting": "points",
}


def write_metrics(table: pd.DataFrame, folder: Path) -> None:
    """Write FOLDER/METHOD.json for each method of a comparison, within folders of models and domains if several are
    compared; what an earlier comparison wrote there is removed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    methods = table[table["method"] != "base"] if len(table) else table
    apart = [kind for kind in ("model", "domain") if len(methods) and methods[kind].nunique() > 1]
    for _, row in methods.iterrows():
        known = {key: row[key] for key in ORDER if key in NAMES and key in row and not numbers.missing(row[key])}
        shown = {NAMES[key]: round((100 if key == "forgetting" else 1) * value, 4) for key, value in known.items()}
        write_json(folder.joinpath(*(row[kind] for kind in apart), f"{row['method']}.json"), shown)
