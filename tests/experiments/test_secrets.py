"""A token is in nothing that a failing access to the hub writes, and nothing printed steers a terminal."""

import io
import sys

import huggingface_hub
import pytest

from experiments.model import hub
from experiments.study import config
from experiments.study.cells import Cell
from experiments.study.failures import recorded
from experiments.study.paths import Paths
from experiments.study.screen import Screen, shown
from experiments.study.secrets import REMOVED, redacted
from methods.errors import UserError
from tests.experiments.hub_server import Hub, run_python

TOKEN = "hf_" + "SecretOfAPerson" * 2 + "1234"

# What a study's commands do with the error of a hub: they print it, record it, and print what nobody expected.
FAIL = """
import os, sys, time, traceback
time.sleep = lambda seconds: None  # between tries
from pathlib import Path
from experiments.data.data_sets import DataSets
from experiments.model import hub
from experiments.study import cells, config, failures
from experiments.study.paths import Paths
from experiments.study.screen import Screen
from methods.errors import UserError
sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
out, token = Path(sys.argv[1]), os.environ["HF_TOKEN"]
study = config.load("demo").model_copy(update={"paths": Paths(study="demo", root=out)})
def asked(name):
    hub.snapshot(name, revision="main", patterns=["*.json"], copy_to=out / "copy")
def rows(name):
    DataSets(folder=None, hashes=out / "hashes")(name, None, {})
def unexpected(name):
    raise RuntimeError(f"GET https://someone:{token}@127.0.0.1/{name}?X-Amz-Signature={token} with Bearer {token}")
for seed, (act, name) in enumerate(((asked, f"someone/{token}"), (rows, "someone/echo"), (unexpected, token))):
    try:
        with failures.recorded(study, cells.Cell("llama-tiny", "sums", "full", seed), "train"):
            act(name)
    except UserError as error:
        print(error)
    except RuntimeError:
        traceback.print_exc(file=sys.stdout)
print("a login", token, flush=True)
"""


def test_a_token_is_in_nothing_that_a_failing_access_to_the_hub_writes(tmp_path, monkeypatch, capsys):
    """The hub repeats the header that it was sent."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repeated = f"the header Authorization: Bearer {TOKEN} is refused"
    study = config.load("demo").model_copy(update={"paths": Paths(study="demo", root=tmp_path)})
    with (
        Hub(faults={"someone/echo": (418, "", repeated)}) as server,
        pytest.raises(UserError) as raised,
        recorded(study, Cell("llama-tiny", "sums", "full", 0), "train"),
    ):
        try:
            huggingface_hub.HfApi(endpoint=server.url, token=TOKEN).dataset_info("someone/echo")
        except huggingface_hub.errors.HfHubHTTPError as error:
            assert TOKEN in str(error)
            raise hub.refused(error, kind="data set", name="someone/echo", revision=None) from error
    print(raised.value)
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    for text in (capsys.readouterr().out, *written):
        assert TOKEN not in text and f"Bearer {REMOVED} is refused" in text
    assert len(written) == 1


@pytest.mark.thorough
def test_a_token_is_in_nothing_that_a_process_with_a_login_writes(tmp_path):
    """The hub repeats what it was sent; one token is in the environment, another in the file of a login."""
    secrets = {"HF_TOKEN": TOKEN, "OTHER": "of-another-registry-00"}
    repeated = f"the header Authorization: Bearer {TOKEN} is refused, and so is {secrets['OTHER']}"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(f"{secrets['OTHER']}\n")
    with Hub(faults={"someone/echo": (418, "", repeated)}) as server:
        said = run_python(FAIL, tmp_path / "hf", str(tmp_path / "out"), HF_ENDPOINT=server.url, HF_TOKEN=TOKEN)
    (tmp_path / "hf" / "token").unlink()
    assert said.count(REMOVED) > 6 and "a login" in said and "Traceback" in said and "I'm a Teapot" in said
    written = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert sum("failures" in str(file) for file in written) == 3
    for secret in secrets.values():
        assert secret not in said and not [file for file, content in written.items() if secret.encode() in content]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (f"token {TOKEN}.", f"token {REMOVED}."),
        ("https://me:pass@hub.example/x/y@main", f"https://{REMOVED}@hub.example/x/y@main"),
        (
            "GET https://cdn.example/a?Expires=9&Signature=aB~_c&Key-Pair-Id=K2&x=1 failed",
            f"GET https://cdn.example/a?Expires=9&Signature={REMOVED}&Key-Pair-Id=K2&x=1 failed",
        ),
        ("https://s3/a?X-Amz-Credential=a%2Fb&X-Amz-Signature=00", f"https://s3/a?X-Amz-Credential={REMOVED}"),
        (r"Illegal header value b'Bearer opaque-secret\x01rest'", f"Illegal header value b'Bearer {REMOVED}'"),
        ("hub:owner/name@main hf_transfer hf_hub_download basic settings", None),
        ("the tokenizer of https://huggingface.co/owner/name/tree/main?x=1", None),
    ],
)
def test_what_has_the_look_of_a_secret_is_taken_out_and_nothing_else(text, cleaned):
    found = redacted(text)
    assert found.startswith(text if cleaned is None else cleaned)
    assert cleaned is not None or found == text


def test_a_secret_of_the_environment_is_known_by_its_variable(monkeypatch):
    monkeypatch.setenv("SOME_REGISTRY_TOKEN", "no-shape-at-all")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert redacted("1 no-shape-at-all 1") == f"1 {REMOVED} 1"
    assert redacted("not allowed: no-shape-a…") == f"not allowed: {REMOVED}…"
    monkeypatch.setenv("SOME_REGISTRY_TOKEN", "with/slashes+and=")
    assert redacted("?x=with%2Fslashes%2Band%3D&y") == f"?x={REMOVED}&y"


def test_the_screen_shows_control_characters_and_lets_bars_pass(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "no-shape-at-all")
    stream = io.StringIO()
    screen = Screen(stream)
    print("a\x1b]52;c;ZXZpbA==\x07b no-shape-at-all \x9b6n", file=screen)
    screen.writelines(["\x1b[32mgreen\x1b[0m", "\r 10 %\x1b[A\n"])
    assert stream.getvalue() == (f"a\\x1b]52;c;ZXZpbA==\\x07b {REMOVED} \\x9b6n\n\x1b[32mgreen\x1b[0m\r 10 %\x1b[A\n")
    assert shown("\x1b[2J no-shape-at-all") == f"\\x1b[2J {REMOVED}"
    assert screen.isatty() is False and screen.write("ab") == 2
    monkeypatch.setattr(sys, "stdout", screen)
    print("flushed", flush=True)
    assert stream.getvalue().endswith("flushed\n")
