"""The standard streams of a command: whatever it prints, no token is shown, and no text of others steers the terminal.

A row, a file's name or a model's answer may hold sequences that change the window's title, write to the clipboard or
make the terminal answer. Colours, and the movements of progress bars and displays, pass.
"""

import re
from typing import Any, TextIO

from analysis.words import CONTROL, visible
from experiments.study.secrets import redacted

_SEQUENCE = re.compile(rf"(\r|\x1b\[[\d;]*[A-Km]|\x1b\[\?25[lh])|[{CONTROL}]")


class Screen:
    """A text stream that cleans what is written to it; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(_SEQUENCE.sub(lambda found: found[1] or visible(found[0]), redacted(text)))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def shown(text: str) -> str:
    """A text of others as it may be shown."""
    return visible(redacted(text))
