"""What DVC runs of a named study in a clone, whose committed results are there and whose weights are not.

For DVC a stage whose outputs are missing is out of date, so that one new cell would train the whole study again. Here a
stage is finished if its entry in dvc.lock is current, and runs again only where a stage that is not finished reads what
is missing of its outputs. If that makes the same again, its results stay those of the first run: other seconds in them
would make what reads them out of date.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments.study import whole

FIRST = ("data", "model")  # stages behind `resolve` that every cell reads


def to_restore(graph: Any) -> set[str]:
    """Names of the finished stages in DVC's graph that make what is missing and is read by a stage that will run.

    A stage will run if its entry is not current, or if one that it reads from will run for that reason. The edges of
    the graph lead from a stage to those that it reads from.
    """
    import networkx

    readers_first = list(networkx.topological_sort(graph))
    run: set[Any] = set()
    for stage in reversed(readers_first):
        makers = list(graph.successors(stage))
        if not run.isdisjoint(makers) or stage.changed(allow_missing=True, upstream=makers):
            run.add(stage)
    restored: set[str] = set()
    for stage in readers_first:
        missing = [Path(out.fs_path) for out in stage.outs if not out.exists] if stage not in run else []
        readers = (reader for reader in graph.predecessors(stage) if reader in run) if missing else ()
        read = [Path(dep.fs_path) for reader in readers for dep in reader.deps]
        if any(one.is_relative_to(other) or other.is_relative_to(one) for one in missing for other in read):
            run.add(stage)
            restored.add(stage.name)
    return restored


def results_of(stage: Any) -> dict[str, bytes]:
    """The contents, by path, of a finished stage's outputs that are in git; {} if one is missing or was changed."""
    kept = [out for out in stage.outs if not out.use_cache]
    if not all(Path(out.fs_path).is_file() and out.get_hash() == out.hash_info for out in kept):
        return {}
    return {out.fs_path: Path(out.fs_path).read_bytes() for out in kept}


def made_by(stage: Any) -> dict[str, Any]:
    """The hashes in dvc.lock of a finished stage's other outputs, by path."""
    return {out.fs_path: out.hash_info for out in stage.outs if out.use_cache}


def put_back(stage: Any, results: Mapping[str, bytes], made: Mapping[str, Any]) -> None:
    """After a finished stage has run again: write what `results_of` had found, if it made what `made_by` had found."""
    if all(out.exists and out.get_hash() == made[out.fs_path] for out in stage.outs if out.use_cache):
        for path, content in results.items():
            with whole.file(Path(path)) as fresh:
                fresh.write_bytes(content)


@contextmanager
def only_needed() -> Iterator[None]:
    """Let DVC in this process run what is needed alone."""
    dvc = import_module("dvc.repo.reproduce")
    plan, reproduce, one = dvc.plan_repro, dvc._reproduce, dvc._reproduce_stage
    restored: set[str] = set()

    def planned(graph: Any, *arguments: Any, **options: Any) -> list:
        order = plan(graph, *arguments, **options)
        restored.update(to_restore(graph.subgraph(order)))
        return order

    def needed(stage: Any, *, upstream: list, force: bool, **options: Any) -> Any:
        if force or stage.changed(allow_missing=True, upstream=upstream):
            return one(stage, upstream=upstream, force=force, **options)
        if stage.name not in restored:
            return None
        results, made = results_of(stage), made_by(stage)
        ran = one(stage, upstream=upstream, force=force, **options)
        if ran and not options.get("dry"):
            put_back(stage, results, made)
            stage.save_outs()
            stage.dump(update_pipeline=False)
        return ran

    dvc.plan_repro, dvc._reproduce = planned, partial(reproduce, repro_fn=needed)
    try:
        yield
    finally:
        dvc.plan_repro, dvc._reproduce = plan, reproduce


def begin(path: str) -> None:
    """Run `resolve`, and `data` and the models where they are out of date: only then is it known which cells are.

    path  of the study's dvc.yaml
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with suppress(DvcException), Repo() as repo:  # the run that follows meets it again, and reports it
        repo.reproduce(f"{path}:resolve")
        first = [stage for stage in repo.stage.load_all(path) if stage.name.partition("@")[0] in FIRST]
        with only_needed():
            repo.reproduce([stage.addressing for stage in first])
