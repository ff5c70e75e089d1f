"""The dashboard answers on this machine alone."""

import os
import socket
import subprocess
import time

import pytest

from experiments.commands.track import track
from experiments.commands.ui import LOOPBACK, command, environment
from tests.analysis.fixtures import write_results
from tests.experiments.browser import end


def test_the_dashboard_is_asked_to_bind_to_loopback_and_to_keep_its_own_guards(tmp_path):
    asked = command(tmp_path / "mlflow.db")
    assert asked[asked.index("--host") + 1] == LOOPBACK == "127.0.0.1"
    variables = environment({"MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true", "MLFLOW_SERVER_ALLOWED_HOSTS": "*"})
    assert variables["MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE"] == "false"
    assert all(name.rpartition(":")[0].endswith(("localhost", LOOPBACK)) for name in _hosts(variables))


def _hosts(variables: dict[str, str]) -> list[str]:
    return variables["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


@pytest.mark.thorough
def test_the_dashboard_listens_on_loopback_and_no_other_address(tmp_path, monkeypatch):
    cells = write_results(tmp_path / "results", methods=("full",))
    track(results_root=tmp_path / "results", cells=cells, study="default", database=tmp_path / "mlflow.db")
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_PORT", str(port))
    monkeypatch.setenv("MLFLOW_HOST", "0.0.0.0")
    with open(tmp_path / "log", "wb") as log:
        started = {"cwd": tmp_path, "env": environment(dict(os.environ)), "start_new_session": True}
        ui = subprocess.Popen(command(tmp_path / "mlflow.db"), stdout=log, stderr=log, **started)
    try:
        until = time.monotonic() + 120
        while not _answers(LOOPBACK, port):
            assert ui.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.3)
        assert not _answers("127.0.0.2", port)  # which a server on all addresses would answer
    finally:
        end(ui)


def _answers(host: str, port: int) -> bool:
    with socket.socket() as asked:
        asked.settimeout(2)
        return asked.connect_ex((host, port)) == 0
