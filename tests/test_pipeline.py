"""A whole tiny grid through real DVC, lm-eval and MLflow: what reruns and what does not, by what ran.

The checkout is copied and cut down to two methods; every promise about reruns is then one change and one `dvc repro`.
"""

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from analysis.dvc_metrics import NAMES
from analysis.load import record
from experiments.study.paths import HERE

pytestmark = pytest.mark.usefixtures("warm_python_on_path")

COPIED = ("experiments", "methods", "evaluation", "analysis", "docs", "dvc.yaml", ".dvcignore", ".gitignore")
CELL = "llama-tiny/sums/{}/seed0"
BIN = str(Path(sys.executable).parent)


def run(folder: Path, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    path = os.environ["PATH"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
    env |= {"PATH": path if BIN in path.split(":") else f"{BIN}:{path}"}
    env.pop("PYTEST_CURRENT_TEST", None)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env | environment)
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(command)} exited {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
    return done


def repro(folder: Path, *targets: str, check: bool = True) -> list[str]:
    """Run `dvc repro` and return the stages that ran."""
    done = run(folder, "dvc", "repro", *targets, check=check)
    return re.findall(r"Running stage '([^']+)'", done.stdout)


def edit(folder: Path, change) -> None:
    path = folder / "params.yaml"
    yaml = YAML()
    raw = yaml.load(path)
    change(raw)
    yaml.dump(raw, path)
    run(folder, "python", "-m", "experiments", "pipeline")


def project_of(folder: Path, params: dict) -> None:
    """A copy of the checkout in `folder`, under git and DVC, whose default study has these blocks."""
    for name in COPIED:
        source = HERE / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "dvc.lock"))
        else:
            shutil.copyfile(source, folder / name)
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(params, file)
    run(folder, "git", "init", "-q")
    run(folder, "git", "config", "user.email", "test@example.org")
    run(folder, "git", "config", "user.name", "test")
    run(folder, "dvc", "init", "-q")
    shutil.copyfile(HERE / ".dvc" / "config", folder / ".dvc" / "config")


HOSTILE = "=1+1<script>alert(1)</script>\x1b]0;owned\x07 "


def make_hostile(folder: Path) -> None:
    """Begin every third question with what a spreadsheet, a browser or a terminal would run."""
    for name in ("colours.jsonl", "sums.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for row in rows[::3]:
            row["question"] = HOSTILE + row["question"]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the checkout whose default study is the demo's, cut to two methods, run once."""
    folder = tmp_path_factory.mktemp("project")
    project_of(folder, YAML().load(HERE / "experiments" / "studies" / "demo" / "params.yaml"))
    make_hostile(folder / "experiments/studies/demo/rows")
    edit(folder, lambda raw: raw["grid"].update(methods=["full", "ewc"]))
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "start")
    done = run(folder, "python", "-m", "experiments", "repro").stdout  # as `make repro` runs it
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "results")
    ran = re.findall(r"Running stage '([^']+)'", done)
    order = [f"{stage}@llama-tiny-sums-{method}-0" for method in ("full", "ewc") for stage in ("train", "collect")]
    assert [stage for stage in ran if stage in order] == order  # one cell after another, not all trainings first
    assert done.count("/seed0: gain ") == 2 and ran[-1] == "compare"
    assert {name.partition("@")[0] for name in ran} == {
        "resolve",
        "model",
        "data",
        "base",
        "prepare",
        "train",
        "evaluate",
        "collect",
        "drift",
        "compare",
    }
    return folder


def metrics(folder: Path, method: str, seed: int = 0) -> dict:
    return record(folder / "results" / "runs" / f"llama-tiny/sums/{method}/seed{seed}")


def test_a_model_is_on_the_disk_once(project):
    file = project / "work/models/llama-tiny/model.safetensors"
    assert any(kept.samefile(file) for kept in (project / ".dvc/cache/files").rglob("*") if kept.is_file())


def test_what_dvc_shows_of_a_study(project):
    """A line a method, which fits a terminal, with the measures in their order; an experiment without running it."""
    head, *rows = run(project, "dvc", "metrics", "show", "results/metrics").stdout.splitlines()
    assert head.split() == ["Path", *(name for key, name in NAMES.items() if key.startswith(("domain", "general")))]
    assert [row.split()[0] for row in rows] == ["results/metrics/ewc.json", "results/metrics/full.json"]
    assert max(map(len, (head, *rows))) <= 120 and sorted(NAMES.values()) == list(NAMES.values())
    assert float(rows[1].split()[1]) == round(metrics(project, "full")["domain_nll_gained"], 4)
    dry = run(project, "dvc", "exp", "run", "--dry", "-f").stdout
    assert dry.count("Running stage") == 15 and "train@llama-tiny-sums-ewc-0" in dry


def test_files_of_a_cell(project):
    found = metrics(project, "ewc")
    wanted = {
        "domain_score",
        "domain_gain",
        "general_score",
        "forgetting",
        "forgetting_by_task",
        "transfer_by_task",
        "general_perplexity",
        "general_perplexity_base",
        "general_nll_lost",
        "general_kl",
        "general_kl_reverse",
        "general_bits_per_byte_lost",
        "gold_nll_lost",
        "margin_lost",
        "brier_lost_by_task",
        "domain_nll_gained",
        "domain_bits_per_byte",
        "score_by_task",
        "seconds_prepare",
        "seconds_train",
        "seconds_evaluate",
        "peak_memory_bytes",
        "bytes_importance",
        "bytes_anchor",
        "bytes_weights_delta",
        "bytes_optimizer_state",
        "tokens_trained",
        "tokens_prepare",
        "n",
        "seed",
        "base_sha256",
        "data_sha256",
        "versions",
        "dtype",
        "hardware",
        "git",
        "scoring",
        "numerics",
        "weights_sha256",
    }
    assert wanted <= found.keys()
    assert found["not_a_result"] is True
    assert (
        found["bytes_importance"]
        == (project / "work/prepared/llama-tiny/ewc/seed0/ewc.importance.safetensors").stat().st_size
    )
    run_folder = project / "results" / "runs" / CELL.format("ewc")
    with (run_folder / "curve.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert {
        "step",
        "loss",
        "grad_norm",
        "penalty",
        "tokens_per_second",
        "probe_sums",
        "probe_colours",
        "probe_perplexity",
    } <= curve[0].keys()
    assert [row["step"] for row in curve if row["probe_sums"]] == ["0", "1", "2", "4", "8"]
    scores = (run_folder / "scores.json").read_text()
    assert not re.search(r"second|host|commit|\bwhen\b", scores)
    with gzip.open(run_folder / "items.csv.gz", "rt") as file:
        text = file.read()
    assert "plus" not in text  # hashes, never the question
    tokens = {metrics(project, method)["tokens_trained"] for method in ("full", "ewc")}
    assert len(tokens) == 1  # the budget is equal


def test_base_is_unchanged_and_a_copy_of_it_forgets_nothing(project):
    base = json.loads((project / "results/base/llama-tiny/scores.json").read_text())
    for method in ("full", "ewc"):
        assert metrics(project, method)["domain_score_base"] == base["tasks"]["sums"]["value"]


def test_a_second_repro_runs_nothing(project):
    assert repro(project) == []
    assert json.loads(run(project, "dvc", "status", "--json", "dvc.yaml").stdout) == {}
    said = run(project, "python", "-m", "experiments", "launch").stdout  # needs Ray only where something is left
    assert said.splitlines()[-1].startswith("nothing is left to run")


def test_editing_a_part_reruns_its_cells_only(project):
    path = project / "methods" / "ewc.py"
    path.write_text(path.read_text() + "\n_NOTHING = 0  # other code of equal effect\n")
    ran = repro(project)
    touched = {name.partition("@")[2] for name in ran if "@" in name}
    assert touched <= {"llama-tiny-ewc-0", "llama-tiny-sums-ewc-0"}
    assert "train@llama-tiny-sums-ewc-0" in ran
    assert "evaluate@llama-tiny-sums-ewc-0" not in ran  # the weights came out equal


def test_strength_reruns_training_and_reuses_the_preparation(project):
    edit(project, lambda raw: raw["methods"]["ewc"]["ewc"].update(strength=7.0))
    ran = repro(project)
    assert "train@llama-tiny-sums-ewc-0" in ran
    assert not [name for name in ran if name.startswith("prepare@")]


def test_adding_a_seed_and_a_method_runs_only_new_cells(project):
    edit(project, lambda raw: raw["grid"].update(methods=["full", "ewc", "hierarchical"], seeds=[0, 1]))
    repro(project, "resolve")
    new = {
        f"{stage}@llama-tiny-{cell}-{seed}"
        for method, seed in (("full", 1), ("ewc", 1), ("hierarchical", 0), ("hierarchical", 1))
        for stage, cell in [
            ("prepare", method),
            *((s, f"sums-{method}") for s in ("train", "evaluate", "collect", "drift")),
        ]
    }
    assert json.loads(run(project, "dvc", "status", "--json", "dvc.yaml").stdout).keys() == new | {"compare"}
    repro(
        project,
        "train@llama-tiny-sums-full-1",
        "prepare@llama-tiny-ewc-1",
        "train@llama-tiny-sums-hierarchical-0",
        "prepare@llama-tiny-hierarchical-1",
    )

    def prepared(cell):
        return json.loads((project / f"results/prepared/llama-tiny/{cell}/prepare.json").read_text())

    assert prepared("ewc/seed1")["reused"] is True  # no seed enters EWC's Fisher
    assert prepared("hierarchical/seed1")["reused"] is False  # the general phase trains an adapter drawn by the seed

    def trained(cell):
        return json.loads((project / f"results/runs/llama-tiny/sums/{cell}/train.json").read_text())

    assert trained("full/seed0")["weights_sha256"] != trained("full/seed1")["weights_sha256"]
    assert (
        trained("hierarchical/seed0")["tokens_trained"] == trained("full/seed0")["tokens_trained"]
    )  # what it prepared with counts apart
    edit(
        project, lambda raw: raw["grid"].update(methods=["full", "ewc"], seeds=[0])
    )  # the tests behind this one need no more


def test_adding_a_retention_task_from_jsonl_trains_nothing(project):
    rows = project / "more.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"question": f"Is {i} even?", "choices": ["no", "yes"], "gold": int(i % 2 == 0)}) + "\n"
            for i in range(30)
        )
    )

    def change(raw):
        raw["tasks"]["even"] = dict(raw["tasks"]["colours"]) | {"rows": {"jsonl": "more.jsonl"}, "test": 20, "probe": 0}
        raw["domains"]["sums"]["retention"] = ["colours", "even"]

    edit(project, change)
    ran = repro(project)
    assert not [name for name in ran if name.startswith(("train@", "prepare@", "model@"))]
    assert [name for name in ran if name.startswith("evaluate@")]
    assert metrics(project, "full")["n"]["even"] == 20


def test_mlflow_is_a_mirror_that_can_be_rebuilt(project):
    import mlflow

    def runs():
        run(project, "python", "-m", "experiments", "track")
        client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("default") or client.search_experiments()[0]
        return {
            r.data.tags["holdfast.key"]: (
                r.info.run_id,
                r.data.metrics["forgetting"] if "forgetting" in r.data.metrics else None,
            )
            for r in client.search_runs([experiment.experiment_id])
            if r.data.tags.get("row") == "cell"
        }

    first = runs()
    assert len(first) == 2
    assert runs() == first
    (project / "mlflow.db").unlink()
    assert {k: v[1] for k, v in runs().items()} == {k: v[1] for k, v in first.items()}


def test_hostile_questions_reach_no_page_table_or_database_and_no_terminal(project):
    if not (project / "mlflow.db").exists():
        run(project, "python", "-m", "experiments", "track")
    scored = (project / "work/data/evaluate/sums/sums.jsonl").read_text()
    assert scored.count("alert(1)") > 5
    shown = run(project, "python", "-m", "experiments", "flips").stdout
    shown += run(project, "python", "-m", "experiments", "show", "sums", "--rows", "9").stdout
    assert "\x1b" not in shown and "\x07" not in shown and r"\x1b]0;owned\x07" in shown
    written = [path for name in ("results", "mlartifacts") for path in (project / name).rglob("*") if path.is_file()]
    assert {"report.html", "table.csv", "items.csv.gz"} <= {path.name for path in written} and len(written) > 40
    for path in [*written, *project.glob("mlflow.db*"), project / "dvc.yaml", project / "dvc.lock"]:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert not [text for text in (b"alert(1)", b"owned", b"=1+1") if text in content], path


def test_a_failed_cell_is_recorded_and_the_others_are_whole(project):
    before = metrics(project, "full")
    edit(project, lambda raw: raw["methods"]["ewc"].update(train={"learning_rate": 1.0e30, "clip": 0.0}))
    done = run(project, "dvc", "repro", "-k", check=False)
    assert done.returncode
    assert "Traceback" not in done.stderr
    record = json.loads((project / "results/failures/llama-tiny/sums/ewc/seed0.json").read_text())
    assert record["kind"] == "nan"
    assert "learning_rate" in record["reason"]
    assert metrics(project, "full") == before
    shown = run(project, "python", "-m", "experiments", "summary", check=False)
    assert shown.returncode == 1
    assert "FAILED" in shown.stdout
    edit(project, lambda raw: raw["methods"]["ewc"].pop("train"))
    repro(project)
    assert not (project / "results/failures/llama-tiny/sums/ewc/seed0.json").exists()


def test_export_loads_in_lm_eval_and_scores_the_same(project, tmp_path):
    run(project, "python", "-m", "experiments", "export", CELL.format("full"), str(tmp_path / "out"))
    from tests.evaluation.test_command import LM_EVAL

    (tmp_path / "tasks").mkdir()
    entry = json.loads((project / "work/data/evaluate/sums/tasks.json").read_text())[0]
    rows = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(project / "work/data/evaluate/sums/sums.jsonl")}},
    }
    task = (
        dict(entry["task"]) | rows | {"task": "exported_sums", "test_split": "test", "output_type": "multiple_choice"}
    )
    (tmp_path / "tasks" / "sums.yaml").write_text(json.dumps(task))  # JSON is YAML
    run(
        tmp_path,
        sys.executable,
        "-c",
        LM_EVAL,
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={tmp_path / 'out'},dtype=float32",
        "--tasks",
        "exported_sums",
        "--include_path",
        str(tmp_path / "tasks"),
        "--batch_size",
        "4",
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "scores"),
        HF_HOME=str(tmp_path / "cache"),
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
    )
    (written,) = (tmp_path / "scores").rglob("results_*.json")
    assert (
        json.loads(written.read_text())["results"]["exported_sums"]["acc,none"]
        == metrics(project, "full")["domain_score"]
    )
    again = run(
        project, "python", "-m", "experiments", "export", CELL.format("full"), str(tmp_path / "out"), check=False
    )
    assert again.returncode == 2
    assert "already exists" in again.stderr


def test_a_fresh_clone_trains_again_and_keeps_equal_scores(project, tmp_path):
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-qm", "more")
    run(tmp_path, "git", "clone", "-q", str(project), "clone")
    clone = tmp_path / "clone"
    ran = repro(clone, "evaluate@llama-tiny-sums-full-0")
    assert "train@llama-tiny-sums-full-0" in ran
    assert "evaluate@llama-tiny-sums-full-0" not in ran  # weights equal bit for bit: DVC keeps the committed scores
    repro(clone, "collect@llama-tiny-sums-full-0")
    shown = run(clone, "python", "-m", "experiments", "summary", check=False).stdout
    assert re.search(r"sums/full/seed0\s+reproduced here bit for bit", shown)
    assert re.search(r"sums/ewc/seed0\s+kept from git", shown)


def test_clean_cells_frees_weights_and_keeps_results(project):
    before = metrics(project, "full")
    run(project, "python", "-m", "experiments", "clean-cells")
    assert not list((project / "work" / "cells").rglob("*.safetensors"))
    assert metrics(project, "full") == before


def test_an_interrupted_run_is_recorded_and_goes_on(project):
    import signal
    import time

    edit(project, lambda raw: raw["train"].update(epochs=500.0))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", "train", CELL.format("full")],
        cwd=project,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = ""
    while "step" not in seen and process.poll() is None:  # the bar says that training has begun
        seen += process.stderr.read(64)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait() == 2
    assert "Traceback" not in seen + rest
    record = json.loads((project / "results/failures/llama-tiny/sums/full/seed0.json").read_text())
    assert (record["kind"], record["stage"]) == ("interrupted", "train")
    assert metrics(project, "ewc")
    edit(project, lambda raw: raw["train"].update(epochs=1.0))
    repro(project, "train@llama-tiny-sums-full-0")
    assert not (project / "results/failures/llama-tiny/sums/full/seed0.json").exists()


@pytest.mark.thorough
def test_dvc_exp_run_sets_one_setting_of_one_part(project):
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-qm", "before exp", check=False)
    done = run(
        project,
        "dvc",
        "exp",
        "run",
        "-n",
        "stronger",
        "-S",
        "methods.ewc.ewc.strength=3",
        "train@llama-tiny-sums-ewc-0",
    )
    assert "Running stage 'train@llama-tiny-sums-ewc-0'" in done.stdout
    trained = json.loads((project / "results/runs" / CELL.format("ewc") / "train.json").read_text())
    assert (
        trained["parts"]["ewc"]["strength"] == 3.0 and trained["git"]["experiment"] == "stronger"
    )  # MLflow's tag DVC_EXP_NAME


@pytest.mark.thorough
def test_a_given_checkpoint_is_scored_and_its_cost_unknown(project):
    exported = project / "given"
    shutil.copytree(project / "work/models/llama-tiny", exported)

    def change(raw):
        raw["methods"]["mine"] = {"given": {"path": "given"}}
        raw["grid"] = raw["grid"] | {"methods": ["mine"], "seeds": [0]}

    edit(project, change)
    repro(project, "collect@llama-tiny-sums-mine-0", "drift@llama-tiny-sums-mine-0")
    found = metrics(project, "mine")
    assert found["cost_known"] is False
    assert found["seconds_train"] is None and found["tokens_trained"] is None
    assert found["domain_gain"] == 0.0  # the base against itself
    assert found["general_perplexity"] == found["general_perplexity_base"]
    assert found["general_nll_lost"] == found["general_kl"] == found["general_kl_reverse"] == 0
    assert found["domain_nll_gained"] == found["general_bits_per_byte_lost"] == 0
    assert all(value == 0.0 for value in found["forgetting_by_task"].values())

    from safetensors.torch import load_file, save_file  # the same folder, other weights: DVC is not told, and sees it

    tensors = load_file(exported / "model.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in tensors.items()},
        exported / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert repro(project, "train@llama-tiny-sums-mine-0") == ["resolve", "train@llama-tiny-sums-mine-0"]
    trained = json.loads((project / "results/runs" / CELL.format("mine") / "train.json").read_text())
    assert trained["weights_sha256"] != found["weights_sha256"]


@pytest.mark.thorough
def test_cells_that_differ_in_finish_alone_train_once(project):
    """Any number of α beside full fine-tuning: one training a seed; another α is no training at all."""

    def trained(method, seed):
        path = project / f"results/runs/llama-tiny/sums/{method}/seed{seed}/train.json"
        return json.loads(path.read_text())

    def change(raw):
        raw["methods"] |= {"wise-03": {"wise_ft": {"alpha": 0.3}}, "wise-05": {"wise_ft": {"alpha": 0.5}}}
        raw["grid"] = raw["grid"] | {"methods": ["full", "wise-03", "wise-05"], "seeds": [0, 1]}
        raw["train"]["learning_rate"] = 0.9e-3  # full is trained anew, too

    edit(project, change)
    repro(project)
    for seed in (0, 1):
        own = [trained(method, seed) for method in ("full", "wise-03", "wise-05")]
        assert sorted(one["training_reused"] for one in own) == [False, True, True]
        assert len({one["seconds_train"] for one in own}) == 1
        assert len({one["weights_sha256"] for one in own}) == 3
    assert trained("full", 0)["seconds_train"] != trained("full", 1)["seconds_train"]
    before = metrics(project, "full")
    edit(project, lambda raw: raw["methods"]["wise-05"]["wise_ft"].update(alpha=0.6))
    ran = repro(project)
    stages = ("train", "evaluate", "collect", "drift")
    assert set(ran) == {"resolve", "compare"} | {f"{s}@llama-tiny-sums-wise-05-{k}" for s in stages for k in (0, 1)}
    assert trained("wise-05", 0)["training_reused"] is True
    assert metrics(project, "wise-05")["training_reused"] is True and metrics(project, "full") == before


@pytest.mark.thorough
def test_a_clone_of_a_named_study_trains_only_what_is_new(project, tmp_path):
    """`make study` where the committed results are there, and weights and rows are not."""
    study = project / "experiments/studies/named/params.yaml"
    params = YAML().load(HERE / "experiments/studies/demo/params.yaml")
    params["grid"].update(methods=["full", "ewc"], seeds=[0])

    def repro_named(folder: Path) -> list[str]:
        run(folder, "python", "-m", "experiments", "pipeline", "--study", "named")
        told = run(folder, "python", "-m", "experiments", "repro", "--study", "named").stdout
        return re.findall(r"Running stage '[^':]*:?([^']+)'", told) or told

    study.parent.mkdir()
    YAML().dump(params, study)
    assert "train@llama-tiny-sums-ewc-0" in repro_named(project)
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-qm", "a named study")
    run(tmp_path, "git", "clone", "-q", str(project), "clone")
    clone = tmp_path / "clone"
    assert "study named is up to date" in repro_named(clone)
    params["grid"].update(seeds=[0, 1])
    YAML().dump(params, clone / study.relative_to(project))
    first, again = repro_named(clone), repro_named(clone)
    assert [name for name in first if name.startswith("train@")] == [
        "train@llama-tiny-sums-full-1",
        "train@llama-tiny-sums-ewc-1",
    ]
    assert {"resolve", "data", "model@llama-tiny", "compare"} < set(first) and "base@llama-tiny" not in first
    assert "up to date" in again


@pytest.mark.thorough
def test_an_upgraded_library_is_told_and_the_advice_works(project, tmp_path):
    """The base is scored, transformers is upgraded, another cell is asked for: both are scored again, once the
    advice is followed.
    """
    edit(project, lambda raw: raw["grid"].update(methods=["full", "ewc"]))
    cell = "collect@llama-tiny-sums-{}-0".format
    repro(project, cell("full"))
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m\nreal = m.version\nm.version = lambda name: '99.0' if name == 'transformers' "
        "else real(name)\n"
    )
    upgraded = {"PYTHONPATH": str(tmp_path)}
    edit(project, lambda raw: raw["methods"]["ewc"]["ewc"].update(samples=9))
    repro(project, "resolve")
    done = run(project, "dvc", "repro", cell("ewc"), check=False, **upgraded)
    assert done.returncode and "train@" not in done.stdout  # before the work
    told = re.search(
        r"versions.transformers is '99.0' now, .*run `(python -m experiments [^`]+)` and then the same "
        "`dvc repro` again",
        done.stderr,
    )
    run(project, *told[1].split(), **upgraded)
    done = run(project, "dvc", "repro", cell("ewc"), **upgraded)
    assert {"resolve", "base@llama-tiny", "evaluate@llama-tiny-sums-ewc-0", cell("ewc")} <= set(
        re.findall(r"Running stage '([^']+)'", done.stdout)
    )
    assert metrics(project, "ewc")["scoring"]["transformers"] == "99.0"
    assert (
        json.loads(
            run(project, "dvc", "status", "--json", cell("ewc"), "base@llama-tiny", "resolve", **upgraded).stdout
        )
        == {}
    )
