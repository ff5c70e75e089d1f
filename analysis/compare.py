"""Writes results/summary/: the table, the figures and the report."""

from pathlib import Path

from analysis.chosen import reported
from analysis.comparable import guarded
from analysis.load import load_cells
from analysis.report.figures import write_figures
from analysis.report.page import write_report
from analysis.sections import costs
from analysis.sections.tables import as_csv, as_markdown, as_text, comparison
from analysis.statistics.permutation import all_tests


def write_summary(
    *, results_root: Path | str, summary_dir: Path | str, cells, title: str, planned=None, archive=None
) -> str:
    """Table (text, CSV, Markdown), paired tests of the chosen settings (CSV), figures and report of `cells`; returns the table as text for the terminal.

    cells    cells to compare, names `model/domain/method/seed0` or objects with a `.name`
    planned  every cell the study asks for, where that is more than `cells`: those without a result are named
    archive  {"commit", "known"} of a study that is kept as it was made: said at the top of table.md and of the report
    Figures of an earlier summary are removed first, so that none outlives its data.
    """
    root, folder = Path(results_root), Path(summary_dir)
    names = [getattr(cell, "name", cell) for cell in cells]
    asked = [getattr(cell, "name", cell) for cell in planned] if planned is not None else names
    loaded = guarded(load_cells(root, dict.fromkeys([*asked, *names])))
    table = comparison(loaded)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg", "csv"):
        for old in (folder / "figures").glob(f"*.{suffix}"):
            old.unlink()
    tests = all_tests(reported(loaded))
    figures = write_figures(loaded, table, folder=folder / "figures")
    (folder / "table.csv").write_text(as_csv(loaded, table), encoding="utf-8")
    (folder / "tests.csv").write_text(
        tests.to_csv(index=False, lineterminator="\n", float_format="%.6g"), encoding="utf-8"
    )
    (folder / "table.md").write_text(
        _archived(archive) + as_markdown(loaded, table) + costs.as_markdown(loaded), encoding="utf-8"
    )
    write_report(
        loaded,
        table,
        tests,
        figures,
        path=folder / "report.html",
        title=title,
        study="" if root.name == "results" else root.name,
        archive=archive,
    )
    text = as_text(loaded, table)
    (folder / "table.txt").write_text(text, encoding="utf-8")
    return text


def _archived(archive) -> str:
    if not archive:
        return ""
    lines = [
        f"This study is an archive of commit {archive['commit'][:10]}. It is read and never run again. What is known against it:",
        "",
    ]
    return "\n".join([*lines, *(f"- {line}" for line in archive["known"]), "", ""])
