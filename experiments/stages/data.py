"""data: rows of domains and tasks, split once; rendered for training, kept raw for scoring."""

import shutil

from experiments.data.prepared_rows import write_data


def main(study) -> None:
    shutil.rmtree(study.paths.data, ignore_errors=True)
    write_data(study, study.paths.data)
