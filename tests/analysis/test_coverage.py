"""How often the 95 % interval covers the truth in simulated studies: at least 93 in 100 in all of them."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from analysis.statistics.crossed import crossed
from analysis.statistics.intervals import Z, of_arrays, of_shares, per_token, perplexity_ratio
from analysis.statistics.nats import Change
from analysis.statistics.seeds import Prior, moderated, of_methods, of_pairs
from tests.analysis import simulated as studies
from tests.analysis.simulated import Setting, simulated

STUDIES = 1000
GRID = [(seeds, n, spread) for seeds in (3, 5) for n in (100, 500) for spread in (0, 1, 2, 5)]


def normal(draw, *, seeds: int, sizes: tuple, spread: float):
    """Differences with equal item and rest parts; the seeds' deviation is `spread` times one run's item error."""
    error = np.sqrt(sum(1 / n for n in sizes)) / len(sizes)
    shift = spread * error * draw.standard_normal((STUDIES, seeds, 1))

    def item(n):
        return np.sqrt(0.5) * draw.standard_normal((STUDIES, 1, n))

    return [shift + item(n) + np.sqrt(0.5) * draw.standard_normal((STUDIES, seeds, n)) for n in sizes], 0.0


def right_or_wrong(draw, *, seeds: int, sizes: tuple, spread: float):
    """Tuned minus base of answers scored 0 or 1: right if a latent ability exceeds a bound, which each seed shifts.

    Most of the ability belongs to the item, so most differences are 0. The truth is the mean over items and seeds.
    """
    own, drawn, bound, drop = 0.9, 0.1, -0.3, 0.25
    error = np.sqrt(_variance(own, drawn, bound, drop) * sum(1 / n for n in sizes)) / len(sizes)
    scale = spread * error / norm.pdf(bound + drop)
    shift, tasks = scale * draw.standard_normal((STUDIES, seeds, 1)), []
    for n in sizes:
        item = np.sqrt(own) * draw.standard_normal((STUDIES, 1, n))
        before = item + np.sqrt(drawn) * draw.standard_normal((STUDIES, 1, n)) > bound
        moved = (
            item
            + np.sqrt(drawn / 2) * draw.standard_normal((STUDIES, 1, n))
            + np.sqrt(drawn / 2) * draw.standard_normal((STUDIES, seeds, n))
        )
        tasks.append((moved + shift > bound + drop) * 1.0 - before)
    return tasks, norm.sf((bound + drop) / np.sqrt(1 + scale**2)) - norm.sf(bound)


def _variance(own, drawn, bound, drop):
    draw = np.random.default_rng(3)
    item = np.sqrt(own) * draw.standard_normal(200_000)

    def right(at):
        return item + np.sqrt(drawn) * draw.standard_normal(200_000) > at

    return (right(bound + drop) * 1.0 - right(bound)).var()


def covered(tasks, truth, *, step=0.0):
    found = crossed(tasks, step=step)
    return float((np.abs(found.value - truth) <= found.half).mean())


def few_move(draw, *, seeds: int, n: int, lost: float, kept: float = 0.7):
    """Right answers turn wrong at a rate `lost`; a seed turns an item that is prone to it with probability `kept`."""
    prone = draw.random((STUDIES, 1, n)) < lost / kept
    return [-1.0 * (prone & (draw.random((STUDIES, seeds, n)) < kept))], -lost


def by_items_only(tasks, truth):
    """The interval that forgets the seeds: each item's mean over them, and the normal distribution."""
    means = [task.mean(axis=1) for task in tasks]
    error = np.sqrt(sum(mean.var(axis=1, ddof=1) / mean.shape[1] for mean in means)) / len(means)
    return float((np.abs(np.mean([mean.mean(axis=1) for mean in means], axis=0) - truth) <= Z * error).mean())


@pytest.mark.parametrize("tasks", (1, 3))
@pytest.mark.parametrize("study", (normal, right_or_wrong))
def test_the_crossed_interval_covers_on_the_whole_grid(study, tasks):
    missed = {}
    for seeds, n, spread in GRID:
        if (tasks, n) == (3, 500):
            continue  # three tasks of 500 take long and say what three of 100 do
        draw = np.random.default_rng([seeds, n, spread, tasks])
        share = covered(*study(draw, seeds=seeds, sizes=(n,) * tasks, spread=spread))
        if not 0.93 <= share <= 0.99:
            missed[seeds, n, spread] = share
    assert not missed


@pytest.mark.parametrize("seeds", (1, 3, 5))
def test_the_interval_covers_where_hardly_an_answer_moves(seeds):
    """One answer in 300, 100 and 50: the plain interval, without two more items, covers 60 to 90 % of such studies."""
    shares, plain = {}, {}
    for lost in (1 / 300, 0.01, 0.02):
        drawn = few_move(np.random.default_rng([9, seeds, round(1000 * lost)]), seeds=seeds, n=300, lost=lost)
        shares[lost], plain[lost] = covered(*drawn, step=1.0), covered(*drawn)
    assert min(shares.values()) >= 0.93 and plain[1 / 300] < 0.8
    one = of_arrays([drawn[0][0][0]])
    assert one.high - one.value == pytest.approx(float(crossed(drawn[0], step=1.0).half[0]))  # what the report uses


def test_an_interval_over_items_alone_fails_where_seeds_differ():
    for study in (normal, right_or_wrong):
        drawn = study(np.random.default_rng(1), seeds=3, sizes=(100,), spread=5)
        assert by_items_only(*drawn) < 0.6 < 0.93 <= covered(*drawn)
        alike = study(np.random.default_rng(2), seeds=3, sizes=(100,), spread=0)
        assert by_items_only(*alike) > 0.92  # what fails it is the seeds


@pytest.mark.parametrize("seeds", (2, 3, 5))
def test_seeds_that_move_items_in_opposite_ways_have_an_interval_of_usual_width(seeds):
    """The mean square of items is near 0 then, and Satterthwaite's df a fraction of one: intervals of 1e11 and more."""
    draw = np.random.default_rng([11, seeds])
    item, sign = draw.standard_t(3, (STUDIES, 1, 100)), draw.choice([-1.0, 1.0], (STUDIES, seeds, 100))
    found = crossed([item * sign])
    assert (np.abs(found.value) <= found.half).mean() >= 0.93
    assert found.df.min() >= seeds - 1 and found.half.max() < 30 * np.median(found.half)


def test_tasks_of_unequal_size_and_a_single_seed_cover():
    draw = np.random.default_rng(4)
    assert 0.93 <= covered(*normal(draw, seeds=4, sizes=(100, 200, 300), spread=1)) <= 0.98
    for study in (
        normal,
        right_or_wrong,
    ):  # one seed, about this run: the seeds' part is no part of the truth, so there is no spread
        assert 0.93 <= covered(*study(draw, seeds=1, sizes=(100, 100, 100), spread=0)) <= 0.97


@pytest.mark.parametrize("spread", (0.0, 0.3))
def test_the_score_over_seeds_covers(spread):
    draw, bound, inside = np.random.default_rng(5), -1.0, 0
    truth = norm.sf(bound / np.sqrt(1 + spread**2))
    for _ in range(STUDIES):
        ability = (
            np.sqrt(0.8) * draw.standard_normal(100)
            + np.sqrt(0.2) * draw.standard_normal((3, 100))
            + spread * draw.standard_normal((3, 1))
        )
        found = of_shares((ability > bound) * 1.0)
        inside += found.low <= truth <= found.high
    assert 0.93 <= inside / STUDIES <= 0.99


@pytest.mark.parametrize("spread", (0.0, 0.02))
def test_the_perplexity_ratio_over_seeds_covers(spread):
    draw, inside = np.random.default_rng(6), 0
    tokens = draw.integers(80, 200, size=128)
    for _ in range(STUDIES):
        nats = (
            0.1
            + spread * draw.standard_normal((3, 1))
            + 0.03 * draw.standard_normal(128)
            + 0.02 * draw.standard_normal((3, 128))
        )
        found = perplexity_ratio(per_token(nats * tokens, tokens.astype(float)))
        inside += found.low <= np.exp(0.1) <= found.high
    assert 0.93 <= inside / STUDIES <= 0.99


def heavy_text(draw, *, seeds: int, spread: float):
    """Nats per token of 128 passages of unequal length, with Student's tails of 3 degrees of freedom between items."""
    tokens = draw.integers(80, 400, size=128).astype(float)
    shift = 0.02 * spread * draw.standard_normal((seeds, 1))
    rate = 0.1 + shift + 0.05 * draw.standard_t(3, 128) + 0.03 * draw.standard_t(3, (seeds, 128))
    return Change(tasks=[rate * tokens], tokens=tokens), 0.1


def divergence(draw, *, seeds: int, spread: float):
    """KL per token: never negative, its logarithm normal between items, which makes a long right tail."""
    tokens, scale = draw.integers(80, 400, size=128).astype(float), 0.6
    shift = np.exp(0.1 * spread * draw.standard_normal((seeds, 1)) - (0.1 * spread) ** 2 / 2)
    rest = np.exp(0.3 * draw.standard_normal((seeds, 128)) - 0.3**2 / 2)
    rate = 0.05 * shift * np.exp(scale * draw.standard_normal(128) - scale**2 / 2) * rest
    return Change(tasks=[rate * tokens], tokens=tokens), 0.05


def heavy_answers(draw, *, seeds: int, spread: float):
    """Nats per item of three retention tasks: a few right answers lose many nats, most hardly any."""
    shift, tasks = 0.1 * spread * draw.standard_normal((seeds, 1)), []
    for n in (100, 200, 200):
        item = draw.standard_exponential(n) ** 1.5 - 1.3293403881791370  # its mean, Γ(2.5)
        tasks.append(0.3 + shift + item + 0.5 * draw.standard_t(3, (seeds, n)))
    return Change(tasks=tasks), 0.3


@pytest.mark.thorough
@pytest.mark.parametrize("study", (heavy_text, divergence, heavy_answers))
@pytest.mark.parametrize("seeds", (1, 3, 5))
def test_intervals_in_nats_cover_where_tails_are_heavy(study, seeds):
    """At least 93 of 100 studies, also of divergences, whose tail is on one side."""
    shares = {}
    for spread in (0, 1, 3) if seeds > 1 else (0,):  # of one run, the interval is about this run
        draw, inside = np.random.default_rng([11, seeds, spread]), 0
        for _ in range(STUDIES):
            change, truth = study(draw, seeds=seeds, spread=spread)
            found = change.interval
            inside += found.low <= truth <= found.high
        shares[spread] = inside / STUDIES
    assert min(shares.values()) >= 0.93 and max(shares.values()) <= 0.99


@pytest.mark.parametrize(
    "setting",
    [
        Setting(title="alike", methods=20, seeds=5),
        Setting(title="one is odd", methods=5, seeds=5, spreads=(3.2, 0.8), odd=True),
        Setting(title="heavy tails", methods=20, seeds=3, kind="tails", spreads=(4.0, 4.0)),
    ],
    ids=lambda setting: setting.title,
)
def test_the_model_of_the_tests_covers_and_errs_seldom(setting):
    found = simulated(setting, studies=100)
    assert found.covers >= 0.93 and found.least >= 0.9 and found.wrong <= 0.06
    assert found.full <= 0.1 and found.width < 1  # of 100 studies; the table of docs/rules.md has more


def test_the_spread_of_a_study_shows_and_one_odd_method_is_not_swamped():
    """Methods whose seeds are alike lend each other theirs; an odd one keeps its own, and the others keep theirs."""
    values = np.array([[0.8, -0.8, 0.1], [0.7, -0.9, 0.3], [-0.6, 0.9, -0.2], [0.9, -0.2, -0.7], [0.5, 0.4, -1.0]])
    prior, own = of_methods(values), values.var(axis=1, ddof=1)
    variances, df = moderated([prior] * 5, own, 2)
    assert (np.abs(np.log(variances / prior.variance)) <= np.abs(np.log(own / prior.variance)) + 1e-12).all()
    assert (df > 2).all() and df.max() <= 2 * 5
    odd = np.vstack([values, 20 * values[0]])
    prior, own = of_methods(odd), odd.var(axis=1, ddof=1)
    variances, df = moderated([prior] * 6, own, 2)
    assert variances[-1] > 0.6 * own[-1] and df[-1] < 2.3
    assert of_methods(values[:1]) == Prior() == of_pairs(values[:2])  # one of a kind has nothing to lend
    alone, own_df = moderated([Prior()], np.array([0.5]), 2)
    assert (alone[0], own_df[0]) == (0.5, 2)


def test_seeds_that_move_together_count_as_fewer():
    draw = np.random.default_rng(0)
    shared = draw.standard_normal(5)
    together = of_methods(shared + 0.05 * draw.standard_normal((10, 5)))
    apart = of_methods(draw.standard_normal((10, 5)))
    assert together.most < 5 < 20 < apart.most <= 40
    assert of_pairs(shared + 0.05 * draw.standard_normal((10, 5))).variance == pytest.approx(2 * 0.05**2, rel=0.4)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "setting", studies.GRID, ids=lambda setting: f"{setting.title}-{setting.methods}-{setting.seeds}"
)
def test_coverage_and_errors_are_what_the_rules_say(setting):
    found = simulated(setting, studies=400, seed=1)
    edge = setting.kind == "accuracy" and setting.spreads == (4.0, 4.0)
    assert found.covers >= (0.83 if edge else 0.93) and found.wrong <= 0.06
    assert found.full <= (0.16 if setting.odd and setting.seeds == 3 else 0.08) and found.pairs <= 0.1
    assert f"| {setting.title} |" in Path("docs/rules.md").read_text(encoding="utf-8")
