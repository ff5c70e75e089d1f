"""The first params.yaml of a study that `python -m experiments new` begins: short, and with comments."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.study.params_text import WIDTH, flow

BATCH = 8
TOKENS = 8192  # of a micro-batch at most
TESTED = "  # test: a fixed sample of each task that states no `test` of its own, or all"
SEEDS = "  # with [0, 1, 2], intervals cover the order of the rows, too"


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What the file says.

    command       that wrote it
    block         of the model; None for one of the root's
    domain        its keys but for the split and the tasks
    data          the root's, where it differs from the defaults
    train         settings of the root, whose rates are taken
    tune          trials by method
    where_chosen  the domains and models for which the root's rates were chosen
    """

    name: str
    command: str
    model: str
    block: Mapping[str, Any] | None
    domain: Mapping[str, Any]
    retention: list[str]
    methods: list[str]
    seeds: list[int]
    data: Mapping[str, Any]
    train: Mapping[str, Any]
    tune: Mapping[str, Any]
    where_chosen: str
    split: Mapping[str, Any]
    counts: str = ""
    probes: list[str] = field(default_factory=list)
    length: int = 256
    about_length: str = ""


def text(begun: Begun) -> str:
    """The file's text."""
    tested = TESTED if "test" in begun.data else ""
    data = f"data: {flow(begun.data)}{tested}\n" if begun.data else ""
    return "\n".join(filter(None, [_head(begun), data, _model(begun), _domain(begun), _train(begun), _tune(begun)]))


def _head(begun: Begun) -> str:
    return f"""\
# yaml-language-server: $schema=../../../params.schema.json
# Begun by `{begun.command}`.
# Models, tasks, methods, general text, packages and suites that are not written here are the root's: docs/studies.md.
title: {flow(f"{begun.name} on {begun.model}")}
device: auto  # auto | cpu | cuda

grid:
  models: {flow([begun.model])}
  domains: {flow([begun.name])}
  methods: {flow(begun.methods)}  # any of the root's, or of your own under `methods:`
  seeds: {flow(begun.seeds)}{SEEDS if len(begun.seeds) < 3 else ""}
"""


def _model(begun: Begun) -> str:
    if begun.block is None:
        return ""
    return f"models:\n  {begun.model}:\n" + _keys(begun.block, indent=4)


def _domain(begun: Begun) -> str:
    return f"""\
domains:
  {begun.name}:
{_keys(begun.domain, indent=4)}\
    split: {flow(begun.split)}{f"  # {begun.counts}" if begun.counts else ""}
    # What shows forgetting: blocks and suites of the root's file, or lm-eval's names (from the hub). Tasks that the
    # rows may teach belong under `transfer`.
    retention: {flow(begun.retention)}
    probes: {flow(begun.probes)}  # scored during training and by `tune`
"""


def _train(begun: Begun) -> str:
    micro = BATCH
    while micro > 1 and micro * begun.length > TOKENS:
        micro //= 2
    kept = {key: value for key, value in begun.train.items() if key not in ("batch", "micro_batch", "length")}
    return f"""\
# Rates here and in the root's methods were chosen for {begun.where_chosen}. Yours may be others: see `tune`.
train:
{_keys(kept, indent=2)}\
  batch: {BATCH}
  micro_batch: {micro}  # rows in a forward pass: as many as memory takes
  length: {begun.length}{f"  # {begun.about_length}" if begun.about_length else ""}
"""


def _tune(begun: Begun) -> str:
    if not (tried := begun.tune["methods"]):
        return ""
    (method, knob), *_ = tried.items()
    part, _, setting = next(iter(knob)).partition(".")
    value = flow(next(iter(knob.values()))[0])
    return f"""\
# `python -m experiments tune {" ".join(tried)} --study {begun.name}`
# tries these on probe rows, never on scored ones, and names the best of each method. Write it under `methods:`, on top
# of the root's block of that name:
#   methods:
#     {method}: {{like: {method}, {part}: {{{setting}: {value}}}}}
tune:
{_keys({key: value for key, value in begun.tune.items() if key != "methods"}, indent=2)}\
  methods:
{_keys(tried, indent=4)}"""


def _keys(block: Mapping[str, Any], *, indent: int) -> str:
    """A line for each key; a mapping that is too long for one has its keys below it."""
    lines = []
    for key, value in block.items():
        line = f"{' ' * indent}{flow(key)}: {flow(value)}\n"
        if len(line) > WIDTH and isinstance(value, Mapping):
            line = f"{' ' * indent}{flow(key)}:\n{_keys(value, indent=indent + 2)}"
        lines.append(line)
    return "".join(lines)
