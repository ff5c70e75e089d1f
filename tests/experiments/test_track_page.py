"""MLflow's own page in a real browser: what a person sees without any set-up. Skipped where there is no Chromium."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from experiments.commands.track import track
from tests.analysis.fixtures import write_results
from tests.experiments.browser import NAMES, Browser, end, executable

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        executable() is None,
        reason=f"no Chromium: none of {', '.join(NAMES)} is on PATH (Debian: apt-get install chromium)",
    ),
]

METHODS = ("full", "lora", "ewc", "mofo")
RUNS = {f"{method} {domain} smollm2-135m" for domain in ("science", "physical") for method in ("base", *METHODS)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of two domains and two seeds a method, one method crashed."""
    folder = tmp_path_factory.mktemp("page")
    cells = [
        cell
        for domain in ("science", "physical")
        for cell in write_results(
            folder / "results",
            methods=METHODS,
            seeds=(0, 1),
            domain=domain,
            failed={"mofo": "loss is NaN at step 12: lower the learning rate"},
        )
    ]
    track(results_root=folder / "results", cells=cells, study="default", database=folder / "mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture(scope="module")
def address(store):
    """`mlflow ui` of the store, one worker and no background jobs; ended with all it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        f"sqlite:///{store}",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    environment = os.environ | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    log = store.parent / "ui.log"
    with open(log, "wb") as out:
        ui = subprocess.Popen(
            command, cwd=store.parent, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        until = time.monotonic() + 90
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert ui.poll() is None and time.monotonic() < until, (
                f"mlflow ui does not answer:\n{log.read_text()[-2000:]}"
            )
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        end(ui)
    with pytest.raises(ProcessLookupError):
        os.killpg(ui.pid, 0)  # nothing it started is left


@pytest.fixture(scope="module")
def page(store):
    with Browser(store.parent) as browser:
        yield browser


def _answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_the_experiment_shows_a_row_per_method_with_its_seeds_folded_below(page, store, address):
    from mlflow import MlflowClient

    experiment = MlflowClient(f"sqlite:///{store}").get_experiment_by_name("default").experiment_id
    page.open(f"{address}/#/experiments/{experiment}/runs")
    page.wait(f"{json.dumps(sorted(RUNS))}.every(name => document.body.innerText.includes(name))", seconds=40)
    page.screenshot(store.parent / "table.png")


def test_a_crashed_cell_says_why_on_its_own_page(page, store, address):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("default").experiment_id
    run = next(
        run
        for run in client.search_runs([experiment])
        if run.data.tags.get("holdfast.cell", "").endswith("science/mofo/seed1")
    )
    page.open(f"{address}/#/experiments/{experiment}/runs/{run.info.run_id}")
    page.wait("document.body.innerText.includes('loss is NaN at step 12')", seconds=40)
    assert "Failed" in page.text()
    page.wait(
        "[...document.querySelectorAll('a')].some(link => link.innerText.trim() == 'mofo science smollm2-135m')"
    )  # the way up
