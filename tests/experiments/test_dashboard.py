"""MLflow's own page in a real browser: what a person sees without any set-up. Skipped, saying why, where there is no Chromium."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from experiments.commands.tracking import link, track
from tests.analysis.fixtures import write_results
from tests.experiments.browser import NAMES, Browser, end, executable

pytestmark = pytest.mark.skipif(
    executable() is None,
    reason=f"no Chromium: none of {', '.join(NAMES)} is on PATH (Debian: apt-get install chromium)",
)

METHODS = ("full", "lora", "ewc", "mofo")
RUNS = {f"{method} {domain} smollm2-135m" for domain in ("science", "physical") for method in ("base", *METHODS)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of two domains and two seeds a method, one method crashed."""
    folder = tmp_path_factory.mktemp("dashboard")
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


HEADERS = "[...document.querySelectorAll('[role=columnheader]')].map(head => head.innerText.trim())"
PLOTS = "[...document.querySelectorAll('.js-plotly-plot')].filter(plot => plot.data && plot.data.length)"


def test_the_table_shows_a_row_a_method_with_its_numbers(page, store, address):
    page.open(link(study="default", database=store, address=address))
    page.wait(f"{json.dumps(sorted(RUNS))}.every(name => document.body.innerText.includes(name))", seconds=40)
    links = page.run("[...document.querySelectorAll('[role=row] a')].map(link => link.innerText.trim())")
    assert set(filter(None, links)) == RUNS  # the seeds are folded below their methods
    page.wait(f"['domain_score', 'domain_gain', 'forgetting'].every(name => {HEADERS}.includes(name))")
    gains = page.run(
        "[...document.querySelectorAll('[role=gridcell][col-id=\"metrics.`domain_gain`\"]')].map(cell => cell.innerText.trim())"
    )
    assert len(gains) == 10 and gains.count("-") == 2 and gains.count("0") == 2  # mofo has no number, the base has 0
    assert sum(float(gain) > 0.05 for gain in gains if gain != "-") == 6 and max(map(len, gains)) <= 9
    page.screenshot(store.parent / "table.png")


def test_the_charts_open_with_forgetting_against_gain(page, store, address):
    page.open(link(study="default", database=store, address=address, charts=True))
    page.wait(f"{PLOTS}.length >= 4", seconds=40)
    titles = page.run("[...document.querySelectorAll('h4')].map(title => title.innerText)")
    own = "science smollm2-135m"
    assert titles[:2] == [
        f"{own}/domain_gain vs. {own}/forgetting",
        f"{own}/forgetting",
    ]  # a comparison shares no chart with another
    kind, gains, losses = page.run(
        f"{PLOTS}.slice(0, 1).map(plot => [plot.data[0].type, plot.data[0].x, plot.data[0].y])[0]"
    )
    assert kind == "scatter" and len(gains) == len(losses) == 4 and (0, 0) in set(zip(gains, losses))
    assert page.run(f"{PLOTS}.slice(0, 1).map(plot => plot.querySelectorAll('.scatterlayer .point').length)[0]") == 4
    kind, losses = page.run(f"{PLOTS}.slice(1, 2).map(plot => [plot.data[0].type, plot.data[0].x])[0]")
    assert kind == "bar" and len(losses) == 4
    assert {"full science smollm2-135m", "ewc science smollm2-135m"} <= set(page.text().splitlines())
    page.screenshot(store.parent / "charts.png")


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
