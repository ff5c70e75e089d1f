"""A task as params.yaml names or writes it, as lm-eval's own configuration on local rows."""

import difflib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from typing import Any

import jinja2.meta
import lm_eval.api.metrics  # noqa: F401 (which registers them)
from lm_eval.api.registry import metric_registry
from lm_eval.config.task import TaskConfig
from lm_eval.utils import env as jinja_env

from evaluation.shipped import shipped_config
from experiments.errors import UserError

SPLIT = "test"
TASK_KEYS = {field.name for field in fields(TaskConfig)} | {"include"}


def config_of(name: str, task: str | Mapping[str, Any]) -> dict[str, Any]:
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
    for entry in config.get("metric_list") or ():
        fetched = isinstance(entry.get("metric"), str) and not callable(config.get("process_results")) and entry["metric"] not in metric_registry
        if fetched or entry.get("hf_evaluate"):
            raise UserError(f"task {name}: {entry.get('metric')!r} in metric_list is none of lm-eval's own metrics "
                            f"({', '.join(sorted(metric_registry))}), and program code of others is not fetched: choose one of these")  # fmt: skip
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


def columns_asked(config: Mapping[str, Any]) -> set[str]:
    """The columns that the task's templates name."""
    return {
        column
        for template in _templates(config)
        if "{" in template
        for column in jinja2.meta.find_undeclared_variables(jinja_env.parse(template))
    }


def columns_read(config: Mapping[str, Any]) -> set[str]:
    """The columns that the task's templates name, and those that stand in a template's place."""
    return columns_asked(config) | {template for template in _templates(config) if "{" not in template}


def _templates(config: Mapping[str, Any]) -> list[str]:
    keys = ("doc_to_text", "doc_to_choice", "doc_to_target", "description", "gen_prefix")
    return [config[key] for key in keys if isinstance(config.get(key), str)]
