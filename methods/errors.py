"""The one error a person can cause: the command line prints it without a traceback."""

import sys
from pathlib import Path


class UserError(Exception):
    """Bad input, a missing thing or a full disk; the message names it, its value and what to do."""


class MissingInput(UserError):
    """What an earlier stage makes is not there: the stage has not begun, so nothing about its cell is known."""


def lacks(error: ModuleNotFoundError) -> str:
    """What to do about a package that is not installed for this Python, in one line."""
    name = (error.name or str(error)).partition(".")[0]
    own = Path(__file__).resolve().parents[1] / ".venv"
    if own.is_dir() and Path(sys.prefix).resolve() != own.resolve():
        remedy = "enter the project's environment with `source .venv/bin/activate`, or use `make`, which does"
    else:
        remedy = "`make setup` makes the project's environment, and `source .venv/bin/activate` enters it"
    return f"the package {name} is not installed for {sys.executable}: {remedy}"
