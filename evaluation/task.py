"""lm-eval tasks on rows of our own: the shipped prompt and metric, without its index, hub or cache.

A task is named as lm-eval names it ("sciq", "hellaswag") or given as a mapping of lm-eval's own YAML keys; such a
mapping may start from a shipped one with `include: sciq`. The rows are a JSONL file, or in memory. Everything that
would make lm-eval score 0.0 in silence (a missing column, a gold answer that is no choice, a null cell) is refused here
by name.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.utils import handle_non_serializable, hash_string

from evaluation import gold as golds
from evaluation import nulls
from evaluation.definition import columns_named, columns_read, config_of
from evaluation.local import LocalTask, Unfit, filled, quiet
from evaluation.measure import measured
from evaluation.shipped import lacks_package
from methods.errors import UserError, shortened
from methods.tools import jsonl
from methods.tools.jsonl import Row, place

__all__ = ["LocalTask", "check", "doc_hash", "gold_index", "make_task", "quiet", "read_rows", "render"]

HASH_DIGITS = 16  # of a doc_hash in items.csv.gz: two of a million rows are alike in 1 of 10^7 sets
SEED = 1234  # of the draw of few-shot examples: lm-eval's own default


def read_rows(file: Path) -> list[Row]:
    """Rows of a JSONL file. Raises UserError for a missing or empty file and for a line that is no JSON object."""
    if not Path(file).is_file():
        raise UserError(f"rows file {file} does not exist: run the `data` stage first, or correct the path")
    rows = jsonl.read(file)
    if not rows:
        raise UserError(f"rows file {file} is empty: the set needs at least one row")
    return rows


def make_task(name: str, task: str | Mapping[str, Any], rows: Path | Sequence[Row], *, metric: str | None) -> LocalTask:
    """The lm-eval task `task` on `rows`, or on those of a JSONL file, known as `name`, reported by `metric`.

    Without a metric it is the task's first.
    A metric that lm-eval takes of several filters' answers is written METRIC,FILTER, such as
    `exact_match,strict-match`; without a filter it is that of the task's first one. Every row is checked (`check`), and
    the metric is tried on made-up answers to all of them (evaluation/measure.py). Raises UserError for an unknown task,
    key, metric or filter, a missing column, a gold answer that is not one of the choices, and for answers that are to
    be drawn instead of written greedily. It names the place where a row was read.
    """
    config = config_of(name, task)
    rows = read_rows(rows) if isinstance(rows, str | Path) else _as_written(rows)
    try:
        with _named(f"task {name}", rows, config):
            made = LocalTask(rows=rows, config=config)
    except UserError:
        if row := _culprit(rows, config):
            only = len(rows) == 1 or not _fails(rows[-1:] if rows[-1].at != row.at else rows[:1], config)
            with _named(f"task {name}", rows, config, row=row, at=f", {row.at}", only=only):
                LocalTask(rows=rows, config=config)
        raise
    made.metric = metric = metric or next(iter(made.aggregation()))
    perplexity = task == "general_text" and metric == "perplexity"  # ours: exp(nats per token)
    if not perplexity:
        refuse_metric(made)
    if made.OUTPUT_TYPE == "generate_until" and made.config.repeats != 1:
        raise UserError(
            f"task {name}: repeats is {made.config.repeats}, but greedy answers are all the same: set `repeats: 1`"
        )
    instances = check(made)
    made.measure = None if perplexity else measured(made, metric, instances)
    return made


def refuse_metric(task: LocalTask) -> None:
    """Refuse a metric or a filter that the task does not have."""
    name, (metric, _, filter) = task.config.task, task.metric.partition(",")
    known, filters = sorted(task.aggregation()), [one.name for one in task._filters]
    if metric not in known:
        raise UserError(f"task {name}: metric {task.metric!r} is not one of its metrics {known}: name one of them")
    if filter not in ("", *filters):
        raise UserError(
            f"task {name}: metric {task.metric!r} names none of its filters {filters}: write METRIC,FILTER with one of "
            "them"
        )


def check(task: LocalTask) -> list[list[Instance]]:
    """lm-eval's requests for each row.

    Raises UserError for a document whose prompt or target cannot be made, that would write null, or whose gold answer
    is not a valid choice.
    """
    task.set_fewshot_seed(SEED)
    _check_examples(task)
    made = []
    for number, doc in enumerate(task.eval_docs, 1):
        with _named(f"task {task.config.task}", task.rows, vars(task.config), row=doc, at=f", {task.place(number)}"):
            made.append(requests(task, doc))
            if task.OUTPUT_TYPE == "multiple_choice":
                gold_index(task, doc, task.place(number))
            elif task.OUTPUT_TYPE == "loglikelihood" and not made[-1][0].args[1]:
                raise Unfit(f"the text to score is empty (doc_to_target: {task.config.doc_to_target!r})")
    return made


def _check_examples(task: LocalTask) -> None:
    """Refuse few-shot examples that do not fit the task by their own number; lm-eval would fail at the first row."""
    shots = task.config.fewshot_config
    if not task.config.num_fewshot or shots is None or shots.process_docs or not isinstance(shots.samples, list):
        return
    alike = (shots.doc_to_target, shots.doc_to_choice) == (task.config.doc_to_target, task.config.doc_to_choice)
    for number, example in enumerate(shots.samples, 1):
        at = f"example {number} of fewshot_config.samples"
        with _named(f"task {task.config.task}", task.rows, vars(task.config), row=example, at=f", {at}"):
            if not isinstance(example, Mapping):
                raise Unfit(f"{example!r:.60} is not a mapping of columns to values")
            task.doc_to_text(example, shots.doc_to_text)
            if task.OUTPUT_TYPE != "multiple_choice":
                task.doc_to_target(example, shots.doc_to_target)
            elif alike:
                gold_index(task, example, at)


def gold_index(task: LocalTask, doc: Mapping[str, Any], at: str = "a row") -> int:
    """The index of the gold choice, as lm-eval reads it (the first of several); UserError where there is none."""
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, list) != bool(task.multiple_target):
        first = "a list" if task.multiple_target else "one"
        raise UserError(
            f"task {task.config.task}: {at} has the gold answer {gold!r}, the first row has {first}: write a list in "
            "every row or in none"
        )
    for answer in gold if isinstance(gold, list) and gold else [gold]:
        valid = 0 <= answer < len(choices) if isinstance(answer, int) else answer in choices
        if not valid:
            # lm-eval would read the name of a missing column as the answer itself, and score 0.0
            absent = answer in (task.config.doc_to_target, task.config.doc_to_text) and isinstance(answer, str)
            reason = f"no column {answer!r} (columns: {sorted(doc)}), so " if absent else ""
            remedy = "rename the column in `columns:`" if absent else "correct the rows or the task's doc_to_target"
            raise UserError(
                f"task {task.config.task}: {reason}{at}'s gold answer {answer!r} is not one of its {len(choices)} "
                f"choices {[str(c)[:40] for c in choices]}: {remedy}"
            )
    first = gold[0] if isinstance(gold, list) else gold
    return int(first) if isinstance(first, int) else choices.index(first)


def requests(task: LocalTask, doc: Mapping[str, Any]) -> list[Instance]:
    """lm-eval's requests for one row: `args` are (context, continuation) by choice, (text,), or (context, settings)."""
    context = task.fewshot_context(doc, num_fewshot=task.config.num_fewshot or 0, gen_prefix=task.doc_to_prefix(doc))
    made = task.construct_requests(doc, context, metadata=(task.config.task, 0, 1))
    instances = made if isinstance(made, list) else [made]
    for text in (part for one in instances for part in one.args if not isinstance(part, dict)):
        if not isinstance(text, str):
            raise Unfit(f"{text!r:.80} would be a prompt or an answer, and is not a text")
    return instances


def _solution(task: LocalTask, doc: Mapping[str, Any]) -> str:
    """The delimiter and the text that answers a question in full: the target, or the first of several."""
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    target = str(target[0] if isinstance(target, list) else target)
    if prefix := task.doc_to_prefix(doc):  # as lm-eval joins them in a few-shot example
        return target if prefix[-1].isspace() or target[:1].isspace() else f" {target}"
    return f"{task.config.target_delimiter}{target}"


def doc_hash(doc: Mapping[str, Any]) -> str:
    """lm-eval's doc_hash: sha256 of the document as it writes it down."""
    return hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False))


def render(task: LocalTask) -> list[dict[str, Any]]:
    """The rows as lm-eval sends them to a model: {"id", "context", "choices", "gold"} with text and delimiters.

    id       lm-eval's doc_hash
    context  with the description and the few-shot examples that scoring shows
    asked    the context without the examples, if there are any
    choices  each with the target delimiter before it; one for a task of one continuation (LAMBADA), gold 0; one, the
             whole target, for a task of written answers (GSM8K)
    norm     for acc_norm and acc_bytes: the lengths by which lm-eval divides the choices' log-likelihoods
    less     for acc_mutual_info: the choices' log-likelihoods without a context are subtracted
    greedy   for exact_match: the gold choice has to be what the model writes
    end      for written answers: an end of text follows the choice
    """
    name, rendered = task.config.task, []
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood", "generate_until") or task.multiple_input:
        raise UserError(
            f"task {name} cannot be rendered as a context with choices "
            f"({'its choices are in the context' if task.multiple_input else task.OUTPUT_TYPE}): it can be scored, "
            "but not trained on or probed"
        )
    task.set_fewshot_seed(SEED)
    for doc in task.eval_docs:
        arguments = [one.args for one in requests(task, doc)]
        row: dict[str, Any] = {"id": doc_hash(doc), "context": arguments[0][0]}
        if task.config.num_fewshot:
            row["asked"] = task.fewshot_context(doc, num_fewshot=0, gen_prefix=task.doc_to_prefix(doc))
        if task.OUTPUT_TYPE == "loglikelihood":
            row |= {"choices": [arguments[0][1]], "gold": 0}
        elif task.OUTPUT_TYPE == "generate_until":
            row |= {"choices": [_solution(task, doc)], "gold": 0, "end": True}
        else:
            choices = task.doc_to_choice(doc)
            row["choices"] = [continuation for _, continuation in arguments[: len(choices)]]
            row["gold"] = gold_index(task, doc)
            if (metric := task.metric.partition(",")[0]) in ("acc_norm", "acc_bytes"):
                row["norm"] = [len(choice if metric == "acc_norm" else choice.encode()) for choice in choices]
            row |= {"acc_mutual_info": {"less": True}, "exact_match": {"greedy": True}}.get(metric, {})
        rendered.append(row)
    return rendered


def _as_written(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows as they are read back from a file that holds them."""
    texts = (json.dumps(row, sort_keys=True, default=str) for row in rows)
    return [Row(json.loads(text), at=place(row, n)) for n, (row, text) in enumerate(zip(rows, texts), 1)]


def _culprit(rows: Sequence[Row], config: Mapping[str, Any]) -> Row | None:
    """A row of which alone lm-eval cannot make a task; None if it fails on several together only."""
    rows = [Row(columns, at=place(row, n)) for n, (row, columns) in enumerate(zip(rows, filled(rows)), 1)]
    while len(rows) > 1:
        half = rows[: len(rows) // 2]
        rows = half if _fails(half, config) else rows[len(rows) // 2 :]
    return rows[0] if _fails(rows, config) else None


def _fails(rows: Sequence[Row], config: Mapping[str, Any]) -> bool:
    try:
        LocalTask(rows=rows, config=deepcopy(dict(config)))
    except Exception:
        return True
    return False


@contextlib.contextmanager
def _named(
    task: str,
    rows: Sequence[Row],
    config: Mapping[str, Any],
    *,
    row: Mapping[str, Any] | None = None,
    at: str = "",
    only: bool = True,
) -> Iterator[None]:
    """Turn whatever lm-eval raises on these rows into a UserError that names the task and the place.

    `row` is the current one and `at` its place; without `only`, other rows fail too, and the place is named where the
    row itself is at fault.
    """
    what, task = f"{task}{at}", f"{task}{at if only else ''}"
    try:
        yield
    except golds.Ambiguous as error:
        raise UserError(f"{what}: {error}") from error
    except UserError:
        raise
    except nulls.NullCell as error:
        raise UserError(f"{what}: {nulls.describe(row or rows[0], columns_read(config))}") from error
    except Unfit as error:
        raise UserError(f"{what}: {error}: correct the rows or the task") from error
    except ImportError as error:
        raise UserError(lacks_package(task.partition(",")[0], error)) from error
    except KeyError as error:
        message = " ".join(str(error.args[0] if error.args else error).split())[:300]
        if not re.fullmatch(r"[\w.-]+", message):  # lm-eval's own message, and not a column's name
            raise UserError(f"{task}: lm-eval cannot make the task ({message})") from error
        raise UserError(f"{task}: no column {error} (columns: {_columns(rows)}): rename it in `columns:`") from error
    except Exception as error:  # templates, and lm-eval's functions that process rows, may raise anything
        # a missing value inside a list reaches lm-eval as the word `Undefined`, which the error does not mention
        absent = sorted(columns_named(config) - {column for row in rows for column in row})
        if absent and not config.get("process_docs"):
            problem = f"no column {', '.join(map(repr, absent))} (columns: {_columns(rows)}): rename it in `columns:`"
            raise UserError(f"{task}: {problem}") from error
        if row and any(nulls.is_null(row.get(column)) for column in columns_read(config) & row.keys()):
            raise UserError(f"{what}: {nulls.describe(row, columns_read(config))}") from error
        which = "a row does" if only else "the rows do"
        raise UserError(
            f"{task}: {which} not fit the task ({shortened(error)}): correct the rows or the task"
        ) from error


def _columns(rows: Sequence[Row]) -> list[str]:
    return sorted({column for row in rows for column in row})
