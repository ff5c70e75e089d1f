"""What is trained and probed is what is scored: rendered contexts and choices are the arguments of lm-eval's own
requests.
"""

import pytest

from evaluation.encode import encode_pair
from evaluation.probe import encoded, probe
from evaluation.task import SEED, make_task, render
from experiments.model.random_models import build
from methods.errors import UserError
from tests.evaluation.test_measure import ROWS, TASKS, task_of

SHOTS = [{"q": f"Is {n} even?", "choices": ["yes", "no"], "gold": n % 2, "text": f"Shot {n}."} for n in range(4)]
SETTINGS = {
    "plain": {},
    "description": {"description": "Answer.\n", "fewshot_delimiter": "\n##\n", "target_delimiter": ":: "},
    "prefix": {"gen_prefix": "The answer is"},
    "prefix, row by row": {"gen_prefix": "Row {{gold}}: "},
    "in the order given": {"fewshot_config": {"samples": SHOTS, "sampler": "first_n"}},
    "shots of another form": {
        "fewshot_config": {"samples": SHOTS, "doc_to_text": "Example: {{q}}", "target_delimiter": " = "}
    },
}


def shown(kind, settings, shots=2):
    metric = {"multiple_choice": "acc", "loglikelihood": "acc", "generate_until": "exact_match"}[kind]
    task = task_of(kind, metric, num_fewshot=shots, fewshot_config={"samples": SHOTS}) | settings
    return make_task("t", task, ROWS, metric=metric)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", ["multiple_choice", "loglikelihood", "generate_until"])
def test_rendered_is_scored(kind, settings):
    task = shown(kind, settings)
    rendered = render(task)
    task.set_fewshot_seed(SEED)  # as harness.score does before lm-eval builds its requests
    task.build_all_requests()
    by_row = {}
    for one in task.instances:
        by_row.setdefault(one.doc_id, []).append(one.args)
    for number, row in enumerate(rendered):
        asked = by_row[number]
        assert row["context"] == asked[0][0] and row["context"].count("even?") == 2 and row["asked"].count("even?") == 0
        if kind != "generate_until":
            assert row["choices"] == [continuation for _, continuation in asked]


@pytest.mark.parametrize("settings", [settings for settings in SETTINGS.values() if "fewshot_config" not in settings])
def test_a_written_solution_stands_behind_its_context_as_in_an_example(settings):
    """The row shown as an example to another one is its own context and solution."""
    task = shown("generate_until", settings | {"fewshot_config": {"samples": [ROWS[3]]}, "description": ""}, shots=1)
    row = render(task)[3]
    example = task.fewshot_context(ROWS[0], num_fewshot=1).removesuffix(ROWS[0]["q"])
    assert row["asked"] + row["choices"][0] + task.config.fewshot_delimiter == example


def test_without_shots_the_context_stands_alone():
    row = render(shown("multiple_choice", {}, shots=0))[0]
    assert row["context"] == "Is 0 odd?" and "asked" not in row
    with pytest.raises(UserError, match="num_fewshot is 9, and fewshot_config has 4 samples"):
        shown("multiple_choice", {}, shots=9)


def test_null_in_an_example_is_refused():
    with pytest.raises(UserError, match="null"):
        shown(
            "multiple_choice", {"fewshot_config": {"samples": [{"q": None, "choices": ["a", "b"], "gold": 0}]}}, shots=1
        )


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"])
def test_accuracy_on_probes_is_lm_evals_by_the_tasks_own_metric(metric, byte_tokenizer):
    """From log-likelihoods of plain forward passes, put into lm-eval's own `process_results`."""
    model = build("llama", seed=3)
    task = make_task("t", TASKS["multiple_choice"] | {"metric_list": [{"metric": metric}]}, ROWS, metric=metric)
    task.build_all_requests()
    answers = {}
    for one in task.instances:
        ids, start = encode_pair(byte_tokenizer, *one.args)
        answers.setdefault(one.doc_id, []).append(_plain(model, ids, start))
    right = sum(task.process_results(task.eval_docs[number], found)[metric] for number, found in answers.items())
    assert probe(model=model, sets={"t": encoded(render(task), byte_tokenizer)})["t"] == right / len(ROWS)


def _plain(model, ids, start):
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].double()
    target = torch.tensor(ids[start:])
    return logits.log_softmax(-1).gather(1, target[:, None]).sum().item(), bool((logits.argmax(-1) == target).all())
