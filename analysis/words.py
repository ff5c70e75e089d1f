"""Names in a sentence, and texts of others where they are shown."""

import re
from collections.abc import Iterable

# control characters but \t and \n, with which a text can steer a terminal, and those that turn the reading direction
CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069"
MOST = 6  # names that a sentence lists one by one; a table beside it has all


def few(names: Iterable[str], *, most: int = MOST, join: str = ", ") -> str:
    """The names, or of more than `most` the first ones and how many others there are: 'a, b, c and 40 others'."""
    names = list(names)
    if len(names) <= most:
        return join.join(names)
    shown = names[: max(1, most // 2)]
    return f"{join.join(shown)} and {len(names) - len(shown)} others"


def visible(text: str) -> str:
    """The text as a terminal may show it: control characters are written as in Python, such as \\x1b."""
    text = text.replace("\r\n", "\n")
    return re.sub(f"[{CONTROL}]", lambda found: found[0].encode("unicode_escape").decode(), text)


def markdown(text: str) -> str:
    """The text as Markdown shows it unchanged, in one line, with neither HTML nor links nor pictures."""
    return re.sub(r"[\\<>\[\]|]", r"\\\g<0>", " ".join(visible(text).split()))
