"""lm-eval's own tasks, read once and kept: their documents and few-shot examples, so that nothing is fetched again.

`read` builds a task as lm-eval does, with its data set from where the caller says; `kept` builds it again on documents
that were read before. Prompts, choices, draws of examples and metrics are lm-eval's own. What it accepts is accepted,
also null cells and gold answers that are no choice.
"""

import contextlib
import inspect
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from evaluation import catalogue, measure, nulls
from evaluation.definition import refuse_unusable
from evaluation.local import Quiet, dataset, quiet
from evaluation.shipped import lacks_package
from evaluation.task import SEED, read_rows, refuse_metric, requests
from methods.errors import UserError, shortened

Load = Callable[[str, str | None, dict[str, Any]], Mapping[str, Any]]  # (path, name, arguments) -> splits
TRIED = 20  # documents whose metrics are tried on invented answers


class _AsInLmEval(Quiet):
    """Beside the task's own class: null is written as lm-eval writes it, and a document that does not fit is named."""

    def place(self, number: int) -> str:
        return f"document {number} of those scored"


def _as_in_lm_eval(name: str) -> Callable:
    def method(self, doc: Any, *arguments: Any, **named: Any) -> Any:
        try:
            with nulls.written():
                return getattr(super(_AsInLmEval, self), name)(doc, *arguments, **named)
        except UserError:
            raise
        except Exception as error:  # the task's templates and its own Python, or the chat template
            chat = named.get("chat_template")  # the task's own parts are methods, too, and are named by then
            who, remedy = ("the chat template", "name another") if chat else ("lm-eval", "correct the data set")
            raise UserError(
                f"task {self.config.task}: {who} cannot use the document {doc!r:.200} ({shortened(error)}): {remedy}, "
                "or choose another task"
            ) from error

    return method


for _name in (
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "doc_to_prefix",
    "fewshot_context",
    "construct_requests",
    "process_results",
):
    setattr(_AsInLmEval, _name, _as_in_lm_eval(_name))


def load(entry: Mapping[str, Any], folder: Path) -> list[ConfigurableTask]:
    """The tasks of an entry of tasks.json whose rows are documents: one, or those of a group."""
    known = catalogue.named(entry["task"], name=entry["name"])
    docs: dict[str, list[dict]] = {}
    examples: dict[str, list[dict]] = {}
    for row in read_rows(Path(folder) / entry["file"]):
        kind = docs if "doc" in row else examples
        kind.setdefault(row["task"], []).append(row["doc" if "doc" in row else "example"])
    if unknown := docs.keys() - known.tasks.keys():
        raise UserError(
            f"{entry['file']} has rows of {min(unknown)}, which lm-eval's {entry['name']} does not have: another "
            "version of lm-eval read them; run the `data` stage again"
        )
    try:
        return [
            kept(name, known.tasks[name], docs=docs[name], examples=examples.get(name, ()), metric=entry["metric"])
            for name in docs
        ]
    except UserError as error:
        inside = "" if entry["name"] in docs else f"{entry['name']}: one of its {len(docs)} tasks cannot be scored: "
        raise UserError(f"{inside}{error}") from error


def lines(docs: Mapping[str, Sequence[dict]], examples: Mapping[str, Sequence[dict]]) -> Iterator[str]:
    """The file that `load` reads, line by line; columns keep their order, which is part of lm-eval's doc_hash."""
    for key, rows in (("doc", docs), ("example", examples)):
        for task, own in rows.items():
            for number, row in enumerate(own, 1):
                try:
                    text = json.dumps({"task": task, key: row}, ensure_ascii=False, allow_nan=False)
                except (TypeError, ValueError) as error:
                    raise UserError(
                        f"task {task}: document {number} holds a value that a file of text cannot ({error}): choose "
                        "another task"
                    ) from error
                yield text + "\n"


def read(name: str, config: Mapping[str, Any], load: Load) -> ConfigurableTask:
    """lm-eval's task `name` with the documents of the data set that `load` returns. Call it within `seeded`."""

    def download(self, dataset_kwargs: dict | None = None, **_: Any) -> None:
        if not self.DATASET_PATH:
            raise UserError(
                f"task {name}: it names no data set (`dataset_path`) from which its rows could be read: name one, "
                "write `rows` in its block under `tasks`, or choose another task"
            )
        arguments = {key: value for key, value in (dataset_kwargs or {}).items() if key != "trust_remote_code"}
        self.dataset = load(self.DATASET_PATH, self.DATASET_NAME, arguments)

    return _built(name, config, {"download": download})


def kept(
    name: str, config: Mapping[str, Any], *, docs: Sequence[dict], examples: Sequence[dict], metric: str | None = None
) -> ConfigurableTask:
    """lm-eval's task `name` on `docs`, which its `process_docs` has made before.

    examples   the documents that few-shot examples are drawn from; none where the task states its own
    metric     METRIC or METRIC,FILTER, by default the task's first
    """

    def fewshot_docs(self) -> Sequence[dict] | None:
        return examples or (super(type(self), self).fewshot_docs() if states_examples(self) else None)

    def download(self, *_: Any, **__: Any) -> None:
        self.dataset = {}

    own = {"download": download, "rows": docs, "eval_docs": dataset(docs), "fewshot_docs": fewshot_docs}
    with seeded():
        task = _built(name, config, own)
    task._aggregation_list = measure.bounded(task._aggregation_list)
    task.metric = metric or next(iter(task.aggregation()))
    refuse_metric(task)
    task.set_fewshot_seed(SEED)
    with quiet():
        task.measure = measure.measured(task, task.metric, [requests(task, doc) for doc in docs[:TRIED]])
    return task


def shots(task: ConfigurableTask) -> int:
    return task.config.num_fewshot or 0


def states_examples(task: ConfigurableTask) -> bool:
    """Whether few-shot examples stand in the task's own configuration."""
    return bool(shots(task) and task.fewshot_cfg.split is None and task.fewshot_cfg.samples is not None)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """The seeds of the `lm_eval` command, for tasks that shuffle choices while they read; states stay as they were.

    One after the other, the tasks of a group draw from the same state.
    """
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _built(name: str, config: Mapping[str, Any], own: Mapping[str, Any]) -> ConfigurableTask:
    """An instance of the task's class, or of lm-eval's general one, in which the attributes of `own` are replaced."""
    refuse_unusable(name, config)
    written = config.get("class") or ConfigurableTask
    kind = type(written.__name__, (_AsInLmEval, written), dict(own))
    config = deepcopy({key: value for key, value in config.items() if key != "class"} | {"task": name})
    takes_config = "config" in inspect.signature(written.__init__).parameters
    try:
        with quiet(), nulls.written():
            task = kind(config=config) if takes_config else kind()
    except UserError:
        raise
    except ImportError as error:
        raise UserError(lacks_package(f"task {name}", error)) from error
    except Exception as error:  # lm-eval's checks, and the task's own Python
        raise UserError(f"task {name}: lm-eval cannot make the task of these rows ({shortened(error)})") from error
    task.config.task = name
    return task
