"""The one error a person can cause: the command line prints it without a traceback."""


class UserError(Exception):
    """Bad input, a missing thing or a full disk; the message names it, its value and what to do."""


class MissingInput(UserError):
    """What an earlier stage makes is not there: the stage has not begun, so nothing about its cell is known."""
