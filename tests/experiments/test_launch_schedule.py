"""Which stage of a launch comes next, and how close to the shortest possible a launch of 10,000 cells is."""

import random

import pytest

from experiments.launch.estimate import Estimate
from experiments.launch.schedule import Needs, Schedule, Task
from experiments.launch.simulate import SPREAD, simulate


def anything(needs: Needs) -> bool:
    return True


def cell(name: str, *, seconds: float, prepared: str = "", once: str = "") -> list[Task]:
    """The stages of one cell, whose preparation is `prepared`."""
    before = frozenset({prepared} if prepared else ())
    train = Task(name=f"train@{name}", seconds=seconds, after=before, once=once)
    evaluate = Task(name=f"evaluate@{name}", seconds=seconds / 4, after=frozenset({train.name}))
    return [train, evaluate, Task(name=f"collect@{name}", after=frozenset({evaluate.name, "base@m"}))]


def taken(schedule: Schedule) -> list[str]:
    """Everything that may begin now, in its order."""
    return list(iter(lambda: schedule.take(anything), None))


def test_the_longest_way_comes_first_and_what_has_begun_is_finished_before_others_begin():
    base = Task(name="base@m", seconds=1.0)
    schedule = Schedule(
        [*cell("short", seconds=10.0), *cell("long", seconds=30.0), *cell("middle", seconds=20.0), base]
    )
    assert [schedule.take(anything) for _ in range(2)] == ["base@m", "train@long"]
    schedule.finish("train@long")
    assert schedule.take(anything) == "evaluate@long"
    assert taken(schedule) == ["train@middle", "train@short"]
    assert schedule.path["train@long"] == 37.5


def test_a_shared_preparation_is_made_by_one_and_waited_for_by_the_others():
    tasks = [Task(name=f"prepare@{seed}", seconds=9.0 - seed, once="fisher") for seed in range(3)]
    schedule = Schedule([*tasks, Task(name="prepare@other", seconds=1.0)])
    assert taken(schedule) == ["prepare@0", "prepare@other"]
    schedule.again("prepare@0")  # it failed: any of them may try
    assert taken(schedule) == ["prepare@0"]
    schedule.set_aside("prepare@0")
    assert taken(schedule) == ["prepare@1"]
    schedule.finish("prepare@1")
    assert taken(schedule) == ["prepare@2"]


def test_a_stage_that_was_finished_before_this_launch_has_made_nothing_that_others_share():
    schedule = Schedule([Task(name=name, once="shared") for name in ("train@1", "train@2", "train@3")])
    assert schedule.ready() == ["train@1", "train@2", "train@3"]
    schedule.finish("train@1", ran=False)
    assert schedule.ready() == ["train@2", "train@3"]
    assert schedule.take(anything) == "train@2" and schedule.take(anything) is None  # 3 waits for what 2 makes
    schedule.finish("train@2")
    assert schedule.take(anything) == "train@3"


def test_what_needs_a_failed_stage_is_set_aside_and_the_others_go_on():
    schedule = Schedule([*cell("a", seconds=2.0), *cell("b", seconds=1.0)])
    assert taken(schedule) == ["train@a", "train@b"]
    assert sorted(schedule.set_aside("train@a")) == ["collect@a", "evaluate@a"]
    schedule.finish("train@b")
    assert taken(schedule) == ["evaluate@b"]
    schedule.finish("evaluate@b")
    assert taken(schedule) == ["collect@b"] and not schedule.ended
    schedule.finish("collect@b")
    assert schedule.ended


def test_a_task_that_does_not_fit_lets_one_of_another_kind_pass():
    large, small = Needs(gpus=4), Needs(gpus=1)
    schedule = Schedule([Task(name="a", seconds=9.0, needs=large), Task(name="b", seconds=1.0, needs=small)])
    assert schedule.take(lambda needs: needs == small) == "b"
    assert schedule.take(anything) == "a"


def test_ten_thousand_cells_on_256_workers_take_at_most_a_tenth_more_than_the_least_possible():
    draw = random.Random(0)
    methods = {f"m{number}": draw.uniform(60, 1200) for number in range(20)}
    tasks = [Task(name="base@m", seconds=300.0)]
    for method, seconds in methods.items():
        for seed in range(500):
            prepared = f"prepare@{method}-{seed}"
            tasks.append(Task(name=prepared, seconds=0.0 if seed else seconds, once=f"prepare {method}"))
            tasks += cell(f"{method}-{seed}", seconds=seconds, prepared=prepared)
    found = simulate(tasks, workers=256, spread=SPREAD)
    assert found.stages == 40_001 and found.bound <= found.makespan <= 1.1 * found.bound


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_a_simulated_launch_is_one_that_could_have_run(workers, monkeypatch):
    """No stage before its inputs, no more at once than workers, and none without work while one is ready."""
    draw, events = random.Random(workers), []
    tasks = [Task(name="base@m", seconds=2.0)]
    for number in range(12):
        once = f"training {number // 3}"
        tasks += cell(f"c{number}", seconds=draw.uniform(1, 9), once=once)
    takes, finishes = Schedule.take, Schedule.finish

    def take(self, fits):
        if name := takes(self, fits):
            assert self.tasks[name].after <= self.done and len(self.running) <= workers
            events.append(name)
        return name

    monkeypatch.setattr(Schedule, "take", take)
    monkeypatch.setattr(Schedule, "finish", lambda self, name: (events.append(name), finishes(self, name))[1])
    found = simulate(tasks, workers=workers)
    assert sorted(events) == sorted(2 * [task.name for task in tasks])
    if workers == 1:
        assert found.makespan == pytest.approx(sum(task.seconds for task in tasks)) == pytest.approx(found.bound)


def test_the_time_left_is_the_plans_corrected_by_what_was_measured():
    tasks = [*cell("a", seconds=8.0), *cell("b", seconds=8.0)]
    schedule, estimate = Schedule(tasks), Estimate({task.name: task.seconds for task in tasks})
    assert estimate.left(schedule, slots=2, elapsed={}) == pytest.approx((8 + 2) * 2 / 2)
    schedule.take(anything)
    estimate.measured("train@a", 24.0)  # three times the plan
    schedule.finish("train@a")
    assert estimate.seconds("train@b") == 24.0 and estimate.seconds("evaluate@b") == 6.0
    assert estimate.left(schedule, slots=1, elapsed={}) == pytest.approx(24 + 6 + 6)
    estimate.measured("collect@x", 5.0)  # of which the plan knows nothing
    assert estimate.seconds("collect@a") == 5.0 and estimate.factor == 3.0
    schedule.take(anything)
    schedule.take(anything)
    assert estimate.left(schedule, slots=9, elapsed={"train@b": 20.0}) == pytest.approx(3 * (8 + 2) - 20)
    # a stage that takes longer than it should leaves all that waits for it
    assert estimate.left(schedule, slots=9, elapsed={"train@b": 100.0}) == pytest.approx(3 * 2)
