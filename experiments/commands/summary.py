"""The end of `make repro`: the comparison, how each cell came to its scores here, and where to look next."""

import sys

from experiments.study import cells, ledger
from methods.tools.files import read_json


def main(study) -> None:
    """Print table, verdicts, report and MLflow's command; exits 1 where a cell failed or is missing."""
    table = study.paths.summary / "table.txt"
    if table.is_file():
        print(table.read_text())
    found = cells.grid(study)
    bad = 0
    width = max(len(cell.name) for cell in found)
    for cell in found:
        path = study.paths.run(cell) / "metrics.json"
        verdict = ledger.verdict(study, cell, read_json(path) if path.is_file() else None)
        bad += verdict.startswith(("FAILED", "not run"))
        print(f"{cell.name:<{width}}  {verdict}")
    print(f"\nreport:    {study.paths.summary / 'report.html'}")
    print("MLflow:    make ui")
    if bad:
        print(f"\n{bad} of {len(found)} cells have no result; the reasons stand above", file=sys.stderr)
        sys.exit(1)
