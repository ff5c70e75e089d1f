"""data: rows of domains and tasks, split once; rendered for training, kept raw for scoring."""

from experiments.data.prepared_rows import write_data
from experiments.study import whole


def main(study) -> None:
    with whole.folder(study.paths.data) as made:
        write_data(study, made)
