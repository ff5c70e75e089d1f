"""Write results/summary/: the tables, the tests, the figures and the report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from analysis import spreadsheet
from analysis.also import beside
from analysis.comparable import guarded
from analysis.dvc_metrics import write_metrics
from analysis.load import load_cells
from analysis.report.beside import write_bench, write_details
from analysis.report.figures import write_figures
from analysis.report.page import write_report
from analysis.roles import Roles
from analysis.sections import costs
from analysis.sections.answer import sentences
from analysis.sections.credit import apart
from analysis.sections.overview import also as also_compared
from analysis.sections.start import with_unsettled
from analysis.sections.tables import BANNER, as_csv, as_markdown, as_text
from analysis.sections.told import with_told
from analysis.statistics.comparison import comparison
from analysis.statistics.tests import all_tests


def write_summary(
    *,
    results_root: Path | str,
    summary_dir: Path | str,
    cells,
    title: str,
    planned=None,
    roles: Roles = Roles(),
    also: Mapping[str, tuple[Path, Sequence[str]]] = MappingProxyType({}),
    metrics_dir: Path | None = None,
) -> str:
    """Write the summary of `cells` and return the comparison as text for the terminal.

    cells    cells to compare, names `model/domain/method/seed0` or objects with a `.name`
    planned  every cell of the study, if that is more than `cells`: those without a result are named
    roles    leaders, compositions and controls among the methods
    also     name of another study -> its folder of results and its cells, which are shown beside and never tested
    metrics_dir  where the numbers go that DVC shows (analysis/dvc_metrics.py)

    Figures of an earlier summary are removed.
    """
    root, folder = Path(results_root), Path(summary_dir)
    names = [getattr(cell, "name", cell) for cell in [*(planned or ()), *cells]]
    loaded = guarded(load_cells(root, dict.fromkeys(names)))
    loaded = replace(loaded, roles=roles, also=beside(loaded, also))
    tests = all_tests(loaded)
    table = with_unsettled(loaded, with_told(comparison(loaded), tests, mixed=apart(loaded)))
    folder.mkdir(parents=True, exist_ok=True)
    if metrics_dir is not None:
        write_metrics(table, metrics_dir)
    for old in (folder / "figures").glob("*.*"):
        if old.suffix in (".png", ".svg", ".csv"):
            old.unlink()
    beside_it = also_compared(loaded)
    figures = write_figures(loaded, table, beside_it, folder=folder / "figures")
    markdown = as_markdown(loaded, table) + costs.as_markdown(loaded)
    files = {
        "table.csv": as_csv(loaded, table),
        "tests.csv": spreadsheet.text(tests, digits="%.6g"),
        "table.md": markdown,
        "table.txt": as_text(loaded, table, answer=sentences(loaded, table, tests) if len(table) else ()),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    study = "" if root.name == "results" else root.name
    path = folder / "report.html"
    write_report(loaded, table, tests, figures, beside_it, path=path, title=title, study=study)
    banner = BANNER if loaded.not_a_result else ""
    write_details(loaded, path=folder / "details.html", title=title, banner=banner)
    write_bench(loaded, path=folder / "bench.html", title=title)
    return files["table.txt"]
