"""What a stage reads, and finds damaged, DVC shall not take from its cache again.

DVC hashes no file of its cache that is read-only, and the file that a stage reads may be a hard link to it. After
`distrusted` it is writable, so that DVC hashes it before it uses it again, and drops it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from methods.errors import MissingInput, UserError


@contextmanager
def distrusted(*folders: Path) -> Iterator[None]:
    """Make every file of the folders writable where what is done with them raises a UserError, which is raised on."""
    try:
        yield
    except MissingInput:
        raise
    except UserError:
        for path in (path for folder in folders for path in folder.rglob("*")):
            with suppress(OSError):
                if path.is_file():
                    path.chmod(0o644)
        raise
