"""The command line: `python -m experiments COMMAND`. Stages of the pipeline, and what a person asks for.

python -m experiments plan                         cells, what is cached, time, memory and disk
python -m experiments train MODEL/DOMAIN/METHOD/seed0
python -m experiments export CELL DIR              an ordinary Hugging Face folder
"""

import argparse
import errno
import sys

if sys.version_info < (3, 11):  # before what an older Python cannot read is imported
    sys.exit(
        "error: this is Python %d.%d, and Python 3.11 is needed: enter the project's environment with `source .venv/bin/activate`, "
        "or use `make`, which does" % sys.version_info[:2]
    )

from experiments.bench import command as bench
from experiments.commands import gpu_check
from experiments.study import environment
from experiments.study.advice import of_study
from experiments.training import allocator
from methods.errors import UserError, lacks

# what a disk answers, and no fault of ours
REFUSED = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)
STAGES = {
    "resolve": ("settings each stage depends on, as small files", ()),
    "model": ("fetch a model and turn it into ordinary safetensors", ("model",)),
    "data": ("fetch, split and render the rows", ()),
    "base": ("score the bare model", ("model",)),
    "prepare": ("what a method computes before it sees the domain", ("model", "method", "seed")),
    "train": ("fine-tune one cell", ("cell",)),
    "evaluate": ("score the weights of one cell with lm-eval", ("cell",)),
    "collect": ("join a cell's files into metrics.json", ("cell",)),
    "drift": ("how far a cell's weights moved from the base, and where", ("cell",)),
    "compare": ("tables, figures and report of the study", ()),
}
COMMANDS = {
    "plan": "cells of the grid, what is cached, and an estimate of time, memory and disk",
    "export": "write a finished cell as an ordinary Hugging Face folder",
    "tune": "trials of learning rates and strengths on probe rows, the same number for every method",
    "sweep": "one knob of a method over several values: writes method blocks into the study's params.yaml",
    "gate": "exit 1 where a finished cell forgot more than a limit: for continuous integration",
    "flips": "print the questions that most runs forgot, with their text from the local rows",
    "track": "fill MLflow's database from results/",
    "pipeline": "rewrite dvc.yaml for the study's grid",
    "summary": "print the comparison, how each cell came to its scores, and where to look next",
    "clean-cells": "free the weights of finished cells; their results stay",
    "schema": "write params.schema.json, from which an editor completes params.yaml; needs no study",
    "check": "whether a part, built in or of another package, keeps the laws that hold for all of them; needs no study",
    "relock": "after a change of form: rewrite the locks of the default study's finished cells, where goldens and settings are equal",
    "gpu-check": "what holds and what it costs on this machine's GPU, with random weights; needs no study",
    "bench": "time each fast path against its plain or library counterpart and keep the ratios; needs no study",
}


READING = ("compare", "summary", "gate", "track")  # what an archived study still takes part in
OURS = ("analysis", "evaluation", "experiments", "methods")
WRITING = ("pipeline", "sweep", "clean-cells", "relock")  # what a run of DVC reads, or would run again for


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m experiments", description="Run a Holdfast study, or one stage of it.")
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = {
        "model": {"help": "a model of params.yaml"},
        "method": {"help": "a method of params.yaml"},
        "seed": {"type": int, "help": "a seed of the grid"},
        "cell": {"help": "model/domain/method/seed0"},
    }
    for name, text in COMMANDS.items():
        command = sub.add_parser(name, help=text, description=text)
        if name == "export":
            command.add_argument("cell", **arguments["cell"])
            command.add_argument("folder", metavar="DIR", help="a folder that does not exist yet")
        if name == "plan":
            command.add_argument(
                "patterns", nargs="*", metavar="CELL", help="cells to plan, `*` for any text (default: the whole grid)"
            )
            command.add_argument("--json", action="store_true", help="print JSON")
        if name == "flips":
            command.add_argument(
                "patterns",
                nargs="*",
                metavar="CELL",
                help="cells to look at, `*` for any text (default: the whole grid)",
            )
            command.add_argument(
                "--top", type=int, default=10, metavar="N", help="questions of each model and domain (default: 10)"
            )
        if name == "tune":
            command.add_argument(
                "methods", nargs="*", metavar="METHOD", help="methods to try (default: all of the grid)"
            )
        if name == "sweep":
            command.add_argument("method", **arguments["method"])
            command.add_argument(
                "knob", metavar="KNOB", help="PART.SETTING, such as ewc.strength, or train.learning_rate"
            )
            command.add_argument("values", metavar="VALUES", help="a range LOW..HIGH, at equal ratios, or a list A,B,C")
            command.add_argument("--points", type=int, metavar="N", help="values of a range (default 5)")
            command.add_argument("--linear", action="store_true", help="equal distances in place of equal ratios")
        if name == "gate":
            command.add_argument(
                "patterns", nargs="*", metavar="CELL", help="cells to judge, `*` for any text (default: the whole grid)"
            )
            command.add_argument(
                "--max-forgetting",
                type=float,
                required=True,
                metavar="SHARE",
                help="the most that may be lost: 0.02 is 2 points",
            )
            command.add_argument("--min-gain", type=float, metavar="SHARE", help="the least that must be learned")
            command.add_argument(
                "--confidence", action="store_true", help="judge by the ends of the 95 %% intervals, not by the values"
            )
        if name == "check":
            command.add_argument("part", metavar="PART", help="the part's name in a method block, such as ewc")
        if name == "relock":
            command.add_argument(
                "--show", action="store_true", help="print what is compared, as JSON, and change nothing"
            )
        if name == "gpu-check":
            gpu_check.add_options(command)
        elif name == "bench":
            bench.add_options(command)
        elif name not in ("check", "relock", "schema"):
            _study(command)
    for name, (text, needs) in STAGES.items():
        command = sub.add_parser(name, help=f"stage: {text}", description=text)
        for need in needs:
            command.add_argument(need, **arguments[need])
        _study(command)
    return top


def _study(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--study", default="", metavar="NAME", help="a folder of experiments/studies (default: the root's)"
    )


def run(options: argparse.Namespace) -> int:
    """Import what the command needs and no more: help pages stay light. Returns the exit status."""
    allocator.keep_memory()
    if options.command == "gpu-check":  # it must run where nothing but torch and transformers is installed
        return gpu_check.main(options)
    environment.at_root()
    if options.command == "bench":
        return bench.main(options)
    if options.command == "schema":
        from experiments.commands import schema

        schema.main()
        return 0
    if options.command == "check":
        from experiments.commands import check

        return check.main(options.part)
    from experiments.study import config

    study = config.load(getattr(options, "study", ""))
    if study.archive and options.command not in READING:
        raise UserError(
            f"study {study.name} is an archive of commit {study.archive.commit[:10]}: its results are read "
            f"({', '.join(READING)}) and never run again; copy its folder under another name, without the block "
            "`archive:`, to run it"
        )
    if options.command in WRITING:
        environment.alone(study)
    if options.command in STAGES:
        _stage(study, options)
    elif options.command == "export":
        from experiments.commands import export
        from experiments.study import cells

        export.main(study, cells.parse(options.cell, study), options.folder)
    elif options.command == "plan":
        from experiments.commands import plan

        plan.main(study, as_json=options.json, patterns=options.patterns)
    elif options.command == "flips":
        from experiments.commands import flips

        flips.main(study, patterns=options.patterns, top=options.top)
    elif options.command == "tune":
        from experiments.commands import tune

        tune.main(study, options.methods)
    elif options.command == "sweep":
        from experiments.commands import sweep

        sweep.main(
            study,
            method=options.method,
            knob=options.knob,
            values=options.values,
            points=options.points,
            linear=options.linear,
        )
    elif options.command == "gate":
        from experiments.commands import gate

        return gate.main(
            study,
            patterns=options.patterns,
            max_forgetting=options.max_forgetting,
            min_gain=options.min_gain,
            confidence=options.confidence,
        )
    elif options.command == "relock":
        from experiments.commands import relock

        relock.main(study, show=options.show)
    elif options.command == "track":
        from experiments.commands import track

        track.main(study)
    else:
        from experiments.commands import clean, summary
        from experiments.study import pipeline

        {"pipeline": pipeline.main, "summary": summary.main, "clean-cells": clean.main}[options.command](study)
    return 0


def _stage(study, options: argparse.Namespace) -> None:
    from importlib import import_module

    from experiments.study import cells, stale
    from methods.tools.names import unknown

    stage = options.command
    if stage in ("train", "evaluate", "collect", "drift"):
        cell = cells.parse(options.cell, study)
        stale.refuse(study, stage, model=cell.model, domain=cell.domain, method=cell.method)
        import_module(f"experiments.stages.{stage}").main(study, cell)
        return
    if hasattr(options, "model") and options.model not in study.models:
        raise unknown("model", options.model, study.models)
    if hasattr(options, "method") and options.method not in study.methods:
        raise unknown("method", options.method, study.methods)
    stale.refuse(
        study, stage, **{name: getattr(options, name) for name in ("model", "method") if hasattr(options, name)}
    )
    if stage == "prepare":
        from experiments.stages import prepare

        if not 0 <= options.seed < 2**63:
            raise UserError(f"seed {options.seed}: it must be a whole number from 0 to {2**63 - 1}")
        # a preparation never sees the domain: a failure is recorded with the first cell that needs it
        cell = cells.Cell(options.model, study.grid.domains[0], options.method, options.seed)
        prepare.main(study, model=options.model, method=options.method, seed=options.seed, cell=cell)
    elif stage == "base":
        from experiments.stages import evaluate

        evaluate.base(study, model=options.model)
    elif stage == "model":
        from experiments.stages import model

        model.main(study, model=options.model)
    else:
        import_module(f"experiments.stages.{stage}").main(study)


def main() -> int:
    options = parser().parse_args()
    try:
        return run(options)
    except UserError as error:
        print(f"error: {of_study(str(error), getattr(options, 'study', ''))}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OURS:
            raise
        print(f"error: {lacks(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        print(
            f"error: {error.filename or 'what was to be written'}: {error.strerror.lower()}; correct the path, make it writable or free some disk, and run the same again",
            file=sys.stderr,
        )
        return 2
    except (MemoryError, RuntimeError) as error:
        from experiments.study.failures import out_of_memory

        if not out_of_memory(error):
            raise
        print(
            f"error: out of memory ({str(error).strip().partition(chr(10))[0] or 'MemoryError'}): lower evaluate.batch_size or train.micro_batch, or run where there is more",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(
            of_study(
                "stopped; finished cells are whole, and `dvc repro` goes on from here", getattr(options, "study", "")
            ),
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
