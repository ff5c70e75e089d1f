"""Tiny cells of every method, in one process or several, whole or stopped on the way; `python -m
tests.experiments.worlds` is what test_sharding.py starts.
"""

import os
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from experiments.model.random_models import build
from experiments.training.engine import final_weights, fit
from experiments.training.preparation import Fitting
from experiments.training.resume import Resume
from methods import registry
from methods.part import Part
from methods.tools import architecture
from methods.tools.process_group import Shards
from tests import goldens


def without_chance(key: str, block: dict) -> dict:
    """Float importance, for a last bit of Ω can change an 8-bit code, and no dropout, which each process draws for
    itself.
    """
    return block | ({"bits": 32} if key in ("ewc", "hierarchical") else {"dropout": 0.0} if key == "lora" else {})


OFFICIAL = {  # params.yaml's block hierarchical-official
    "temperature": 1.0e8,
    "normalise": "sum",
    "keep_strength": False,
    "gradient": "displacement",
    "clamp": "step",
    "consolidate": "epoch",
    "carry_optimizer": True,
}
METHODS = {
    name: {key: without_chance(key, block) for key, block in blocks.items()} for name, blocks in goldens.METHODS.items()
}


NEVER = 1 << 30


class Stopped(Exception):
    """What a kill is to a test in one process."""


@dataclass(frozen=True, kw_only=True)
class Stop(Part):
    """Ends the run once `left[0]` optimizer steps or Fisher examples are done."""

    key = "stop"
    left: list[int] = field(default_factory=lambda: [NEVER])

    def after_step(self, **_):
        self.left[0] -= 1
        if self.left[0] <= 0:
            raise Stopped

    def bar(self, **_):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def update(self, count):
        self.left[0] -= count - 1
        self.after_step()


@dataclass(frozen=True, kw_only=True)
class Look(Part):
    """Tells what its hooks see, and adds what the model says of another text to the loss, times a third, which no
    bf16 number is.
    """

    key = "look"

    def begin(self, *, run, state, examples, general):
        state |= {"run": run, "calls": 0, "saw": set()}

    def batch(self, *, run, state, batch):
        return batch | {"weight": torch.full((len(batch["input_ids"]), 1, 1), 1 / 3)}

    def loss(self, *, run, state, batch, hidden):
        state["calls"] += 1
        state["saw"] |= {
            ("the run", run is state["run"]),
            ("hidden", str(hidden.dtype)),
            ("weight", batch["weight"][0].item()),
            *(("trained", str(w.dtype)) for w in run.weights.values()),
        }
        other = architecture.hidden_states(run.model, batch["input_ids"].flip(1), None)
        return (batch["weight"] * (hidden - other).float().square()).mean()

    def report(self, *, run, state):
        return {"calls": int(run.shards.sum(torch.tensor(state["calls"]))), "saw": sorted(map(repr, state["saw"]))}


@contextmanager
def of_one():
    """The shards of one process, which fully_shard cuts all the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Shards(active=True)
    finally:
        dist.destroy_process_group()


def cell(
    architecture: str,
    method: str,
    *,
    shards: Shards = Shards(),
    dtype=torch.float32,
    folder: Path | None = None,
    stop: int = NEVER,
    blocks: dict | None = None,
    more: tuple[Part, ...] = (),
    compute_dtype: torch.dtype | None = None,
    watch=None,
    **settings,
) -> dict:
    """Prepare and train one cell; with `folder` a checkpoint after every step, and `stop` ends it after so many steps.

    watch   watch(prepared states, fit's result): what else is wanted of the cell, under "watched"
    """
    chosen = replace(goldens.SETTINGS, **settings)
    make = partial(build, architecture, seed=1, dtype=dtype)
    base = {n: p.detach().clone() for n, p in make().named_parameters()}
    parts, states, stopper = registry.build(METHODS[method] if blocks is None else blocks), {}, Stop(left=[stop])
    keep = partial(Resume, shards=shards, every=0.0 if folder else float("inf"), identity={"method": method})
    folder = folder or Path(tempfile.mkdtemp())

    def general(key: str):
        run = Fitting(keep(folder / key), settings=chosen, base=base, device="cpu", name="prepare", shards=shards)
        return lambda *, parts, **arguments: run(parts=(*parts, stopper), **arguments)

    for part in parts:
        model = make()
        for other in parts:
            model = other.adapt(model, seed=5)
        prepared = part.prepare(
            model=model,
            base=base,
            general=goldens.texts(8, seed=11, labelled=False),
            seed=5,
            shards=shards,
            resume=keep(folder / part.key),
            progress=stopper.bar,
            fit=general(part.key),
        )
        if prepared:
            states[part.key] = {
                k: getattr(prepared, k) for k in ("importance", "start", "carry") if getattr(prepared, k)
            }
    result = fit(
        model=make(),
        parts=(*parts, *more, stopper),
        examples=goldens.texts(18, seed=12, labelled=True),
        general=goldens.texts(8, seed=11, labelled=False),
        settings=chosen,
        seed=5,
        base=base,
        compute_dtype=compute_dtype,
        states=states,
        shards=shards,
        resume=keep(folder / "train"),
    )
    reports = {part.key: part.report(run=result.run, state=result.states[part.key]) for part in (*parts, *more)}
    beside = {"watched": watch(states, result)} if watch else {}
    return {
        "final": final_weights(result, parts),
        "reports": reports,
        "resumed": result.resumed,
        "shared": [isinstance(p, DTensor) for p in result.run.model.parameters()],
        "curve": [{k: row[k] for k in ("step", "loss", "penalty", "grad_norm", "tokens")} for row in result.curve],
    } | beside


def everything(shards: Shards, folder: Path) -> dict:
    """Ten steps of all methods on both architectures, and what else must not depend on the processes."""
    ten = partial(cell, shards=shards, epochs=2.0)
    architectures = ("llama",) if shards.active and shards.world == 1 else goldens.ARCHITECTURES
    found = {(a, m): ten(a, m) for a in architectures for m in METHODS}
    found["mofo", "lora"] = ten("llama", "", blocks={"mofo": {"fraction": 0.2}, "lora": {"rank": 2}})
    found["official"] = ten(
        "llama", "", blocks={"lora": {"rank": 2}, "hierarchical": OFFICIAL | {"samples": 6, "bits": 32}}
    )
    found["moments"] = ten("llama", "full", moments="bfloat16")
    found["packed"] = ten("llama", "full", pack=64)
    found["recomputed"] = ten("gptj", "ewc", checkpointing=True)
    found["one at a time"] = ten("gptj", "mofo", micro_batch=1)
    # one example at a time, each has the same gradient in bf16 wherever it is computed, and sums are in float32
    half = partial(ten, dtype=torch.bfloat16, micro_batch=1)
    found |= {("bfloat16", m): half("llama", m) for m in ("full", "ewc-lora")}
    found["bfloat16", "look"] = half("gptj", "mofo", more=(Look(),), batch=3, epochs=1.7)
    found["bfloat16", "computed in float32"] = half("llama", "lora", compute_dtype=torch.float32)
    return found


def stopped(shards: Shards, folder: Path) -> dict:
    """Cells stopped on the way, three times, beside the same ones left alone."""
    found = {}
    official = {"lora": {"rank": 2}, "hierarchical": OFFICIAL | {"samples": 6, "bits": 32, "epochs": 3.0}}
    for family, method in (
        ("llama", "full"),
        ("gptj", "ewc"),
        ("llama", "official"),
        ("gptj", "hierarchical-full"),
        ("llama", "mofo"),
    ):
        here, blocks = folder / method, METHODS.get(method, official)
        for stop in (2, 5, 12):
            try:
                cell(family, method, shards=shards, folder=here, stop=stop, blocks=blocks)
            except Stopped:
                pass
        found[method] = (
            cell(family, method, shards=shards, blocks=blocks),
            cell(family, method, shards=shards, folder=here, blocks=blocks),
        )
    return found


def ruled(shards: Shards, folder: Path) -> dict:
    """A run that a rule on probes ends; what the other processes measure does not count."""
    from tests.experiments.test_stopping import RULE, falling_until, trained

    values = falling_until(3) if shards.first else falling_until(12, general=(2.0,) * 5)
    final, result = trained(rule=RULE, values=values, shards=shards)
    return {"final": final, "stopped": result.stopped}


def _work(rank: int, world: int, folder: str, job: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{job}-{world}", rank=rank, world_size=world)
    found = {"everything": everything, "stopped": stopped, "ruled": ruled}[job](
        Shards(rank=rank, world=world, active=True), Path(folder)
    )
    if rank == 0:
        torch.save(found, f"{folder}/{job}-{world}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(_work, (int(sys.argv[1]), sys.argv[2], sys.argv[3]), nprocs=int(sys.argv[1]))
