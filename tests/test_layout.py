"""The floors of the house: imports go down only, and only between the four packages of the design."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"methods": {"methods"}, "evaluation": {"evaluation", "methods"}, "analysis": {"analysis", "methods"}}


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere in it, under TYPE_CHECKING too."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("floor", MAY_IMPORT)
def test_imports_go_down_only(floor):
    upward = {
        str(path.relative_to(ROOT)): found
        for path in (ROOT / floor).rglob("*.py")
        if (found := imported(path) & {"methods", "evaluation", "analysis", "experiments", "tests"} - MAY_IMPORT[floor])
    }
    assert not upward


def test_statistics_know_nothing_of_sections_and_sections_nothing_of_the_report():
    for lower, higher in (("statistics", ("sections", "report")), ("sections", ("report",))):
        for path in (ROOT / "analysis" / lower).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not [
                room for room in higher if f"analysis.{room}" in text or f"from analysis import {room}" in text
            ], path


def test_the_training_loop_is_one_file_of_under_300_lines():
    assert len((ROOT / "experiments/training/engine.py").read_text(encoding="utf-8").splitlines()) < 300
