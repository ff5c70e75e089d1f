"""summary: print the comparison, the outcome of each cell and where to look next; `make repro` ends with it."""

import sys

from analysis.load import record
from experiments.study import cells, ledger


def main(study) -> None:
    """Print the table, the outcome of each cell, the report and MLflow's command; exit 1 if a cell has no result."""
    table = study.paths.summary / "table.txt"
    if table.is_file():
        print(table.read_text())
    grid, notes = cells.grid(study), ledger.entries(study)
    bad = 0
    width = max(len(cell.name) for cell in grid)
    for cell in grid:
        verdict = ledger.verdict(study, cell, record(study.paths.run(cell)), notes=notes)
        bad += verdict.startswith(("FAILED", "not run"))
        print(f"{cell.name:<{width}}  {verdict}")
    print(f"\nreport:    {study.paths.summary / 'report.html'}")
    print("MLflow:    make ui")
    if bad:
        print(f"\n{bad} of {len(grid)} cells have no result; see the reasons above", file=sys.stderr)
        sys.exit(1)
