"""compare: the tables, figures and report of a study, from the files of exactly its own cells."""

from analysis.compare import write_summary
from analysis.roles import Roles
from evaluation.chance import below_chance
from experiments.study import cells, controls, whole
from experiments.study.config import also


def main(study) -> None:
    with whole.folder(study.paths.results / "metrics") as metrics, whole.folder(study.paths.summary) as summary:
        write_summary(
            results_root=study.paths.results,
            summary_dir=summary,
            cells=[cell.name for cell in cells.grid(study)],
            title=study.title,
            roles=Roles(
                leaders=study.leaders,
                compositions=study.compositions,
                controls=study.controls,
                control_of=controls.of_grid(study),
            ),
            metrics_dir=metrics,
            also={
                name: (other.paths.results, [c.name for c in cells.grid(other)]) for name, other in also(study).items()
            },
        )
    for model in study.grid.models:
        for line in below_chance(study, model):
            print(line)
