"""What Python's garbage collection looks at."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """No collection inside the block looks at what was there before it, such as the objects of imported libraries.

    What the caller had frozen before stays frozen behind the block.
    """
    before = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not before:
            gc.unfreeze()
