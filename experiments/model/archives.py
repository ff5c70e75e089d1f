"""Archives and packed files: no member that points elsewhere is read, and no small file that becomes a huge one.

Nothing is unpacked to the disk: members are read into memory by name. A name that would leave a folder is refused all
the same, because no honest archive has one, and so is a link.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from methods.errors import UserError

LARGE = 2**25  # bytes; what is smaller may be packed as tightly as it likes
TIGHT = 200  # times: texts and tables shrink to a tenth, and what shrinks more than this was made to
_PIECE = 2**20
_PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_ELSEWHERE = re.compile(r"[/\\]|[A-Za-z]:|(?:.*[/\\])?\.\.(?:[/\\]|$)", re.DOTALL)


def refuse_elsewhere(archive: zipfile.ZipFile, what: object) -> None:
    """Refuse an archive with a link, or with a name twice, that is absolute, has a drive, or leads out of a folder."""
    seen = set()
    for member in archive.infolist():
        kind = stat.S_IFMT(member.external_attr >> 16)
        name = member.filename
        if _ELSEWHERE.match(name) or "\\" in name or "\0" in member.orig_filename:
            why = "leads out of its folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            why = "is a link or a device"
        elif name in seen:
            why = "is there twice"
        else:
            seen.add(name)
            continue
        raise UserError(f"{what}: its member {name!r} {why}, as in no honest archive: do not use it")


def refuse_bomb(unpacked: int, packed: int, what: object) -> None:
    """Refuse what would become huge: `unpacked` bytes (or cells of a table) from so few `packed` ones."""
    if unpacked > LARGE and unpacked > TIGHT * packed:
        raise UserError(
            f"{what}: {packed:,} bytes would become more than {min(unpacked, TIGHT * max(packed, 1)):,}, which no "
            "honest file does: do not use it, or unpack it yourself where you trust it"
        )


def read_member(archive: zipfile.ZipFile, member: str, what: object) -> bytes:
    """A member's bytes. Raises KeyError where there is none; more bytes than it states are never read."""
    about = archive.getinfo(member)
    refuse_bomb(about.file_size, about.compress_size, f"{what}: {member}")
    return archive.read(member)


def unpacked(raw: bytes, *, what: object) -> bytes:
    """The bytes of a text that gzip, bzip2 or xz packed; others as they are. A bomb ends early, as a UserError."""
    opened = _opened(raw)
    return b"".join(_pieces(io.BytesIO(raw), opened, packed=len(raw), what=what)) if opened else raw


def look(path: Path) -> None:
    """Refuse a packed file that would become huge, before it is read line by line; a damaged one passes."""
    with contextlib.suppress(OSError, EOFError, zlib.error, lzma.LZMAError), path.open("rb") as file:
        opened = _opened(file.read(8))
        if opened:
            for _ in _pieces(path, opened, packed=path.stat().st_size, what=path):
                pass


def _opened(start: bytes) -> Callable | None:
    return next((opened for magic, opened in _PACKED.items() if start.startswith(magic)), None)


def _pieces(file: BinaryIO | Path, opened: Callable, *, packed: int, what: object) -> Iterator[bytes]:
    size = 0
    with opened(file, "rb") as content:
        while piece := content.read(_PIECE):
            size += len(piece)
            refuse_bomb(size, packed, what)
            yield piece
