"""Sweeps: blocks written into params.yaml, everything else of it untouched, one preparation for all of them."""

import difflib
import re
import shutil

import pytest

from analysis.families import families, family
from experiments.commands import sweep
from experiments.stages import resolve
from experiments.study import config, pipeline
from experiments.study.params_text import read_yaml, with_methods
from experiments.study.paths import HERE
from methods.errors import UserError

SOURCES = [HERE / "params.yaml", *sorted((HERE / "experiments" / "studies").glob("*/params.yaml"))]


@pytest.fixture
def demo(tmp_path):
    """The demo study in a project of its own."""
    folder = tmp_path / "experiments" / "studies" / "demo"
    folder.mkdir(parents=True)
    shutil.copy(HERE / "experiments/studies/demo/params.yaml", folder)
    shutil.copy(HERE / "dvc.yaml", tmp_path)
    study = config.load("demo", root=tmp_path)
    pipeline.main(study)
    return study


def again(study):
    return config.load(study.name, root=study.paths.root)


def added_lines(before, after):
    changes = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[:1] in "+-"]
    return [line[2:] for line in changes if line[0] == "+"], [line[2:] for line in changes if line[0] == "-"]


def test_a_sweep_writes_blocks_names_and_the_pipeline(demo, capsys):
    before = demo.paths.params.read_text()
    capsys.readouterr()
    sweep.main(demo, method="ewc", knob="ewc.strength", values="1e1..1e5", points=5)
    said = capsys.readouterr().out
    new, old = added_lines(before, demo.paths.params.read_text())
    # ewc itself runs at 100: that value is its own trial
    assert [line for line in new if "like" in line] == [
        "  ewc-s1: {like: ewc, ewc: {strength: 10.0}}",
        "  ewc-s2: {like: ewc, ewc: {strength: 1000.0}}",
        "  ewc-s3: {like: ewc, ewc: {strength: 10000.0}}",
        "  ewc-s4: {like: ewc, ewc: {strength: 1.0e+5}}",
    ]
    assert len(new) == 5 and old == ["  methods: [full, lora, ewc, mofo, hierarchical]"]
    study = again(demo)
    assert study.grid.methods == ["full", "lora", "ewc", "ewc-s1", "ewc-s2", "ewc-s3", "ewc-s4", "mofo", "hierarchical"]
    assert [study.methods[f"ewc-s{k}"].parts[0].strength for k in (1, 2, 3, 4)] == [10.0, 1e3, 1e4, 1e5]
    assert {study.methods[f"ewc-s{k}"].parts[0].samples for k in (1, 2, 3, 4)} == {16}
    assert not pipeline.behind(study)
    assert (
        "results/demo/runs/llama-tiny/sums/ewc-s4/seed0/metrics.json" in (study.paths.folder / "dvc.yaml").read_text()
    )
    assert "trials by family: full 1, lora 1, ewc 5, mofo 1, hierarchical 1" in said
    assert "sweep full, lora, mofo, hierarchical until each has 5" in said
    assert re.search(r"4 of 4 cells to run: about [\d.]+ min, disk \d+ MiB.*plan --study demo` shows each", said)


def test_the_same_sweep_again_changes_nothing_and_another_is_refused(demo, capsys):
    arguments = {"method": "mofo", "knob": "mofo.fraction", "values": "0.05,0.2"}
    sweep.main(demo, **arguments)
    text = demo.paths.params.read_text()
    capsys.readouterr()
    sweep.main(again(demo), **arguments)
    assert (
        demo.paths.params.read_text() == text
        and "mofo-s2: mofo.fraction = 0.2 (already present)" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match=r"already has a block mofo-s1, .*0.05.*delete the blocks mofo-s.*mofo-b"):
        sweep.main(again(demo), method="mofo", knob="mofo.fraction", values="0.3,0.4")
    assert demo.paths.params.read_text() == text
    sweep.main(
        again(demo), method="mofo", knob="mofo.fraction", values="0.05,0.2,0.4"
    )  # a longer list goes on from the shorter one
    assert again(demo).methods["mofo-s3"].parts[0].fraction == 0.4


def test_the_preparation_is_shared_where_the_knob_does_not_enter_it(demo):
    sweep.main(demo, method="ewc", knob="ewc.strength", values="1,10")
    sweep.main(again(demo), method="hierarchical", knob="hierarchical.samples", values="4,8")
    study = again(demo)
    prepared = {name: resolve.text(resolve.prepare(study, "llama-tiny", name)) for name in study.grid.methods}
    trained = {name: resolve.text(resolve.train(study, "llama-tiny", "sums", name)) for name in study.grid.methods}
    assert prepared["ewc"] == prepared["ewc-s1"] == prepared["ewc-s2"] and "samples" in prepared["ewc"]
    assert len({trained["ewc"], trained["ewc-s1"], trained["ewc-s2"]}) == 3
    assert len({prepared[name] for name in ("hierarchical", "hierarchical-s1", "hierarchical-s2")}) == 3


def test_cells_of_one_preparation_pay_for_it_once(demo, monkeypatch):
    sweep.main(demo, method="ewc", knob="ewc.strength", values="1,10")
    cell = {"seconds": 90.0, "seconds_prepare": 60.0, "cached": {"scored": False}}
    made = {
        "cells": [cell | {"cell": f"llama-tiny/sums/ewc-s{k}/seed0"} for k in (1, 2)],
        "total": {"to_run": 2, "cells": 2, "disk_bytes": 0, "peak_memory_bytes": 0, "too_large": 0},
    }
    monkeypatch.setattr(sweep.plan, "make", lambda study, patterns: made)
    assert "about 2.0 min" in sweep.cost(again(demo), ["ewc-s1", "ewc-s2"])  # 60 + 30 + 30 seconds


def test_both_sides_of_a_methods_own_value(demo):
    sweep.main(demo, method="ewc", knob="ewc.strength", values="x10")
    sweep.main(again(demo), method="lora", knob="train.learning_rate", values="x2")
    study = again(demo)
    assert [study.methods[f"ewc-s{k}"].parts[0].strength for k in (1, 2)] == [10.0, 1000.0]
    own = study.settings(model="llama-tiny", domain="sums", method="lora").learning_rate
    rates = [study.settings(model="llama-tiny", domain="sums", method=f"lora-s{k}").learning_rate for k in (1, 2)]
    assert rates == [own / 2, own * 2]


def test_training_rates_whole_numbers_and_names_of_choices(demo):
    sweep.main(demo, method="lora", knob="train.learning_rate", values="1e-4..1e-2", points=3)
    sweep.main(again(demo), method="ewc", knob="ewc.samples", values="4..30", points=3, linear=True)
    sweep.main(again(demo), method="hierarchical", knob="lora.rank", values="2..32", points=3)
    text = demo.paths.params.read_text()
    assert (
        "lora-s1: {like: lora, train: {learning_rate: 1.0e-4}}" in text
        and "lora-s3: {like: lora, train: {learning_rate: 0.01}}" in text
    )
    study = again(demo)
    assert [
        study.settings(model="llama-tiny", domain="sums", method=f"lora-s{k}").learning_rate for k in (1, 2, 3)
    ] == [1e-4, 1e-3, 1e-2]
    assert [study.methods[f"ewc-s{k}"].parts[0].samples for k in (1, 2, 3)] == [4, 17, 30]
    assert [next(p.rank for p in study.methods[f"hierarchical-s{k}"].parts if p.key == "lora") for k in (1, 2, 3)] == [
        2,
        8,
        32,
    ]
    assert study.methods["hierarchical-s1"].train == {"learning_rate": 5e-3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ewd", "ewc.strength", "1,2"), "unknown method 'ewd'.*did you mean 'ewc'"),
        (("ewc", "strength", "1,2"), "write PART.SETTING"),
        (("ewc", "ewc.strength", "x1"), "need a number above 1"),
        (("ewc", "ewc.strength", "xx"), "write x and a number above 1, such as x2"),
        (("ewc", "ewc.scope", "x2"), "which has no sides: write a range"),
        (("ewc", "ewx.strength", "1,2"), "unknown part 'ewx'.*did you mean 'ewc'"),
        (("ewc", "ewc.strenght", "1,2"), "unknown setting 'strenght'.*did you mean 'strength'"),
        (("ewc", "train.learning_rat", "1,2"), "unknown setting 'learning_rat'.*learning_rate"),
        (("ewc", "ewc.strength", "-1,2"), "methods.ewc-s1.ewc.strength is -1.0: it must be a number from 0"),
        (("ewc", "ewc.strength", "1e2"), "ewc has this value itself"),
        (("ewc", "ewc.strength", "1,1.0"), "1.0 comes twice"),
        (("ewc", "ewc.samples", "2..3"), "comes twice.*fewer points"),
        (("ewc", "ewc.samples", "2.5,3"), "methods.ewc-s1.ewc.samples is 2.5: it must be a whole number"),
        (("ewc", "ewc.strength", "0..1"), "equal ratios need ends above 0; --linear"),
        (("ewc", "ewc.strength", "5..1"), "from the lower to the higher"),
        (("ewc", "ewc.strength", "a..b"), "write a range LOW..HIGH"),
        (("ewc", "ewc.strength", "1,,2"), "'' is not a value"),
        (("ewc", "ewc.strength", "nan,1"), "'nan' is not a finite number"),
        (("ewc", "ewc.strength", "1,1e400"), "'1e400' is not a finite number"),
        (("ewc", "ewc.strength", f"1,1{'0' * 400}"), "'10+' is not a finite number"),
        (("ewc", "ewc.scope", "[a"), r"'\[a' is not a value"),
        (("ewc", "ewc.scope", "*a"), r"'\*a' is not a value"),
        (("ewc", "ewc.scope", "!!int a"), "'!!int a' is not a value"),
        (("ewc", "ewc.samples", "x1e308"), "16 times 1e.308 is too large a number"),
        (("ewc", "ewc.samples", "1e-320..1e308"), "the ends are too far apart"),
        (("full", "train.epochs", "1,2"), "train.epochs changes the tokens.*a study of its own"),
        (("full", "train.length", "128,512"), "train.length changes the tokens"),
        (
            ("lora", "train.learning_rate", "0,1e-3"),
            "methods.lora-s1.train.learning_rate is 0.0: it must be a number above 0",
        ),
        (("lora", "train.moments", "bfloat16"), "one for all methods"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(demo, arguments, message):
    before = demo.paths.params.read_text(), (demo.paths.folder / "dvc.yaml").read_text()
    with pytest.raises(UserError, match=message):
        sweep.main(demo, **dict(zip(("method", "knob", "values"), arguments)))
    assert (demo.paths.params.read_text(), (demo.paths.folder / "dvc.yaml").read_text()) == before


def test_a_list_has_its_own_number_of_points_and_a_block_is_not_swept(demo):
    with pytest.raises(UserError, match="--points and --linear are for a range"):
        sweep.make(demo, method="ewc", knob="ewc.strength", values="1,2", points=2, linear=False)
    for points in (1, 1_000_000):
        with pytest.raises(UserError, match=f"--points {points}: .*give 2 to 100"):
            sweep.make(demo, method="ewc", knob="ewc.strength", values="1..2", points=points, linear=False)
    sweep.main(demo, method="ewc", knob="ewc.strength", values="1,10")
    with pytest.raises(UserError, match="ewc-s1 is a block of a sweep: sweep ewc"):
        sweep.main(again(demo), method="ewc-s1", knob="ewc.strength", values="3,4")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.parent.name)
def test_every_studys_params_keep_every_other_line(path):
    """First, middle and last method: comments between blocks stay where they were."""
    text = path.read_text()
    methods = [name for name in read_yaml(path)["methods"] if family(name) == name]
    for method in (methods[0], "mofo", methods[-1]):
        blocks = {f"{method}-s{k}": {"like": method, "train": {"learning_rate": 1e-7 * k}} for k in (7, 8, 9)}
        made = with_methods(text, blocks=blocks, grid=list(blocks), behind=method, where="params.yaml")
        new, old = added_lines(text, made)
        own = [f"  {method}-s{k}: {{like: {method}, train: {{learning_rate: {k}.0e-7}}}}" for k in (7, 8, 9)]
        assert [line for line in new if line in own] == own and len(old) <= 1
        rows = made.splitlines()
        assert rows[rows.index(own[0]) - 1].strip() and not rows[rows.index(own[0]) - 1].startswith("#")
        assert max(map(len, rows)) <= max(120, *map(len, text.splitlines()))


def test_other_layouts():
    block = {"b-s1": {"like": "b", "x": {"y": 2}}}
    listed = "grid:\n  methods:\n    - a\n    - b  # why\n\nmethods:\n  a: {}\n  b:\n    x: {y: 1}"
    made = with_methods(listed, blocks=block, grid=["b-s1"], behind="b", where="p")
    assert (
        made == "grid:\n  methods:\n    - a\n    - b  # why\n    - b-s1\n\n"
        "methods:\n  a: {}\n  b:\n    x: {y: 1}\n  b-s1: {like: b, x: {y: 2}}\n"
    )
    with pytest.raises(UserError, match="p: cannot add methods to this layout"):
        with_methods(
            "grid: {methods: [b]}\nmethods: {b: {x: {y: 1}}, a: {}}\n", blocks=block, grid=[], behind="b", where="p"
        )
    with pytest.raises(UserError, match="p: cannot add methods to this layout"):
        with_methods(
            "grid: {methods: [b]}\nmethods: {b: {x: {y: 1}},\n  a: {}}\n", blocks=block, grid=[], behind="b", where="p"
        )


def test_families():
    assert [family(name) for name in ("ewc", "ewc-s3", "ewc-s03", "x-s1-s2", "mofo-ewc")] == [
        "ewc",
        "ewc",
        "ewc-s03",
        "x-s1",
        "mofo-ewc",
    ]
    assert families(["a", "b-s1", "a-s2", "b"]) == {"a": ["a", "a-s2"], "b": ["b-s1", "b"]}
