"""What no line of the program may do, whatever it reads: docs/security.md says it in words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.test_pipeline import project_of, run

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for room in ("analysis", "evaluation", "experiments", "methods") for path in (ROOT / room).rglob("*.py")
)
RUN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "code.interact"}
UNPICKLE = {f"{module}.{name}" for module in ("pickle", "dill", "cloudpickle", "marshal") for name in ("load", "loads")}
UNPICKLE |= {"pickle.Unpickler", "joblib.load", "shelve.open", "pd.read_pickle"}
SETTINGS = {  # what a call must state
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "tree.extractall": ("filter", "data"),
    "jinja2.Environment": ("autoescape", True),
}


def calls(path: Path) -> Iterator[tuple[str, dict[str, object], int]]:
    """Every call of a file: what is called, the keywords with their values, and the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            values = {
                word.arg: word.value.value if isinstance(word.value, ast.Constant) else ast.unparse(word.value)
                for word in node.keywords
                if word.arg
            }
            yield ast.unparse(node.func), values, node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_becomes_a_program(path):
    for called, given, line in calls(path):
        at = f"{path.relative_to(ROOT)}:{line}"
        assert called not in RUN | UNPICKLE, at
        assert given.get("shell", False) is False and given.get("trust_remote_code", False) is False, at
        if called in SETTINGS:
            setting, value = SETTINGS[called]
            assert given.get(setting) == value, at
        if called == "yaml.load" and "import yaml" in path.read_text(encoding="utf-8").splitlines():  # not ruamel's
            assert given.get("Loader") == "yaml.CSafeLoader", at
        assert not called.endswith("extractall") or "filter" in given, at
        assert called not in ("YAML", "ruamel.yaml.YAML") or given.get("typ") in (None, "safe"), at
        if re.search(r"Auto\w+\.from_(pretrained|config)$", called):
            assert given.get("trust_remote_code") is False, at


DRAWINGS = ("overview.wide", "overview.phone", "figure.svg", "drawn.definitions()")


def test_templates_of_pages_leave_nothing_unescaped_but_our_own_drawings():
    for path in sorted((ROOT / "analysis").rglob("*.j2")):
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for what in re.findall(r"\{\{([^}]*)\|\s*safe\b", text):
                assert what.strip() in DRAWINGS, f"{path.name}:{line}"
            assert "autoescape false" not in text and not re.search(r"(href|src)=\"\{\{(?! ?(c\.|file ))", text), line
            assert not re.search(r"<script[^>]*>[^<]*\{\{|on\w+=\"[^\"]*\{\{", text), f"{path.name}:{line}"


@pytest.mark.thorough
def test_names_of_a_strangers_study_reach_no_shell(tmp_path):
    """`dvc repro` itself reads params.yaml, and puts its names into commands."""
    params = YAML().load(ROOT / "experiments" / "studies" / "demo" / "params.yaml")
    name = "x; touch trap #"
    params["models"][name] = params["models"]["llama-tiny"]
    params["grid"]["models"] = [name]
    project_of(tmp_path, params)
    for path in re.findall(r"results/settled/\S+", (tmp_path / "dvc.yaml").read_text()):  # of the default study
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    done = run(tmp_path, "dvc", "repro", "-k", check=False)
    assert done.returncode and "a name is lower-case letters, digits" in done.stderr, done.stderr[-2000:]
    assert "Running stage 'resolve'" in done.stdout and not list(tmp_path.rglob("trap"))
