"""Fill MLflow's database from results/, then serve it to this machine: python -m experiments ui

`MLFLOW_PORT=5001 python -m experiments ui` takes another port than 5000.
"""

import os
import sys
from pathlib import Path

from experiments.commands import track
from experiments.commands.tracked_page import HOST, port

LOOPBACK = "127.0.0.1"


def main(study) -> None:
    track.main(study)
    print("in a few seconds; Ctrl-C ends it", flush=True)
    os.execve(sys.executable, command(study.paths.root / "mlflow.db"), environment(os.environ))


def command(database: Path) -> list[str]:
    """MLflow's server for this machine alone, whatever MLFLOW_HOST says: there is no password."""
    server = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", f"sqlite:///{database}", "--workers", "1"]
    return [*server, "--host", LOOPBACK, "--uvicorn-opts", "--log-level warning"]  # or it prints an address of its own


def environment(known: dict[str, str]) -> dict[str, str]:
    """The environment of MLflow's server: no telemetry, no background jobs, and no names of this machine but these."""
    names = [f"{name}:{port()}" for name in (HOST, "localhost", LOOPBACK)]
    return {
        **known,
        "MLFLOW_PORT": port(),
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(names),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"http://{names[0]}",
        "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
