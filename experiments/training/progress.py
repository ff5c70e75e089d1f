"""Progress with time left: a live bar on a terminal, a line now and then in a log."""

import sys

from tqdm import tqdm


def bar(*, total: int, desc: str, unit: str = "it", disable: bool = False) -> tqdm:
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        disable=disable,
        dynamic_ncols=live,
        mininterval=0.3 if live else 20.0,
        maxinterval=30.0,
    )
