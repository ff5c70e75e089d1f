"""The one error a person can cause: the command line prints it without a traceback."""

import sys
from pathlib import Path


class UserError(Exception):
    """Bad input, a missing thing or a full disk; the message names it, its value and what to do."""


class MissingInput(UserError):
    """What an earlier stage makes is not there: the stage has not begun, so nothing about its cell is known."""


def shortened(error: BaseException) -> str:
    """A library's error in one line: its type and the first 400 characters of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}{'…' if len(text) > 400 else ''}"


def chain(error: BaseException | None) -> list[BaseException]:
    """The error and the errors that it was raised from; libraries wrap the one that explains."""
    errors: list[BaseException] = []
    while error is not None and error not in errors:
        errors.append(error)
        error = error.__cause__ or error.__context__
    return errors


def lacks(error: ModuleNotFoundError) -> str:
    """What to do about a package that is not installed for this Python, in one line."""
    name = (error.name or str(error)).partition(".")[0]
    own = Path(__file__).resolve().parents[1] / ".venv"
    if own.is_dir() and Path(sys.prefix).resolve() != own.resolve():
        remedy = "enter the project's environment with `source .venv/bin/activate`, or use `make`, which does"
    else:
        remedy = "`make setup` makes the project's environment, and `source .venv/bin/activate` enters it"
    return f"the package {name} is not installed for {sys.executable}: {remedy}"


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch's CPU allocator says so only in its message."""
    import torch  # which messages about missing packages do without

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
