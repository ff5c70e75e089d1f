"""MLflow's own page in a real browser: what a person sees without any set-up. Skipped where there is no Chromium."""

import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from experiments.commands.track import track
from experiments.commands.tracked_page import HOST, first_link
from experiments.commands.ui import command, environment
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
    log = store.parent / "ui.log"
    with open(log, "wb") as out:
        ui = subprocess.Popen(
            command(store), cwd=store.parent, env=variables, stdout=out, stderr=out, start_new_session=True
        )
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
def link(store, address):
    """The address that the command prints, at this server."""
    from mlflow import MlflowClient

    number = MlflowClient(f"sqlite:///{store}").get_experiment_by_name("default").experiment_id
    return f"{address}/#{first_link(number).partition('#')[2]}"


def test_the_link_opens_the_methods_the_front_and_the_curves_and_nothing_over_them(page, link, store):
    page.open(link)
    page.wait("document.body.innerText.includes('probe/accuracy')", seconds=120)
    page.screenshot(store.parent / "charts.png")
    shown = page.text()
    assert all(name in shown for name in ("base", "full", "ewc", "mofo", "Front", "1 domain gained: nats/token"))
    assert "seed0" not in shown  # a row for each method alone
    assert "Assistant" not in shown and "forgetting" not in shown  # no panel over it, no chart of one number


def test_the_table_has_a_row_for_each_method_with_its_interval(page, link, store):
    page.open(link.replace("CHART", "TABLE"))
    rows = "[...document.querySelectorAll('.ag-center-cols-container .ag-row')].map(row => row.innerText)"
    page.wait(f"{rows}.filter(row => row.includes('[')).length == 3", seconds=120)  # base has none, mofo failed
    page.screenshot(store.parent / "table.png")
    texts = page.run(rows)
    assert (
        len(texts) == 5 and sum(bool(re.search(r"\n[+−]0\.\d+ \[[+−]0\.\d+, [+−]0\.\d+\]", row)) for row in texts) == 3
    )


def test_a_crashed_cell_says_why_on_its_own_page(page, store, address):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("default").experiment_id
    run = next(
        run for run in client.search_runs([experiment]) if run.data.tags["holdfast.key"].endswith("science/mofo/seed1")
    )
    page.open(f"{address}/#/experiments/{experiment}/runs/{run.info.run_id}")
    page.wait("document.body.innerText.includes('loss is NaN at step 12')", seconds=120)
    assert "Failed" in page.text()
    page.wait("[...document.querySelectorAll('a')].some(link => link.innerText.trim() == 'mofo')")  # the way up
