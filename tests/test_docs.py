"""Every code block of README and docs: examples run, commands are parsed by the program that they call, and run
where they only read.
"""

import contextlib
import csv
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from statistics import median

import pytest
import torch
from ruamel.yaml import YAML

from experiments.__main__ import parser, run
from experiments.commands import leaders
from experiments.data import prepared_rows as data
from experiments.study import cells, config
from experiments.study.params_text import read_yaml
from experiments.study.paths import HERE, Paths
from experiments.training import memory
from methods import part as protocol
from methods import registry
from methods.part import REGISTERED

PAGES = [HERE / "README.md", HERE / "CONTRIBUTING.md", *sorted((HERE / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
READS = ("plan", "gate", "summary")  # commands that take seconds and change nothing


def blocks(language):
    return [
        (page.relative_to(HERE).as_posix(), text)
        for page in PAGES
        for kind, text in BLOCK.findall(page.read_text())
        if kind == language
    ]


def commands():
    """(page, words) of every command of a `sh` block, without comments and without what is set before it."""
    found = []
    for page, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            for command in re.split(r" ; | && ", re.sub(r"\s#\s.*", "", line)):
                words = shlex.split(command)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words = words[1:]
                if words:
                    found.append(pytest.param(words, id=f"{page}: {' '.join(words)}"))
    return found


def test_every_block_says_what_it_is():
    for page in PAGES:
        text = page.read_text()
        assert {kind for kind, _ in BLOCK.findall(text)} <= {"sh", "python", "yaml", "toml", "text"}, page.name
        assert not re.search(r"\n\n    (python|make|dvc|@register|@dataclass)", BLOCK.sub("", text)), (
            f"{page.name}: a block without fences is never run"
        )


@pytest.mark.parametrize("words", commands())
def test_a_command_is_one_that_its_program_takes(words, capsys):
    programs = {"make": _make, "python": _python, "dvc": _dvc, "mlflow": _mlflow, "torchrun": _torchrun}
    if words[0] in programs:
        programs[words[0]](words[1:])
    else:
        assert words[0] in ("grep", "ruff") and shutil.which(words[0]), words


def _make(words):
    done = subprocess.run(["make", "-n", *words], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _python(words):
    assert words[0] == "-m"
    if words[1] in ("pip", "pytest", "tests.goldens"):
        assert importlib.util.find_spec(words[1]) and all(
            (HERE / word).exists() for word in words if word.endswith(".py")
        )
        return
    if words[1] == "methods":
        assert words[2:] in ([], ["docs"]) or words[2:] == ["KEY"] or set(words[2:]) <= registry.parts().keys()
        return
    assert words[1] == "experiments"
    options = parser().parse_args(words[2:])
    if not hasattr(options, "study"):
        return
    study = config.load(options.study)
    if hasattr(options, "cell"):
        cells.parse(options.cell, study)
    if hasattr(options, "patterns"):
        assert cells.matching(study, options.patterns)
    if options.command == "sweep":
        from experiments.commands import sweep

        made = sweep.make(
            study,
            method=options.method,
            knob=options.knob,
            values=options.values,
            points=options.points,
            linear=options.linear,
        )
        assert len(made) == (options.points or 2)
    if options.command in READS and options.study != "paper":
        try:
            assert run(options) in (0, 1)
        except SystemExit as end:  # `summary`, where a cell has no result in a fresh clone
            assert end.code == 1


def _dvc(words):
    from dvc.cli import parse_args

    options = parse_args(words)
    stages = words[0] not in ("metrics", "plots")  # whose targets are files
    for target in (stages and getattr(options, "targets", None)) or []:
        file, _, stage = target.rpartition(":")
        if not getattr(options, "glob", False):
            assert stage in _stages(HERE / (file or "dvc.yaml")), f"no stage {stage} in {file or 'dvc.yaml'}"
        else:
            assert any(re.fullmatch(re.escape(stage).replace(r"\*", ".*"), name) for name in _stages(HERE / file)), (
                target
            )
    for change in getattr(options, "set_param", None) or []:
        name, _, _ = change.partition("=")
        block = read_yaml(HERE / "params.yaml")
        for key in name.split("."):
            assert key in block, f"{name} is no key of params.yaml"
            block = block[key]


def _stages(file):
    """Every stage of a dvc.yaml by the name that DVC gives it."""
    from itertools import product

    study = config.load(file.parent.name if file.parent != HERE else "")
    lists = {"model": "models", "domain": "domains", "method": "methods", "seed": "seeds"}
    names = set()
    for stage, block in YAML(typ="safe").load(file)["stages"].items():
        values = product(*([str(v) for v in getattr(study.grid, lists[key])] for key in block.get("matrix", {})))
        names |= {f"{stage}@{'-'.join(value)}" if value else stage for value in values}
    return names


def _mlflow(words):
    from mlflow.cli import cli

    name, command, rest = cli.resolve_command(cli.make_context("mlflow", words, resilient_parsing=True), words)
    command.make_context(name, rest)


def _torchrun(words):
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    assert options.module
    _python(["-m", options.training_script, *options.training_script_args])


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed(code, entry points as TOML): the package of a README, on the search path, gone after the test."""
    before = set(registry.parts())

    def install(code, points):
        ((name, target),) = tomllib.loads(points)["project"]["entry-points"]["holdfast.parts"].items()
        module = target.partition(":")[0]
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[holdfast.parts]\n{name} = {target}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        return name

    yield install
    for key in set(REGISTERED) - before:
        del REGISTERED[key]
    sys.modules.pop("holdfast_l2sp", None)


def test_the_readmes_part_works_as_printed(installed, tiny_llama):
    """Its gradient is α·(θ − θ₀) and its value α/2·‖θ − θ₀‖², against plain arithmetic and by its own test."""
    (_, code), (_, test), (_, points) = *blocks("python")[:2], blocks("toml")[0]
    name = installed(code, points)
    assert name in registry.parts()
    block = next(YAML(typ="safe").load(text) for _, text in blocks("yaml") if name in text)
    ((method, parts),) = block["methods"].items()
    (part,) = config.build_method(method, parts).parts
    _pulls(part, tiny_llama, strength=parts[name]["strength"])
    names = {"L2SP": type(part)}
    exec(test, names)
    names["test_the_gradient_is_alpha_times_the_distance"](tiny_llama)


def test_the_protocols_example_works_as_printed(tiny_llama, tmp_path):
    code = textwrap.dedent(protocol.__doc__.partition("A complete example:")[2])
    file = tmp_path / "docstring_l2sp.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        _pulls(module.L2SP(strength=0.5), tiny_llama, strength=0.5)
    finally:
        REGISTERED.pop("my_l2_sp", None)


def _pulls(part, model, *, strength):
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = {name: (p.detach() + 0.1).requires_grad_() for name, p in model.named_parameters()}
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    state = protocol.Run(model=model, weights=weights, base=base, seed=0, device="cpu")
    with torch.no_grad():
        value = part.before_clip(run=state, state={}, step=0)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, strength * (weight.detach() - base[name]))
    assert float(value) == pytest.approx(
        strength / 2 * sum(float((w.detach() - base[n]).square().sum()) for n, w in weights.items()), rel=1e-5
    )


@pytest.mark.parametrize("page, text", [(page, text) for page, text in blocks("yaml") if "l2_sp" not in text])
def test_a_block_of_params_yaml_is_one_that_loads(page, text, tmp_path):
    """Put in place of the same blocks of the study it is about (else beside those of the default study), it is
    accepted.
    """
    given = YAML(typ="safe").load(text)
    study = "mofo-math" if "math-small" in text else ""
    whole = read_yaml(Paths(study=study).params)
    for key, block in given.items():
        merge = isinstance(block, dict) and key != "grid" and "source" not in block
        whole[key] = whole.get(key, {}) | block if merge else block
    folder = Paths(study=study, root=tmp_path).folder
    folder.mkdir(parents=True, exist_ok=True)
    YAML().dump(whole, folder / "params.yaml")
    if study:
        shutil.copy(HERE / "params.yaml", tmp_path)
    loaded = config.load(study, root=tmp_path)
    for key in ("methods", "domains", "models"):
        assert set(given.get(key, {})) <= set(getattr(loaded, key))


def test_the_readmes_domain_makes_its_rows(tmp_path, monkeypatch):
    """The block `birds` on rows of the form that its comment shows, split and rendered by the `data` stage."""
    text = next(text for _, text in blocks("yaml") if "birds" in text)
    row = json.loads(re.search(r"# (\{.*\})", text)[1])
    block = YAML(typ="safe").load(text)["domains"]["birds"] | {
        "retention": [],
        "split": {"train": 5, "probe": 2, "test": 3},
    }
    assert row.keys() == {"question", "choices", "gold"}
    rows = [row | {"question": f"Bird number {n}?", "choices": ["a", "b", "c"], "gold": n % 3} for n in range(12)]
    (tmp_path / "birds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"A passage about bird number {n}."}) for n in range(40))
    )
    whole = read_yaml(HERE / "params.yaml") | {
        "domains": {"birds": block},
        "general": {"rows": {"jsonl": "text.jsonl"}, "importance": 4, "replay": 0, "probe": 2, "test": 4},
    }
    whole["grid"] = whole["grid"] | {"domains": ["birds"], "models": ["smollm2-135m"]}
    YAML().dump(whole, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        said = data.write_data(config.load(root=tmp_path), tmp_path / "out")
    assert said["domains"]["birds"]["n"] == {"train": 5, "probe": 2, "test": 3}
    first = json.loads((tmp_path / "out/train/birds/train.jsonl").read_text().splitlines()[0])
    assert re.fullmatch(r"Q: Bird number \d+\?\nA:", first["context"]) and first["choices"] == [" a", " b", " c"]


def test_the_readmes_numbers_are_recomputed_from_items(capsys, monkeypatch):
    """Means are those of the report, and intervals but for the variance between seeds, which the report pools."""
    monkeypatch.chdir(HERE)
    text, hours = [text for page, text in blocks("python") if page == "docs/recompute.md"]
    exec(compile(hours, "docs/recompute.md", "exec"), {})
    table = (HERE / "docs/studies.md").read_text().partition("| hours of scoring |")[2].partition("\n\n")[0]
    assert capsys.readouterr().out.splitlines() == table.splitlines()[2:]
    exec(compile(text, "docs/recompute.md", "exec"), {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {}
    for study in ("results/summary", "results/track/summary"):
        with open(HERE / study / "table.csv") as file:
            rows |= {(r["domain"], r["method"]): r for r in csv.DictReader(file) if r["seeds"] not in ("", "0")}
    assert {(domain, method) for domain, method, *_ in printed} == rows.keys()
    for domain, method, seeds, *numbers in printed:
        row = rows[domain, method]
        assert seeds == row["seeds"]
        for key, own in zip(("domain_nll_gained", "general_nll_lost"), (numbers[:3], numbers[3:])):
            value, low, high = (float(row[f"{key}{end}"]) for end in ("", "_low", "_high"))
            ours = [float(number) for number in own]
            assert ours[0] == pytest.approx(value, abs=6e-5), (domain, method, key)
            assert ours[1:] == pytest.approx([low, high], abs=2.5e-4), (domain, method, key)


def test_the_readmes_table_is_the_reports():
    """The README's table is the first columns of results/summary/table.md, without the base."""

    def table(page):
        text = (HERE / page).read_text()
        lines = text[text.index("| method | gain") :].partition("\n\n")[0].splitlines()
        return [
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| base")
        ]

    own = table("README.md")
    assert own == [row[: len(own[0])] for row in table("results/summary/table.md")] and len(own) > 2


def test_the_readme_quotes_the_answer_of_the_track():
    answer = (HERE / "results/track/summary/table.txt").read_text().partition("\n\n")[0]
    quoted = [line.removeprefix(">") for line in (HERE / "README.md").read_text().splitlines() if line.startswith(">")]
    assert " ".join(quoted).split() == answer.split()
    ran = len([*(HERE / "results/track/runs").rglob("metrics.json")])
    planned = len(cells.grid(config.load("track")))
    said = " ".join((HERE / "README.md").read_text().split())
    assert ran == planned and f"All {ran} cells of `track` have run" in said


def test_the_readme_states_the_limits_of_the_track_in_its_numbers():
    said = " ".join((HERE / "README.md").read_text().split())
    with open(HERE / "results/track/summary/table.csv") as file:
        rows = {row["method"]: row for row in csv.DictReader(file) if row["general_nll_lost"]}
    lost, low, high = (
        {method: f"{float(rows[method][f'general_nll_lost{end}']):.3f}" for method in ("full", "full-s1", "full-s2")}
        for end in ("", "_low", "_high")
    )
    gains = [float(rows[method]["domain_nll_gained"]) for method in ("full", "full-s1")]
    before = float(rows["full"]["unsettled_domain_nll_gained"])
    assert f"plain fine-tuning gains {before:.3f} of the {gains[0]:.3f} nats" in said
    with open(HERE / "results/summary/table.csv") as file:
        full = next(row for row in csv.DictReader(file) if row["method"] == "full")
    before, gain = (float(full[f"{about}domain_nll_gained"]) for about in ("unsettled_", ""))
    assert f"`full` gains {before:.3f} of the {gain:.3f} nats" in said
    settled = json.loads((HERE / "results/settled/smollm2-135m-settled/settle.json").read_text())
    gates = {gate["learning_rate"]: [gate[key] for key in ("improvement", "low", "high")] for gate in settled["gates"]}
    assert f"{lost['full-s1']} for {lost['full']}, and costs {gains[0] - gains[1]:.3f} of its gain" in said
    assert f"it is {lost['full']}, and {lost['full-s2']} [{low['full-s2']}, {high['full-s2']}]" in said
    assert "lower its loss on general text by {:.3f} [{:.3f}, {:.3f}] nats".format(*gates[7.5e-5]) in said
    raised, high, low = (-number for number in gates[3e-4])
    assert f"raise its loss on general text by {raised:.3f} [{low:.3f}, {high:.3f}] nats" in said


def test_the_studies_page_states_the_memory_of_the_full_sizes():
    files = [
        *Paths(study="full-size").results.rglob("train.json"),
        *Paths(study="full-size").results.rglob("prepare.json"),
    ]
    found = [record for path in files if "predicted_memory_bytes" in (record := json.loads(path.read_text()))]
    above = [record["peak_memory_bytes"] / memory.resident(record["predicted_memory_bytes"]) - 1 for record in found]
    assert len(found) == 6
    page = " ".join((HERE / "docs/studies.md").read_text().split())
    assert f"lies between {-100 * min(above):.0f} % below and {100 * max(above):.0f} % above what `plan` says" in page
    files = [path for name in ("track", "track-screen") for path in Paths(study=name).results.rglob("train.json")]
    small = [record for path in files if "predicted_memory_bytes" in (record := json.loads(path.read_text()))]
    ratios = [record["peak_memory_bytes"] / memory.resident(record["predicted_memory_bytes"]) for record in small]
    low, middle, high = (100 * (value - 1) for value in (min(ratios), median(ratios), max(ratios)))
    assert f"{len(small)} trainings of `track` and `track-screen` it lies between {-low:.0f} % below and" in page
    assert f"and {high:.0f} % above (median {middle:.0f} % above)" in page


def test_the_studies_page_says_which_choices_of_the_screen_lie_at_an_end(capsys):
    leaders.main(config.load("track-screen"))
    ends = capsys.readouterr().out.splitlines()[-1]
    ended = set(re.findall(r"[:,] (\S+) \(\S+ [\d.]+, the (?:lowest|highest)\)", ends))
    several = {method.removesuffix("-s1") for method in config.load("track-screen").grid.methods if "-s1" in method}
    assert several - ended == {"full", "asft"} and len(several) == 14 and ended < several
    assert "all but `full` and `asft` chose the one at an end" in " ".join(
        (HERE / "docs/studies.md").read_text().split()
    )
