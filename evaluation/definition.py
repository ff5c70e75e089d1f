"""A task as params.yaml names or writes it, as lm-eval's own configuration on local rows."""

import difflib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from typing import Any, Literal

import jinja2
import jinja2.meta
import lm_eval.api.metrics  # noqa: F401 (which registers them)
from lm_eval.api.registry import metric_registry
from lm_eval.config.task import TaskConfig

from evaluation.shipped import refuse_unsafe, shipped_config
from evaluation.templates import environment
from methods.errors import UserError, shortened
from methods.settings import refuse, shown

SPLIT = "test"
TEMPLATES = ("doc_to_text", "doc_to_choice", "doc_to_target", "description", "gen_prefix")
# the types of lm-eval's YAML keys whose values no other check covers; a function of an included task is valid too
FORMS: dict[str, Any] = {
    "num_fewshot": int,
    "fewshot_config": dict,
    "doc_to_choice": str | list | dict,
    "doc_to_target": str | int,
    "generation_kwargs": dict,
    "output_type": Literal["loglikelihood", "loglikelihood_rolling", "generate_until", "multiple_choice"],
    "repeats": int,
    "should_decontaminate": bool,
    "gen_prefix": str,
    "use_prompt": str,
    "metadata": dict,
}
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names of one setting
TASK_KEYS = {field.name for field in fields(TaskConfig)} | {"include"}


def config_of(name: str, task: str | Mapping[str, Any]) -> dict[str, Any]:
    config = shipped_config(task) if isinstance(task, str) else dict(task)
    if not isinstance(task, str) and "include" in config:
        refuse(config["include"], str, where=f"task {name}: include")
        config = shipped_config(config.pop("include")) | config
    config = deepcopy(config)
    if "class" in config:
        raise UserError(
            f"task {name}: {task!r} is written in Python, not YAML, and cannot run on rows of one's own: leave `rows` "
            "out of its block under `tasks`, and it runs on lm-eval's"
        )
    refuse_unsafe(name, config)
    config.pop("unsafe_code", None)
    for key in ("tag", "group", "task_list", "task_alias", "dataset_path", "dataset_name", "dataset_kwargs"):
        config.pop(key, None)
    refuse_keys(name, config)
    _refuse_forms(name, config)
    _refuse_generation(name, config.get("generation_kwargs") or {})
    _refuse_metrics(name, config)
    if "doc_to_choice" in config:
        config.setdefault("output_type", "multiple_choice")
    shots = (config.get("fewshot_config") or {}) | {"split": None}
    if config.get("num_fewshot") and not shots.get("samples"):
        raise UserError(
            f"task {name}: num_fewshot is {config['num_fewshot']}, but the rows scored are no examples to "
            "show: give `fewshot_config: {samples: [...]}`, or num_fewshot 0, or leave `rows` out for lm-eval's own"
        )
    if isinstance(shots.get("samples"), list) and (config.get("num_fewshot") or 0) > len(shots["samples"]):
        raise UserError(
            f"task {name}: num_fewshot is {config['num_fewshot']}, and fewshot_config has {len(shots['samples'])} "
            "samples: lower it"
        )
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


def _refuse_metrics(name: str, config: Mapping[str, Any]) -> None:
    """Refuse metrics that lm-eval would download as program code."""
    for entry in config.get("metric_list") or ():
        metric, own = entry.get("metric"), callable(config.get("process_results"))
        fetched = isinstance(metric, str) and not own and metric not in metric_registry
        if fetched or entry.get("hf_evaluate"):
            why = "not one of lm-eval's own metrics" if fetched else "to be downloaded (hf_evaluate: true)"
            raise UserError(
                f"task {name}: {metric!r} in metric_list is {why}, and code of others is not downloaded: choose among "
                f"lm-eval's own ({', '.join(sorted(metric_registry))}); the list of a shipped task is replaced beside "
                "`include:`"
            )


def refuse_keys(name: str, config: Mapping[str, Any]) -> None:
    """Refuse keys that lm-eval does not know, and values of another type or range than a key's."""
    for key in config:
        if key not in TASK_KEYS:
            near = difflib.get_close_matches(key, TASK_KEYS, n=1)
            raise UserError(f"task {name}: unknown key {key!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    for key, kind in FORMS.items():
        if config.get(key) is not None and not callable(config[key]):
            refuse(config[key], kind, where=f"task {name}: {key}")
    if ".yaml" in str(config.get("use_prompt") or ""):
        raise UserError(
            f"task {name}: use_prompt is {config['use_prompt']!r}, a file that lm-eval would read outside of this "
            "project's checks: write its templates as `doc_to_text` and `doc_to_target`"
        )
    if (config.get("num_fewshot") or 0) < 0:
        raise UserError(f"task {name}: num_fewshot is {config['num_fewshot']}: it must be 0 or more")


def refuse_unusable(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a task of lm-eval's own that cannot be scored here; `config` is its YAML file's with its functions."""
    refuse_unsafe(name, config)
    if callable(config.get("custom_dataset")):
        raise UserError(
            f"task {name}: its own Python code makes or fetches its rows (custom_dataset), which is not run here: "
            "choose another task"
        )
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise UserError(f"task {name}: it shows images or sounds, and Holdfast scores models of text: choose another")
    _refuse_generation(name, config.get("generation_kwargs") or {})
    _refuse_metrics(name, config)


def _refuse_forms(name: str, config: Mapping[str, Any]) -> None:
    """Refuse values at which lm-eval would fail without naming the key, or which it would ignore."""
    for key in ("process_docs", "process_results", "custom_dataset"):
        if isinstance(config.get(key), str):
            raise UserError(
                f"task {name}: {key} is a function, which params.yaml cannot hold: start from a task that has it with "
                "`include:`"
            )
    for key, needed in (("metric_list", "metric"), ("filter_list", "filter")):
        entries = [] if config.get(key) is None else config[key]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and needed in entry for entry in entries):
            such = "[{metric: acc}]" if needed == "metric" else "[{name: first, filter: [{function: take_first}]}]"
            raise UserError(f"task {name}: {key} must be a list of mappings with `{needed}`, such as {such}")
    for entry in config.get("metric_list") or ():
        if not isinstance(entry["metric"], str) and not callable(entry["metric"]):
            raise UserError(
                f"task {name}: metric_list names {shown(entry['metric'])}: write a metric's name: {{metric: acc}}"
            )
        if "higher_is_better" in entry:
            where = f"task {name}: higher_is_better of {entry['metric']} in metric_list"
            refuse(entry["higher_is_better"], bool | None, where=where)
    for entry in config.get("filter_list") or ():
        if not isinstance(entry.get("name"), str) or not isinstance(entry["filter"], list):
            raise UserError(f"task {name}: every entry of filter_list has a `name` and a list of `filter`")
    kind = config.get("output_type") or ("multiple_choice" if "doc_to_choice" in config else "generate_until")
    if kind == "multiple_choice" and config.get("doc_to_choice") is None and not config.get("use_prompt"):
        raise UserError(
            f"task {name}: it is a task of choices without `doc_to_choice`: write a column's name, a template or a "
            "list of choices"
        )
    if kind != "loglikelihood_rolling" and "doc_to_text" not in config and not config.get("use_prompt"):
        raise UserError(
            f"task {name}: it has no `doc_to_text`: write a column's name or a template, such as 'Q: {{{{question}}}}'"
        )
    text = config.get("doc_to_text", "")
    if not isinstance(text, str | int) and not callable(text):
        raise UserError(
            f"task {name}: doc_to_text is {text!r}: write a column's name or a template, such as 'Q: {{{{question}}}}'"
        )
    for key in ("target_delimiter", "fewshot_delimiter", "description"):
        if key in config and not isinstance(config[key], str) and not callable(config[key]):
            raise UserError(f"task {name}: {key} is {config[key]!r}: write a text, '' for none")
    for key in TEMPLATES:
        if isinstance(template := config.get(key), str):
            try:
                environment.parse(template)
                environment.from_string(template)
            except Exception as error:  # a template is a program, and may raise anything while it is compiled
                why = str(error) if isinstance(error, jinja2.TemplateError) else shortened(error)
                raise UserError(f"task {name}: {key} {template[:60]!r} is not a valid template: {why}") from error


def _refuse_generation(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings with which equal weights would give different answers, and settings that are not supported."""
    for key, value in settings.items():
        if key in ("temperature", "do_sample"):
            if value:
                raise UserError(
                    f"task {name}: generation_kwargs.{key} is {value!r}, but answers are written greedily, so that "
                    "equal weights score equally: set `do_sample: false` and leave temperature out"
                )
        elif key in LENGTHS:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(
                    f"task {name}: generation_kwargs.{key} is {value!r}: it must be a whole number of tokens, 1 or more"
                )
        elif key == "until":
            stops = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(stop, str) and stop for stop in stops):
                raise UserError(
                    f"task {name}: generation_kwargs.until is {value!r}: it must be a text, or a list of texts, at "
                    "which an answer ends, and none of them empty"
                )
        else:
            raise UserError(
                f"task {name}: generation_kwargs.{key} is not supported (until, {LENGTHS[0]} and greedy decoding are): "
                "leave it out"
            )


def columns_named(config: Mapping[str, Any]) -> set[str]:
    """The columns that the task's templates name."""
    return {
        column
        for template in _templates(config)
        if "{" in template
        for column in jinja2.meta.find_undeclared_variables(environment.parse(template))
    }


def columns_read(config: Mapping[str, Any]) -> set[str]:
    """The columns that the task's templates name, and those that are named in place of a template."""
    return columns_named(config) | {template for template in _templates(config) if "{" not in template}


def _templates(config: Mapping[str, Any]) -> list[str]:
    return [config[key] for key in TEMPLATES if isinstance(config.get(key), str)]
