"""tune: try learning rates and strengths on probe rows, with the same number of trials for every method.

`tune:` in params.yaml gives each method one setting and its values. Every trial trains for `tune.epochs` (or the cell's
own epochs) with seed 0 and is probed on rows that are no test rows. What is chosen is the value with the least nats per
token on the domain's probe rows, for each model and domain by itself (analysis/chosen.py); what a trial forgot is
recorded beside it and decides nothing. Every trial is recorded as it ends; a second call runs only the missing ones.
"""

from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from analysis.chosen import RULE, end_of, least
from analysis.families import family
from evaluation.probe import load_probes, probe
from experiments.model import tuned, weights
from experiments.model.base import dtype_of, load_tensors
from experiments.model.measure import Measure
from experiments.model.shape import shape_of
from experiments.stages import resolve
from experiments.study.config import build_method, with_setting
from experiments.training import hardware, hooks, prepared
from experiments.training.engine import TrainingFailed, final_weights, finish, fit
from experiments.training.examples import encoded
from experiments.training.stopping import rule_of
from methods.errors import UserError
from methods.part import prepares
from methods.tools.files import folder_sha256, read_json, write_json
from methods.tools.names import unknown
from methods.tools.process_group import Shards

SEED = 0


def main(study, methods: list[str]) -> None:
    grid = study.tune.methods
    # the blocks of a sweep are trials themselves
    methods = methods or [name for name in study.grid.methods if family(name) == name]
    for method in methods:
        if method in study.methods and method not in grid:
            raise UserError(
                f"tune.methods does not name {method}: add a setting with the values to try, such as `{method}: "
                "{train.learning_rate: [1.0e-4, 3.0e-4]}`, or name the methods to try on the command line"
            )
        if method not in grid:
            raise unknown("method", method, study.methods)
    counts = {name: len(_trials(knob)) for name, knob in grid.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"tune.methods: every method gets the same number of trials, but they have {counts}")
    for model in study.grid.models:
        for domain in study.grid.domains:
            _refuse_without_probes(study, domain)
            _tune(study, model, domain, methods)


def _refuse_without_probes(study, domain: str) -> None:
    split = study.domains[domain].split
    if split and not split.probe:
        raise UserError(
            f"domains.{domain}.split.probe is 0: trials are judged on probe rows of the domain; give it some"
        )


def _trials(knob: dict[str, list]) -> list[tuple[str, Any]]:
    """(setting, value) of each trial of a method; `config` has checked that it is one setting with a list."""
    return [(name, value) for name, values in knob.items() for value in values]


def _tune(study, model_name: str, domain: str, methods: list[str]) -> None:
    path = study.paths.tuning(model_name, domain)
    folder, rows = study.paths.model(model_name), study.paths.data / "train" / domain
    judged_on = {"base_sha256": read_json(folder / "base.json", "sha256")["sha256"], "data_sha256": folder_sha256(rows)}
    record = earlier(path, judged_on) | {"rule": RULE, "epochs": study.tune.epochs, "judged_on": judged_on}
    where = hardware.device(study.device)
    base = load_tensors(folder)
    computing = study.compute_dtype(model_name, dtype_of(read_json(folder / "base.json", "dtype")), where)
    tokenizer = weights.load_tokenizer(folder)
    sets = load_probes(rows / "probe", tokenizer)
    record["base"] = probe(model=weights.load_model(folder, dtype=computing, device=where), sets=sets)
    for method in methods:
        for knob, value in _trials(study.tune.methods[method]):
            trial_study = _with(study, method, knob, value, study.tune.epochs)
            key = _key(trial_study, model_name, domain, method)
            if any(t["key"] == key for t in record["trials"]):
                continue
            model = weights.load_model(folder, dtype=computing, device=where)
            scores = _run(trial_study, model_name, domain, method, model, base, tokenizer, sets, where)
            record["trials"] = [t for t in record["trials"] if (t["method"], t["settings"]) != (method, {knob: value})]
            record["trials"].append({"method": method, "settings": {knob: value}, "key": key} | scores)
            judge(record["trials"], domain=domain)
            write_json(path, record)
            print(
                f"{method} {knob}={value}: "
                + ", ".join(f"{k} {v:.4g}" for k, v in scores.items() if isinstance(v, float)),
                flush=True,
            )
    judge(record["trials"], domain=domain)
    write_json(path, record)
    for method in methods:
        for line in advice(record["trials"], method=method, where=f"{model_name}/{domain}", study=study.name):
            print(line)


def advice(trials: list[dict], *, method: str, where: str, study: str = "") -> list[str]:
    """What was chosen for a method, whether others are equal or better ones may lie beyond, and how to run more."""
    own = [trial for trial in trials if trial["method"] == method and "failed" not in trial]
    picked = next((trial for trial in own if trial["chosen"]), None)
    if picked is None:
        return [f"nothing is chosen for {method} on {where}: every trial failed"]
    ((knob, value),) = picked["settings"].items()
    values = [trial["settings"].get(knob) for trial in own]
    lines = [f"chosen for {method} on {where}: {knob} = {value}"]
    if equal := [trial["settings"][knob] for trial in own if trial["tied"]]:
        lines[0] += f", the first of equal ones (also {', '.join(map(str, equal))})"
    if picked["end"]:
        lines.append(
            f"  it is the {picked['end']} value tried, so a better one may lie beyond: widen tune.methods.{method}"
        )
    elif len(values) > 2 and all(isinstance(one, int | float) for one in values):
        option = f" --study {study}" if study else ""
        around = [max(one for one in values if one < value), min(one for one in values if one > value)]
        lines.append(
            f"  for a curve, write it into methods.{method} and run the values on either side, too: "
            f"python -m experiments sweep {method} {knob} {','.join(f'{one:g}' for one in around)}{option}"
        )
    return lines


def earlier(path: Path, judged_on: dict[str, str]) -> dict:
    """The record of earlier trials.

    Trials of another base or of other rows have the same names but cannot be compared; their file is renamed.
    """
    record = read_json(path, "trials") if path.is_file() else {"trials": []}
    if record.get("judged_on", judged_on) == judged_on:
        return record
    aside = path.with_suffix(f".{sha256(resolve.text(record['judged_on']).encode()).hexdigest()[:8]}.old")
    path.replace(aside)
    print(
        f"{path}: its {len(record['trials'])} trials are of other rows or of another base, and are now in {aside.name}",
        flush=True,
    )
    return {"trials": []}


def _with(study, method: str, knob: str, value, epochs: float | None):
    """The study with another value of one setting of a method, and with the epochs of a trial."""
    block = with_setting(study.methods[method].block, knob, value)
    if epochs:
        block = with_setting(block, "train.epochs", epochs)
    return study.model_copy(update={"methods": study.methods | {method: build_method(method, block)}})


def _key(study, model: str, domain: str, method: str) -> str:
    content = {
        "train": resolve.train(study, model, domain, method),
        "prepare": resolve.prepare(study, model, method),
        "data": resolve.data(study)["domains"][domain],
    }
    return sha256(resolve.text(content).encode()).hexdigest()[:16]


def _run(study, model_name, domain, method, model, base, tokenizer, sets, where) -> dict:
    settings = study.settings(model=model_name, domain=domain, method=method)
    rule = rule_of(settings, domain=domain)  # a trial ends as its cell would; without a rule it is probed at its end
    parts = study.methods[method].parts
    states = {}
    if any(map(prepares, parts)):
        store, _ = prepared.stored(study, model_name, method, SEED)
        states = prepared.load_states(store / "out", parts)
    examples = encoded(
        study.paths.data / "train" / domain / "train.jsonl",
        tokenizer,
        settings.length,
        where=study.written("length", model=model_name, domain=domain, method=method),
    )
    try:
        result = fit(
            model=model,
            parts=hooks.trainers(parts),
            examples=examples,
            settings=settings,
            seed=SEED,
            base=base,
            general=prepared.load_general(study.paths.data / "general" / "replay.jsonl", tokenizer),
            states=states,
            tokenizer=tokenizer,
            device=where,
            probe=(lambda m: probe(model=m, sets=sets)) if rule else None,
            rule=rule,
            name=f"trial {method}",
        )
    except TrainingFailed as error:
        return {"failed": str(error)}
    judged = _finished(study, model_name, domain, result, parts, base, where)
    return probe(model=judged, sets=sets) | {"seconds": result.seconds}


def _finished(study, model_name, domain, result, parts, base, where) -> nn.Module:
    """The model that judges a trial: the trained one, or one with the weights that parts change after training."""
    if not hooks.changers(parts):
        return result.run.model
    folder, probes = study.paths.model(model_name), study.paths.data / "train" / domain / "probe"
    computing = study.compute_dtype(model_name, dtype_of(read_json(folder / "base.json", "dtype")), where)
    measure = Measure(folder=folder, probes=probes, base=base, dtype=computing, device=where, shards=Shards())
    final = final_weights(result, hooks.trainers(parts), measure=measure)
    shape = shape_of(model_name, study.models[model_name], folder)
    final, _, _ = finish(parts, final=final, measure=measure, shape=shape, base=base, seed=SEED, device=where)
    return tuned.loaded(folder, base=base, final=final, dtype=computing, device=where)


def judge(trials: list[dict], *, domain: str) -> None:
    """Mark the chosen trial of every method (`chosen`), others that are equal to it (`tied`), and whether its value is
    the lowest or highest of those that did not fail (`end`)."""
    key = f"{domain}_nll"
    for method in dict.fromkeys(trial["method"] for trial in trials):
        own = [trial for trial in trials if trial["method"] == method]
        done = {str(place): trial[key] for place, trial in enumerate(own) if "failed" not in trial}
        best = least(done)
        values = [value for each in own if "failed" not in each for value in each["settings"].values()]
        for place, trial in enumerate(own):
            trial["chosen"], trial["tied"] = [str(place)] == best[:1], str(place) in best[1:]
            trial["end"] = end_of(*trial["settings"].values(), values) if trial["chosen"] else ""
