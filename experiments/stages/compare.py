"""compare: the tables, figures and report of a study, from the files of exactly its own cells."""

from analysis.compare import write_summary
from evaluation.chance import below_chance
from experiments.study import cells


def main(study) -> None:
    write_summary(
        results_root=study.paths.results,
        summary_dir=study.paths.summary,
        cells=[cell.name for cell in cells.grid(study)],
        title=study.title,
        archive=study.archive and study.archive.as_written,
    )
    for model in study.grid.models:
        for line in below_chance(study, model):
            print(line)
