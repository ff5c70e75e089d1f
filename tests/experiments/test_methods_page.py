"""docs/methods.md says what the registry, params.yaml and the parts' own statements of costs say."""

import pytest

from experiments.commands import methods
from experiments.study import config
from experiments.study.paths import HERE
from methods import registry

PAGE = (HERE / methods.PAGE).read_text(encoding="utf-8")
BEHIND = "docs/methods.md is behind: run `python -m experiments methods`"


def test_every_part_has_its_row_and_what_is_left_out_has_a_reason():
    rows = list(methods.facts(config.load()))
    assert [row[0].split("`")[1] for row in rows] == registry.built_in() and len(rows) >= 30
    for row in rows:
        assert f"| {' | '.join(row)} |\n" in PAGE, BEHIND
    for name in ("FOGO", "SLAO", "MSSR", "DiSC", "Anchored learning"):
        assert f"- **{name} (" in PAGE


@pytest.mark.thorough
def test_the_page_is_as_the_command_writes_it():
    assert methods.page(config.load()) == PAGE, BEHIND
