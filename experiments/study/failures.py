"""A cell that fails leaves a record with its reason, never a zero and never nothing."""

import errno
import signal
import time
from contextlib import contextmanager

import torch

from experiments.study.advice import of_study
from experiments.study.provenance import git, now
from experiments.training import processes
from experiments.training.log import TrainingFailed
from methods.errors import MissingInput, UserError
from methods.tools.files import read_json, write_json


@contextmanager
def recorded(study, cell, stage: str):
    """Run a stage of `cell`; on failure write results/failures/CELL.json and raise one clear UserError.

    A missing input leaves no record: a stage that could not begin says nothing of a cell, which may be whole from an earlier run.
    """
    path = study.paths.failure(cell)
    began = time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped by the system is stopped like from the keyboard
    try:
        yield
    except KeyboardInterrupt:
        kind, reason = "interrupted", f"stopped during {stage}; `dvc repro` goes on with this cell"
        if not processes.first() or (path.exists() and path.stat().st_mtime > began):
            raise  # stopped because another process of this run failed, which has said why
    except TrainingFailed as error:
        kind, reason = "nan", str(error)
    except MissingInput as error:
        raise UserError(f"{cell.name}: {error}") from error
    except UserError as error:
        kind, reason = "error", str(error)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            write_json(path, _record(study, cell, stage, "error", f"{type(error).__name__}: {_first_line(error)}"))
            raise
        kind = "out of memory"
        reason = (
            f"out of memory during {stage}: {_first_line(error)}. Lower train.micro_batch or train.length, "
            "or set train.checkpointing: true"
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        at = f" ({error.filename})" if error.filename else ""
        kind, reason = "error", f"the disk is full{at}: free some, then run `dvc repro` again"
    except Exception as error:  # recorded for the report; the traceback is still shown, for it is our fault
        write_json(path, _record(study, cell, stage, "error", f"{type(error).__name__}: {_first_line(error)}"))
        raise
    else:
        if processes.first() and path.exists() and read_json(path).get("stage") == stage:
            path.unlink()
        return
    reason = of_study(reason, study.name)
    write_json(path, _record(study, cell, stage, kind, reason))
    raise UserError(f"{cell.name}: {reason}")


def _record(study, cell, stage: str, kind: str, reason: str) -> dict:
    """What failed, and the settings and code it failed with: a reader looks for the rate that gave the NaN."""
    settings = study.settings(model=cell.model, domain=cell.domain, method=cell.method).numeric()
    return {
        "cell": cell.name,
        "stage": stage,
        "kind": kind,
        "reason": reason,
        "when": now(),
        "git": git(study.paths.root),
        "settings": settings,
        "parts": {part.key: part.settings() for part in study.methods[cell.method].parts},
    }


def out_of_memory(error: BaseException) -> bool:
    """torch's CPU allocator says so only in words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
