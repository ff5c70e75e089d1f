"""Claims against results: verdicts are computed from values and intervals, and say why where there is none."""

import json
import statistics
from dataclasses import replace

import jinja2
import pandas as pd
import pytest
from ruamel.yaml import YAML

from analysis import numbers
from analysis.load import load_cells
from analysis.sections import claims
from analysis.statistics.claimed import Measured
from analysis.statistics.comparison import comparison
from experiments.bench.race import Race
from experiments.study.paths import HERE
from methods.errors import UserError
from tests.analysis.fixtures import write_bench, write_json, write_results

PAPERS = {"p": {"title": "A paper <of> 2025", "source": "https://example.org/p"}}
CLAIM = {
    "paper": "p",
    "claim": "c",
    "number": 0.1,
    "unit": "points",
    "direction": "about",
    "tolerance": 0.02,
    "setting": "s",
    "scope": "any",
    "seen": "review",
    "measures": [{"table": {"metric": "forgetting", "method": "ewc", "as": "value"}}],
}
HERE_ON = {"scope": "setting", "on": {"models": ["smollm2-135m"], "domains": ["science"]}}


def written(folder, **changes):
    claim = {key: value for key, value in (CLAIM | changes).items() if value is not ...}
    YAML().dump({"papers": PAPERS, "claims": {"one": claim}}, folder / "claims.yaml")
    return folder / "claims.yaml"


def one(folder, **changes):
    return claims.load(written(folder, **changes)).claims["one"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("claims") / "results"
    planned = write_results(root, seeds=(0, 1))
    race = Race(title="a step", against="full", seconds={"full": [1.0, 2.0], "mofo": [1.1, 2.4]}, facts={"share": 0.12})
    write_bench(root, "steps", races=[race], drawn=False)
    return root, planned


def found(results, path, **more):
    loaded = replace(load_cells(results[0], results[1]), **more)
    return claims.table(loaded, comparison(loaded), path=path)


def measure(results, folder, measured, **changes):
    (row,) = found(results, written(folder, measures=[measured], **changes)).to_dict("records")
    return row


def test_the_projects_own_claims_hold_together(results):
    file = claims.load()
    assert len(file.claims) >= 15
    sources = {paper.source for paper in file.papers.values()}
    assert sources == {"https://arxiv.org/abs/2501.13669", "https://arxiv.org/abs/2407.20999"}
    for claim in file.claims.values():
        low, high = claim.accepted
        assert low <= claim.range[0] <= claim.range[1] <= high  # what is claimed agrees with itself
    table = found(results, claims.FILE)
    assert set(table["name"]) == set(file.claims) and set(table["verdict"]) <= set(claims.VERDICTS)
    of_setting = table["name"].map(lambda name: file.claims[name].scope == "setting")
    scores = table[of_setting & table["value"].notna()]
    assert len(scores) and set(scores["verdict"]) == {"not comparable"}  # nothing here is of the papers' models
    unknown = table[table["value"].isna()]
    assert (unknown["verdict"] == "not measured").all() and unknown["why"].all()


@pytest.mark.parametrize(
    ("direction", "value", "low", "high", "verdict"),
    [
        ("about", 0.1, 0.09, 0.11, "agrees"),
        ("about", 0.12, None, None, "agrees"),
        ("about", 0.1201, None, None, "disagrees"),
        ("about", 0.1, 0.07, 0.11, "not measured"),
        ("about", 0.2, 0.05, 0.3, "not measured"),
        ("about", 0.2, 0.13, 0.3, "disagrees"),
        ("about", 0.0, -0.1, 0.079, "disagrees"),
        ("at least", 9.0, None, None, "agrees"),
        ("at least", 0.2, 0.08, 0.3, "agrees"),
        ("at least", 0.2, 0.07, 0.3, "not measured"),
        ("at least", 0.05, 0.0, 0.07, "disagrees"),
        ("at most", -9.0, None, None, "agrees"),
        ("at most", 0.1, 0.0, 0.13, "not measured"),
        ("at most", 0.2, 0.13, 0.3, "disagrees"),
    ],
)
def test_a_verdict_is_of_the_whole_interval(tmp_path, direction, value, low, high, verdict):
    claim = one(tmp_path, direction=direction)
    assert claim.verdict(Measured(where="w", value=value, low=low, high=high))[0] == verdict


def test_a_range_is_claimed_as_a_range(tmp_path):
    claim = one(tmp_path, number=[0.1, 0.2])
    assert [claim.verdict(Measured(where="w", value=v))[0] for v in (0.07, 0.08, 0.15, 0.22, 0.23)] == [
        "disagrees",
        *["agrees"] * 3,
        "disagrees",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "unknown key 'colour' in a block `claim` of docs/claims.yaml"),
        ({"tolerence": 1, "tolerance": ...}, "unknown key 'tolerence' in .*: did you mean 'tolerance'"),
        ({"number": ...}, "claims.one.number: Field required"),
        ({"number": "20"}, "claims.one.number.* is '20'"),
        ({"number": [2, 1]}, r"claims.one.number is \[2, 1\]: it must be a number or"),
        ({"tolerance": -1}, "claims.one.tolerance is -1"),
        ({"unit": "percent"}, "claims.one.unit is 'percent': Input should be 'times', 'share', 'points' or 'nats'"),
        ({"direction": "up"}, "claims.one.direction is 'up'"),
        ({"seen": "somewhere"}, "claims.one.seen is 'somewhere'"),
        ({"paper": "q"}, "unknown paper 'q' in claims.one"),
        ({"scope": "setting"}, "claims.one: scope `setting` names models and domains"),
        ({"on": {"models": [], "domains": []}}, "claims.one: scope `setting` names models and domains"),
        ({"scope": "setting", "on": {"models": []}}, "claims.one.on.domains: Field required"),
        ({"measures": ...}, "a claim that nothing measures says in `why`"),
        ({"measures": [{"tables": {}}]}, r"unknown key 'tables' in .* did you mean 'table'"),
        (
            {"measures": [{"table": {"metric": "forgeting", "method": "ewc", "as": "value"}}]},
            "claims.one.measures.0.table.metric is 'forgeting': Input should be 'general_nll_lost'",
        ),
        (
            {"measures": [{"table": {"metric": "forgetting", "method": "ewc", "as": "sum", "against": "full"}}]},
            "as is 'sum': Input should be 'value', 'difference' or 'ratio'",
        ),
        (
            {"measures": [{"table": {"metric": "forgetting", "method": "ewc", "as": "ratio"}}]},
            "table: against is missing",
        ),
        (
            {"measures": [{"table": {"metric": "forgetting", "methods": "ewc"}}]},
            "unknown key 'methods' in .*did you mean 'method'",
        ),
        (
            {"measures": [{"fact": {"record": "steps", "name": "x"}, "equals": []}]},
            "unknown key 'equals' in .*did you mean 'equal'",
        ),
        ({**HERE_ON, "measures": [{"fact": {"record": "steps", "name": "x"}}]}, "the claim's scope must be `any`"),
    ],
)
def test_mistakes_in_the_file_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        one(tmp_path, **changes)


def test_a_file_that_is_no_yaml_is_refused(tmp_path):
    (tmp_path / "claims.yaml").write_text("papers: [\n")
    with pytest.raises(UserError, match="cannot be read"):
        claims.load(tmp_path / "claims.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        claims.load(tmp_path / "nowhere.yaml")


def test_a_value_is_the_tables_own(results, tmp_path):
    row = measure(results, tmp_path, CLAIM["measures"][0])
    loaded = load_cells(*results)
    table = comparison(loaded)
    own = table[table["method"] == "ewc"].iloc[0]
    assert (row["value"], row["low"], row["high"]) == (own["forgetting"], own["forgetting_low"], own["forgetting_high"])
    assert row["n"] == "600 rows, 2 seeds" and row["where"] == "smollm2-135m, science: forgetting of ewc"


@pytest.mark.parametrize("metric", ["forgetting", "domain_gain", "domain_score", "general_score"])
def test_a_difference_is_paired_by_item_and_seed(results, tmp_path, metric):
    row = measure(
        results, tmp_path, {"table": {"metric": metric, "method": "ewc", "against": "full", "as": "difference"}}
    )
    loaded = load_cells(*results)
    mean = loaded.cells.groupby("method")[metric].mean()
    assert row["value"] == pytest.approx(mean["ewc"] - mean["full"])
    assert row["low"] < row["value"] < row["high"] and (row["low"] + row["high"]) / 2 == pytest.approx(row["value"])
    alone = load_cells(results[0], [cell for cell in results[1] if cell.endswith("seed0")])
    (single,) = claims.table(alone, comparison(alone), path=tmp_path / "claims.yaml").to_dict("records")
    if metric.startswith("domain"):  # one task and one seed: by hand
        scores = alone.items[alone.items["task"] == "science"].pivot(index="doc_hash", columns="cell", values="score")
        difference = scores["smollm2-135m/science/ewc/seed0"] - scores["smollm2-135m/science/full/seed0"]
        difference = [*difference, 1, -1]  # two items more, one moved up and one down
        error = statistics.stdev(difference) / len(difference) ** 0.5
        assert single["high"] - single["value"] == pytest.approx(1.968 * error, rel=1e-3)  # t of 299 degrees
    assert "this run, not this method" in single["ends"] and "other seeds" in row["ends"]


@pytest.mark.parametrize("metric", ("general_nll_lost", "gold_nll_lost"))
def test_a_claim_may_name_a_measure_in_nats(results, tmp_path, metric):
    place = {"table": {"metric": metric, "method": "ewc", "against": "full", "as": "difference"}}
    sign = {"number": 0.0, "tolerance": 0.0, "direction": "at most", "unit": "nats"} | HERE_ON
    row = measure(results, tmp_path, place, **sign)
    mean = load_cells(*results).cells.groupby("method")[metric].mean()
    assert row["value"] == pytest.approx(mean["ewc"] - mean["full"]) and row["low"] < row["value"] < row["high"] < 0
    assert row["verdict"] == "agrees" and row["metric"] == metric
    rows = "128 rows" if metric == "general_nll_lost" else "600 rows"
    assert row["n"] == f"{rows}, 2 seeds" and numbers.nats(row["value"]) in claims.SHOW["nats"](row["value"])
    value = measure(results, tmp_path, {"table": {"metric": metric, "method": "full", "as": "value"}}, **sign)
    assert value["verdict"] == "disagrees" and value["value"] == pytest.approx(mean["full"])
    both = [place, {"table": place["table"] | {"metric": "forgetting"}}]
    assert len(one(tmp_path, measures=both, **sign).measures) == 2
    for changes in ({"number": 0.1}, {"tolerance": 0.02}, {"unit": "points", "number": 0.1}):
        with pytest.raises(UserError, match="only where the claim is about its sign"):
            one(tmp_path, measures=both, **sign | changes)


def test_a_ratio_of_scores_has_an_interval(results, tmp_path):
    row = measure(
        results,
        tmp_path,
        {"table": {"metric": "domain_score", "method": "mofo", "against": "full", "as": "ratio"}},
        unit="share",
    )
    loaded = load_cells(*results)
    mean = loaded.cells.groupby("method")["domain_score"].mean()
    assert row["value"] == pytest.approx(mean["mofo"] / mean["full"]) and row["low"] < row["value"] < row["high"]
    same = measure(
        results,
        tmp_path,
        {"table": {"metric": "domain_score", "method": "full", "against": "full", "as": "ratio"}},
        unit="share",
    )
    assert (
        same["value"] == 1.0 and 0.98 < same["low"] < 1 < same["high"] < 1.02
    )  # that no item differs does not say that none can


def test_costs_are_compared_seed_by_seed_on_one_machine(results, tmp_path):
    asked = {"table": {"metric": "seconds_train", "method": "mofo", "against": "full", "as": "ratio"}}
    row = measure(results, tmp_path, asked, number=1.19, unit="times")
    assert row["value"] == pytest.approx(301.2 / 252.3) and row["n"] == "1 timing"  # the fixture's seeds are alike
    assert (row["verdict"], row["why"][:10]) == ("not measured", "timed once")
    loaded = load_cells(*results)
    loaded.cells.loc["smollm2-135m/science/full/seed1", "seconds_train"] *= 1.02
    loaded.cells.loc["smollm2-135m/science/mofo/seed1", "seconds_train"] *= 1.02
    (row,) = claims.table(loaded, comparison(loaded), path=tmp_path / "claims.yaml").to_dict("records")
    assert row["n"] == "2 timings" and row["verdict"] == "agrees"
    loaded = load_cells(*results)
    loaded.cells.loc["smollm2-135m/science/full/seed1", "seconds_train"] *= 1.02
    loaded.cells.loc["smollm2-135m/science/mofo/seed0", "seconds_train"] *= 2
    (row,) = claims.table(loaded, comparison(loaded), path=tmp_path / "claims.yaml").to_dict("records")
    assert (
        row["low"] == pytest.approx(301.2 / 252.3 / 1.02)
        and row["high"] == pytest.approx(602.4 / 252.3)
        and row["verdict"] == "not measured"
    )
    loaded.cells.at["smollm2-135m/science/mofo/seed0", "hardware"] = {"cpu": "another"}
    (row,) = claims.table(loaded, comparison(loaded), path=tmp_path / "claims.yaml").to_dict("records")
    assert row["verdict"] == "not comparable" and "hardware is not equal" in row["why"]


def test_a_reused_preparation_or_training_counts_once(results, tmp_path):
    asked = {"table": {"metric": "seconds_prepare", "method": "hierarchical", "against": "ewc", "as": "ratio"}}
    assert measure(results, tmp_path, asked, unit="times")["n"] == "1 timing"

    whole = load_cells(*results)
    table = comparison(whole)

    def found_in(**seconds):
        loaded = replace(whole, cells=whole.cells.copy(), prepared=dict(whole.prepared))
        for method, (stored, added) in seconds.items():
            cell = f"smollm2-135m/science/{method}/seed1"
            loaded.prepared[cell] = loaded.prepared[cell] | {"seconds_prepare": stored}
            loaded.cells.loc[cell, "seconds_prepare"] = stored + added
        (row,) = claims.table(loaded, table, path=tmp_path / "claims.yaml").to_dict("records")
        return row

    # what a cell does itself before its first step is added, so that the sums of one preparation differ
    assert found_in(ewc=(96.4, 9.0), hierarchical=(88.7, 0.1))["n"] == "1 timing"
    assert found_in(ewc=(96.4, 0.0), hierarchical=(99.0, 0.0))["n"] == "1 timing"  # of two methods, the fewer
    row = found_in(ewc=(106.0, 0.0), hierarchical=(99.0, 0.0))
    assert row["n"] == "2 timings" and row["low"] < row["high"]
    place = {"metric": "seconds_train", "method": "mofo", "against": "full", "as": "ratio"}
    path = written(tmp_path, measures=[{"table": place}])
    whole.cells["seconds_train"] = 252.3  # mofo begins from full's training
    (row,) = claims.table(whole, table, path=path).to_dict("records")
    assert row["verdict"] == "not measured" and row["why"].startswith("both take the time of one training")


def test_preparations_are_compared_with_tolerance_and_storage_in_equal_bits(results, tmp_path):
    place = {"table": {"metric": "bytes_importance", "method": "hierarchical", "against": "ewc", "as": "ratio"}}
    path = written(tmp_path, unit="share", measures=[place | {"equal": ["tokens_prepare", "bits"]}])
    loaded = load_cells(*results)
    whole = comparison(loaded)

    def verdict():
        (row,) = claims.table(loaded, whole, path=path).to_dict("records")
        return row["verdict"], row["why"]

    own = loaded.cells["method"] == "ewc"
    loaded.cells.loc[own, "tokens_prepare"] *= 0.995
    assert verdict() == ("disagrees", "")
    for cell in loaded.cells.index[own]:
        loaded.cells.at[cell, "parts"] = {"ewc": {"bits": 32}}
    assert verdict() == ("not comparable", "bits is not equal: None and 32")
    loaded.cells.loc[own, "tokens_prepare"] *= 0.9
    assert verdict()[1].startswith("tokens prepare is not equal: 35820")


def test_a_claim_counts_once_however_many_places_it_has():
    def of(*verdicts):
        return claims.of_claims(pd.DataFrame({"name": "one", "verdict": verdicts}))["one"]

    assert of("not measured", "agrees", "not comparable") == "agrees" and of("agrees", "disagrees") == "mixed"
    assert of("not measured", "not comparable") == "not comparable" and of("not measured") == "not measured"


def test_what_must_be_equal_and_is_not_is_not_comparable(results, tmp_path):
    asked = {
        "table": {"metric": "bytes_importance", "method": "hierarchical", "against": "ewc", "as": "ratio"},
        "equal": ["learning_rate", "tokens_trained"],
    }
    assert measure(results, tmp_path, asked, unit="share")["verdict"] == "disagrees"  # 0.7 %
    loaded = load_cells(*results)
    loaded.cells.loc[loaded.cells["method"] == "ewc", "learning_rate"] = 3e-4
    (row,) = claims.table(loaded, comparison(loaded), path=tmp_path / "claims.yaml").to_dict("records")
    assert row["verdict"] == "not comparable" and row["why"] == "learning rate is not equal: 1e-05 and 0.0003"
    unknown = measure(
        results,
        tmp_path,
        {"table": {"metric": "bytes_importance", "method": "ewc", "against": "full", "as": "ratio"}},
        why="a",
    )
    assert (
        unknown["verdict"] == "not measured"
        and "bytes_importance is unknown or zero; it would take a" == unknown["why"]
    )


def test_scores_agree_or_disagree_only_on_the_claims_own_models_and_data(results, tmp_path):
    asked = {"table": {"metric": "forgetting", "method": "full", "as": "value"}}
    value = measure(results, tmp_path, asked)["value"]
    for number, verdict in ((value, "agrees"), (value - 0.5, "disagrees")):
        changes = {"number": number, "tolerance": 0.2}
        assert measure(results, tmp_path, asked, **changes, **HERE_ON)["verdict"] == verdict
        elsewhere = {"scope": "setting", "on": {"models": ["llama2-7b"], "domains": ["science"]}}
        row = measure(results, tmp_path, asked, **changes, **elsewhere)
        assert row["verdict"] == "not comparable" and row["value"] == value


def test_benchmarks_are_looked_up_by_runner_and_fact(results, tmp_path):
    row = measure(
        results,
        tmp_path,
        {"bench": {"record": "steps", "runner": "mofo", "against": "full"}},
        number=1.12,
        unit="times",
        tolerance=0.1,
    )
    assert (
        (row["value"], row["low"], row["high"]) == pytest.approx((1.15, 1.1, 1.15))
        and row["n"] == "2 rounds"
        and row["verdict"] == "agrees"
    )
    row = measure(results, tmp_path, {"fact": {"record": "steps", "name": "share"}}, unit="share")
    assert row["value"] == 0.12 and row["verdict"] == "agrees"
    for gone in (
        {"bench": {"record": "steps", "runner": "mofo", "against": "lora"}},
        {"fact": {"record": "headline", "name": "x"}},
    ):
        row = measure(results, tmp_path, gone)
        assert row["verdict"] == "not measured" and "python -m experiments bench" in row["why"]


def test_movement_is_read_from_drift(results, tmp_path):
    asked = {"drift": {"metric": "distance", "method": "mofo", "against": "full"}}
    assert measure(results, tmp_path, asked)["verdict"] == "not measured"
    moved = {
        cell: {"overall": {"distance": {"mofo": 1.0, "full": 5.0}.get(cell.split("/")[2], 2.0) + int(cell[-1])}}
        for cell in results[1]
    }
    (row,) = found(results, tmp_path / "claims.yaml", drift=moved).to_dict("records")
    assert row["value"] == pytest.approx((1 / 5 + 2 / 6) / 2) and (row["low"], row["high"]) == pytest.approx(
        (1 / 5, 2 / 6)
    )


def test_methods_that_are_not_there_and_seeds_that_do_not_meet(results, tmp_path):
    row = measure(
        results,
        tmp_path,
        {"table": {"metric": "forgetting", "method": "ewc-lora", "against": "full", "as": "difference"}},
    )
    assert (
        row["verdict"] == "not measured"
        and row["why"] == "no model and domain with finished cells of ewc-lora and full"
    )
    cells = ["smollm2-135m/science/ewc/seed0", "smollm2-135m/science/full/seed1"]
    loaded = load_cells(results[0], cells)
    written(
        tmp_path, measures=[{"table": {"metric": "forgetting", "method": "ewc", "against": "full", "as": "difference"}}]
    )
    (row,) = claims.table(loaded, comparison(loaded), path=tmp_path / "claims.yaml").to_dict("records")
    assert row["verdict"] == "not measured" and row["why"] == "ewc and full have no seed in common"


def test_random_models_are_no_evidence(tmp_path):
    planned = write_results(tmp_path / "results", methods=("ewc",), not_a_result=True)
    row = measure((tmp_path / "results", planned), tmp_path, CLAIM["measures"][0])
    assert row["verdict"] == "not comparable" and row["why"] == "demo or random weights: not a result"


def test_without_items_there_is_a_value_and_no_interval(tmp_path):
    planned = write_results(tmp_path / "results", methods=("ewc", "full"))
    (tmp_path / "results/runs/smollm2-135m/science/ewc/seed0/items.csv.gz").unlink()
    asked = {"table": {"metric": "forgetting", "method": "ewc", "against": "full", "as": "difference"}}
    row = measure((tmp_path / "results", planned), tmp_path, asked)
    assert row["value"] is not None and pd.isna(row["low"])


def test_nothing_finished(tmp_path):
    loaded = load_cells(tmp_path, ["m/d/full/seed0"])
    table = claims.table(loaded, comparison(loaded))
    assert set(table["verdict"]) == {"not measured"}


def test_the_section_shows_every_claim_and_escapes(results):
    loaded = load_cells(*results)
    made = claims.section(loaded, comparison(loaded))
    json.dumps(made)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    partial = environment.from_string((HERE / "analysis/sections/claims.html.j2").read_text())
    page = partial.render(claims=made)
    table = claims.table(loaded, comparison(loaded))
    assert page.count("<tr><td") == len(table) and page.count('scope="rowgroup"') == table["name"].nunique()
    assert made["sentence"].startswith(f"{len(claims.load().claims)} claims, each counted once: ")
    assert "one-sided: anything up to" in page and "one-sided: anything from" in page
    assert "arxiv.org/abs/2407.20999" in page and "http" not in page  # the report asks nothing of a network
    made["papers"][0]["claims"][0]["claim"] = "<b>"
    assert "&lt;b&gt;" in partial.render(claims=made) and partial.render(claims=None).strip() == ""


def test_a_record_of_one_round_is_no_verdict(results, tmp_path):
    race = Race(title="t", against="a", seconds={"a": [1.0], "b": [2.0]})
    write_json(
        tmp_path / "results/bench/other.json",
        {"name": "other", "title": "t", "text": "t", "when": "2030", "races": [race.record()]},
    )
    row = measure(
        (tmp_path / "results", []),
        tmp_path,
        {"bench": {"record": "other", "runner": "b", "against": "a"}},
        number=2,
        tolerance=0,
    )
    assert row["verdict"] == "not measured" and pd.isna(row["low"]) and row["n"] == "1 round"
    assert row["why"].startswith("timed once")
