"""Names in a sentence."""

from collections.abc import Iterable

MOST = 6  # names that a sentence lists one by one; a table beside it has all


def few(names: Iterable[str], *, most: int = MOST, join: str = ", ") -> str:
    """The names, or of more than `most` the first ones and how many others there are: 'a, b, c and 40 others'."""
    names = list(names)
    if len(names) <= most:
        return join.join(names)
    shown = names[: max(1, most // 2)]
    return f"{join.join(shown)} and {len(names) - len(shown)} others"
