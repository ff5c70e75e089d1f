"""lm-eval tasks on rows of our own: the shipped prompt and metric, without its index, hub or cache.

A task is named as lm-eval names it ("sciq", "hellaswag") or given as a mapping of lm-eval's own YAML keys; such a
mapping may start from a shipped one with `include: sciq`. The rows are a JSONL file. Everything that would make
lm-eval score 0.0 in silence (a missing column, a gold answer that is no choice) is refused here by name.
"""

import contextlib
import difflib
import functools
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import jinja2.meta
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.task import TaskConfig
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import env as jinja_env, handle_non_serializable, hash_string

from evaluation.shipped import shipped_yaml
from experiments.errors import UserError

SPLIT = "test"
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names of one setting
TASK_KEYS = {field.name for field in fields(TaskConfig)} | {"include"}

# lm-eval compiles a template again at every use: most of the time that scoring spends outside the model
if not hasattr(jinja_env.from_string, "cache_info"):
    jinja_env.from_string = functools.lru_cache(maxsize=256)(jinja_env.from_string)


class LocalTask(ConfigurableTask):
    """An lm-eval task whose documents are rows held in memory: nothing is downloaded, nothing is cached."""

    def __init__(self, *, rows: list[dict[str, Any]], config: dict[str, Any], metric: str) -> None:
        self.rows, self.metric = rows, metric
        with quiet():
            super().__init__(config=config)

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


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file. Raises UserError for a missing or empty file and for a line that is no JSON object."""
    if not Path(file).is_file():
        raise UserError(f"rows file {file} does not exist: run the `data` stage first, or correct the path")
    rows = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file} line {number} is not JSON ({error}): write one JSON object a line") from error
            if not isinstance(row, dict):
                raise UserError(f"{file} line {number} is {type(row).__name__}: write one JSON object a line")
            rows.append(row)
    if not rows:
        raise UserError(f"rows file {file} is empty: the set needs at least one row")
    return rows


def make_task(name: str, task: str | Mapping[str, Any], rows_file: Path, *, metric: str) -> LocalTask:
    """The lm-eval task `task` on the rows of `rows_file`, known as `name`, reported by `metric`.

    A metric that lm-eval takes of several filters' answers is written METRIC,FILTER, such as
    `exact_match,strict-match`; without a filter it is that of the task's first one. Every row is checked (`check`).
    Raises UserError for an unknown task, key, metric or filter, a missing column, a gold answer that is not one of the
    choices, and for answers that are to be drawn instead of written greedily.
    """
    config = _config(name, task)
    rows = read_rows(rows_file)
    with _named(f"task {name} ({rows_file})", rows, config):
        made = LocalTask(rows=rows, config=config, metric=metric)
    known = sorted(made.aggregation())
    perplexity = made.OUTPUT_TYPE == "loglikelihood_rolling" and metric == "perplexity"  # ours: exp(nats per token)
    if metric.partition(",")[0] not in known and not perplexity:
        raise UserError(f"task {name}: metric {metric!r} is not one of its metrics {known}: name one of them")
    filters = [one.name for one in made._filters]
    if metric.partition(",")[2] not in ("", *filters):
        raise UserError(f"task {name}: metric {metric!r} names none of its filters {filters}: write METRIC,FILTER with one of them")
    if made.OUTPUT_TYPE == "generate_until":
        _greedy(made)
    check(made, rows)
    return made


def check(task: LocalTask, rows: Iterable[Mapping[str, Any]], columns: Iterable[str] = ()) -> None:
    """Refuse rows that lack one of `columns` and rows of `task` whose gold answer is not a valid choice."""
    name = task.config.task
    for number, row in enumerate(rows, 1):
        for column in columns:
            if row.get(column) is None:
                raise UserError(
                    f"task {name}: row {number} has no {column!r} (it has {sorted(row)}): "
                    "rename the column in the task's `columns:` or choose other rows"
                )
    if task.OUTPUT_TYPE == "multiple_choice":
        for number, doc in enumerate(task.eval_docs, 1):
            with _named(f"task {name}, row {number}", task.rows, vars(task.config)):
                gold_index(task, doc, number)


def gold_index(task: LocalTask, doc: Mapping[str, Any], number: int | None = None) -> int:
    """The index of the gold choice, as lm-eval reads it (the first of several); UserError where there is none."""
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    for answer in gold if isinstance(gold, list) and gold else [gold]:
        valid = 0 <= answer < len(choices) if isinstance(answer, int) else answer in choices
        if not valid:
            where = "a row" if number is None else f"row {number}"
            # lm-eval takes the name of a column that is not there for the answer itself, and scores 0.0
            absent = answer in (task.config.doc_to_target, task.config.doc_to_text) and isinstance(answer, str)
            reason = f"no column {answer!r} (columns: {sorted(doc)}), so " if absent else ""
            raise UserError(
                f"task {task.config.task}: {reason}{where}'s gold answer {answer!r} is not one of its {len(choices)} "
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
    config = load_yaml(shipped_yaml(task)) if isinstance(task, str) else dict(task)
    if not isinstance(task, str) and "include" in config:
        config = load_yaml(shipped_yaml(config.pop("include"))) | config
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


def _dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    # datasets takes the columns of the first row: give every row every column, in order of appearance
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return datasets.Dataset.from_list([{column: row.get(column) for column in columns} for row in rows])


@contextlib.contextmanager
def _named(what: str, rows: list[dict[str, Any]], config: Mapping[str, Any]) -> Iterator[None]:
    """Errors of a prompt that asks for a column the rows lack, told as such."""
    columns = sorted(rows[0])
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{what}: no column {error} (columns: {columns}): rename it in `columns:`") from error
    except (jinja2.TemplateError, TypeError, ValueError, IndexError, AttributeError, SyntaxError) as error:
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
