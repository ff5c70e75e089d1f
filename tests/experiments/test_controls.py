"""Every method that trains on general text has a control with the same data, or a warning."""

import pytest

from experiments.study import ahead, controls
from tests.experiments.test_prepare import load

LORA = {"lora": {"rank": 2}}
WARM = {"hierarchical": {"samples": 4, "length": 16}}
OFF = {"hierarchical": {"samples": 4, "length": 16, "strength": 0.0}}


def study(tmp_path, methods, **named):
    def change(raw):
        raw["methods"] = methods
        raw["grid"]["methods"] = list(methods)
        raw["controls"] = named

    return load(tmp_path, change)


@pytest.mark.parametrize(
    ("methods", "found"),
    [
        ({"full": {}, "ewc": {"ewc": {"samples": 4}}}, {}),  # which reads general text, and does not train on it
        ({"lora": LORA, "warm": LORA | WARM}, {"warm": ""}),
        ({"warm": LORA | WARM, "off": LORA | OFF}, {"warm": "off"}),
        ({"warm": LORA | WARM, "off": OFF}, {"warm": ""}),  # other parts
        ({"warm": LORA | WARM, "off": LORA | {"hierarchical": {"samples": 5, "strength": 0.0}}}, {"warm": ""}),
        ({"warm": LORA | WARM, "off": LORA | OFF | {"train": {"learning_rate": 0.1}}}, {"warm": ""}),  # in the warm-up
        ({"full": {}, "replay": {"replay": {}}, "both": LORA | {"replay": {}}}, {"replay": "full", "both": ""}),
        ({"none": {"replay": {"share": 0.0}}, "replay": {"replay": {}}}, {"replay": "none"}),
        (
            {"full": {}, "kl": {"kl": {}}, "both": {"kl": {"text": "both"}}},
            {"both": "full"},
        ),  # kl: the domain's own text
    ],
)
def test_the_control_of_a_method(tmp_path, methods, found):
    assert controls.of_grid(study(tmp_path, methods)) == found


def test_each_setting_of_a_family_has_the_control_at_its_own_rate(tmp_path):
    fast = {"train": {"learning_rate": 0.1}}
    methods = {"warm": LORA | WARM, "warm-s1": LORA | WARM | fast, "off": LORA | OFF, "off-s1": LORA | OFF | fast}
    found = study(tmp_path, methods | {"other": LORA | OFF}, warm="off")
    assert controls.of_grid(found) == {"warm": "off", "warm-s1": "off-s1"} and controls.look(found) == []


def test_plan_and_resolve_warn_of_a_method_without_one(tmp_path):
    found = study(tmp_path, {"lora": LORA, "warm": LORA | WARM}, warm="lora")
    (line,) = [line for line in ahead.look(found) if "general text" in line]
    assert line == (
        "warning: methods.warm.hierarchical trains on general text, and lora is not its control (the same preparation "
        "with hierarchical.strength 0.0): the report cannot tell what the method does from what that text does"
    )
    (line,) = controls.look(study(tmp_path, {"lora": LORA, "replay": {"replay": {}}}))
    assert "the grid has no control for it (the same method without that part)" in line
