"""Rows of lm-eval's own tasks and groups: read from where lm-eval gets them, sampled, and kept for scoring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from datasets import DatasetDict
from tqdm import tqdm

from evaluation import catalogue, documents, groups, guessing
from evaluation.catalogue import Named
from evaluation.task import render
from experiments.data import splits
from experiments.data.data_sets import DataSets
from experiments.data.rows import Rows, placed
from experiments.study.schema import Domain, Task
from methods.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Documents of each task by its name: those scored, those probed, and those that few-shot examples are drawn from.

    total  how many documents there are
    """

    named: Named
    test: dict[str, list[dict]]
    probe: dict[str, list[dict]]
    examples: dict[str, list[dict]]
    sources: tuple[str, ...]
    total: int

    @property
    def source(self) -> str:
        return " ; ".join(self.sources)


def draw(name: str, block: Task, *, test: int | str, data_sets: DataSets) -> Drawn:
    """The documents of a task or group; at most `test` of them, a fixed sample in proportion to its tasks' sizes.

    Raises UserError that names the task, the data set it wanted and the settings that would provide it.
    """
    named = catalogue.named(block.task, name=name)
    docs: dict[str, list[dict]] = {}
    examples: dict[str, list[dict]] = {}
    sources: dict[str, None] = {}
    with documents.seeded():
        for task, config in tqdm(named.tasks.items(), desc=f"data sets of {name}", disable=None, leave=False):
            group = bool(named.aggregates)
            load = _loader(f"tasks.{name}", task, config, data_sets=data_sets, sources=sources, group=group)
            read = documents.read(task, config, load)
            docs[task] = list(read.task_docs)  # as lm-eval made them first: another look would shuffle some anew
            if documents.shots(read) and not documents.states_examples(read):
                examples[task] = _examples(read, f"tasks.{name}")
    sizes = {task: len(own) for task, own in docs.items()}
    free = max(sum(sizes.values()) - block.probe, 1)
    tested = shared_out(sizes, free if test == "all" else min(test, free))
    probed = shared_out({task: sizes[task] - tested[task] for task in sizes}, block.probe, least=0)
    chosen = {task: _chosen(own, test=tested[task], probe=probed[task]) for task, own in docs.items()}
    return Drawn(
        named=named,
        test={task: own[0] for task, own in chosen.items()},
        probe={task: own[1] for task, own in chosen.items()},
        examples=examples,
        sources=tuple(sources),
        total=sum(sizes.values()),
    )


def _examples(task: Any, where: str) -> list[dict]:
    """The documents that the task's few-shot examples are drawn from."""
    examples = list(task.sampler.df)
    scored = task.fewshot_cfg.split == task.config.test_split
    if documents.shots(task) > len(examples) - scored:  # a scored row is never its own example
        raise UserError(
            f"{where}: num_fewshot is {documents.shots(task)}, and the split of {task.config.task} that examples are "
            f"drawn from has {len(examples)} rows{', one of which is the row asked' if scored else ''}: lower it"
        )
    return examples


def shared_out(sizes: Mapping[str, int], number: int, *, least: int = 1) -> dict[str, int]:
    """`number` rows shared out in proportion to `sizes` by largest remainder, and at least `least` of each task.

    There are more than `number` only where the tasks are more.
    """
    total = sum(sizes.values())
    if number >= total:
        return dict(sizes)
    exact = {task: number * size / total for task, size in sizes.items()}
    shares = {task: max(int(part), min(least, sizes[task])) for task, part in exact.items()}
    for task in sorted(exact, key=lambda task: (int(exact[task]) - exact[task], task)):
        if sum(shares.values()) < number and shares[task] < sizes[task] and shares[task] <= exact[task]:
            shares[task] += 1
    while sum(shares.values()) > number and max(shares.values()) > least:
        shares[max(shares, key=lambda task: (shares[task], task))] -= 1
    return shares


def _chosen(docs: Sequence[dict], *, test: int, probe: int) -> tuple[list[dict], list[dict]]:
    """The first by hash for scoring and the next for probes, each in the order of the data set, as lm-eval has them."""
    order = sorted(range(len(docs)), key=lambda number: (splits.row_hash(docs[number]), number))
    return [docs[i] for i in sorted(order[:test])], [docs[i] for i in sorted(order[test : test + probe])]


def training(domain: str, block: Domain, *, data_sets: DataSets) -> tuple[Rows, Rows | None]:
    """The rows of a domain's task as lm-eval reads them: its training split, and the split that it scores."""
    where = f"domains.{domain}"
    named = catalogue.named(block.task, name=domain)
    if named.aggregates:
        raise UserError(
            f"{where}.task is a group of lm-eval's tasks: name one of {', '.join(named.tasks)}, or add `rows`"
        )
    ((task, config),) = named.tasks.items()
    split, scored = config.get("training_split"), config.get("test_split") or config.get("validation_split")
    if not split or not config.get("dataset_path"):
        raise UserError(f"{where} has no `rows`, and lm-eval has no training split of {task}: add `rows`")
    sources: dict[str, None] = {}
    arguments = {
        key: value for key, value in (config.get("dataset_kwargs") or {}).items() if key != "trust_remote_code"
    }
    load = _loader(where, task, config | {"fewshot_split": split}, data_sets=data_sets, sources=sources)
    read = load(config["dataset_path"], config.get("dataset_name"), arguments)
    (source,) = sources
    return tuple(placed(read[one], f"{source}/{one}") if one else None for one in (split, scored))


def _loader(
    where: str,
    task: str,
    config: Mapping[str, Any],
    *,
    data_sets: DataSets,
    sources: dict[str, None],
    group: bool = False,
) -> documents.Load:
    """Reads the data set that lm-eval's task asks for, and adds its source to `sources`."""
    splits_wanted = dict.fromkeys(config.get(f"{kind}_split") for kind in ("test", "validation", "fewshot"))

    def refused(path: str, subset: str | None, problem: object) -> UserError:
        wanted = [f"data set {path}", subset and f"configuration {subset}", *splits_wanted]
        helps = [] if data_sets.folder else ["`data.hub: FOLDER` reads it from a folder in the hub's layout"]
        helps += [] if group else [f"`{where}.rows` reads other rows"]
        return UserError(
            f"{where}: task {task} of lm-eval wants {', '.join(filter(None, wanted))}: {problem}"
            + (f". {', and '.join(helps)}" if helps else "")
        )

    def load(path: str, subset: str | None, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        class Splits(DatasetDict):
            def __missing__(self, split: str) -> NoReturn:
                raise refused(path, subset, f"it has no split {split!r} (it has {', '.join(self)})")

        try:
            rows, source = data_sets(path, subset, arguments)
        except UserError as error:
            raise refused(path, subset, error) from error
        sources[source] = None
        return Splits(rows)

    return load


def write(file: Path, drawn: Drawn) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8") as out:
        out.writelines(documents.lines(drawn.test, drawn.examples))
    return file


def entry(name: str, block: Task, role: str, drawn: Drawn, *, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """The entry of tasks.json of documents that were written to `folder`, and lm-eval's tasks of it.

    Metric and chance level are the task's or the group's first where the block states none.
    """
    stated = {"name": name, "role": role, "file": f"{name}.jsonl", "task": block.task, "documents": True}
    stated |= _metric(block, drawn.named)
    tasks = documents.load(stated, folder)
    if shown := max(map(documents.shots, tasks)):
        stated["num_fewshot"] = shown
    chance = block.chance
    if chance is None:
        guessed = [guessing.chance(task) for task in tasks]
        sizes = [len(task.eval_docs) for task in tasks]
        chance = groups.mean(guessed, sizes, by_size=stated.get("weight_by_size", True))
    return stated | {"metric": stated["metric"] or tasks[0].metric, "chance": chance}, tasks


def _metric(block: Task, named: Named) -> dict[str, Any]:
    """The metric, and for a group whether its tasks weigh by size."""
    if not named.aggregates:
        return {"metric": block.metric}
    first = named.aggregates[0]
    own = next((one for one in named.aggregates if one.metric == (block.metric or "").partition(",")[0]), first)
    filters = [one for one in own.filter_list or () if one != "none"]
    return {
        "metric": block.metric or ",".join([own.metric, *filters[:1]]),
        "weight_by_size": own.weight_by_size,
        "version": named.version,
    }


def rendered(name: str, block: Task, drawn: Drawn) -> tuple[list[dict], list[dict]]:
    """The scored and the probed rows as lm-eval's tasks render them."""
    metric = _metric(block, drawn.named)["metric"]
    rows: dict[str, list[dict]] = {"test": [], "probe": []}
    for kind, own in rows.items():
        for task, docs in getattr(drawn, kind).items():
            if docs:
                config, examples = drawn.named.tasks[task], drawn.examples.get(task, ())
                own += render(documents.kept(task, config, docs=docs, examples=examples, metric=metric))
    return rows["test"], rows["probe"]


def facts(block: Task, drawn: Drawn) -> dict[str, Any]:
    """What data.json says of the task: its data sets with commit or hash, and how many rows are used."""
    counts = {kind: sum(map(len, getattr(drawn, kind).values())) for kind in ("test", "probe")}
    return {
        "source": drawn.source,
        "licence": block.licence,
        "n": {"train": 0} | counts,
        "of": drawn.total,
        "duplicates": {"within": 0, "between": 0},
    }
