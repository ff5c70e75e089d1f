"""A progress bar with the time left, which also tells listeners how far it is."""

from collections.abc import Callable
from typing import Any, ClassVar

from tqdm import tqdm

Listener = Callable[[str, float, float], None]  # description, done, total


class Bar(tqdm):
    """tqdm; each of `listeners` is called after every update, also where there is no terminal to show a bar on."""

    listeners: ClassVar[list[Listener]] = []

    def __init__(self, *, total: float, desc: str | None, **settings: Any):
        super().__init__(total=total, desc=desc, **settings)
        self._done, self._of, self._name = 0.0, total, desc or ""  # a bar that is not shown does not count

    def update(self, n: float = 1) -> bool | None:
        self._done += n
        for listener in self.listeners:
            listener(self._name, self._done, self._of)
        return super().update(n)
