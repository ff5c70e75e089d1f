"""Every key of params.yaml with wrong values: the loader refuses each by name, and the JSON Schema refuses it, too."""

import json
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import pytest
from annotated_types import Ge, Gt, Lt
from pydantic.fields import FieldInfo

from experiments.commands.schema import text
from experiments.study import config, schema
from experiments.study.blocks import Block
from experiments.study.params_text import read_yaml
from experiments.study.paths import HERE, Paths
from methods import registry
from methods.errors import UserError
from methods.part import Part
from methods.settings import declared, setting

SHA = "a" * 64
ROWS = {
    "hub": {
        "path": "a/b",
        "name": "c",
        "split": "test",
        "revision": "main",
        "data_files": "x.json",
        "keep": "p",
        "set": {"q": "{{p}}"},
        "columns": ["q"],
    },
    "pypi": {"package": "a-b==1", "path": "x/y", "requests": "z.jsonl.gz", "keep": "p", "set": {"q": 1}}
    | {"columns": {"q": "p"}},
    "jsonl": {"path": "rows.jsonl", "keep": "p", "set": {"q": ""}, "columns": ["q"]},
    "local": {"path": "rows.csv", "split": "train", "encoding": "cp1252", "keep": "p", "set": {"q": ""}}
    | {"columns": ["q"]},
}
SCORED = {
    "task": "sciq",
    "metric": "acc",
    "chance": 0.25,
    "licence": "MIT",
    "rows": ROWS,
    "nulls": "empty",
    "keep": "a < 3",
    "set": {"a": ""},
    "columns": {"a": "b"},
}
TRAIN = {
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup": 0.1,
    "epochs": 2,
    "batch": 8,
    "micro_batch": 4,
    "length": 64,
    "weight_decay": 0,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 1e-9,
    "clip": 0.5,
    "pack": 128,
    "moments": "bfloat16",
    "checkpointing": True,
    "compile": False,
    "checkpoint_seconds": 0.0,
    "probes": 0,
    "stop": {"general_nll": 0.1, "t": -1},
    "keep": "best",
}
FULL = {  # every key of every block, with a right value
    "title": "all",
    "device": "cpu",
    "not_a_result": True,
    "grid": {"models": ["m"], "domains": ["d"], "methods": ["lora"], "seeds": [0, 1]},
    "data": {"source": "hub", "test": 100, "hub": "sets"},
    "packages": {"a-b==1": SHA},
    "models": {
        "m": {
            "source": "pypi:a==1/x.gguf",
            "sha256": SHA,
            "bin_sha256": SHA.upper(),
            "dtype": "float32",
            "compute_dtype": "bfloat16",
            "note": "n",
            "licence": "MIT",
            "config": {"a": 1},
            "architecture": {"model_type": "llama"},
            "seed": 0,
            "parameters": 5,
            "layers": 2,
            "width": 8,
            "needs": {"gpus": 0.5, "cores": 4, "memory": 16},
            "processes": 2,
            "train": TRAIN,
        },
        "settled": {
            "settle": {
                "from": "m",
                "mix": {"general": 1, "t": 0.5},
                "lora": {"rank": 2, "alpha": 4},
                "train": TRAIN,
                "gate": {"learning_rate": 1e-3, "steps": 4, "nats": 0.1, "every": 8, "most": 16},
                "adapter_sha256": SHA,
                "sha256": SHA,
            }
        },
    },
    "tasks": {"t": SCORED | {"test": 20, "probe": 4, "settle": 2}},
    "suites": {"s": ["t"]},
    "domains": {
        "d": SCORED
        | {
            "format": "task",
            "chat_template": "t.jinja",
            "question": "q",
            "test_rows": ROWS,
            "split": {"train": "all", "probe": 0, "test": 5, "distinct": True},
            "retention": ["t"],
            "transfer": [],
            "score": [],
            "probes": ["t"],
            "why": "w",
            "train": TRAIN,
        }
    },
    "general": {
        "rows": ROWS,
        "text": "passage",
        "article": "title",
        "settle": 0,
        "importance": 4,
        "replay": 0,
        "probe": 0,
        "test": 4,
        "max_words": 100,
        "nulls": "empty",
        "licence": "MIT",
        "note": "n",
    },
    "methods": {
        "lora": {"lora": {}, "ewc": {}, "train": {key: value for key, value in TRAIN.items() if key != "moments"}}
    },
    "train": TRAIN,
    "evaluate": {"scorer": "hflm", "batch_size": 4, "chat_template": True, "fewshot_as_multiturn": False, "improve": 5},
    "tune": {"epochs": 0.5, "methods": {"lora": {"lora.rank": [2, 4]}}},
    "leaders": ["lora"],
    "compositions": ["lora"],
    "controls": {"lora": "lora"},
    "also": ["other"],
}
PATHS = (schema.Jsonl, schema.Local, schema.Rows)  # blocks that may be a path alone
OTHERS = ["text", 1.5, 7, True, None, ["a"], [1], [["a"]], {"a": 1}, [None]]  # one of each type that YAML writes


def build(raw):
    return config.build(raw, paths=Paths())  # the root's own, which takes no block over from another file


def put(path: tuple[str, ...], value: Any) -> dict:
    raw = json.loads(json.dumps(FULL))  # nothing shared between blocks
    block = raw
    for key in path[:-1]:
        block = block[key]
    block[path[-1]] = value
    return raw


def keys(block: type[Block], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every key of a block and of the blocks in it; of named blocks, the one that FULL has."""
    for name, field in block.model_fields.items():
        if field.annotation is schema.Settle:  # in a block of its own, for a model has either this or `source`
            yield ("models", "settled", name), field
            yield from keys(field.annotation, ("models", "settled", name))
            continue
        yield (*path, name), field
        inner = typing.get_args(field.annotation)[1:] if typing.get_origin(field.annotation) is dict else ()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Block):
            yield from keys(field.annotation, (*path, name))
        elif inner and isinstance(inner[0], type) and issubclass(inner[0], Block):
            yield from keys(inner[0], (*path, name, next(iter(FULL[name]))))


EVERY = [*keys(schema.Params), *keys(schema.MethodTrain, ("methods", "lora", "train"))]


def right(value: Any, kind: Any) -> bool:
    """An independent reading of a key's type."""
    if typing.get_origin(kind) is typing.Annotated:
        return right(value, typing.get_args(kind)[0])
    if isinstance(kind, type) and issubclass(kind, Block):
        return isinstance(value, dict)
    if kind in (int, float):
        return isinstance(value, (int,) if kind is int else (int, float)) and not isinstance(value, bool)
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind) and not isinstance(value, bool)
    if typing.get_origin(kind) in (list, tuple):
        return isinstance(value, list) and all(right(item, typing.get_args(kind)[0]) for item in value)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(right(item, typing.get_args(kind)[1]) for item in value.values())
    if typing.get_args(kind):
        return any(right(value, option) for option in typing.get_args(kind))
    return isinstance(value, kind)


def test_the_example_has_every_key_and_is_accepted():
    build(FULL)
    for path, _ in EVERY:
        block: Any = FULL
        for key in path:
            assert key in block, f"add {'.'.join(path)} to FULL"
            block = block[key]


@pytest.mark.parametrize(
    ("path", "field"), EVERY, ids=lambda value: ".".join(value) if isinstance(value, tuple) else ""
)
def test_a_wrong_type_and_a_wrong_value_are_named(path, field):
    for value in wrong_values(field):
        with pytest.raises(UserError) as refused:
            build(put(path, value))
        name = re.escape(".".join(path))
        assert re.match(rf"{name} (is|names) |{name}\.\w+ is |.*unknown \w+ .* in {name}:", str(refused.value)), (
            value,
            str(refused.value),
        )


@pytest.mark.parametrize("path", [path for path, field in EVERY if field.is_required()], ids=".".join)
def test_a_missing_key_is_named(path):
    raw = put(path, None)
    block = raw
    for key in path[:-1]:
        block = block[key]
    del block[path[-1]]
    with pytest.raises(UserError, match=rf"^{re.escape('.'.join(path[:-1]) or 'params.yaml')} has no `{path[-1]}`"):
        build(raw)


@pytest.mark.parametrize("path", [path for path, field in EVERY if field.is_required()], ids=".".join)
def test_a_required_key_with_nothing_behind_it_is_missing(path):
    with pytest.raises(UserError, match=rf"^{re.escape('.'.join(path[:-1]) or 'params.yaml')} has no `{path[-1]}`"):
        build(put(path, None))


@pytest.mark.parametrize("path", sorted({path[:-1] for path, _ in EVERY}), ids=lambda path: ".".join(path) or "top")
def test_an_unknown_key_is_named(path):
    with pytest.raises(UserError, match=rf"^unknown key 'nonsense' in {re.escape('.'.join(path) or 'params.yaml')}: "):
        build(put((*path, "nonsense"), 1))


@pytest.mark.parametrize("part", sorted(registry.parts()))
def test_settings_of_parts_are_named_with_their_whole_path(part):
    kinds = typing.get_type_hints(registry.parts()[part])
    for field in declared(registry.parts()[part]):
        wrong: list[Any] = [{"a": 1}, [["a"]]]
        if field.metadata["within"]:
            low, high = (float(end) for end in field.metadata["within"][1:-1].split(","))
            wrong += [low - 1, *([high + 1] if high < 1e300 else [])]
        assert not any(right(value, kinds[field.name]) for value in wrong[:2])
        for value in wrong:
            raw = put(("methods", "mine"), {"like": "other", part: {field.name: value}})
            raw["methods"]["other"] = {}
            with pytest.raises(UserError, match=rf"^methods\.mine\.{part}\.{field.name} is "):
                build(raw)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("tasks", "t", "chance"),
            "0.5",
            "tasks.t.chance is '0.5': it must be a share of 1, in [0, 1); write 0.5 without quotes",
        ),
        (("domains", "d", "chance"), 25, "domains.d.chance is 25: it must be a share of 1, in [0, 1); 25 % is 0.25"),
        (
            ("tasks", "t", "test"),
            "20",
            "tasks.t.test is '20': it must be a whole number from 1, or all; write 20 without quotes",
        ),
        (
            ("domains", "d", "split", "train"),
            32.0,
            "domains.d.split.train is 32.0: it must be a whole number from 1, or all",
        ),
        (("domains", "d", "retention"), "t", "domains.d.retention is 't': it must be a list of names; write [t]"),
        (("grid", "methods"), "lora", "grid.methods is 'lora': it must be a list of names; write [lora]"),
        (
            ("grid", "seeds"),
            0,
            "grid.seeds is 0: it must be a list of whole numbers from 0 to 9223372036854775807; write [0]",
        ),
        (("evaluate", "batch_size"), "auto", "evaluate.batch_size is 'auto': it must be a whole number from 1"),
        (("evaluate", "scorer"), "vllm", "evaluate.scorer is 'vllm': it must be one of shared-prefix, hflm"),
        (("not_a_result"), "yes", "not_a_result is 'yes': it must be true or false; write true"),
        (("models", "m", "sha256"), "b179", "models.m.sha256 is 'b179': it must be a sha256: 64 hexadecimal digits"),
        (("models", "m", "sha256"), None, "models.m.sha256 is null"),
        (
            ("tasks", "t", "columns"),
            {"a": ["b"]},
            "tasks.t.columns is {'a': ['b']}: it must be a list of names or a mapping of names to names",
        ),
        (("models", "m", "config"), {"seed": 1}, "models.m.config names `seed`: write it in the block beside `config`"),
        (
            ("models", "m", "dtype"),
            "bf16",
            "models.m.dtype is 'bf16': it must be one of bfloat16, float16, float32, float64",
        ),
        (("models", "m", "source"), "llama", "models.m.source is 'llama': it must be hub:NAME@REVISION, pypi:"),
        (("packages"), {"a-b": SHA}, "packages names 'a-b': it must be NAME==VERSION"),
        (("packages"), {"a-b==1": SHA[1:]}, "packages.a-b==1 is 'aaaa"),
        (
            ("domains", "d", "rows", "hub", "revision"),
            47e169,
            "domains.d.rows.hub.revision is 4.7e+170: it must be text that is not empty; put it in quotes",
        ),
        (
            ("methods", "lora", "train", "learning_rate"),
            -1.0,
            "methods.lora.train.learning_rate is -1.0: it must be a number above 0",
        ),
        (("methods", "x"), "lora", "methods.x is 'lora': it must be a mapping"),
        (("methods", "x"), False, "methods.x is false: it must be a mapping"),
        (("methods", "x"), {"lora": 0}, "methods.x.lora is 0: it must be a mapping"),
        (("methods", "x"), {"train": []}, "methods.x.train is []: it must be a mapping"),
        (("methods", "x"), {"lora": 4}, "methods.x.lora is 4: it must be a mapping"),
        (("methods", "x"), {"like": ["lora"]}, "methods.x.like is ['lora']: it must be text"),
        (("methods", "x"), {"given": {}}, "methods.x.given.path is missing"),
        (("methods", "x"), {"mofo": {}, "given": {"path": "x"}}, "methods.x: given and mofo cannot be combined"),
        (("tune", "methods"), {"lara": {}}, "unknown method 'lara' in tune.methods: did you mean 'lora'?"),
        (("tune", "methods"), {"lora": []}, "tune.methods.lora is []: it must be a mapping"),
        (
            ("tune", "methods"),
            {"lora": {"lora.rank": 4}},
            "tune.methods.lora.lora.rank: write PART.SETTING or train.SETTING with a list of values",
        ),
        (("tune", "methods"), {"lora": {"mofo.fraction": [0.1]}}, "unknown part 'mofo' in tune.methods.lora"),
        (
            ("tune", "methods"),
            {"lora": {"lora.rank": [2, 0]}},
            "tune.methods.lora: with lora.rank 0, methods.lora.lora.rank is 0: it must be a whole number",
        ),
        (
            ("tune", "methods"),
            {"lora": {"train.rate": [1.0]}},
            "unknown key 'rate' in tune.methods.lora: with train.rate 1.0, methods.lora.train",
        ),
        (("domains", "d", "retention"), ["t", "t"], "domains.d.retention names 't' twice"),
        (("tasks", "t", "probe"), 0, "domains.d.probes names 't', but tasks.t.probe is 0"),
        (("tasks", "t", "rows"), {"jsonl": None}, "tasks.t.rows.jsonl has no `path`"),
        (("general", "rows"), {"pypi": None}, "general.rows.pypi has no `package`"),
        (("models", "m", "config"), {1: 2}, "models.m.config: the key 1 is not text: put it in quotes"),
        (("tasks", "t", "task"), {None: 2}, "tasks.t.task: the key null is not text: put it in quotes"),
        (("methods", 1), {}, "methods: the key 1 is not text: put it in quotes"),
        (
            ("tasks", "t", "set"),
            {"x": [date(2024, 1, 2)]},
            "tasks.t.set.x is 2024-01-02, which YAML reads as a date: put it in quotes",
        ),
        (
            ("domains", "d", "task"),
            {"metadata": {"x": b"y"}},
            "domains.d.task.metadata.x is b'y': write text, a number",
        ),
        (("title",), "\ud800", "title is '\\ud800': it has half of a character"),
        (
            ("grid", "seeds"),
            [0, 2**63],
            "grid.seeds is [0, 9223372036854775808]: it must be a list of whole numbers from 0 to 9223372036854775807",
        ),
    ],
)
def test_what_is_said(path, value, message):
    with pytest.raises(UserError) as refused:
        build(put(path if isinstance(path, tuple) else (path,), value))
    assert str(refused.value).startswith(message), str(refused.value)


def test_an_alias_inside_of_its_own_anchor_is_refused_and_one_used_twice_is_not():
    raw = put(("title",), "x")
    raw["domains"]["d"]["set"] = raw["tasks"]["t"]["set"] = {"x": {"y": 1}}
    build(raw)
    raw["tasks"]["t"]["set"]["x"]["y"] = raw["tasks"]["t"]["set"]
    with pytest.raises(UserError, match="tasks.t.set.x.y contains itself"):
        build(raw)


def test_aliases_that_would_become_millions_of_values_are_refused(tmp_path):
    lines = ["title: x", "a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "params.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="has [0-9,]+ values when its aliases"):
        read_yaml(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("\n".join(lines[:4]))
    assert len(read_yaml(tmp_path / "params.yaml")["a2"][0]) == 10


def test_yaml_makes_values_and_runs_nothing(tmp_path):
    for tag in ("!!python/object/apply:os.system ['touch trap']", "!!python/name:os.system", "!function utils.run"):
        (tmp_path / "params.yaml").write_text(f"title: {tag}\n")
        with pytest.raises(UserError, match="is not valid YAML: line 1"):
            read_yaml(tmp_path / "params.yaml")


def test_choices_may_be_counted_by_their_keys():
    """lm-eval takes the values of a mapping of choices alone, in their order."""
    build(put(("tasks", "t", "task"), {"doc_to_choice": {0: "no", 1: "yes"}}))


@pytest.mark.parametrize("nothing", ({}, None))
def test_a_method_without_settings_is_plain_fine_tuning_however_it_is_written(nothing):
    raw = put(("methods", "plain"), nothing)
    raw["methods"]["mine"] = {"ewc": nothing, "train": nothing}
    study = build(raw)
    assert study.methods["plain"].parts == () and [part.key for part in study.methods["mine"].parts] == ["ewc"]


def valid(value: Any, schema: dict, root: dict) -> bool:
    """JSON Schema (draft 2020-12) by its text, for the keywords that the schema uses; another keyword is an error."""
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}

    def is_a(kind: str) -> bool:
        if kind in ("integer", "number"):
            return (
                isinstance(value, int | float) and not isinstance(value, bool) and (kind == "number" or value % 1 == 0)
            )
        return isinstance(value, kinds[kind])

    def within(inner: dict, *values: Any) -> bool:
        return all(valid(value, inner, root) for value in values)

    number, block = is_a("number"), value if isinstance(value, dict) else {}
    names = schema.get("properties", {})
    patterns = schema.get("patternProperties", {})
    others = [v for k, v in block.items() if k not in names and not any(re.search(p, k) for p in patterns)]
    checks = {
        "$ref": lambda ref: within(root["$defs"][ref.removeprefix("#/$defs/")], value),
        "type": lambda kind: any(map(is_a, [kind] if isinstance(kind, str) else kind)),
        "enum": lambda choices: value in choices,
        "const": lambda choice: value == choice,
        "anyOf": lambda options: any(within(option, value) for option in options),
        "properties": lambda _: all(within(names[k], v) for k, v in block.items() if k in names),
        "patternProperties": lambda _: all(
            within(patterns[p], v) for p in patterns for k, v in block.items() if re.search(p, k)
        ),
        "propertyNames": lambda inner: within(inner, *block),
        "additionalProperties": lambda inner: not others if inner is False else inner is True or within(inner, *others),
        "required": lambda keys: not isinstance(value, dict) or set(keys) <= set(value),
        "items": lambda inner: not isinstance(value, list) or within(inner, *value),
        "minItems": lambda least: not isinstance(value, list) or len(value) >= least,
        "pattern": lambda pattern: not isinstance(value, str) or re.search(pattern, value) is not None,
        "maxLength": lambda most: not isinstance(value, str) or len(value) <= most,
        "minimum": lambda least: not number or value >= least,
        "exclusiveMinimum": lambda least: not number or value > least,
        "maximum": lambda most: not number or value <= most,
        "exclusiveMaximum": lambda most: not number or value < most,
    }
    said = schema.keys() - {"$schema", "$defs", "description", "default"}
    return all(checks[keyword](schema[keyword]) for keyword in said)


BUILT_IN = {name: part for name, part in registry.parts().items() if part.__module__.startswith("methods.")}
JSON_SCHEMA = json.loads((HERE / "params.schema.json").read_text())


def accepted(raw: dict) -> bool:
    return valid(raw, JSON_SCHEMA, JSON_SCHEMA)


def test_the_committed_schema_is_of_the_code():
    """Run `python -m experiments schema` after a change of a key or of a part's settings."""
    assert (HERE / "params.schema.json").read_text() == text(BUILT_IN)


@pytest.mark.parametrize(
    "params",
    sorted(HERE.glob("experiments/studies/*/params.yaml")) + [HERE / "params.yaml"],
    ids=lambda path: path.parent.name,
)
def test_every_study_is_valid_and_names_the_schema(params):
    assert accepted(read_yaml(params))
    schema = params.read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (params.parent / schema).samefile(HERE / "params.schema.json")


def wrong_values(field: FieldInfo) -> list[Any]:
    """Values of other types, and those at and beyond the bounds."""
    options = (field.annotation, *typing.get_args(field.annotation))
    empty = {typing.get_origin(option) or option for option in options} & {dict, list}
    empty = empty or field.is_required() or (isinstance(field.annotation, type) and issubclass(field.annotation, Block))
    kind = str | dict if field.annotation in PATHS else field.annotation
    wrong = [value for value in OTHERS if not right(value, kind) and not (value is None and empty)]
    assert len(wrong) >= 5
    for bound in field.metadata:
        wrong += [float("nan")] if isinstance(bound, Ge | Gt | Lt) else []
        wrong += [bound.ge - 1] if isinstance(bound, Ge) else []
        wrong += [bound.gt, bound.gt - 1] if isinstance(bound, Gt) else []
        wrong += [bound.lt, bound.lt + 1] if isinstance(bound, Lt) else []
        wrong += ["", " "] if getattr(bound, "pattern", None) else []
    if typing.get_origin(field.annotation) is typing.Literal:
        wrong += ["", " "]
    return wrong


@pytest.mark.parametrize(
    ("path", "field"), EVERY, ids=lambda value: ".".join(value) if isinstance(value, tuple) else ""
)
def test_the_schema_refuses_what_the_loader_refuses(path, field):
    assert accepted(FULL) and not accepted(put((*path[:-1], "nonsense"), 1))
    for value in wrong_values(field):
        if value == value and value is not None:  # JSON has no NaN
            assert not accepted(put(path, value)), value


@pytest.mark.parametrize("path", [path for path, _ in EVERY], ids=".".join)
def test_the_schema_and_the_loader_agree_on_null(path):
    raw = put(path, None)
    try:
        build(raw)
    except UserError as error:
        # a name whose block null has emptied, and a key that only some formats need
        assert accepted(raw) == str(error).startswith(("unknown ", "domains.d has no `task`: add it, or name"))
    else:
        assert accepted(raw)


def test_settings_of_parts_are_in_the_schema():
    for block, fits in (
        ({"lora": {"rank": 4, "targets": ["q_proj"]}, "ewc": None}, True),
        ({"lora": {"rnak": 4}}, False),
        ({"lora": {"rank": 0}}, False),
        ({"lora": {"targets": "q_proj"}}, False),
        ({"lroa": {}}, False),
        ({"train": {"moments": "float32"}}, False),
    ):
        assert accepted(put(("methods", "mine"), block)) == fits, block


def test_a_part_of_another_package_brings_its_settings():
    @dataclass(frozen=True, kw_only=True)
    class Strange(Part):
        line, paper = "A part.", ""
        share: float | None = setting(None, within="(0, 1]", help="share of something")

    whole = json.loads(text(BUILT_IN | {"strange": Strange}))
    for share, fits in ((0.5, True), (None, True), (1, True), (0, False), (1.5, False), ("a", False)):
        assert valid(put(("methods", "mine"), {"strange": {"share": share}}), whole, whole) == fits, share
    assert not accepted(put(("methods", "mine"), {"strange": {}}))


def test_every_key_has_help():
    blocks = {"params.yaml": JSON_SCHEMA} | JSON_SCHEMA["$defs"]
    keys = {(name, key): value for name, block in blocks.items() for key, value in block.get("properties", {}).items()}
    described = [blocks[key["$ref"].removeprefix("#/$defs/")] | key if "$ref" in key else key for key in keys.values()]
    assert len(keys) > 150 and all(key["description"] for key in described)
