"""What an audit is doing, and how much time is left of the whole of it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from tqdm import tqdm

from analysis.numbers import seconds
from evaluation.progress import Bar
from experiments.audit.scoring import Scores

EVERY = 30.0  # seconds between two lines


class Progress:
    """Prints a line for each step, and one now and then within it.

    Scoring a model is several passes over tokens, of which one is known when it begins. What is left of the audit is
    what is left of this model, at the pace so far, and as much again for every model that is still to be scored.
    """

    def __init__(self) -> None:
        self._began = perf_counter()

    def step(self, what: str) -> None:
        print(f"audit: {what} ({seconds(perf_counter() - self._began)} so far)", flush=True)

    def scoring(self, name: str, work: Callable[[], Scores], *, after: int, like: Scores | None = None) -> Scores:
        """Score the model `name`, `after` which so many models are left; `like` took about as long."""
        known = like.seconds * (1 + after) if like else None
        self.step(f"scoring {name}" + (f", about {seconds(known)} left" if known and known > 2 else ""))
        with told(name, models=after):
            scores = work()
        if scores.again:
            print(f"audit: the scores of {name} are kept from before", flush=True)
        return scores


@contextmanager
def told(name: str, *, models: int = 0) -> Iterator[None]:
    """Tell now and then how far the work on a model is, with as much work for each of `models` others behind it."""
    began = seen = said = perf_counter()
    starts: dict[str, float] = {}  # of each pass: the last update before its first one

    def tell(what: str, done: float, total: float) -> None:
        nonlocal seen, said
        now = perf_counter()
        start = starts.setdefault(what, seen)
        seen = now
        if now - said < EVERY:
            return
        said = now
        left = time_left(elapsed=now - began, in_pass=now - start, share=done / total, models=models)
        line = f"audit: {name}: {what or 'scoring'}, {100 * done / total:.0f} %; about {seconds(left)} left in all"
        tqdm.write(line, file=sys.stderr)

    Bar.listeners.append(tell)
    try:
        yield
    finally:
        Bar.listeners.remove(tell)


def time_left(*, elapsed: float, in_pass: float, share: float, models: int) -> float:
    """Seconds left: of this pass at its own pace, and then `models` times what this model takes."""
    here = in_pass * (1 - share) / share
    return here + models * (elapsed + here)
