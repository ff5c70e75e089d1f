"""What a study takes over from the root's params.yaml, and whose mistakes are whose."""

import io
import json
import shutil

import pytest
from ruamel.yaml import YAML

from experiments.commands import sweep
from experiments.stages import resolve
from experiments.study import cells, config, inheritance, pipeline
from experiments.study.params_text import read_yaml
from experiments.study.paths import HERE, Paths
from experiments.study.schema import TAKEN_OVER
from methods.errors import UserError

ROOT = read_yaml(HERE / "params.yaml")
STUDIES = sorted(path.parent.name for path in (HERE / "experiments" / "studies").glob("*/params.yaml"))
OWN = {  # all that a study has to write
    "grid": {"models": ["llama-tiny"], "domains": ["mine"], "methods": ["full", "lora"], "seeds": [0]},
    "domains": {"mine": ROOT["domains"]["science"]},
    "train": {"learning_rate": 1.0e-4},
}


def write(folder, raw):
    folder.mkdir(parents=True, exist_ok=True)
    out = io.StringIO()
    YAML().dump(json.loads(json.dumps(raw)), out)
    (folder / "params.yaml").write_text(out.getvalue())


def load(root, own=OWN, above=ROOT):
    """A study `mine` of these blocks below a root of those."""
    write(root, above)
    write(Paths(study="mine", root=root).folder, own)
    return config.load("mine", root=root)


def copied(own, above=ROOT):
    """The blocks of a study that copies whatever it takes over, by the rule in words."""
    whole = dict(own)
    for kind in TAKEN_OVER:
        if kind == "general":
            whole[kind] = own.get(kind) or above[kind]
        else:
            whole[kind] = {**(above.get(kind) or {}), **(own.get(kind) or {})}
    return whole


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_resolves_to_what_it_would_if_it_copied_the_roots_blocks(name):
    raw, study = read_yaml(Paths(study=name).params), config.load(name)
    plain = config.build(copied(raw), paths=Paths())
    moved = plain.model_copy(update={"paths": study.paths, "title": study.title})
    assert resolve.contents(study) == resolve.contents(moved)
    for cell in cells.grid(study):
        names = {"model": cell.model, "domain": cell.domain, "method": cell.method}
        assert study.settings(**names) == plain.settings(**names)
    pairs = [(study.grid, plain.grid), (study.general.as_written, plain.general.as_written)]
    assert all(ours == theirs for ours, theirs in pairs)


def test_a_study_needs_a_grid_domains_and_train_alone(tmp_path):
    study = load(tmp_path)
    assert study.models["llama-tiny"].as_written == ROOT["models"]["llama-tiny"]
    assert study.tasks["piqa"].as_written == ROOT["tasks"]["piqa"]
    assert study.general.as_written == ROOT["general"] and study.packages == ROOT["packages"]
    assert study.methods["lora-wise-ft"].block == {**ROOT["methods"]["lora"], "wise_ft": {"alpha": 0.5}}
    assert study.domains.keys() == {"mine"} and not study.tune.methods  # these are the root's own question
    settings = study.settings(model="llama-tiny", domain="mine", method="full")
    assert (settings.learning_rate, settings.warmup) == (1.0e-4, 0.0) and ROOT["train"]["warmup"]  # the default's


def test_a_block_of_the_same_name_replaces_the_roots_whole(tmp_path):
    own = OWN | {
        "models": {"llama-tiny": {"source": "random:llama", "seed": 7}},
        "methods": {"lora": {"lora": {"rank": 2}}, "more": {"like": "kl", "kl": {"strength": 2.0}}},
        "general": {"rows": {"jsonl": "text.jsonl"}},
    }
    study = load(tmp_path, own)
    assert study.models["llama-tiny"].as_written == {"source": "random:llama", "seed": 7}
    assert study.models["gptj-tiny"].seed == 0
    assert study.methods["lora"].train == {} and study.methods["lora"].block == {"lora": {"rank": 2}}
    assert study.methods["more"].block == {"kl": {"strength": 2.0, "text": "domain"}}  # `like` names the root's
    assert study.methods["lora-wise-ft"].block["lora"] == {"rank": 2}  # and the root's `like` names the study's
    assert study.general.text == "text" and study.general.importance == 512  # defaults, not the root's keys


def test_suites_are_taken_over_and_name_the_studys_own_tasks(tmp_path):
    above = ROOT | {"suites": {"mine": ["piqa", "copa"], "words": ["lambada_openai"]}}
    domain = OWN["domains"]["mine"] | {"retention": ["mine", "words"], "probes": ["piqa"]}
    piqa = ROOT["tasks"]["piqa"] | {"test": 7}
    own = OWN | {"domains": {"mine": domain}, "suites": {"words": ["hellaswag"]}, "tasks": {"piqa": piqa}}
    study = load(tmp_path, own, above)
    assert study.domains["mine"].retention == ["piqa", "copa", "hellaswag"]
    assert study.tasks["piqa"].test == 7 and study.tasks["copa"].as_written == ROOT["tasks"]["copa"]


def test_a_method_like_its_own_name_begins_from_the_roots(tmp_path):
    own = OWN | {"methods": {"lora": {"like": "lora", "train": {"learning_rate": 3.0e-4}, "lora": {"rank": 2}}}}
    study = load(tmp_path, own)
    assert study.methods["lora"].block == {
        "lora": ROOT["methods"]["lora"]["lora"] | {"rank": 2},
        "train": {"learning_rate": 3.0e-4},
    }
    assert study.methods["lora-wise-ft"].block == study.methods["lora"].block | {"wise_ft": {"alpha": 0.5}}
    own["methods"] = {"hierarchical-paper": {"like": "hierarchical-paper", "hierarchical": {"strength": 1.0}}}
    block = load(tmp_path, own).methods["hierarchical-paper"].block
    assert block["hierarchical"]["strength"] == 1.0 and block["hierarchical"]["groups"] == "blocks"
    assert block["lora"] == ROOT["methods"]["lora"]["lora"]
    with pytest.raises(UserError, match="methods.mine: `like` leads back to itself"):
        load(tmp_path, OWN | {"methods": {"mine": {"like": "mine"}}})


def test_whose_mistake_it_is(tmp_path):
    def message(own=OWN, above=ROOT):
        with pytest.raises(UserError) as refused:
            load(tmp_path, own, above)
        return str(refused.value)

    of_root = " (in the root's params.yaml, from which the study takes over what it does not write)"
    wrong = ROOT | {"models": ROOT["models"] | {"bad": {"source": "random:llama", "dtpye": "float32"}}}
    assert message(above=wrong) == "unknown key 'dtpye' in models.bad: did you mean 'dtype'?" + of_root
    wheel = ROOT | {"models": {"llama-tiny": {"source": "pypi:a==1/b.gguf"}}}
    assert message(above=wheel).startswith("models.llama-tiny has no `sha256`") and message(above=wheel).endswith(
        of_root
    )
    misspelt = {{"general": "generall"}.get(name, name): block for name, block in ROOT.items()}
    assert message(above=misspelt) == "unknown key 'generall' in params.yaml: did you mean 'general'?" + of_root
    rank = ROOT | {"methods": ROOT["methods"] | {"lora": {"lora": {"rank": 0}}}}
    assert message(above=rank).startswith("methods.lora.lora.rank is 0:") and message(above=rank).endswith(of_root)
    mine = OWN | {"methods": {"lora": {"lora": {"rank": 0}}}}
    assert message(mine).startswith("methods.lora.lora.rank is 0:") and of_root not in message(mine)
    assert message(OWN | {"grid": OWN["grid"] | {"methods": ["lroa"]}}) == (
        "unknown method 'lroa' in grid.methods: did you mean 'lora'?"
    )
    assert message({key: OWN[key] for key in ("grid", "domains")}).startswith("params.yaml has no `train`")
    (tmp_path / "params.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML.*in the root's params.yaml"):
        config.load("mine", root=tmp_path)


def test_what_is_found_later_names_the_roots_file_too(tmp_path):
    own = OWN | {"tasks": {"piqa": ROOT["tasks"]["piqa"]}}
    paths = load(tmp_path, own).paths
    of_root = " (in the root's params.yaml, from which the study takes over what it does not write)"
    for path, whose in (
        ("tasks.copa.rows.pypi: no checksum", of_root),
        ("tasks.piqa.rows.pypi: no checksum", ""),
        ("models.llama-tiny.source is wrong", of_root),
        ("general.rows has no 'hub' source", of_root),
        ("domains.mine.rows: no file", ""),
        ("generally speaking", ""),
        (f"models.x is wrong{of_root}", ""),
    ):
        assert inheritance.attributed(path, paths) == path + whose
        assert inheritance.attributed(path, Paths(root=tmp_path)) == path


def test_a_method_of_the_root_that_the_study_does_not_use_is_no_hindrance(tmp_path):
    """The root's `lora-wise-ft` begins from `lora`, with which the study's own block of that name does not go."""
    own = OWN | {"methods": {"lora": {"given": {"path": "somewhere"}, "wise_ft": {"alpha": 2.0}}}}
    with pytest.raises(UserError, match=r"methods.lora.wise_ft.alpha is 2.0"):
        load(tmp_path, own)
    above = ROOT | {"methods": ROOT["methods"] | {"other": {"like": "lora", "lora": {"nonsense": 1}}}}
    assert "other" not in load(tmp_path, above=above).methods
    with pytest.raises(UserError, match=r"'nonsense' in methods.other.lora.*in the root's params.yaml"):
        load(tmp_path, OWN | {"grid": OWN["grid"] | {"methods": ["other"]}}, above)


def test_dvc_looks_at_the_roots_file_for_a_study_alone(tmp_path):
    study = load(tmp_path)
    shutil.copy(HERE / "dvc.yaml", tmp_path)
    deps = YAML(typ="safe").load(pipeline.rendered(study))["stages"]["resolve"]["deps"]
    assert deps[:2] == ["experiments/studies/mine/params.yaml", "params.yaml"]
    deps = YAML(typ="safe").load(pipeline.rendered(config.load(root=tmp_path)))["stages"]["resolve"]["deps"]
    assert deps.count("params.yaml") == 1 and deps[0] == "params.yaml"


def test_a_method_that_is_taken_over_can_be_swept(tmp_path):
    shutil.copy(HERE / "dvc.yaml", tmp_path)
    study = load(tmp_path)
    before = study.paths.params.read_text()
    for method, knob in (("kl", "kl.strength"), ("lora", "lora.rank")):
        sweep.main(config.load("mine", root=tmp_path), method=method, knob=knob, values="1,2")
    after = study.paths.params.read_text()
    assert set(before.splitlines()) < set(after.splitlines())
    study = config.load("mine", root=tmp_path)
    assert study.grid.methods == ["full", "lora", "lora-s1", "lora-s2", "kl-s1", "kl-s2"]
    assert read_yaml(study.paths.params)["methods"] == {
        "kl-s1": {"like": "kl", "kl": {"strength": 1.0}},
        "kl-s2": {"like": "kl", "kl": {"strength": 2.0}},
        "lora-s1": {"like": "lora", "lora": {"rank": 1}},
        "lora-s2": {"like": "lora", "lora": {"rank": 2}},
    }
