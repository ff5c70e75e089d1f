"""Which task runs next: what it waits for, what may not run beside it, and what would take longest if it waited.

The rule is list scheduling by the longest path (Graham 1969; the critical-path rule of Hu 1961): of the tasks whose
inputs are there, the one with the longest way to the end comes first. The base's scores and the stages behind a
training come before everything else, so that a cell that has begun is finished, and its numbers are seen, before others
begin.

`launch` and its simulation use this one class. It knows neither DVC nor Ray.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

EARLY = ("compare", "collect", "drift", "evaluate", "base")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a task takes of a machine: cores, GPUs (or a share of one), bytes of main memory.

    here  whether it runs on the machine of `launch` itself
    """

    cores: float = 1.0
    gpus: float = 0.0
    memory: int = 0
    here: bool = False


@dataclass(frozen=True, kw_only=True)
class Task:
    """One stage.

    after   names of the tasks whose outputs it reads
    once    tasks with the same text share work that is kept: until one of them is done, only one runs
    """

    name: str
    seconds: float = 0.0
    after: frozenset[str] = frozenset()
    needs: Needs = field(default_factory=Needs)
    once: str = ""


class Schedule:
    """Tasks that wait, are ready, run, are done or were set aside. Names of tasks that are not known are ignored."""

    def __init__(self, tasks: Iterable[Task]):
        self.tasks: Mapping[str, Task] = {task.name: task for task in tasks}
        self._before: dict[str, set[str]] = {}  # what a task still waits for
        self._behind: dict[str, list[str]] = {name: [] for name in self.tasks}
        for name, task in self.tasks.items():
            self._before[name] = {other for other in task.after if other in self.tasks}
            for other in self._before[name]:
                self._behind[other].append(name)
        self.path = self._longest_paths()
        self._ready: dict[Needs, list[tuple[bool, float, str]]] = {}
        self._held: dict[str, list[str]] = {}  # by `once`: tasks that wait until the one that runs has ended
        self._kept: set[str] = set()  # `once` of tasks that are done
        self.running: set[str] = set()
        self.done: set[str] = set()
        self.aside: set[str] = set()
        for name, before in self._before.items():
            if not before:
                self._push(name)

    def _longest_paths(self) -> dict[str, float]:
        """Seconds from the beginning of each task to the end of all that waits for it."""
        path: dict[str, float] = {}
        self._depth: dict[str, int] = {}  # tasks on the longest way behind each
        waiting = {name: len(behind) for name, behind in self._behind.items()}
        ends = [name for name, count in waiting.items() if not count]
        while ends:
            name = ends.pop()
            path[name] = self.tasks[name].seconds + max((path[other] for other in self._behind[name]), default=0.0)
            self._depth[name] = 1 + max((self._depth[other] for other in self._behind[name]), default=0)
            for other in self._before[name]:
                waiting[other] -= 1
                if not waiting[other]:
                    ends.append(other)
        return path

    def _push(self, name: str) -> None:
        ready = self._ready.setdefault(self.tasks[name].needs, [])
        heapq.heappush(ready, (name.partition("@")[0] not in EARLY, -self.path[name], name))

    def take(self, fits: Callable[[Needs], bool]) -> str | None:
        """The first ready task, in the order of the rule, among those whose needs fit; it runs from now on."""
        while heads := [(ready[0], needs) for needs, ready in self._ready.items() if ready and fits(needs)]:
            _, needs = min(heads)
            name = heapq.heappop(self._ready[needs])[2]
            once = self.tasks[name].once
            if name in self.aside or name in self.done:
                continue
            if once in self._held:
                self._held[once].append(name)
                continue
            self.running.add(name)
            if once and once not in self._kept:
                self._held[once] = []
            return name
        return None

    def ready(self) -> list[str]:
        """Tasks that could begin now, if there were room."""
        waiting = (name for ready in self._ready.values() for *_, name in ready)
        return [name for name in waiting if name not in self.aside and name not in self.done]

    def finish(self, name: str, *, ran: bool = True) -> None:
        """The task is done, or was before: those that waited for it alone are ready.

        ran  whether it has run in this launch, so that the work that it shares with others is kept
        """
        if name in self.running:
            self.running.discard(name)
            if ran and (once := self.tasks[name].once):
                self._kept.add(once)
            self._release(name)
        self.done.add(name)
        for other in self._behind[name]:
            self._before[other].discard(name)
            if not self._before[other]:
                self._push(other)

    def again(self, name: str) -> None:
        """The task did not end well and is ready once more."""
        self.running.discard(name)
        self._release(name)
        self._push(name)

    def set_aside(self, name: str) -> list[str]:
        """The task has failed: the names of all that waited for it, which will not run either."""
        self.running.discard(name)
        self._release(name)
        lost, left = [], [name]
        while left:
            self.aside.add(one := left.pop())
            behind = [other for other in self._behind[one] if other not in self.aside]
            self.aside.update(behind)
            lost += behind
            left += behind
        return lost

    def _release(self, name: str) -> None:
        """Let tasks that waited for the shared work of this one be ready."""
        for other in self._held.pop(self.tasks[name].once, []) if self.tasks[name].once else []:
            self._push(other)

    def in_order(self) -> list[Task]:
        """All tasks, each behind those that it waits for."""
        return sorted(self.tasks.values(), key=lambda task: -self._depth[task.name])

    def open(self) -> Iterator[str]:
        """Tasks that are neither done nor set aside."""
        return (name for name in self.tasks if name not in self.done and name not in self.aside)

    @property
    def ended(self) -> bool:
        return len(self.done) + len(self.aside) == len(self.tasks)
