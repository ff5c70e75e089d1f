"""The page of an audit, one self-contained HTML file, and its summary for a terminal."""

from pathlib import Path

from analysis.report.pages import write_page
from analysis.sections import audit
from analysis.sections.audit import Record


def write(record: Record, *, path: Path, flips: str) -> Path:
    """Write the page to `path` and return it; `flips` is the name of the file beside it with all flipped answers."""
    return write_page("report/audit.html.j2", path=path, **audit.section(record), flips_file=flips)


def summary(record: Record) -> str:
    """The audit in a few lines: what was lost, task by task, and the verdict."""
    shown = audit.section(record)
    lines = [*shown["notes"], *shown["answer"], ""]
    columns = [0, 1, 3, 4, 5, 6, 8, 9]
    texts = [
        [task["name"], *(" ".join(filter(None, _bracketed(*cell))) for cell in task["cells"])]
        for task in shown["tasks"]
    ]
    table = [[row[column] for column in columns] for row in [list(audit.HEADS), *texts]]
    widths = [max(len(row[column]) for row in table) for column in range(len(columns))]
    lines += [
        "  ".join(
            text.ljust(width) if n == 0 else text.rjust(width) for n, (text, width) in enumerate(zip(row, widths))
        )
        for row in table
        if len(table) > 1
    ]
    verdict = shown["verdict"]
    if verdict["limits"]:
        lines += ["", *(f"FAIL  {reason}" for reason in verdict["exceeded"])]
        lines += [] if verdict["exceeded"] else [f"pass  {'; '.join(verdict['limits'])}"]
    return "\n".join(line.rstrip() for line in lines)


def _bracketed(value: str, ends: str) -> tuple[str, str]:
    return value, f"[{ends}]" if " to " in ends else ""
