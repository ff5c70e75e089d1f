"""repro: `dvc repro -k` of a study, one cell after another, so that the first results are there early.

DVC runs what a target needs in the order in which a set of stages happens to be iterated: often all trainings before
the first score, and another order each time. Here the same stages are walked from `compare`, which lists the cells'
files one cell after another. What runs and what is up to date DVC decides, as it always does.
"""

import logging
import os
from importlib import import_module
from pathlib import Path

from experiments.study import missing, whole


def main(study) -> int:
    """Run the study; the exit status is DVC's: a cell that fails is recorded, and the others go on.

    Raises UserError before anything is written where the disk has no room for the models that are not here yet.
    """
    import networkx
    from dvc.cli import main as dvc

    reproduce = import_module("dvc.repo.reproduce")

    def cell_by_cell(graph, stages, pipeline: bool = False, downstream: bool = False) -> list:
        needed = reproduce.get_subgraph(graph, stages, pipeline=pipeline, downstream=downstream)
        (last,) = (stage for stage in stages if stage.name == "compare")
        order = list(networkx.dfs_postorder_nodes(needed, last))
        return order + [stage for stage in networkx.dfs_postorder_nodes(needed) if stage not in set(order)]

    path = os.path.relpath(study.paths.folder / "dvc.yaml")
    if study.name and committed(path):
        print(f"study {study.name} is up to date: the committed results are those of this code and these settings")
        return 0
    if any(not (study.paths.model(name) / "base.json").is_file() for name in study.grid.models):
        from experiments.commands import plan  # imports torch

        plan.refuse_models(study)
    keep_locks_whole()
    if study.name:
        missing.begin(path)
    reproduce.plan_repro = cell_by_cell
    if not study.name:  # the default study is for everybody to run, and a clone has its results already
        return dvc(["repro", "-k", path])
    with missing.only_needed():
        return dvc(["repro", "-k", path])


def keep_locks_whole() -> None:
    """Let DVC replace dvc.lock as a whole in this process: it would write into the old one.

    A kill, or a full disk, then left a part of it, and the cells of the rest were not known to be finished.
    """
    common, yaml = (import_module(f"dvc.utils.serialize.{name}") for name in ("_common", "_yaml"))
    dump = common._dump_data

    def dump_whole(path, data, dumper, fs=None, **options) -> None:
        with whole.file(Path(path)) as made:
            dump(made, data, dumper, **options)

    common._dump_data = yaml._dump_data = dump_whole


def committed(path: str) -> bool:
    """Whether DVC would run nothing if the files that a clone lacks (weights, prepared data) were there.

    dvc.lock has their hashes, so that a clone need not train a study again to know that its results are current.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    logger = logging.getLogger("dvc")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with Repo() as repo:
            return not repo.reproduce(path, dry=True, allow_missing=True)
    except DvcException:  # a dry run stops at a stage whose inputs another stage has yet to make
        return False
    finally:
        logger.setLevel(level)
