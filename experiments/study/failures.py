"""Record why a cell failed, so that a failure is never a zero and never missing."""

import errno
import signal
import time
from contextlib import contextmanager

from experiments.study.advice import of_study
from experiments.study.provenance import git, now
from experiments.study.screen import shown
from experiments.training import processes
from experiments.training.log import TrainingFailed
from methods.errors import MissingInput, UserError, out_of_memory
from methods.tools.files import read_json, write_json


@contextmanager
def recorded(study, cell, stage: str):
    """Run a stage of `cell`; on failure write results/failures/CELL.json and raise one clear UserError.

    A missing input leaves no record, because the cell may be complete from an earlier run.
    """
    path = study.paths.failure(cell)
    began = time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop by the system is handled like Ctrl-C
    try:
        yield
    except KeyboardInterrupt:
        kind, reason = "interrupted", f"stopped during {stage}; `dvc repro` continues with this cell"
        if not processes.first() or (path.exists() and path.stat().st_mtime > began):
            raise  # another process of this run failed and has recorded the reason
    except TrainingFailed as error:
        kind, reason = "nan", str(error)
    except MissingInput as error:
        raise UserError(f"{cell.name}: {error}") from error
    except UserError as error:
        kind, reason = "error", str(error)
    except Exception as error:
        if out_of_memory(error):
            kind = "out of memory"
            reason = (
                f"out of memory during {stage}: {_first_line(error)}. Lower train.micro_batch or train.length, "
                "or set train.checkpointing: true"
            )
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            at = f" ({error.filename})" if error.filename else ""
            kind, reason = "error", f"the disk is full{at}: free some space, then run `dvc repro` again"
        else:  # a fault of the program: recorded for the report, and the traceback is still shown
            write_json(path, _record(study, cell, stage, "error", f"{type(error).__name__}: {_first_line(error)}"))
            raise
    else:
        if processes.first() and path.exists() and read_json(path).get("stage") == stage:
            path.unlink()
        return
    reason = of_study(reason, study.name)
    write_json(path, _record(study, cell, stage, kind, reason))
    raise UserError(f"{cell.name}: {reason}")


def keep(study, cell, *, stage: str, kind: str, reason: str) -> None:
    """Record a failure that the stage could not record itself, because its process was killed or never began."""
    write_json(study.paths.failure(cell), _record(study, cell, stage, kind, of_study(reason, study.name)))


def _record(study, cell, stage: str, kind: str, reason: str) -> dict:
    """What failed, with the settings and the code: a reader looks for the learning rate that gave the NaN.

    No token and no control character of a library's message is written.
    """
    settings = study.settings(model=cell.model, domain=cell.domain, method=cell.method).numeric()
    parts = {part.key: part.settings() for part in study.methods[cell.method].parts}
    record = {"cell": cell.name, "stage": stage, "kind": kind, "reason": shown(reason), "when": now()}
    return record | {"git": git(study.paths.root), "settings": settings, "parts": parts}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
