"""params.yaml: what is wrong in it is named, with the nearest right thing."""

import copy
import io
import re

import pytest
from ruamel.yaml import YAML

from experiments.study import cells, config
from experiments.study.params_text import read_yaml
from experiments.study.paths import HERE
from methods.errors import UserError

DEMO = YAML(typ="safe").load(HERE / "experiments" / "studies" / "demo" / "params.yaml")


def load(tmp_path, change=None, text=None):
    raw = copy.deepcopy(DEMO)
    if change:
        change(raw)
    out = io.StringIO()
    YAML().dump(raw, out)
    (tmp_path / "params.yaml").write_text(text if text is not None else out.getvalue())
    return config.load(root=tmp_path)


def put(path, value):
    def change(raw):
        *way, last = path.split("/")
        for key in way:
            raw = raw[key]
        raw[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("gird", {}, "unknown key 'gird'.*did you mean 'grid'"),
        ("grid/model", [], "unknown key 'model' in grid.*'models'"),
        ("grid/methods", ["ful"], "unknown method 'ful' in grid.methods: did you mean 'full'"),
        ("grid/models", ["llama"], "unknown model 'llama' in grid.models: did you mean 'llama-tiny'"),
        ("grid/domains", ["sum"], "unknown domain 'sum'.*did you mean 'sums'"),
        ("grid/seeds", [], "grid.seeds"),
        ("leaders", ["ful"], "unknown method 'ful' in leaders: did you mean 'full'"),
        ("controls", {"full": "lor"}, "unknown method 'lor' in controls: did you mean 'lora'"),
        ("grid/seeds", [0, 0], "grid.seeds names one entry twice"),
        ("grid/seeds", ["a"], "whole numbers"),
        ("models/llama-tiny/dtpye", "float32", "unknown key 'dtpye' in models.llama-tiny: did you mean 'dtype'"),
        (
            "domains/sums/retention",
            ["colour"],
            "unknown task 'colour' in domains.sums.retention: did you mean 'colours'",
        ),
        ("tasks/colours/chance", 50, "tasks.colours.chance is 50: it must be a share of 1, in \\[0, 1\\); 50 % is 0.5"),
        ("domains/sums/chance", -9.0, "domains.sums.chance is -9.0: it must be a share of 1, in \\[0, 1\\)"),
        ("tasks/colours/chance", "0.5", "tasks.colours.chance is '0.5': it must be a share of 1"),
        ("tasks/colours/chance", True, "tasks.colours.chance is true: it must be a share of 1"),
        ("tasks/colours/nulls", "keep", "tasks.colours.nulls is 'keep': it must be the word empty"),
        ("train/learning_rat", 1.0, "unknown key 'learning_rat' in train: did you mean 'learning_rate'"),
        ("train/learning_rate", "fast", "train.learning_rate is 'fast': it must be a number above 0"),
        ("train/batch", 0, "train.batch is 0: it must be a whole number from 1"),
        ("train/batch", 2.5, "train.batch is 2.5: it must be a whole number from 1"),
        (
            "methods/ewc/ewc",
            {"strenght": 1.0},
            "unknown setting 'strenght' in methods.ewc.ewc: did you mean 'strength'",
        ),
        ("methods/ewc", {"ewx": {}}, "unknown part 'ewx' in methods.ewc: did you mean 'ewc'"),
        ("methods/mofo/mofo", {"fraction": 1.5}, "methods.mofo.mofo.fraction is 1.5.*\\(0, 1\\]"),
        ("methods/bad name", {}, "methods: 'bad name'"),
        ("methods/plus+plus", {}, "methods: 'plus\\+plus'"),
        ("methods/again", {"like": "nobody"}, "unknown method 'nobody' in methods.again.like"),
        (
            "methods/full",
            {"train": {"moments": "bfloat16"}},
            "methods.full.train.moments: Adam's precision is one for all methods",
        ),
        ("train/moments", "float16", "train.moments is 'float16': it must be one of float32, bfloat16"),
        ("models/llama-tiny/processes", 0, "models.llama-tiny.processes is 0: it must be a whole number from 1"),
        ("device", "tpu", "device is 'tpu'"),
        ("models/llama-tiny/note", "a\0b", "models.llama-tiny.note is 'a.x00b': it has a zero character"),
        ("evaluate", {"batchsize": 4}, "unknown key 'batchsize' in evaluate: did you mean 'batch_size'"),
    ],
)
def test_mistakes_are_named(tmp_path, path, value, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, put(path, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [1", "params.yaml is not valid YAML: line 1, column 6"),
        (b"a:\n\tb: 1\n", "params.yaml is not valid YAML: line 2, column 1: a tab: indent with spaces"),
        (b"a: 1\nb: c: d\n", "line 2, column 5: a second colon: put a text with a colon in quotes"),
        (
            b"train: {}\nmodels: {}\ntrain: {}\n",
            'params.yaml line 3: the key "train" is already in this block: keep one of the two',
        ),
        (
            b"a: {{b}}\n",
            "params.yaml is not valid YAML: line 1, column 5: a text that begins with one of { [ % @ ` must be in "
            "quotes",
        ),
        (b"a: %b\n", "line 1, column 4: a text that begins with one of { [ % @ ` must be in quotes"),
        (b"", "params.yaml is empty: it needs at least grid"),
        (b"- a\n", "params.yaml must be a mapping of blocks"),
        (b"a: 1\nb: \xff\n", "params.yaml line 2 has bytes that are not UTF-8"),
        (b"a: 2024-99-99\n", "params.yaml is not valid YAML: month"),
        (b'a: "\\UFFFFFFFF"\n', "params.yaml is not valid YAML: "),
        pytest.param(b"a: 1" + b"0" * 400, "a is a whole number of 1329 bits: write one of at most 63", id="no float"),
        pytest.param(b"a: 0x" + b"f" * 5000, "a is a whole number of 20000 bits", id="not to be shown"),
        pytest.param(b"? 0x" + b"f" * 5000 + b"\n: a", "a key of params.yaml is a whole number of", id="as a key"),
    ],
)
def test_broken_yaml_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "params.yaml").write_bytes(text)
    with pytest.raises(UserError, match=re.escape(message)):
        config.load(root=tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="params.yaml not found"):
        config.load(root=tmp_path / "nowhere")


@pytest.mark.parametrize("name", ("demo/", "../..", "Demo", "."))
def test_a_study_is_a_name_and_no_path(name):
    """`demo/`, as a shell completes it, would write other paths into dvc.yaml and make every finished cell stale."""
    with pytest.raises(UserError, match="--study '.*': a name is lower-case letters"):
        config.load(name)


def test_a_number_without_a_point_is_a_number(tmp_path):
    # PyYAML reads 1e-3 as text, DVC as a number: so must we
    text = "train: {learning_rate: 1e-3}"
    (tmp_path / "x.yaml").write_text(text)
    assert read_yaml(tmp_path / "x.yaml")["train"]["learning_rate"] == pytest.approx(1e-3)


def test_precedence_train_domain_model_method(tmp_path):
    def change(raw):
        raw["train"] |= {"learning_rate": 1.0, "epochs": 1.0, "clip": 1.0, "batch": 1}
        raw["domains"]["sums"]["train"] = {"epochs": 2.0, "clip": 2.0, "batch": 2}
        raw["models"]["llama-tiny"]["train"] = {"clip": 3.0, "batch": 3}
        raw["methods"]["full"] = {"train": {"batch": 4}}

    study = load(tmp_path, change)
    settings = study.settings(model="llama-tiny", domain="sums", method="full")
    assert (settings.learning_rate, settings.epochs, settings.clip, settings.batch) == (1.0, 2.0, 3.0, 4)
    prepared = study.prepare_settings(model="llama-tiny", method="full")
    assert (prepared.epochs, prepared.clip) == (1.0, 3.0)  # the preparation never sees the domain


def test_like_takes_over_and_is_overridden(tmp_path):
    def change(raw):
        raw["methods"]["ewc-s1"] = {"like": "ewc", "ewc": {"strength": 7.0}}

    study = load(tmp_path, change)
    ours, theirs = study.methods["ewc-s1"].parts[0], study.methods["ewc"].parts[0]
    assert (ours.strength, ours.samples) == (7.0, theirs.samples)


def test_parts_stand_in_the_order_of_their_phases_whatever_the_block_says(tmp_path):
    def change(raw):
        raw["methods"]["both"] = {"mofo": {}, "ewc": {}, "lora": {}}

    assert [part.key for part in load(tmp_path, change).methods["both"].parts] == ["lora", "ewc", "mofo"]


def test_cells_and_their_names(tmp_path):
    study = load(tmp_path)
    assert [c.name for c in cells.grid(study)] == [
        f"llama-tiny/sums/{m}/seed0" for m in ("full", "lora", "ewc", "mofo", "hierarchical")
    ]
    assert cells.parse("llama-tiny/sums/ewc/seed3", study) == cells.Cell("llama-tiny", "sums", "ewc", 3)
    for text, message in (
        ("llama-tiny/sums/ewc", "model/domain/method/seed0"),
        ("llama-tiny/sums/ewd/seed0", "did you mean 'ewc'"),
    ):
        with pytest.raises(UserError, match=message):
            cells.parse(text, study)


def test_two_cells_that_dvc_could_not_tell_apart_are_refused(tmp_path):
    def change(raw):
        raw["models"] |= {"a": raw["models"]["llama-tiny"], "a-sums": raw["models"]["llama-tiny"]}
        raw["domains"]["sums-sums"] = raw["domains"]["sums"]
        raw["grid"] |= {"models": ["a", "a-sums"], "domains": ["sums", "sums-sums"]}

    with pytest.raises(UserError, match="share the stage name"):
        cells.grid(load(tmp_path, change))
