"""What the tasks that a domain names stand for: suites and blocks of params.yaml, and lm-eval's own names."""

from collections.abc import Mapping
from typing import Any

from experiments.study.schema import Params, Task
from methods.errors import UserError
from methods.tools.names import unknown

ROLES = ("retention", "transfer", "score", "probes")  # what a domain uses tasks for


def expanded(params: Params) -> Params:
    """The same study with a block for every task that a domain names, and each name in the place of what holds it.

    A name is looked for among the suites, then the tasks of params.yaml, then the tasks, groups and tags of lm-eval. A
    tag, and a group that lm-eval does not aggregate, stand for their tasks. Raises UserError for an unknown name.
    """
    tasks = {name: _named(name, block) for name, block in params.tasks.items()}
    domains = {
        name: block.model_copy(
            update={
                role: _flat(getattr(block, role), params.suites, tasks, where=f"domains.{name}.{role}")
                for role in ROLES
            }
        )
        for name, block in params.domains.items()
    }
    return params.model_copy(update={"tasks": tasks, "domains": domains})


def of(names: list[str], params: Params, *, where: str) -> tuple[Params, list[str]]:
    """The study with a block for every task that `names` stand for, and these tasks; `where` is where they are written.

    It is `expanded` for names that are no domain's, such as those of a command.
    """
    tasks = {name: _named(name, block) for name, block in params.tasks.items()}
    flat = _flat(names, params.suites, tasks, where=where)
    return params.model_copy(update={"tasks": tasks}), flat


def _named(name: str, block: Task) -> Task:
    """The block with its own name as `task` where it states none."""
    if block.rows is None and (changed := {"set", "columns", "nulls"} & block.as_written.keys()):
        raise UserError(
            f"tasks.{name} has `{min(changed)}` without `rows`: it changes rows that the block itself names"
        )
    return block if block.task is not None else Task.model_validate({"task": name} | block.as_written)


def _flat(
    names: list[str], suites: Mapping[str, list[str]], tasks: dict[str, Any], *, where: str, above: tuple[str, ...] = ()
) -> list[str]:
    """The names of tasks that `names` stand for; a block is added to `tasks` for those of lm-eval.

    A name that is written twice stays twice; one that suites and tags name again is there once.
    """
    flat: list[str] = []
    for name in names:
        if name in above:
            raise UserError(f"suites.{name} leads back to itself: {' -> '.join((*above, name))}")
        if name in suites:
            inner = _flat(suites[name], suites, tasks, where=f"suites.{name}", above=(*above, name))
        else:
            inner = [name] if name in tasks else _of_lm_eval(name, suites, tasks, where=where)
        flat += [one for one in dict.fromkeys(inner) if one not in flat or names.count(one) > 1]
    return flat


def _of_lm_eval(name: str, suites: Mapping[str, list[str]], tasks: dict[str, Any], *, where: str) -> list[str]:
    from evaluation import catalogue  # imports lm-eval

    if catalogue.kind(name) is None:
        nearest = unknown("task", name, [*suites, *tasks], where=where)
        raise nearest if "did you mean" in str(nearest) else catalogue.unknown(name, where=where)
    stands_for = catalogue.expanded(name)
    for task, stated in stands_for.items():
        if task not in tasks:
            tasks[task] = Task.model_validate({"task": stated})
    return list(stands_for)
