"""Record why a cell failed, so that a failure is never a zero and never missing."""

import errno
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from experiments.study import cells, running, stops
from experiments.study.advice import of_study
from experiments.study.provenance import git, now
from experiments.study.screen import shown
from experiments.training import processes
from experiments.training.log import TrainingFailed
from methods.errors import MissingInput, UserError, out_of_memory
from methods.tools.files import read_json, write_json

RECORDED = ("prepare", "train", "evaluate")
AGAIN = "`dvc repro` continues with this cell"
_FOR_THREAD_OR_FILE = re.compile(r"start new thread|os error 12\b")


@contextmanager
def recorded(study, cell, stage: str):
    """Run a stage of `cell`; on failure write results/failures/CELL.json and raise one clear UserError.

    A missing input leaves no record, because the cell may be complete from an earlier run.
    """
    path = study.paths.failure(cell)
    before = running.stamp(path)
    try:
        with stops.heeded():
            yield
    except KeyboardInterrupt:
        kind, reason = "interrupted", f"stopped during {stage}; {AGAIN}"
        if not processes.first() or running.stamp(path) != before:
            raise  # another process of this run failed and has recorded the reason
    except TrainingFailed as error:
        kind, reason = "nan", str(error)
    except MissingInput as error:
        raise UserError(f"{cell.name}: {error}") from error
    except processes.Killed as error:
        if running.stamp(path) != before:
            raise  # another one has recorded the reason
        kind, reason = "killed", f"{error}, by the system or by hand; {AGAIN}"
    except processes.Failed:
        raise  # it has recorded its reason, if there is one to record
    except UserError as error:
        kind, reason = "error", str(error)
    except Exception as error:
        if lacked_memory(error):
            kind = "out of memory"
            reason = (
                f"out of memory during {stage}: {_first_line(error)}. Lower train.micro_batch or train.length, "
                "or set train.checkpointing: true"
            )
        elif isinstance(error, OSError) and number_of(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            at = f" ({error.filename})" if error.filename else ""
            kind, reason = "error", f"the disk is full{at}: free some space, then run `dvc repro` again"
        else:  # a fault of the program: recorded for the report, and the traceback is still shown
            _write(path, _record(study, cell, stage, "error", f"{type(error).__name__}: {_first_line(error)}"))
            raise
    else:
        if processes.first() and path.exists() and read_json(path).get("stage") == stage:
            path.unlink()
        return
    reason = of_study(reason, study.name)
    _write(path, _record(study, cell, stage, kind, reason))
    raise UserError(f"{cell.name}: {reason}")


def keep(study, cell, *, stage: str, kind: str, reason: str) -> None:
    """Record a failure that the stage could not record itself, because its process was killed or never began."""
    _write(study.paths.failure(cell), _record(study, cell, stage, kind, of_study(reason, study.name)))


def number_of(error: OSError) -> int | None:
    """The system's number of an error; `shutil.copytree` gathers those of its files and has none of its own."""
    if error.errno is None and (told := re.search(r"\[Errno (\d+)\]", str(error))):
        return int(told[1])
    return error.errno


def lacked_memory(error: BaseException) -> bool:
    """Whether memory ran out: for a tensor, for a thread, or for the mapping of a file."""
    if isinstance(error, RuntimeError | SafetensorError) and _FOR_THREAD_OR_FILE.search(str(error)):
        return True
    return out_of_memory(error) or (isinstance(error, OSError) and number_of(error) == errno.ENOMEM)


def find_killed(study) -> None:
    """Record the stages of cells that were killed, which could not do it themselves."""
    for stage, names, about in running.left(study):
        if stage == "prepare":  # recorded with the first cell that needs it
            names = [names[0], study.grid.domains[0], *names[1:]]
        try:
            cell = cells.parse("/".join(names), study)
        except UserError:  # a stage of no cell, or a cell that params.yaml no longer has
            if stage not in (*RECORDED, "collect", "drift"):
                print(f"{' '.join((stage, *names)).strip()} was killed; `dvc repro` runs it again", file=sys.stderr)
            continue
        if stage not in RECORDED:
            print(f"{stage} of {cell.name} was killed; {AGAIN}", file=sys.stderr)
        if stage not in RECORDED or running.stamp(study.paths.failure(cell)) != about.get("record"):
            continue  # who started it has recorded it
        reason = f"killed during {stage}, or stopped by a full disk before it could say more"
        if about.get("ended") is not None and (running.ended() or 0) > about["ended"]:
            reason += (
                "; the system has ended processes for want of memory since it began: lower train.micro_batch or "
                "train.length, or set train.checkpointing: true"
            )
        reason += f"; {AGAIN}"
        record = _record(study, cell, stage, "killed", of_study(reason, study.name))
        _write(study.paths.failure(cell), record | {"when": about.get("when", record["when"])})


def _record(study, cell, stage: str, kind: str, reason: str) -> dict:
    """What failed, with the settings and the code: a reader looks for the learning rate that gave the NaN.

    No token and no control character of a library's message is written.
    """
    settings = study.settings(model=cell.model, domain=cell.domain, method=cell.method).numeric()
    parts = {part.key: part.settings() for part in study.methods[cell.method].parts}
    record = {"cell": cell.name, "stage": stage, "kind": kind, "reason": shown(reason), "when": now()}
    return record | {"git": git(study.paths.root), "settings": settings, "parts": parts}


def _write(path: Path, record: dict) -> None:
    own = path.with_name(f".{path.name}.{os.getpid()}")  # several processes of a run may fail at once
    write_json(own, record)
    os.replace(own, path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
