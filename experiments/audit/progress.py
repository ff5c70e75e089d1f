"""What an audit is doing, and how long it will take."""

from collections.abc import Callable
from time import perf_counter

from analysis.numbers import seconds
from experiments.audit.scoring import Scores


class Progress:
    """Prints a line for each step; the time left is known once the base is scored, because both models take alike."""

    def __init__(self) -> None:
        self._began = perf_counter()

    def step(self, what: str) -> None:
        print(f"audit: {what} ({seconds(perf_counter() - self._began)} so far)", flush=True)

    def scoring(self, name: str, work: Callable[[], Scores], *, like: Scores | None = None) -> Scores:
        """Score the model `name`, which takes as long as the one before it, `like`."""
        left = f", about {seconds(like.seconds)} left" if like and like.seconds > 2 else ""
        self.step(f"scoring {name}{left}")
        scores = work()
        if scores.again:
            print(f"audit: the scores of {name} are kept from before", flush=True)
        return scores
