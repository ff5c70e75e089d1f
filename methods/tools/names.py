"""Names that people type: their form, and the nearest known name for a mistyped one."""

import difflib
import re
from collections.abc import Iterable

from methods.errors import UserError

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
LONGEST = 100  # letters: the file of a figure has two names in its name, which may have 255 letters


def checked(kind: str, name: str) -> str:
    """`name` itself, or a UserError: DVC's `-S` cannot take a `+`, and paths cannot take a `/`."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"{kind} {name!r}: a name is lower-case letters, digits, '-' and '_', and starts with a letter or digit"
        )
    if len(name) > LONGEST:
        raise UserError(
            f"{kind} {name!r} has {len(name)} letters: shorten the name to at most {LONGEST}, which file names need"
        )
    return name


def unknown(kind: str, name: object, known: Iterable[str], *, where: str = "") -> UserError:
    """The error for an unknown name, with the nearest known one."""
    known = sorted(map(str, known))
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
    return UserError(f"unknown {kind} {name!r}{f' in {where}' if where else ''}: {hint}")
