"""A method that trains on general text is compared with its control, and never credited with what the text does."""

from dataclasses import replace

import pytest

from analysis.load import load_cells
from analysis.roles import Roles
from analysis.sections import matched
from analysis.sections.credit import apart, sentences
from analysis.statistics.contrasts import Contrasts
from tests.analysis.fixtures import write_results

WHERE = {"model": "smollm2-135m", "domain": "science"}
KEY = "general_nll_lost"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    return load_cells(root, write_results(root, methods=("full", "lora", "hierarchical", "mofo"), seeds=(0, 1)))


def of(loaded, **control_of):
    return replace(loaded, roles=Roles(control_of=control_of))


def test_the_comparison_named_is_with_the_control(loaded):
    known = of(loaded, hierarchical="lora", mofo="full")
    assert apart(known) == {"hierarchical": "lora"}  # plain fine-tuning is mofo's own control here
    one = Contrasts(loaded, **WHERE).of(KEY, [("hierarchical", "lora")])["hierarchical", "lora"]
    (line,) = sentences(known, **WHERE)
    assert line.startswith("hierarchical also trains on 40,000 tokens of general text; against lora, which reads")
    assert f"it loses {one.value:+.3f} [".replace("-", "\N{MINUS SIGN}") in line and ", p\N{NO-BREAK SPACE}" in line


@pytest.mark.parametrize(("control", "why"), [("", "the study has no control"), ("warm", "its control warm has no")])
def test_without_a_control_it_says_that_remedy_and_text_cannot_be_told_apart(loaded, control, why):
    (line,) = sentences(of(loaded, hierarchical=control), **WHERE)
    assert why in line and line.endswith("what its remedy does and what that text does cannot be told apart.")


def test_at_equal_gain_too_no_such_method_is_set_against_plain_fine_tuning(loaded):
    def rows(known):
        made = matched.section(known, **WHERE)
        return {row["name"]: row["cells"][2] for row in made["rows"]}, " ".join(made["sentences"])

    texts, said = rows(of(loaded))
    assert "lora" not in texts["hierarchical"][1]
    texts, said = rows(of(loaded, hierarchical="lora"))
    assert texts["hierarchical"][1].endswith("against lora") and "against lora, which reads the same" in said
    texts, said = rows(of(loaded, hierarchical=""))
    assert texts["hierarchical"] == ("", "") and "cannot be told apart" in said
    assert "hierarchical (" not in said
