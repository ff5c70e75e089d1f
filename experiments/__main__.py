"""The command line of Holdfast: `python -m experiments COMMAND`, or one stage of the pipeline.

python -m experiments plan                         cells, what is cached, time, memory and disk
python -m experiments train MODEL/DOMAIN/METHOD/seed0
python -m experiments export CELL [DIR]            an ordinary Hugging Face folder; without DIR its hash is compared
"""

import argparse
import ctypes
import errno
import os
import signal
import sys
from contextlib import nullcontext
from importlib import import_module

if sys.version_info < (3, 11):  # noqa: UP036 (before importing code that an older Python cannot read)
    sys.exit(
        f"error: this is Python {sys.version_info.major}.{sys.version_info.minor}, and Python 3.11 is needed: enter "
        "the project's environment with `source .venv/bin/activate`, or use `make`, which does"
    )

from experiments.commands.table import COMMANDS, STAGES, Command
from experiments.study import environment, stops
from experiments.study.advice import of_study
from experiments.study.screen import Screen, shown
from experiments.training import allocator
from methods.errors import UserError, lacks, shortened

DISK_ERRORS = {
    getattr(errno, name) for name in "EACCES EPERM EROFS ENOSPC EDQUOT EFBIG EIO ENOTDIR EISDIR ENAMETOOLONG".split()
}
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
OURS = ("analysis", "evaluation", "experiments", "methods")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m experiments", description="Run a Holdfast study, or one stage of it.")
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in (COMMANDS | STAGES).items():
        help = f"stage: {command.help}" if name in STAGES else command.help
        own = sub.add_parser(name, help=help, description=f"{command.help[0].upper()}{command.help[1:]}.")
        for names, options in command.arguments:
            own.add_argument(*names, **options)
        if command.add_options:
            command.add_options(own)
        if command.study and name != "relock":
            text = "a folder of experiments/studies (default: the study in the root)"
            own.add_argument("--study", default="", metavar="NAME", help=text)
    return top


def run(options: argparse.Namespace) -> int:
    """Run the command and return the exit status; only the modules that it needs are imported."""
    if options.command in STAGES and "DVC_STAGE" in os.environ:
        _end_with_parent()  # before seconds of imports, in which DVC may be killed
    allocator.keep_memory()
    command = (COMMANDS | STAGES)[options.command]
    if options.command != "gpu-check":  # it runs where only torch and transformers are installed, also away from git
        environment.at_root()
    arguments = {name: value for name, value in vars(options).items() if name not in ("command", "study")}
    if not command.study:
        call = _function(options.command, command)
        return (call(options) if command.add_options else call(**arguments)) or 0
    from experiments.study import cells, config, failures, lock_copy

    study = config.load(getattr(options, "study", ""))
    failures.find_killed(study)
    if command.alone:
        environment.alone(study)
        if mended := lock_copy.mend(study):
            print(mended, flush=True)
    if "cell" in arguments:
        arguments["cell"] = cells.parse(options.cell, study)
    with _stage(study, options.command, arguments) if options.command in STAGES else nullcontext():
        return _function(options.command, command)(study, **arguments) or 0


def _function(name: str, command: Command):
    room = "stages" if name in STAGES else "commands"
    module, _, function = (command.module or f"experiments.{room}.{name.replace('-', '_')}").partition(":")
    return getattr(import_module(module), function or "main")


def _stage(study, stage: str, arguments: dict):
    """What a stage runs in: it runs once at a time. `prepare` also gets a cell.

    Refuses unknown names, and a stage whose inputs are not those of params.yaml.
    """
    from experiments.study import cells, failures, lock_copy, running, stale
    from methods.tools.names import unknown

    for kind, known in (("model", study.models), ("method", study.methods)):
        if arguments.get(kind, next(iter(known))) not in known:
            raise unknown(kind, arguments[kind], known)
    if not 0 <= arguments.get("seed", 0) < 2**63:
        raise UserError(f"seed {arguments['seed']}: it must be a whole number from 0 to {2**63 - 1}")
    names = {name: value for name, value in arguments.items() if name in ("model", "method")}
    if cell := arguments.get("cell"):
        names = {"model": cell.model, "domain": cell.domain, "method": cell.method}
    stale.refuse(study, stage, **names)
    seed = arguments.get("seed", cell.seed if cell else None)
    if stage == "prepare":  # it never sees the domain; a failure is recorded with the first cell that needs it
        cell = arguments["cell"] = cells.Cell(names["model"], study.grid.domains[0], names["method"], arguments["seed"])
    if "DVC_STAGE" in os.environ:
        lock_copy.keep(study)
        noted = study.paths.local / "launch" / (study.name or "default")  # by an earlier launch, of other outputs
        (noted / f"{os.environ['DVC_STAGE'].rpartition(':')[2]}.json").unlink(missing_ok=True)
    numbered = [] if seed is None else [f"seed{seed}"]
    of_cell = cell if stage in failures.RECORDED else None
    return running.alone(study, stage, *names.values(), *numbered, cell=of_cell)


def _end_with_parent() -> None:
    """Stop when the process that started this one is killed, unless that has chosen a signal for it already."""
    if sys.platform == "linux":
        system, chosen = ctypes.CDLL(None), ctypes.c_int()
        system.prctl(PR_GET_PDEATHSIG, ctypes.byref(chosen))
        if not chosen.value:
            system.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> int:
    """Run the command of the command line; what a person can correct is one line, without a traceback."""
    options = parser().parse_args()
    study = getattr(options, "study", "")
    try:
        with stops.heeded():
            return run(options)
    except UserError as error:
        from experiments.study import inheritance
        from experiments.study.paths import Paths

        message = of_study(inheritance.attributed(str(error), Paths(study=study)), study)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OURS:
            raise
        message = lacks(error)
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError):
            return 1
        from experiments.study.failures import lacked_memory, number_of

        if isinstance(error, OSError) and (number := number_of(error)) in DISK_ERRORS:
            print(
                f"error: {error.filename or 'a file'}: {os.strerror(number).lower()}; correct the path, make it "
                "writable or free some disk space, and run the same command again",
                file=sys.stderr,
            )
            return 2
        if "home directory" in str(error):  # pathlib's, which does not name the path
            message = "a path begins with ~ and a name that no user of this machine has: write the whole path"
        elif lacked_memory(error):
            message = (
                f"out of memory ({str(error).strip().partition(chr(10))[0] or 'MemoryError'}): lower "
                "evaluate.batch_size or train.micro_batch, or use a machine with more"
            )
        else:
            raise
    except KeyboardInterrupt:
        stopped = "stopped; finished cells are complete, and `dvc repro` continues from here"
        if options.command == "audit":
            stopped = "stopped; scores of a model that are complete are kept for the next run of the same command"
        print(of_study(stopped, study), file=sys.stderr)
        return 130
    except BaseException as error:
        if not _of_tokenizer(error):
            raise
        message = (
            f"a tokenizer fails ({shortened(error)}): its tokenizer.json is damaged, or has no token for text that it "
            "does not know; fetch the model's folder again, or choose another model"
        )
    print(f"error: {shown(message)}", file=sys.stderr)
    return 2


def _of_tokenizer(error: BaseException) -> bool:
    """Whether the library tokenizers raised it: as a panic of its Rust code, or as a plain Exception."""
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    plain = type(error) is Exception and frame and "tokeniz" in frame.tb_frame.f_code.co_filename
    return bool(plain) or type(error).__name__ == "PanicException"


if __name__ == "__main__":
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)  # for good: a traceback is printed after `main`
    sys.exit(main())
