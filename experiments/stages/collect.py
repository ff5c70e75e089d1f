"""collect: join training, preparation, scores and the base's scores of a cell.

metrics.json has the headline numbers, by their names in analysis/measures.py; details.json all others, and what
they are of: scores by task, costs, hashes, hardware, settings.
"""

from collections.abc import Iterator

from analysis.measures import ORDER
from evaluation.chance import below_chance
from evaluation.retention import bits_per_byte, change, forgetting, lost_in_nats, nats_per_token
from experiments.study import outcome
from methods.errors import UserError
from methods.tools.files import read_json, write_json

OF_TASK = (
    "value",
    "base",
    "n",
    "chance",
    "metric",
    "role",
    "version",
    "prompt",
    "unit",
    "higher_is_better",
    "per_item",
    "change",
    "change_error",
    "change_low",
    "change_high",
    "subtasks",
)
# What must be equal where two scores are compared: of a task, and of the general text.
THING = {
    "metric": "the metric",
    "chance": "chance",
    "version": "the version",
    "n": "the number of rows",
    "prompt": "the digest of rows and prompts",
    "format": "the format",
    "tokens": "the number of scored tokens",
    "bytes": "the number of scored bytes",
}
TEXT = {
    "n": "the number of texts",
    "bytes": "the number of bytes",
    "tokens": "the number of tokens",
    "prompt": "the digest",
}

# Keys of train.json that details.json takes over: costs, and where the weights come from.
COSTS = (
    "seconds_train",
    "bytes_anchor",
    "bytes_weights_delta",
    "bytes_optimizer_state",
    "tokens_trained",
    "mfu",
    "processes",
)
ORIGIN = (
    "weights_sha256",
    "base_sha256",
    "data_sha256",
    "versions",
    "hardware",
    "git",
    "dtype",
    "compute_dtype",
    "device",
    "numerics",
    "when",
    "settings",
)
HEADLINE = (
    *ORDER,
    "domain_score",
    "seconds_prepare",
    "seconds_train",
    "seconds_evaluate",
    "bytes_importance",
    "bytes_weights_delta",
)
TRAIN = (*COSTS, *ORIGIN, "cost_known", "seconds_begin", "peak_memory_bytes", "parts")
SCORES = ("tasks", "general", "scoring", "weights_sha256")


def main(study, cell) -> None:
    paths = study.paths
    train = read_json(paths.run(cell) / "train.json", *TRAIN)
    scores = read_json(paths.run(cell) / "scores.json", *SCORES)
    base = read_json(paths.base(cell.model) / "scores.json", *SCORES)
    prepared = read_json(
        paths.prepare_costs(model=cell.model, method=cell.method, seed=cell.seed),
        "seconds_prepare",
        "tokens_prepare",
        "bytes_importance",
        "peak_memory_bytes",
    )
    evaluated = read_json(paths.run(cell) / "evaluate.json", "seconds_evaluate")
    model = study.models[cell.model]
    comparable(cell, scores=scores, base=base, train=train, study=study.name)
    found = (
        {
            "cell": cell.name,
            "model": cell.model,
            "domain": cell.domain,
            "method": cell.method,
            "seed": cell.seed,
            "parts": dict(study.methods[cell.method].block),
            "model_note": model.note,
            "not_a_result": study.not_a_result or model.source.startswith("random:"),
        }
        | _scores(scores, base, cell.domain)
        | _costs(train, prepared, evaluated)
        | {key: train[key] for key in ORIGIN}
        | {
            "learning_rate": train["settings"]["learning_rate"],
            "scoring": scores["scoring"],
            "parts_report": train["parts"],
        }
    )
    write_json(paths.run(cell) / "details.json", {key: found[key] for key in found.keys() - set(HEADLINE)})
    write_json(paths.run(cell) / "metrics.json", {key: found[key] for key in HEADLINE})
    # The cell is complete. A stage that failed before is not run again where DVC finds equal weights, so that only this
    # stage can remove its record.
    paths.failure(cell).unlink(missing_ok=True)
    print(f"{cell.name}: {outcome.line(found)}")
    for line in below_chance(study, cell.model, scores["tasks"]):
        print(line)


def comparable(cell, *, scores: dict, base: dict, train: dict, study: str) -> None:
    """Refuse scores that cannot be compared with the base's: other weights, scorer, rows, prompts or metrics.

    scores, base   the contents of two scores.json
    train          the content of the cell's train.json

    The UserError names the task and what differs.
    """
    for what, ours, theirs in _differences(scores, base, train):
        option = f" --study {study}" if study else ""
        raise UserError(
            f"{cell.name}: {what} is {ours!r} for the cell and {theirs!r} for its base: score both again with `python "
            f"-m experiments base {cell.model}{option}` and `python -m experiments evaluate {cell.name}{option}`, then "
            f"`python -m experiments collect {cell.name}{option}`"
        )


def _differences(scores: dict, base: dict, train: dict) -> Iterator[tuple[str, object, object]]:
    """(what, the cell's value, the base's value) of everything that must be equal and is not."""
    tuned = "the hash of the tuned weights in train.json and scores.json"
    pairs = [
        ("the hash of the base's weights", train["base_sha256"], base["weights_sha256"]),
        (tuned, train["weights_sha256"], scores["weights_sha256"]),
    ]
    settings = scores["scoring"].keys() | base["scoring"].keys()
    pairs += [(f"`{key}` of scoring", scores["scoring"].get(key), base["scoring"].get(key)) for key in sorted(settings)]
    for name, ours in scores["tasks"].items():
        theirs = base["tasks"].get(name)
        if theirs is None:
            yield f"the score of task {name}", ours["value"], None
            continue
        pairs += [(f"{what} of task {name}", ours.get(key), theirs.get(key)) for key, what in THING.items()]
    pairs += [
        (f"{what} of the general text", scores["general"].get(key), base["general"].get(key))
        for key, what in TEXT.items()
    ]
    yield from (pair for pair in pairs if pair[1] != pair[2])


def _scores(scores: dict, base: dict, domain: str) -> dict:
    tasks = {
        name: {"higher_is_better": True, "per_item": True}
        | task
        | {"base": base["tasks"][name]["value"]}
        | change(base["tasks"][name], task)
        for name, task in scores["tasks"].items()
    }
    lost = forgetting(base["tasks"], scores["tasks"])
    kept = list(lost["by_task"])
    mean = (lambda key: sum(tasks[n][key] for n in kept) / len(kept)) if kept else (lambda key: None)
    return {
        "domain_score": tasks[domain]["value"],
        "domain_score_base": tasks[domain]["base"],
        "domain_gain": tasks[domain]["change"],
        "domain_unit": tasks[domain]["unit"],
        **_domain_in_nats(base["tasks"][domain], scores["tasks"][domain]),
        "general_score": mean("value"),
        "general_score_base": mean("base"),
        "forgetting": lost["forgetting"],
        "forgetting_by_task": lost["by_task"],
        "at_chance": lost["at_chance"],
        "forgetting_apart": lost["apart"],
        **lost_in_nats(base, scores),
        "transfer_by_task": {n: t["change"] for n, t in tasks.items() if t["role"] == "transfer"},
        "score_by_task": {n: t["change"] for n, t in tasks.items() if t["role"] == "score"},
        "scores_by_task": {n: {k: t[k] for k in OF_TASK if k in t} for n, t in tasks.items()},
        "n": {n: t["n"] for n, t in tasks.items()} | {"general_text": scores["general"]["n"]},
        "general_nll": scores["general"]["nats_per_token"],
        "general_nll_base": base["general"]["nats_per_token"],
        "general_perplexity": scores["general"]["perplexity"],
        "general_perplexity_base": base["general"]["perplexity"],
        "general_bits_per_byte": scores["general"]["bits_per_byte"],
        "general_bits_per_byte_base": base["general"]["bits_per_byte"],
    }


def _domain_in_nats(base: dict, tuned: dict) -> dict:
    before, after = nats_per_token(base), nats_per_token(tuned)
    return {
        "domain_nll_gained": None if None in (before, after) else before - after,
        "domain_bits_per_byte": bits_per_byte(tuned),
        "domain_bits_per_byte_base": bits_per_byte(base),
    }


def _costs(train: dict, prepared: dict, evaluated: dict) -> dict:
    known = train["cost_known"]
    costs = {key: train[key] for key in COSTS} | {
        "seconds_prepare": prepared["seconds_prepare"] + train["seconds_begin"],
        "peak_memory_bytes": max(train["peak_memory_bytes"], prepared["peak_memory_bytes"]),
        "bytes_importance": prepared["bytes_importance"],
        "tokens_prepare": prepared["tokens_prepare"],
        "flops": train.get("flops"),
        "flops_prepare": _sum(prepared, "flops"),
        "tokens_added": _sum(train, "tokens"),
        "tokens_left_out": _sum(train, "left_out"),
        "flops_added": _sum(train, "flops"),
        "added": {"prepare": prepared.get("added"), "train": train.get("added")},
        "tokens_per_second": train["tokens_trained"] / train["seconds_train"] if known else None,
    }
    if train.get("stopped"):
        costs["stopped"] = train["stopped"]  # what a rule on probes did: tokens and seconds are those that were spent
    if train.get("training_reused"):
        costs["training_reused"] = True  # these are the costs of the one training that several cells begin from
    if not known:  # a checkpoint made elsewhere, whose costs nobody measured here
        costs = dict.fromkeys(costs)
    return costs | {"cost_known": known, "seconds_evaluate": evaluated["seconds_evaluate"]}


def _sum(record: dict, kind: str) -> float | None:
    """What all parts added of one kind of cost; None where it is not known, as in records of earlier versions."""
    if (added := record.get("added")) is None:
        return None
    each = [costs.get(kind, 0) for costs in added.values()]
    return None if None in each else sum(each)
