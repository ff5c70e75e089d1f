"""The GPU check, tried on the CPU with tiny sizes: that it runs with little installed, keeps what it has, and tells
right from wrong.
"""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch

from analysis.load import load_cells
from analysis.machines import newest_gpu_check
from analysis.report.beside import write_bench
from experiments.__main__ import parser
from experiments.bench import optimizers, sizes
from experiments.bench.running import RESET, Peak, process_group
from experiments.bench.stopwatch import Stopwatch
from experiments.commands import gpu_check as command
from experiments.commands.gpu_check import Record
from experiments.model.random_models import build
from experiments.study.paths import HERE
from methods.errors import UserError
from methods.tools import adam as moments
from methods.tools import selection
from methods.tools.process_group import Shards
from tests.analysis.fixtures import write_results
from tests.gpu import kernels, waiting

CPU = torch.device("cpu")
# modules that the machines of the check may lack; peft and accelerate do not import without psutil
GUARD = """
import runpy, socket, sys
from importlib.machinery import PathFinder
absent = "dvc mlflow lm_eval pandas datasets pytest ruamel matplotlib psutil accelerate peft".split()
class Fewer(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)
def refuse(*arguments):
    raise AssertionError(f"a connection was tried: {arguments}")
sys.meta_path[:] = [Fewer if finder is PathFinder else finder for finder in sys.meta_path]
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = refuse
sys.argv = ["experiments", *sys.argv[1:]]
runpy.run_module("experiments", run_name="__main__")
"""


def run(*arguments):
    """The command in this process; returns its exit status."""
    return command.main(parser().parse_args(["gpu-check", "--tiny", *map(str, arguments)]))


def pieces(path):
    return json.loads(path.read_text())["pieces"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """One call without the modules and without a network, as on a bare GPU machine."""
    out = tmp_path_factory.mktemp("gpu") / "out.json"
    arguments = ["gpu-check", "--tiny", "--methods", "full,ewc,lora", "--models", "llama3-8b", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", GUARD, *arguments],
        cwd=HERE,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done


def test_runs_with_torch_and_transformers_alone(guarded):
    out, done = guarded
    found = pieces(out)
    assert not any(piece["status"] in ("failed", "broken", "out of memory") for piece in found.values())
    for name in (
        "attention-float32",
        "attention-bfloat16",
        "cross-entropy",
        "random-bits",
        "mofo-threshold",
        "zero-strength",
        "importance-8-bit",
        "resume-full",
        "resume-mofo",
        "resume-ewc",
        "sharded-float32",
        "sharded-bfloat16",
        "packed-gptj-eager",
        "packed-gptj-sdpa",
        "packed-llama-eager",
        "packed-llama-sdpa",
    ):
        assert found[f"checks/{name}"]["status"] == "passed", name
    for name in ("checks/zero-strength-lora", "speed/llama3-8b/lora/plain/2x32"):
        assert found[name]["status"] == "skipped" and "peft" in found[name]["reason"]
    assert "CPU" in found["checks/no-waiting-plain"]["reason"]
    assert re.search(r"gpu-check: \d+/\d+ checks/cross-entropy: passed, took .* \(\d+ min \d\d s left\)", done.stdout)


def test_every_number_has_its_origin(guarded):
    whole = json.loads(guarded[0].read_text())
    assert whole["tiny"] is True and whole["device"] == "cpu" and whole["running"] is None
    assert {"cpu", "cores", "driver", "cuda", "gpu"} <= whole["hardware"].keys() and {"torch", "python"} <= whole[
        "versions"
    ].keys()
    for piece in whole["pieces"].values():
        assert piece["code"] == command.code() and piece["when"] and piece["seconds"] >= 0


def test_speed_says_all_it_should(guarded):
    piece = pieces(guarded[0])["speed/llama3-8b/ewc/sharded/2x32"]
    kinds = piece["memory"]["held"]
    parameters = sizes.shape_named("llama3-8b", tiny=True).parameters
    assert kinds == {
        "weights": 4 * parameters,
        "masters": 0,
        "gradients": 4 * parameters,
        "moments": kinds["moments"],
        "anchor": 2 * parameters,
        "importance": kinds["importance"],
    }
    assert (
        4 * parameters <= kinds["moments"] < 4.1 * parameters and parameters <= kinds["importance"] < 1.1 * parameters
    )
    assert piece["bytes"] == {"weights": 2 * parameters, "importance": kinds["importance"], "anchor": 2 * parameters}
    assert piece["tokens_per_second"] == pytest.approx(64 / piece["seconds_step"])
    assert 0 < piece["share_penalty"] < 1 and piece["prepare"]["seconds_per_million_tokens"] > 0
    assert 0 < piece["seconds_optimizer"] < piece["seconds_step"] and piece["prepare"]["predicted"]["total"] > 0
    inside = (
        piece["seconds_forward"] + piece["seconds_backward"] + piece["seconds_penalty"] + piece["seconds_optimizer"]
    )
    assert inside < 1.5 * piece["seconds_step"]
    assert pieces(guarded[0])["speed/llama3-8b/full/plain/2x32"]["share_penalty"] is None
    alone = pieces(guarded[0])["speed/llama3-8b/optimizers"]
    assert alone["entries"] == alone["entries_of"] == parameters
    assert alone["times_fused_adamw"]["adamw fused, float32 moments"] == 1 and len(alone["seconds_by_optimizer"]) == 5


def test_a_later_call_adds_to_the_file_and_does_not_repeat(guarded, capsys):
    out, _ = guarded
    before = pieces(out)
    arguments = ("--parts", "speed", "--models", "llama3-8b", "--layouts", "plain", "--out", out)
    assert run("--methods", "full,mofo", *arguments) == 0
    after = pieces(out)
    assert set(after) - set(before) == {"speed/llama3-8b/mofo/plain/2x32"}
    assert {name: after[name] for name in before} == before
    assert "1 pieces to do, 2 done before" in capsys.readouterr().out
    assert run("--methods", "full", "--only", "/full/", "--again", *arguments) == 0
    assert (
        pieces(out)["speed/llama3-8b/full/plain/2x32"]["seconds"]
        != before["speed/llama3-8b/full/plain/2x32"]["seconds"]
    )


def test_another_code_or_a_failed_piece_is_measured_again(tmp_path, monkeypatch):
    kept = Record(tmp_path / "out.json", device=CPU, tiny=True)
    kept.add("checks/a", {"status": "passed"})
    kept.add("checks/b", {"status": "failed"})
    kept = Record(tmp_path / "out.json", device=CPU, tiny=True)
    assert kept.done("checks/a") and not kept.done("checks/b") and not kept.done("checks/c")
    kept.add("checks/a", {"status": "skipped", "reason": "no time"})
    assert kept.pieces["checks/a"]["status"] == "passed"
    monkeypatch.setattr(command, "code", lambda: "another")
    assert not kept.done("checks/a")


def test_numbers_that_json_has_not_are_none_and_a_killed_call_names_its_piece(tmp_path):
    kept = Record(tmp_path / "out.json", device=CPU, tiny=True)
    kept.add("a", {"status": "failed", "off": float("inf"), "rows": [float("nan"), 1.5]})
    kept.begin("b")
    whole = json.loads((tmp_path / "out.json").read_text())
    assert (
        whole["pieces"]["a"]["off"] is None and whole["pieces"]["a"]["rows"] == [None, 1.5] and whole["running"] == "b"
    )


@pytest.mark.parametrize(("key", "value"), [("device", "NVIDIA H200"), ("tiny", False), ("format", 0)])
def test_another_devices_file_is_not_added_to(tmp_path, key, value):
    Record(tmp_path / "out.json", device=CPU, tiny=True).begin("x")
    there = json.loads((tmp_path / "out.json").read_text()) | {key: value}
    (tmp_path / "out.json").write_text(json.dumps(there))
    with pytest.raises(UserError, match=f"has {key} .*--out"):
        Record(tmp_path / "out.json", device=CPU, tiny=True)


def test_no_piece_is_begun_without_time_for_it(tmp_path, capsys):
    assert run("--parts", "checks", "--minutes", 0.001, "--out", tmp_path / "out.json") == 0
    assert {piece["status"] for piece in pieces(tmp_path / "out.json").values()} == {"skipped"}
    assert "for lack of time" in capsys.readouterr().out


def test_a_wrong_device_fails_its_check_and_a_broken_piece_costs_no_other(tmp_path, monkeypatch, capsys):
    """Another hash, a threshold that is off by one, and a device that runs out of memory."""
    bits = moments.random_bits
    calls = []

    def every_other(**given):
        calls.append(0)
        return bits(**given | {"seed": len(calls)})

    monkeypatch.setattr(moments, "random_bits", every_other)
    monkeypatch.setattr(selection, "kth_largest", lambda size, k: torch.topk(size, min(k + 1, len(size))).values.min())

    def exhausted(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")

    monkeypatch.setattr(kernels, "cross_entropy", exhausted)
    monkeypatch.setattr(kernels, "importance_in_8_bits", lambda *a, **k: 1 / 0)
    out = tmp_path / "out.json"
    for only in ("random-bits", "mofo-threshold", "cross-entropy", "importance-8-bit", "attention-float32"):
        status = run("--parts", "checks", "--only", only, "--out", out)
        assert status == (only not in ("cross-entropy", "attention-float32")), only
    found = {name.removeprefix("checks/"): piece for name, piece in pieces(out).items()}
    assert {name: piece["status"] for name, piece in found.items()} == {
        "random-bits": "failed",
        "mofo-threshold": "failed",
        "cross-entropy": "out of memory",
        "importance-8-bit": "broken",
        "attention-float32": "passed",
    }
    assert "1.00 TiB" in found["cross-entropy"]["reason"] and found["importance-8-bit"]["reason"].startswith(
        "ZeroDivisionError"
    )
    assert any("heavy-tailed, k=1, one" in wrong for wrong in found["mofo-threshold"]["wrong"])
    assert "1 failed: checks/mofo-threshold" in capsys.readouterr().out


def test_full_sizes_on_a_cpu_are_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="use --tiny"):
        command.main(parser().parse_args(["gpu-check", "--out", str(tmp_path / "x.json")]))
    assert not (tmp_path / "x.json").exists()


def test_what_became_a_study_is_named(tmp_path, capsys):
    with pytest.raises(UserError, match="fine-tuning real weights is a study"):
        run("--weights", tmp_path)
    with pytest.raises(SystemExit):
        parser().parse_args(["gpu-check", "--parts", "comparison"])
    assert "tuning real weights is a study" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--parts", "speed,chekcs"), ("--shape", "4"), ("--minutes", "0")])
def test_options_that_make_no_sense(arguments, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["gpu-check", *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_the_models_have_the_real_sizes():
    assert sizes.shape_named("gptj-6b", tiny=False).parameters == 6_050_882_784
    assert sizes.shape_named("llama3-8b", tiny=False).parameters == 8_030_261_248


@pytest.mark.parametrize("kind", ["gptj", "llama"])
def test_buffers_of_a_model_built_on_the_device_are_right(kind):
    made, wanted = sizes.build(kind, device=CPU, dtype=torch.bfloat16), build(kind, seed=0, dtype=torch.bfloat16)
    buffers = dict(made.named_buffers())
    assert buffers and all(
        torch.equal(buffers[name], other) and other.isfinite().all() for name, other in wanted.named_buffers()
    )
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), wanted.parameters()))


def test_steps_are_timed_from_end_to_end_and_by_their_inside():
    watch = Stopwatch(CPU)
    for at in range(4):
        watch._now = {"begin": 10.0 * at, "forward": 10.0 * at + 1, "end": 10.0 * at + 3 + (at == 3)}
        watch._rows.append(watch._now)
    assert watch.steps(skip=2) == [10.0, 11.0]
    assert watch.between("begin", "forward", skip=1) == [1.0, 1.0, 1.0]


def test_tensors_that_do_not_fit_are_left_out():
    shapes = [torch.Size([100, 10]), torch.Size([50]), torch.Size([1000, 10])]
    assert optimizers._first_that_fit(shapes, None) == shapes
    assert optimizers._first_that_fit(shapes, 16 * (1050 + 1000)) == shapes[:2]
    assert optimizers._first_that_fit(shapes, 16 * 2000 - 1) == []


def test_waits_are_counted_by_place():
    places = {}
    with waiting.places_of_warnings(places):
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert list(places.values()) == [3] and next(iter(places)).startswith("tests/experiments/test_gpu_check.py:")


def test_a_group_of_one_needs_no_network():
    with process_group(CPU) as shards:
        assert shards == Shards(rank=0, world=1, active=True)
    assert not torch.distributed.is_initialized()


def test_the_report_shows_the_newest_check_or_that_there_is_none(tmp_path, guarded):
    root = tmp_path / "results"
    planned = write_results(root)

    def page():
        return write_bench(load_cells(root, planned), path=root / "summary/bench.html", title="x").read_text()

    assert "Not measured: there is no file in results/gpu/" in page()
    whole = json.loads(guarded[0].read_text())
    (root / "gpu").mkdir()
    (root / "gpu/tiny.json").write_text(json.dumps(whole))
    assert newest_gpu_check(root) is None  # tiny sizes measure nothing
    goal = {"what": "mfu", "value": 0.123, "goal": ">= 0.45", "stated_for": "NVIDIA H200", "met": False}
    whole["pieces"]["speed/llama3-8b/full/plain/2x32"]["goals"] = [goal]
    whole["pieces"]["checks/random-bits"]["status"] = "failed"
    whole["pieces"]["speed/llama3-8b/ewc/plain/2x32"] = {"status": "out of memory", "reason": "Tried to allocate 1 GiB"}
    for name, when, device in (
        ("a", "2026-02-01T00:00:00+00:00", "GPU newer"),
        ("b", "2026-01-01T00:00:00+00:00", "GPU older"),
    ):
        (root / f"gpu/{name}.json").write_text(json.dumps(whole | {"tiny": False, "when": when, "device": device}))
    assert newest_gpu_check(root)["device"] == newest_gpu_check(root / "study")["device"] == "GPU newer"
    shown = page()
    assert "GPU newer" in shown and "GPU older" not in shown and "random-bits</span>: failed" in shown
    assert "mfu 0.123, goal &gt;= 0.45 on an NVIDIA H200: missed" in shown
    assert "not measured, out of memory: Tried to allocate 1 GiB" in shown
    measured = whole["pieces"]["speed/llama3-8b/full/plain/2x32"]
    assert f"<td>{measured['tokens_per_second']:,.0f}</td>" in shown and "mofo, bfloat16 moments" in shown


def test_a_slice_is_measured_on_a_cpu(tmp_path):
    out = tmp_path / "slice.json"
    methods = ("full", "ewc", "l2_sp", "hierarchical-lora")
    assert run("--blocks", 1, "--models", "gptj-6b", "--methods", ",".join(methods), "--out", out) == 0
    found = pieces(out)
    assert set(found) == {f"memory/gptj-6b/1-blocks/{method}/plain/1x32" for method in methods}
    parameters = sizes.shape_named("gptj-6b", tiny=True, blocks=1).parameters
    assert parameters < sizes.shape_named("gptj-6b", tiny=True).parameters
    for name, piece in found.items():
        memory = piece["memory"]
        assert piece["status"] == "measured" and piece["blocks"] == 1
        assert memory["bytes_a_weight"]["predicted"] == memory["predicted"]["total"] / parameters
        for kind in ("weights", "masters", "gradients", "moments"):
            assert memory["held"][kind] == pytest.approx(memory["predicted"][kind], rel=0.05), (name, kind)


@pytest.mark.skipif(not RESET.exists(), reason="this system does not tell the peak of a process")
def test_the_resident_peak_counts_what_came_and_went():
    peak = Peak(CPU, resident=True)
    torch.ones(1 << 26)  # 256 MiB
    kept = torch.ones(1 << 24)
    assert peak.bytes() == pytest.approx(1 << 28, rel=0.1)
    again = Peak(CPU, resident=True)
    assert again.bytes() < 1 << 25 and kept.sum() > 0
    assert Peak(CPU).bytes() is None
