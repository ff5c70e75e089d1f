"""Progress bars with the time left: redrawn often on a terminal, every 20 seconds in a log file."""

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
