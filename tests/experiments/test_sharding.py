"""One run on several processes: the numbers of one process, and a run that was stopped and resumes, bit for bit.

Processes are real (gloo), weights are shared by torch's fully_shard.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from experiments.launch.work import PATIENCE
from experiments.model.random_models import build
from experiments.model.weights import load_model
from experiments.study.paths import HERE
from experiments.training import processes
from experiments.training.engine import final_weights, fit
from experiments.training.sharded_weights import ShardedWeights
from methods import registry
from methods.errors import UserError
from methods.part import Part
from methods.tools.process_group import Shards
from tests import goldens
from tests.experiments import worlds


def start(world: int, folder: Path, job: str) -> dict:
    command = [sys.executable, "-m", "tests.experiments.worlds", str(world), str(folder), job]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / f"{job}-{world}.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone():
    return worlds.everything(Shards(), Path())


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.thorough)])
def shared(request, tmp_path_factory):
    """The same cells by `fully_shard`, on one process and on two."""
    if request.param == 2:
        return start(2, tmp_path_factory.mktemp("worlds"), "everything")
    with worlds.of_one() as shards:
        return worlds.everything(shards, Path())


def away(tensor: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((tensor - wanted).norm() / wanted.norm()).item()


def test_numbers_do_not_depend_on_the_processes(alone, shared, request):
    """To the bit in one process, in bf16 too; in two to the order in which float32 sums are taken."""
    assert len(shared) >= len(worlds.METHODS)
    for name, found in shared.items():
        wanted = alone[name]
        assert len(wanted["curve"]) == 10 and all(found["shared"]) and not any(wanted["shared"])
        assert found["final"].keys() == wanted["final"].keys()
        # bf16 weights are rounded anew each step, bf16 moments at random: a last bit of the gradient can turn a
        # rounding
        rounded = "moments" in name or "bfloat16" in name
        for tensor, value in wanted["final"].items():
            if request.node.callspec.params["shared"] == 1:
                assert torch.equal(found["final"][tensor], value), f"{name}: {tensor}"
            assert away(found["final"][tensor], value) < (1e-4 if rounded else 1e-6), f"{name}: {tensor}"
        for row, theirs in zip(found["curve"], wanted["curve"], strict=True):
            assert row == pytest.approx(theirs, rel=3e-3 if rounded else 2e-5, abs=1e-7), name


def test_parts_see_the_run_itself(alone, shared, request):
    """Not a copy of it that is rounded to bf16, in whose state nothing that a hook writes would stay."""
    saw = sorted(
        map(
            repr,
            [
                ("the run", True),
                ("hidden", "torch.bfloat16"),
                ("trained", "torch.float32"),
                ("weight", torch.tensor(1 / 3).item()),
            ],
        )
    )
    # three examples a step for two processes: the second one is asked of the first example again, ten times in all
    for found, calls in ((alone, 30), (shared, 30 if request.node.callspec.params["shared"] == 1 else 40)):
        assert found["bfloat16", "look"]["reports"]["look"] == {"calls": calls, "saw": saw}


def test_weights_that_change_after_a_forward_pass_are_gathered_anew():
    """fully_shard leaves the root's weights gathered where no backward pass follows."""
    ids = torch.arange(12)[None]
    model, plain = build("llama", seed=0), build("llama", seed=0)
    with worlds.of_one() as shards, torch.no_grad():
        where = {"compute_dtype": torch.float32, "device": torch.device("cpu"), "base": {}}
        trained = ShardedWeights(model, shards=shards, **where)
        trained.compute(lambda one: one(ids))
        for weight in (*trained.weights.values(), *plain.parameters()):
            weight.mul_(1.5)
        trained.update_model()
        assert torch.equal(trained.compute(lambda one: one(ids).logits), plain(ids).logits)


@pytest.mark.thorough
def test_the_first_process_decides_by_its_probes(tmp_path):
    alone, shared = worlds.ruled(Shards(), tmp_path), start(2, tmp_path, "ruled")
    assert shared["stopped"] == alone["stopped"] and shared["stopped"]["kept_step"] == 3
    assert all(away(shared["final"][name], tensor) < 1e-6 for name, tensor in alone["final"].items())


@dataclass(frozen=True, kw_only=True)
class Decay(Part):
    key = "decay"

    def loss(self, *, run, state, batch, hidden):
        return sum(weight.square().sum() for weight in run.weights.values())


def test_a_loss_of_the_rows_themselves_is_refused():
    """No process's rows get the gradient of another's micro-batches: numbers would depend on the processes."""
    with worlds.of_one() as shards, pytest.raises(UserError, match="`loss` is computed of run.weights.*before_clip"):
        worlds.cell("llama", "full", shards=shards, more=(Decay(),))


@pytest.mark.parametrize(
    ("checkpoint", "computing", "method"),
    [
        ("bfloat16", "float32", "lora"),
        ("bfloat16", "float32", "full"),
        ("float32", "bfloat16", "lora"),
        ("float16", "float64", "lora"),
    ],
)
def test_computes_in_the_dtype_that_is_asked_for(tmp_path, checkpoint, computing, method):
    """The same bits as one process with a model that transformers itself loads in that dtype."""
    build("gptj" if method == "full" else "llama", seed=1, dtype=getattr(torch, checkpoint)).save_pretrained(tmp_path)
    alike(tmp_path, method, loaded=getattr(torch, checkpoint), computing=getattr(torch, computing))


def test_modules_kept_in_float32_are_computed_in_it(tmp_path):
    """The routers of Ernie 4.5, which transformers leaves in float32 whatever the dtype."""
    config = AutoConfig.for_model(
        "ernie4_5_moe",
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=258,
        moe_num_experts=4,
        moe_k=2,
        moe_layer_start_index=0,
        moe_num_shared_experts=1,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    alike(tmp_path, "full", loaded=torch.bfloat16, computing=torch.bfloat16)


def alike(folder: Path, method: str, *, loaded: torch.dtype, computing: torch.dtype) -> None:
    """A shared run of the model in `folder`, loaded in another dtype, against a plain one that is loaded in the
    dtype to compute in.
    """
    base = {name: p.detach() for name, p in load_model(folder, dtype="auto").named_parameters()}
    parts, found = registry.build(worlds.METHODS[method]), []
    with worlds.of_one() as one:
        for shards, dtype in ((Shards(), computing), (one, loaded)):
            result = fit(
                model=load_model(folder, dtype=dtype),
                parts=(*parts, worlds.Look()),
                settings=goldens.SETTINGS,
                seed=5,
                base=base,
                examples=goldens.texts(8, seed=12, labelled=True),
                shards=shards,
                compute_dtype=computing,
            )
            assert ("hidden", str(computing)) in result.states["look"]["saw"]
            found.append((final_weights(result, parts), result.curve))
    (plain, curve), (shared, theirs) = found
    assert [row["loss"] for row in theirs] == [row["loss"] for row in curve]
    assert plain and all(torch.equal(shared[name], tensor) for name, tensor in plain.items())


def test_reports_are_of_the_whole(alone, shared):
    for method in ("mofo", "hierarchical", "lora"):
        for part, wanted in alone["llama", method]["reports"].items():
            found = shared["llama", method]["reports"][part]
            for key, value in wanted.items():
                assert found[key] == (
                    pytest.approx(value, rel=1e-3) if isinstance(value, dict | float) and key != "settings" else value
                ), key


def test_methods_and_settings_differ(alone):
    """What is compared above is not one run under many names."""
    finals = [
        torch.cat([t.flatten() for t in cell["final"].values()]) for name, cell in alone.items() if "gptj" not in name
    ]
    assert sum(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(finals) for b in finals[:i]) == 0


@pytest.mark.thorough
def test_runs_of_two_processes_go_on_too(tmp_path):
    for method, (whole, again) in start(2, tmp_path, "stopped").items():
        assert again["resumed"] > 0, method
        for name, tensor in whole["final"].items():
            assert torch.equal(again["final"][name], tensor), f"{method}: {name}"
        assert again["curve"] == whole["curve"]


def test_stopped_processes_have_time_for_a_step_and_a_checkpoint(monkeypatch):
    from torch.distributed.launcher import api

    configs = []
    monkeypatch.setattr(api, "elastic_launch", lambda config, program: lambda *command: configs.append(config))
    processes.start(2, ["train", "a/b/c/seed0"])
    assert [(c.nproc_per_node, c.shutdown_timeout) for c in configs] == [(2, processes.STOPPING)]
    assert 30 < processes.STOPPING < PATIENCE  # torchrun's own seconds; those after which `launch` kills a stage


def test_a_number_is_whole_in_every_process():
    number = torch.tensor(3.0)
    shards = Shards(rank=1, world=2)
    assert shards.whole(shards.local(number), number.shape) is number


def test_rows_are_cut_as_torch_cuts_them():
    for count in (0, 1, 2, 5, 7, 8):
        tensor = torch.arange(count)
        for world in (1, 2, 3, 4):
            pieces = [Shards(rank=rank, world=world).local(tensor) for rank in range(world)]
            chunks = list(torch.chunk(tensor, world)) if count else []
            assert torch.equal(torch.cat(pieces), tensor)
            assert [p.tolist() for p in pieces if len(p)] == [c.tolist() for c in chunks if len(c)]
