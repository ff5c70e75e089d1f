"""The commands of `python -m experiments`: what each does and which arguments it takes. Help imports only this."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments.bench import command as bench
from experiments.commands import gpu_check
from experiments.faults import command as faults


def argument(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What argparse's `add_argument` takes."""
    return names, options


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command or stage.

    module       its `main` (or the function after a colon) is called with the study and the arguments by name;
                 by default the module of the command's name in experiments/commands or experiments/stages
    alone        whether it is refused during `dvc repro`, because it writes what that reads
    study        whether it works on a study
    add_options  adds arguments that are not in `arguments`; `main` gets them as one namespace
    """

    help: str
    module: str = ""
    arguments: tuple = ()
    alone: bool = False
    study: bool = True
    add_options: Callable | None = None


CELL = argument("cell", help="a cell of the grid: MODEL/DOMAIN/METHOD/seed0")
CELLS = argument("patterns", nargs="*", metavar="CELL", help="cells; * stands for any text (default: the whole grid)")
MODEL = argument("model", help="name of a block under `models:` in params.yaml")
METHOD = argument("method", help="name of a block under `methods:` in params.yaml")
SEED = argument("seed", type=int, help="a seed of the grid")
MODEL_GIVEN = "a folder, a peft adapter's folder, hub:NAME[@REV], or a model's name in params.yaml"
SHARE = {"type": float, "metavar": "SHARE"}
NATS = {"type": float, "metavar": "NATS"}

COMMANDS = {
    "new": Command(
        help="begin a study of your own: look at a file of rows, and write the study's params.yaml and dvc.yaml",
        arguments=(
            argument("name", help="the study's name"),
            argument(
                "--model",
                required=True,
                metavar="MODEL",
                help="a model of the root's params.yaml, hub:OWNER/NAME[@REVISION], or a local folder",
            ),
            argument(
                "--rows",
                required=True,
                metavar="FILE",
                help="JSONL, JSON, CSV, TSV or Parquet file, folder of text files, or folder that `datasets` saved",
            ),
            argument("--format", choices=("chat", "pairs", "text", "task"), help="default: by the columns"),
            argument("--columns", metavar="NEW=OLD,…", help="columns that the file calls otherwise: prompt=question"),
            argument("--encoding", metavar="NAME", help="encoding of the file, such as cp1252 (default: UTF-8)"),
            argument("--chat-template", metavar="FILE", help="chat template (default: the tokenizer's own)"),
            argument("--methods", metavar="A,B,…", help="methods of the root (default: full,lora,replay,wise-ft)"),
            argument("--retention", metavar="A,B,…", help="tasks or suites (default: the default study's)"),
            argument("--seeds", default="0", metavar="0,1,…", help="default: 0"),
        ),
        study=False,
    ),
    "plan": Command(
        help="show the cells of the grid, what is cached, and the expected time, memory and disk space",
        arguments=(CELLS, argument("--json", dest="as_json", action="store_true", help="print JSON")),
    ),
    "show": Command(
        help="print rows of a domain as training sees them, with the tokens that are learned marked",
        arguments=(
            argument("domain", help="name of a block under `domains:` in params.yaml"),
            argument("--rows", type=int, default=3, metavar="N", help="rows to print (default: 3)"),
            argument("--model", default="", metavar="NAME", help="whose tokenizer (default: the grid's first model)"),
        ),
    ),
    "export": Command(
        help="rebuild the weights of a finished cell, compare their hash, and write an ordinary Hugging Face folder",
        arguments=(
            CELL,
            argument("folder", metavar="DIR", nargs="?", help="the new folder (default: nothing is written)"),
        ),
    ),
    "tune": Command(
        help="try values of one setting on probe rows, the same number of values for every method",
        arguments=(argument("methods", nargs="*", metavar="METHOD", help="methods to try (default: all of the grid)"),),
    ),
    "settle": Command(
        help="make the adapter of a model with `settle:`; it is committed, and the stage `model` merges it",
        arguments=(MODEL,),
        alone=True,
    ),
    "sweep": Command(
        help="add a method block to params.yaml for each of several values of one setting",
        arguments=(
            METHOD,
            argument("knob", metavar="SETTING", help="PART.SETTING, such as ewc.strength, or train.learning_rate"),
            argument(
                "values", metavar="VALUES", help="LOW..HIGH in equal ratios, a list A,B,C, or x2: half and twice of it"
            ),
            argument("--points", type=int, metavar="N", help="number of values in a range (default: 5)"),
            argument("--linear", action="store_true", help="space the values of a range by equal distances"),
        ),
        alone=True,
    ),
    "leaders": Command(help="order the methods of a screen by what they lose on general probe text at one gain"),
    "repro": Command(help="run the study by `dvc repro`, one cell after another", alone=True),
    "launch": Command(
        help="run the study's unfinished stages on Ray, many cells at once, on this machine or a cluster",
        arguments=(
            CELLS,
            argument(
                "--address", default="", metavar="HOST:PORT", help="a Ray cluster, or auto (default: this machine)"
            ),
            argument("--workers", type=int, metavar="N", help="cells at once on this machine, which share its cores"),
            argument(
                "--slurm", dest="template", default="", metavar="TEMPLATE", help="write array jobs in place of running"
            ),
            argument("--submit", action="store_true", help="submit them with sbatch"),
            argument("--gather", action="store_true", help="take over what array jobs made, and run nothing else"),
            argument(
                "--simulate",
                dest="simulated",
                type=int,
                metavar="CELLS",
                help="print how long so many cells take on --workers N (default: 256), by the plan; run nothing",
            ),
        ),
        alone=True,
    ),
    "watch": Command(help="print each cell's result as it finishes, and the time that is left"),
    "gate": Command(
        help="exit with status 1 if a finished cell forgot more than a limit, for continuous integration",
        arguments=(
            CELLS,
            argument("--min-nll-gained", help="least that must be gained: nats per token of the domain", **NATS),
            argument("--min-gain", help="the same of its score: 0.02 is 2 points of accuracy", **SHARE),
            argument("--max-nll-lost", help="most that may be lost: nats per token of general text", **NATS),
            argument("--max-kl", help="most that KL(base‖tuned) may be there, in nats per token", **NATS),
            argument("--max-gold-lost", help="most that the right retention answers may lose, in nats an item", **NATS),
            argument("--max-margin-lost", help="most that they may lose against the best wrong choice", **NATS),
            argument("--max-forgetting", help="most of the accuracy there: 0.02 is 2 points", **SHARE),
            argument("--confidence", action="store_true", help="compare the ends of the 95 %% confidence intervals"),
        ),
    ),
    "flips": Command(
        help="print the questions that most runs forgot, with their text from the local rows",
        arguments=(
            CELLS,
            argument("--top", type=int, default=10, metavar="N", help="questions per model and domain (default: 10)"),
        ),
    ),
    "power": Command(
        help="print how many seeds and items it takes to tell a difference between a method and plain fine-tuning",
        arguments=(
            argument("--difference", type=float, required=True, metavar="X", help="nats, or a share of 1 for accuracy"),
            argument("--measure", default="general_nll_lost", metavar="NAME", help="default: general_nll_lost"),
            argument("--seeds", default="2,3,5,8,12,20", metavar="A,B,…", help="default: 2,3,5,8,12,20"),
            argument("--items", default="", metavar="A,B,…", help="scored items (default: multiples of the study's)"),
            argument("--tests", type=int, metavar="N", help="tests in the family (default: methods of the grid − 1)"),
        ),
    ),
    "audit": Command(
        help="compare a fine-tuned model with its base: what it forgot, on one page; needs no study",
        arguments=(
            argument("base", metavar="BASE", help=MODEL_GIVEN),
            argument("tuned", metavar="TUNED", help="the same of the tuned model; an adapter is merged into BASE"),
            argument("--suite", metavar="NAME", help="a suite of params.yaml (default: general)"),
            argument("--tasks", metavar="A,B,C", help="tasks in place of a suite"),
            argument("--rows", type=int, metavar="N", help="rows of each task, a fixed sample"),
            argument("--text", metavar="FILE", help="general text of your own"),
            argument("--text-rows", type=int, metavar="N", help="passages of general text"),
            argument("--out", metavar="FILE.html", help="the page (default: results/audits/BASE--TUNED/audit.html)"),
            argument("--max-forgetting", help="exit with status 1 above it: 0.02 is 2 points of accuracy", **SHARE),
            argument("--max-nll-lost", type=float, metavar="NATS", help="the same in nats per token of general text"),
            argument("--confidence", action="store_true", help="compare the upper ends of the 95 %% intervals"),
            argument(
                "--same-base", action="store_true", help="BASE is the adapter's base, whatever name that gives it"
            ),
            argument(
                "--chat-template",
                nargs="?",
                const=True,
                default=False,
                metavar="FILE",
                help="write prompts in each model's chat template, or in FILE's",
            ),
            argument(
                "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)"
            ),
            argument("--dtype", help="what both are computed in (default: what suits the checkpoints)"),
            argument("--batch-size", type=int, metavar="N", help="requests in a forward pass (default: 16)"),
        ),
        study=False,
    ),
    "track": Command(help="copy the results into MLflow's database"),
    "ui": Command(help="copy the results into MLflow's database, and serve its pages to this machine"),
    "pipeline": Command(help="write dvc.yaml for the study's grid", module="experiments.study.pipeline", alone=True),
    "summary": Command(help="print the comparison, the outcome of each cell and the path of the report"),
    "clean-cells": Command(help="delete the weights of finished cells and keep their results", alone=True),
    "relock": Command(
        help="rewrite dvc.lock after a change of form, if golden weights and settings are equal before and after",
        arguments=(argument("--show", action="store_true", help="print what is compared as JSON; change nothing"),),
        alone=True,
    ),
    "methods": Command(
        help="write docs/methods.md, the table of all parts and what they cost; needs no study", study=False
    ),
    "schema": Command(
        help="write params.schema.json, by which editors complete params.yaml; needs no study", study=False
    ),
    "check": Command(
        help="test a part, built in or of another package, against the laws for all parts; needs no study",
        arguments=(argument("name", metavar="PART", help="name of the part in a method block, such as ewc"),),
        study=False,
    ),
    "gpu-check": Command(
        help="test and measure this machine's GPU with random weights; needs no study",
        study=False,
        add_options=gpu_check.add_options,
    ),
    "faults": Command(
        help="disturb a tiny study on purpose, and compare what is left with the undisturbed run; needs no study",
        module="experiments.faults.command",
        study=False,
        add_options=faults.add_options,
    ),
    "bench": Command(
        help="time each fast path against its plain or library counterpart; needs no study",
        module="experiments.bench.command",
        study=False,
        add_options=bench.add_options,
    ),
}
STAGES = {
    "resolve": Command(help="write the settings on which each stage depends, as small files"),
    "model": Command(help="fetch a model and write it as ordinary safetensors", arguments=(MODEL,)),
    "data": Command(help="fetch, split and render the rows"),
    "base": Command(help="score the bare model", module="experiments.stages.evaluate:base", arguments=(MODEL,)),
    "prepare": Command(help="compute what a method needs before it sees the domain", arguments=(MODEL, METHOD, SEED)),
    "train": Command(help="fine-tune one cell", arguments=(CELL,)),
    "evaluate": Command(help="score the weights of one cell with lm-eval", arguments=(CELL,)),
    "collect": Command(help="join the files of a cell into metrics.json and details.json", arguments=(CELL,)),
    "drift": Command(help="measure how far the weights of a cell moved from the base, and where", arguments=(CELL,)),
    "compare": Command(help="write the tables, figures and report of the study"),
}
