"""Where in the code the host waits for the device: torch's own warnings, counted by place."""

import contextlib
import dataclasses
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from experiments.study.paths import HERE
from methods.part import Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watcher(Part):
    """Counts, by place in the code, what makes the host wait from the end of step `first` − 1 to the end of step
    `last`.
    """

    key = "~ watch"

    first: int
    last: int
    places: dict = dataclasses.field(default_factory=dict)
    inside: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def after_step(self, *, run, state, step, gradient):
        if step + 1 == self.first:
            self.inside.enter_context(_told_of_waiting(self.places))
        elif step == self.last:
            self.inside.close()


@contextlib.contextmanager
def _told_of_waiting(places: dict[str, int]) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with places_of_warnings(places):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def places_of_warnings(places: dict[str, int]) -> Iterator[None]:
    """Count torch's warnings of a wait in `places` by where in the code they arise; others are let go."""

    def note(message, category, filename, lineno, file=None, line=None):
        if "synchroniz" in str(message):
            place = _place(traceback.extract_stack()[:-1])
            places[place] = places.get(place, 0) + 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield


def _place(stack: traceback.StackSummary) -> str:
    """`file:line function` of the innermost frame of this project, and of the library's that it called."""
    frames = [frame for frame in stack if Path(frame.filename).name != "warnings.py"]
    own = max((i for i, frame in enumerate(frames) if _is_ours(frame.filename)), default=0)
    said = [f"{_short_path(frame.filename)}:{frame.lineno} {frame.name}" for frame in (frames[own], frames[-1])]
    return " → ".join(dict.fromkeys(said))


def _short_path(file: str) -> str:
    """A path without this machine's part of it."""
    return Path(file).relative_to(HERE).as_posix() if _is_ours(file) else "/".join(Path(file).parts[-3:])


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(HERE) and "site-packages" not in file
