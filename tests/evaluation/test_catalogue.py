"""Names of lm-eval: the same index as its own, and what a name stands for."""

import pytest
from lm_eval.tasks._index import TaskIndex

from evaluation import catalogue
from evaluation.shipped import SHIPPED
from methods.errors import UserError


@pytest.mark.thorough
def test_the_index_is_lm_evals_own():
    own = TaskIndex.build([SHIPPED])
    assert catalogue.registry().keys() == own.keys() and len(own) > 10_000
    for name, entry in catalogue.registry().items():
        assert (entry.kind, entry.yaml_path, entry.tags) == (own[name].kind, own[name].yaml_path, own[name].tags), name


def test_a_group_holds_the_tasks_of_its_groups_and_tags():
    mmlu = catalogue.named("mmlu", name="mmlu")
    assert len(mmlu.tasks) == 57 and mmlu.tasks["mmlu_anatomy"]["dataset_name"] == "anatomy"
    assert [(one.metric, one.weight_by_size) for one in mmlu.aggregates] == [("acc", True)]
    stem = catalogue.named("mmlu_stem", name="mmlu_stem")
    assert mmlu.tasks.keys() > stem.tasks.keys() and "mmlu_anatomy" in stem.tasks


def test_keys_beside_include_replace_those_of_all_tasks_of_a_group():
    few = catalogue.named({"include": "bhs_hindi", "num_fewshot": 3}, name="few")
    assert [task["num_fewshot"] for task in few.tasks.values()] == [3] * 6
    assert not few.aggregates[0].weight_by_size


def test_a_tag_stands_for_its_tasks():
    assert {"mmlu_anatomy", "mmlu_astronomy"} < catalogue.expanded("mmlu_stem_tasks").keys()


def test_a_group_that_is_not_aggregated_stands_for_its_tasks_as_it_changes_them():
    leaderboard = catalogue.expanded("openllm")
    assert leaderboard["openllm-arc_challenge"] == {
        "include": "arc_challenge",
        "fewshot_split": "train",
        "num_fewshot": 25,
    }
    assert leaderboard["openllm-mmlu"] == {"include": "mmlu", "num_fewshot": 5}
    assert {name for name in leaderboard if "truthfulqa" in name} == {
        f"openllm-truthfulqa_{kind}"
        for kind in ("gen", "mc1", "mc2")  # a tag inside the group
    }


def test_a_group_that_is_aggregated_stands_for_itself():
    assert catalogue.expanded("mmlu") == {"mmlu": "mmlu"} and catalogue.expanded("gsm8k") == {"gsm8k": "gsm8k"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("SciQ", "did you mean 'sciq'"), ("hellaswg", "did you mean 'hellaswag'"), ("qqqqqqqq", "`lm_eval ls tasks`")],
)
def test_an_unknown_name_is_told_with_near_ones(name, message):
    with pytest.raises(UserError, match=f"unknown task '{name}': lm-eval has none of this name; .*{message}"):
        catalogue.expanded(name)
