"""lm-eval tasks on rows of our own: the shipped prompt and metric, without its index, hub or cache.

A task is named as lm-eval names it ("sciq", "hellaswag") or given as a mapping of lm-eval's own YAML keys; such a
mapping may start from a shipped one with `include: sciq`. The rows are a JSONL file, or in memory. Everything that would make
lm-eval score 0.0 in silence (a missing column, a gold answer that is no choice) is refused here by name.
"""

import contextlib
import difflib
import functools
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import jinja2.meta
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.task import TaskConfig
from lm_eval.utils import env as jinja_env, handle_non_serializable, hash_string

from evaluation.shipped import lacks_package, shipped_config
from experiments import jsonl
from experiments.errors import UserError
from experiments.jsonl import Row, place

SPLIT = "test"
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names of one setting
TASK_KEYS = {field.name for field in fields(TaskConfig)} | {"include"}

# lm-eval compiles a template again at every use: most of the time that scoring spends outside the model
if not hasattr(jinja_env.from_string, "cache_info"):
    jinja_env.from_string = functools.lru_cache(maxsize=256)(jinja_env.from_string)


class LocalTask(ConfigurableTask):
    """An lm-eval task whose documents are rows held in memory: nothing is downloaded, nothing is cached."""

    def __init__(self, *, rows: Sequence[Row], config: dict[str, Any], metric: str) -> None:
        self.rows, self.metric = rows, metric
        with quiet():
            super().__init__(config=config)

    def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> list[str]:
        """The choices as text: numbers and truth values as JSON writes them."""
        choices = super().doc_to_choice(doc, doc_to_choice)
        if not isinstance(choices, list | tuple):
            raise _Unfit(f"doc_to_choice ({self.config.doc_to_choice!r}) gives {str(choices)[:60]!r}, not a list of choices")
        texts = []
        for number, choice in enumerate(choices, 1):
            if not isinstance(choice, str | int | float):
                raise _Unfit(f"choice {number} of {len(choices)} is {json.dumps(choice, default=str)[:60]}, neither text nor a number "
                             f"(doc_to_choice: {self.config.doc_to_choice!r})")  # fmt: skip
            texts.append(choice if isinstance(choice, str) else json.dumps(choice))
            if not texts[-1]:
                raise _Unfit(f"choice {number} of {len(choices)} is empty (doc_to_choice: {self.config.doc_to_choice!r})")
        return texts

    def place(self, number: int) -> str:
        """Where the row of document `number` (from 1) was read from."""
        if len(self.eval_docs) == len(self.rows):
            return place(self.rows[number - 1], number)
        return f"document {number} of those that its process_docs makes of the rows"

    def download(self, dataset_kwargs: dict | None = None, **_: Any) -> None:
        self.dataset = {SPLIT: _dataset(self.rows)}

    @functools.cached_property
    def eval_docs(self) -> datasets.Dataset:  # lm-eval asks several times and would process the rows each time
        with quiet():
            return self.test_docs()

    def build_all_requests(self, **settings: Any) -> None:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each task, of no interest
            super().build_all_requests(**settings)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's and datasets' advice and bars off the screen."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


class _Unfit(ValueError):
    """What is wrong with one row, in words for the person who wrote it."""


def read_rows(file: Path) -> list[Row]:
    """Rows of a JSONL file. Raises UserError for a missing or empty file and for a line that is no JSON object."""
    if not Path(file).is_file():
        raise UserError(f"rows file {file} does not exist: run the `data` stage first, or correct the path")
    rows = jsonl.read(file)
    if not rows:
        raise UserError(f"rows file {file} is empty: the set needs at least one row")
    return rows


def make_task(name: str, task: str | Mapping[str, Any], rows: Path | Sequence[Row], *, metric: str) -> LocalTask:
    """The lm-eval task `task` on `rows`, or on those of a JSONL file, known as `name`, reported by `metric`.

    A metric that lm-eval takes of several filters' answers is written METRIC,FILTER, such as
    `exact_match,strict-match`; without a filter it is that of the task's first one. Every row is checked (`check`).
    Raises UserError for an unknown task, key, metric or filter, a missing column, a gold answer that is not one of the
    choices, and for answers that are to be drawn instead of written greedily. It names the place where a row was read.
    """
    config = _config(name, task)
    rows = read_rows(rows) if isinstance(rows, str | Path) else _as_written(rows)
    try:
        with _named(f"task {name}", rows, config):
            made = LocalTask(rows=rows, config=config, metric=metric)
    except UserError:
        # lm-eval reads the first document, and process_docs all of them
        if at := _culprit(rows, config, metric):
            with _named(f"task {name}, {at}", rows, config):
                LocalTask(rows=rows, config=config, metric=metric)
        raise
    known = sorted(made.aggregation())
    perplexity = made.OUTPUT_TYPE == "loglikelihood_rolling" and metric == "perplexity"  # ours: exp(nats per token)
    if metric.partition(",")[0] not in known and not perplexity:
        raise UserError(f"task {name}: metric {metric!r} is not one of its metrics {known}: name one of them")
    filters = [one.name for one in made._filters]
    if metric.partition(",")[2] not in ("", *filters):
        raise UserError(f"task {name}: metric {metric!r} names none of its filters {filters}: write METRIC,FILTER with one of them")
    if made.OUTPUT_TYPE == "generate_until":
        _greedy(made)
    check(made)
    return made


def check(task: LocalTask) -> None:
    """Refuse documents whose prompt or target cannot be made, and those whose gold answer is not a valid choice."""
    for number, doc in enumerate(task.eval_docs, 1):
        with _named(f"task {task.config.task}, {task.place(number)}", task.rows, vars(task.config)):
            if task.OUTPUT_TYPE == "multiple_choice":
                gold_index(task, doc, task.place(number))
            elif task.OUTPUT_TYPE != "loglikelihood_rolling":
                task.doc_to_text(doc)
                if not task.doc_to_target(doc) and task.OUTPUT_TYPE == "loglikelihood":
                    raise _Unfit(f"the text to score is empty (doc_to_target: {task.config.doc_to_target!r})")


def gold_index(task: LocalTask, doc: Mapping[str, Any], at: str = "a row") -> int:
    """The index of the gold choice, as lm-eval reads it (the first of several); UserError where there is none."""
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    for answer in gold if isinstance(gold, list) and gold else [gold]:
        valid = 0 <= answer < len(choices) if isinstance(answer, int) else answer in choices
        if not valid:
            # lm-eval takes the name of a column that is not there for the answer itself, and scores 0.0
            absent = answer in (task.config.doc_to_target, task.config.doc_to_text) and isinstance(answer, str)
            reason = f"no column {answer!r} (columns: {sorted(doc)}), so " if absent else ""
            raise UserError(
                f"task {task.config.task}: {reason}{at}'s gold answer {answer!r} is not one of its {len(choices)} "
                f"choices {[str(c)[:40] for c in choices]}: "
                + ("rename the column in `columns:`" if absent else "correct the rows or the task's doc_to_target")
            )
    first = gold[0] if isinstance(gold, list) else gold
    return first if isinstance(first, int) else choices.index(first)


def _solution(task: LocalTask, doc: Mapping[str, Any]) -> str:
    """The text that answers a question in full: the target, the first of several."""
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    return str(target[0] if isinstance(target, list) else target)


def _greedy(task: LocalTask) -> None:
    """Refuse what would make two runs on equal weights write different answers, and settings nobody would follow."""
    name, settings = task.config.task, task.config.generation_kwargs or {}
    for key, value in settings.items():
        if key in ("temperature", "do_sample"):
            if value:
                raise UserError(f"task {name}: generation_kwargs.{key} is {value!r}, but answers are written greedily, so that "
                                "equal weights score equally: set `do_sample: false` and leave temperature out")  # fmt: skip
        elif key not in ("until", *LENGTHS):
            raise UserError(f"task {name}: generation_kwargs.{key} is not followed (until, {LENGTHS[0]} and greedy decoding are): "
                            "leave it out")  # fmt: skip
    if task.config.repeats != 1:
        raise UserError(f"task {name}: repeats is {task.config.repeats}, but greedy answers are all the same: set `repeats: 1`")


def doc_hash(doc: Mapping[str, Any]) -> str:
    """lm-eval's doc_hash: sha256 of the document as it writes it down."""
    return hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False))


def render(task: LocalTask) -> list[dict[str, Any]]:
    """The rows as the task asks them: {"id", "context", "choices", "gold"}, text and delimiters as lm-eval sends them.

    `choices` begin with the target delimiter. Where the metric is acc_norm a row also has "norm", the lengths in
    characters by which lm-eval divides the choices' log-likelihoods. A task of one continuation (LAMBADA) has one
    choice, gold 0; so has a task whose answers are written (GSM8K), its choice the whole target, and the row has "end",
    for end of text belongs behind it. `id` is lm-eval's doc_hash.
    """
    name, rendered = task.config.task, []
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood", "generate_until") or task.multiple_input:
        raise UserError(
            f"task {name} cannot be rendered as a context with choices "
            f"({'its choices stand in the context' if task.multiple_input else task.OUTPUT_TYPE}): "
            "it can be scored, but not trained on or probed"
        )
    for doc in task.eval_docs:
        context = task.fewshot_context(doc, num_fewshot=0, gen_prefix=task.doc_to_prefix(doc))
        row: dict[str, Any] = {"id": doc_hash(doc), "context": context}
        if task.OUTPUT_TYPE == "loglikelihood":
            row |= {"choices": [task.doc_to_target(doc)], "gold": 0}
        elif task.OUTPUT_TYPE == "generate_until":
            row |= {"choices": [f"{task.config.target_delimiter}{_solution(task, doc)}"], "gold": 0, "end": True}
        else:
            choices = task.doc_to_choice(doc)
            row["choices"] = [f"{task.config.target_delimiter}{choice}" for choice in choices]
            row["gold"] = gold_index(task, doc)
            if task.metric == "acc_norm":
                row["norm"] = [len(choice) for choice in choices]
        rendered.append(row)
    return rendered


def _config(name: str, task: str | Mapping[str, Any]) -> dict[str, Any]:
    config = shipped_config(task) if isinstance(task, str) else dict(task)
    if not isinstance(task, str) and "include" in config:
        config = shipped_config(config.pop("include")) | config
    config = deepcopy(config)
    if "class" in config:
        raise UserError(f"task {name}: {task!r} is written in Python, not YAML, and cannot run on local rows")
    for key in ("tag", "group", "task_list", "task_alias", "dataset_path", "dataset_name", "dataset_kwargs"):
        config.pop(key, None)
    for key in config:
        if key not in TASK_KEYS:
            near = difflib.get_close_matches(key, TASK_KEYS, n=1)
            raise UserError(f"task {name}: unknown key {key!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    if "doc_to_choice" in config:
        config.setdefault("output_type", "multiple_choice")
    shots = (config.get("fewshot_config") or {}) | {"split": None}
    if config.get("num_fewshot") and not shots.get("samples"):
        raise UserError(f"task {name}: num_fewshot is {config['num_fewshot']}, but the rows scored are no examples to "
                        "show: give `fewshot_config: {samples: [...]}`, or num_fewshot 0")
    metadata = config.get("metadata")
    return config | {
        "task": name,
        "training_split": None,
        "validation_split": None,
        "test_split": SPLIT,
        "fewshot_split": None,
        "fewshot_config": shots if config.get("fewshot_config") else None,
        "num_fewshot": config.get("num_fewshot") or 0,
        "metadata": metadata if isinstance(metadata, dict) else {},
    }


def _as_written(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows as they are read back from a file that holds them."""
    return [Row(json.loads(json.dumps(row, sort_keys=True, default=str)), at=place(row, number)) for number, row in enumerate(rows, 1)]


def _filled(rows: Sequence[Row]) -> list[dict[str, Any]]:
    # datasets takes the columns of the first row: give every row every column, in order of appearance
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column) for column in columns} for row in rows]


def _dataset(rows: Sequence[Row]) -> datasets.Dataset:
    """The rows with their values as they are: a column whose values have no one type, which Arrow refuses, is held as JSON.

    So is a column of whole and broken numbers, of which Arrow would make broken ones: a choice 3 stays "3", not "3.0".
    """
    filled = _filled(rows)
    mixed = [column for column in filled[0] if not _one_type([row[column] for row in filled])]
    if not mixed:
        return datasets.Dataset.from_list(filled)
    typed = datasets.Dataset.from_list([{c: value for c, value in row.items() if c not in mixed} for row in filled]).features
    features = {column: datasets.Json() if column in mixed else typed[column] for column in filled[0]}
    return datasets.Dataset.from_list(filled, features=datasets.Features(features))


def _one_type(values: Sequence[Any]) -> bool:
    """Whether the values, but for nulls, are of one type, and so are what lists hold and what objects hold by one name."""
    values = [value for value in values if value is not None]
    kinds = {type(value) for value in values}
    if kinds == {list}:
        return _one_type([inner for value in values for inner in value])
    if kinds == {dict}:
        names = {name for value in values for name in value}
        return all(_one_type([value[name] for value in values if name in value]) for name in names)
    return len(kinds) <= 1


def _culprit(rows: Sequence[Row], config: Mapping[str, Any], metric: str) -> str:
    """The place of a row of which alone lm-eval can make no task; nothing where only several together do not go."""

    def fails(some: Sequence[Row]) -> bool:
        try:
            LocalTask(rows=some, config=deepcopy(dict(config)), metric=metric)
        except Exception:
            return True
        return False

    rows = [Row(filled, at=place(row, number)) for number, (row, filled) in enumerate(zip(rows, _filled(rows), strict=True), 1)]
    while len(rows) > 1:
        half = rows[: len(rows) // 2]
        rows = half if fails(half) else rows[len(rows) // 2 :]
    return rows[0].at if fails(rows) else ""


@contextlib.contextmanager
def _named(what: str, rows: Sequence[Row], config: Mapping[str, Any]) -> Iterator[None]:
    """Errors of a prompt that asks for a column the rows lack, told as such."""
    columns = sorted({column for row in rows[:100] for column in row})
    try:
        yield
    except UserError:
        raise
    except _Unfit as error:
        raise UserError(f"{what}: {error}: correct the rows or the task") from error
    except ImportError as error:
        raise UserError(lacks_package(what, error)) from error
    except KeyError as error:
        raise UserError(f"{what}: no column {error} (columns: {columns}): rename it in `columns:`") from error
    except Exception as error:  # templates, and functions of lm-eval that process rows, fail in any way on rows that do not fit
        # a missing value inside a list reaches lm-eval as the word `Undefined`, and the error says nothing of it
        absent = sorted(_asked(config) - {column for row in rows for column in row})
        if absent and not config.get("process_docs"):
            told = f"no column {', '.join(map(repr, absent))} (columns: {columns}): rename it in `columns:`"
            raise UserError(f"{what}: {told}") from error
        raise UserError(f"{what}: a row does not fit the task's prompt ({type(error).__name__}: {error})") from error


def _asked(config: Mapping[str, Any]) -> set[str]:
    """The columns that the task's templates name."""
    templates = [config.get(key) for key in ("doc_to_text", "doc_to_choice", "doc_to_target")]
    return {
        column
        for template in templates
        if isinstance(template, str) and "{" in template
        for column in jinja2.meta.find_undeclared_variables(jinja_env.parse(template))
    }
