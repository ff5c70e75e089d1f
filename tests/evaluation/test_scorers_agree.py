"""Both scorers through lm-eval's evaluation, on every kind of task of the default study and the domains beside it."""

import json

import pytest

from evaluation import harness
from tests.evaluation.conftest import ENTRIES, write_rows

ARC = [
    {
        "id": f"a{i}",
        "question": f"Which of {i + 2} things is wet?",
        "answerKey": "AB1"[i % 3],
        "choices": {"text": ["water", "a dry stone " * (i + 1), "w"], "label": ["A", "B", "1"]},
    }
    for i in range(4)
]
OTHERS = [
    {
        "task": "piqa",
        "metric": "acc_norm",
        "rows": [
            {
                "goal": f"To open jar {i},",
                "sol1": "twist the lid firmly",
                "sol2": "twist the lid " + "very " * i,
                "label": i % 2,
            }
            for i in range(4)
        ],
    },
    {"task": "arc_easy", "metric": "acc", "rows": ARC},
    {"task": "arc_challenge", "metric": "acc_norm", "rows": ARC[::-1]},
    {
        "task": "openbookqa",
        "metric": "acc_norm",
        "rows": [
            {
                "id": str(i),
                "question_stem": f"The moon, {i} times,",
                "answerKey": "B",
                "choices": {"text": ["shines", "is a planet's moon", "eats", "s"], "label": list("ABCD")},
            }
            for i in range(3)
        ],
    },
    {
        "task": "mmlu_anatomy",
        "metric": "acc",  # one token a choice
        "rows": [
            {
                "question": f"Where is bone {i}?",
                "subject": "anatomy",
                "choices": ["arm", "leg", "foot", "nose"],
                "answer": i,
            }
            for i in range(4)
        ],
    },
    {
        "task": "medmcqa",
        "metric": "acc",
        "rows": [
            {"question": f"Dose {i}?", "opa": "one", "opb": "two", "opc": "three", "opd": "none", "cop": i}
            for i in range(3)
        ],
    },
]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gptj"])
def test_item_for_item(name, tasks_dir, tmp_path, byte_tokenizer, request):
    entries = json.loads((tasks_dir / "tasks.json").read_text())
    for entry in entries:
        entry["file"] = str(tasks_dir / entry["file"])
    for other in OTHERS:
        file = write_rows(tmp_path / f"{other['task']}.jsonl", other["rows"])
        entries.append(
            {
                "name": other["task"],
                "task": other["task"],
                "metric": other["metric"],
                "role": "transfer",
                "chance": 0.0,
                "file": str(file),
            }
        )
    (tmp_path / "tasks.json").write_text(json.dumps(entries))
    model = request.getfixturevalue(name)
    (ours, items), (theirs, expected) = (
        harness.score(model=model, tokenizer=byte_tokenizer, tasks_dir=tmp_path, scorer=scorer, batch_size=4)
        for scorer in ("shared-prefix", "hflm")
    )
    assert ours["scoring"]["scorer"] == "shared-prefix" and theirs["scoring"]["scorer"] == "hflm"
    assert len(items) == len(expected) == sum(len(e["rows"]) for e in [*ENTRIES, *OTHERS])
    for column in ("task", "doc_id", "doc_hash", "choice", "gold"):
        assert items[column].equals(expected[column])
    assert items.log_likelihood.tolist() == pytest.approx(expected.log_likelihood.tolist(), abs=1e-3)
    exact = items.task != "general"
    assert items.score[exact].equals(expected.score[exact])
    assert ours["tasks"].keys() == theirs["tasks"].keys()
    for task, entry in ours["tasks"].items():
        near = {key: pytest.approx(entry[key], rel=1e-3) for key in ("gold_nll", "margin", "brier") if key in entry}
        near["metrics"] = pytest.approx(entry["metrics"], rel=1e-3)
        assert theirs["tasks"][task] | near == entry | near
