"""Refuse names of params.yaml that would stand for two things: a file, a score or a row of a table has one owner."""

import json
from collections.abc import Mapping
from itertools import product

from experiments.study.names_of_tasks import ROLES
from experiments.study.schema import Domain, Params, Task, Tune
from methods.errors import UserError

# names under which Holdfast itself writes rows and scores of general text, beside domains and tasks
GENERAL = ("general", "general_text", "perplexity")
NATS = "_nll"  # suffix of a probe's nats per token
# what a trial of `tune` records beside its scores
TRIAL = "method settings key chosen tied end failed seconds".split()
BASE = "base"  # the row of the bare model among the methods
# folders of the default study in results/ and work/, where every other study has a folder of its own name
STUDIES = (
    "audits base bench cells data default downloads failures gpu gpu-check local models prepared resolved runs settled "
    "summary tuning"
).split()


def refuse_study(name: str) -> None:
    """Refuse a study whose folders would be those of the default study."""
    if name in STUDIES:
        raise UserError(
            f"a study cannot be called {name!r}: results/{name} and work/{name} belong to the default study; rename "
            "its folder"
        )


def refuse(params: Params) -> None:
    """Refuse a name that two things of a study would share; the message names the block to rename."""
    for domain, block in params.domains.items():
        _refuse_format(domain, block)
    used = {domain: params.domains[domain] for domain in params.grid.domains}
    scored = {
        task: f"domains.{domain}.{role}"
        for domain, block in reversed(used.items())
        for role in ("score", "transfer", "retention")
        for task in getattr(block, role)
    }
    named = dict.fromkeys(task for block in used.values() for role in ROLES for task in getattr(block, role))
    for kind, names in (("domains", used), ("tasks", named)):
        for name in names:
            _own(kind, name, params.tune)
    for name, block in used.items():
        if name in scored:
            raise UserError(
                f"domains.{name} and tasks.{name} share their name, and both are scored (the task for {scored[name]}): "
                f"the base model is scored once a name, so rename one of the blocks, such as tasks.{name}_task"
            )
        if name in block.probes:
            raise UserError(
                f"domains.{name} and tasks.{name} share their name, and both have probe rows (domains.{name}.probes): "
                f"rename one of the blocks, such as tasks.{name}_task"
            )
        first: dict[str, str] = {}
        for role in ("retention", "transfer", "score"):
            for task in getattr(block, role):
                if (other := first.setdefault(task, role)) != role:
                    raise UserError(
                        f"domains.{name}.{role} lists {task!r}, which is evaluated already under `{other}`: name each "
                        "task once"
                    )
        _same_rows(name, list(first), params.tasks)
    if BASE in params.grid.methods:
        raise UserError(
            f"grid.methods names {BASE!r}, which is what tables call the model before training: rename methods.{BASE}"
        )
    prepared: dict[str, tuple[str, str]] = {}
    for pair in product(params.grid.models, params.grid.methods):
        if (other := prepared.setdefault("-".join(pair), pair)) != pair:
            raise UserError(
                f"method {other[1]} of model {other[0]} and method {pair[1]} of model {pair[0]} share the stage name "
                f"prepare@{'-'.join(pair)}: rename one of the blocks"
            )


def _refuse_format(domain: str, block: Domain) -> None:
    """Refuse a domain without the keys of its format, or with those of another."""
    of_task = ("task", "metric", "chance")
    if block.rows is None and block.format != "task":
        raise UserError(f"domains.{domain} has no `rows`: add them")
    if block.format == "task":
        for key in ("task", "question", "split"):
            if getattr(block, key) is None:
                raise UserError(
                    f"domains.{domain} has no `{key}`: add it, or name the `format` of its rows: text, pairs or chat"
                )
    elif stated := [key for key in of_task if getattr(block, key) is not None]:
        raise UserError(
            f"domains.{domain}.{stated[0]}: a domain of the format {block.format} is scored in nats per token of its "
            f"own text: leave `{stated[0]}` out, and name lm-eval's tasks under `score`"
        )


def _own(kind: str, name: str, tune: Tune) -> None:
    """Refuse a domain or a task with a name that Holdfast itself uses beside it."""
    if name in GENERAL:
        raise UserError(f"{kind}.{name}: general text is stored and scored under {name!r}: rename the block")
    if name.endswith(NATS):
        raise UserError(f"{kind}.{name}: a name ending in {NATS} stands for a probe's nats per token: rename the block")
    if tune.as_written and name in TRIAL:
        raise UserError(f"{kind}.{name}: {name!r} is a value that each trial of `tune` records: rename the block")


def _same_rows(domain: str, names: list[str], tasks: Mapping[str, Task]) -> None:
    """Refuse a task under two names, because its score would count twice."""
    first: dict[str, str] = {}
    for name in names:
        block = tasks[name].as_written
        scored = {key: block[key] for key in block.keys() - {"chance", "licence", "probe"}}
        if (other := first.setdefault(json.dumps(scored, sort_keys=True), name)) != name:
            raise UserError(
                f"domains.{domain}: tasks.{other} and tasks.{name} have the same rows, prompt and metric and would "
                "count twice: leave one of them out"
            )
