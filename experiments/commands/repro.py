"""repro: `dvc repro -k` of a study, one cell after another, so that the first results are there early.

DVC runs what a target needs in the order in which a set of stages happens to be iterated: often all trainings before
the first score, and another order each time. Here the same stages are walked from `compare`, which lists the cells'
files one cell after another. What runs and what is up to date DVC decides, as it always does.
"""

import os
from importlib import import_module


def main(study) -> int:
    """Run the study; the exit status is DVC's: a cell that fails is recorded, and the others go on."""
    import networkx
    from dvc.cli import main as dvc

    reproduce = import_module("dvc.repo.reproduce")

    def cell_by_cell(graph, stages, pipeline: bool = False, downstream: bool = False) -> list:
        needed = reproduce.get_subgraph(graph, stages, pipeline=pipeline, downstream=downstream)
        (last,) = (stage for stage in stages if stage.name == "compare")
        order = list(networkx.dfs_postorder_nodes(needed, last))
        return order + [stage for stage in networkx.dfs_postorder_nodes(needed) if stage not in set(order)]

    reproduce.plan_repro = cell_by_cell
    return dvc(["repro", "-k", os.path.relpath(study.paths.folder / "dvc.yaml")])
