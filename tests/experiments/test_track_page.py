"""MLflow's own page in a real browser: what a person sees without any set-up. Skipped where there is no Chromium."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from experiments.commands.track import track
from experiments.commands.tracked_page import HOST, first_link
from experiments.commands.ui import environment
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
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_PORT", str(port))
        variables = environment(os.environ)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", f"sqlite:///{store}", "--workers", "1"]
    log = store.parent / "ui.log"
    with open(log, "wb") as out:
        ui = subprocess.Popen(command, cwd=store.parent, env=variables, stdout=out, stderr=out, start_new_session=True)
    try:
        until = time.monotonic() + 90
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert ui.poll() is None and time.monotonic() < until, (
                f"mlflow ui does not answer:\n{log.read_text()[-2000:]}"
            )
            time.sleep(0.3)
        yield f"http://{HOST}:{port}"
    finally:
        end(ui)
    with pytest.raises(ProcessLookupError):
        os.killpg(ui.pid, 0)  # nothing it started is left


@pytest.fixture(scope="module")
def page(store):
    # as high as the whole page, because MLflow draws only the charts that are on the screen
    with Browser(store.parent, width=1280, height=2800) as browser:
        yield browser


def _answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def charts(page, store, address):
    """The page that the command's link opens, in a profile that has never seen MLflow."""
    from mlflow import MlflowClient

    number = MlflowClient(f"sqlite:///{store}").get_experiment_by_name("default").experiment_id
    page.open(address + "/#" + first_link(number).partition("#")[2])
    page.wait("document.body.innerText.includes('probe/domain_nll')", seconds=40)
    return page


def test_the_link_opens_the_methods_the_front_and_the_curves_and_nothing_over_them(charts, store):
    charts.screenshot(store.parent / "charts.png")
    shown = charts.text()
    assert all(name in shown for name in ("base", "full", "ewc", "mofo", "Front", "1 domain gained: nats/token"))
    assert "seed0" not in shown and "physical" not in shown.replace("smollm2-135m on physical", "")
    assert "Assistant" not in shown and "forgetting" not in shown  # no panel in front, no chart of one number


def test_the_table_has_a_row_for_each_method_with_its_interval(charts, store):
    charts.run("[...document.querySelectorAll('a')].find(link => link.innerText == 'table').click()")
    head = "3 general text lost: nats/token"
    charts.wait(
        f"document.body.innerText.includes({head!r}) && !document.body.innerText.includes('probe/')", seconds=40
    )
    charts.screenshot(store.parent / "table.png")
    rows = charts.run("[...document.querySelectorAll('.ag-center-cols-container .ag-row')].map(row => row.innerText)")
    assert len(rows) == 5 and sum(bool(re.search(r"\[[+−]0\.\d+, [+−]0\.\d+\]", row)) for row in rows) == 3


def test_a_crashed_cell_says_why_on_its_own_page(page, store, address):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("default").experiment_id
    run = next(
        run
        for run in client.search_runs([experiment])
        if run.data.tags["holdfast.key"].endswith("science/mofo/seed1")
    )
    page.open(f"{address}/#/experiments/{experiment}/runs/{run.info.run_id}")
    page.wait("document.body.innerText.includes('loss is NaN at step 12')", seconds=40)
    assert "Failed" in page.text()
    page.wait("[...document.querySelectorAll('a')].some(link => link.innerText.trim() == 'mofo')")  # the way up
