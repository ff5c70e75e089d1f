"""The law that the number of processes changes nothing: two real processes (gloo) against one.

In float32, after ten steps, each tensor is within 1e-6 of its norm. A part that brings an optimizer or a mask may
choose other entries to move, at most one in 10⁴: the last bit of a gradient can turn the choice between two.
"""

import functools
import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.laws.laws import PROCESSES, Broken, Verdict, in_one_line, relative, verdict
from experiments.laws.trial import Trained, Trial
from methods.part import Part, phase_of
from methods.tools.process_group import Shards

WORLD = 2
STEPS = 10
WITHIN = 1e-6
OTHER_MASKS = 1e-4  # share of all entries
PATIENCE = timedelta(seconds=120)  # of a process for another one, which may have failed


def judge(trials: Sequence[Trial], folder: Path) -> list[Verdict]:
    """The verdict on each trial; one pair of processes trains all of them, one after the other."""
    items = [(trial.kind.__module__, trial.kind.__qualname__, trial.architecture) for trial in trials]
    folder.mkdir(parents=True, exist_ok=True)
    problem = ""
    try:
        mp.spawn(_work, (str(folder), items), nprocs=WORLD)
    except Exception as error:  # of either process; what they did before is there
        problem = str(error).strip().splitlines()[-1]
    return [
        verdict(PROCESSES, trial, functools.partial(_compare, trial, folder / str(index), problem))
        for index, trial in enumerate(trials)
    ]


def _compare(trial: Trial, folder: Path, problem: str) -> None:
    """Raise `Broken` unless the pair ended with the weights of one process."""
    if not (folder / "final.safetensors").is_file():
        errors = [json.loads(path.read_text())["error"] for path in sorted(folder.glob("error-*.json"))]
        raise Broken(f"two processes did not end: {errors[0] if errors else problem or 'they stopped earlier'}")
    alone = _run(trial)
    two, one = load_file(folder / "final.safetensors"), alone.final
    if two.keys() != one.keys():
        raise Broken("two processes give tensors of other names than one: every process must call the same `run.whole`")
    errors = {name: relative(tensor, one[name]) for name, tensor in two.items()}
    worst = max(errors, key=errors.get, default="")
    share = _share_of_other_entries(two, one)
    chooses = "optimizer" in trial.kind.capabilities or phase_of(trial.kind) == "mask"
    masked = chooses and share <= OTHER_MASKS
    if worst and errors[worst] > WITHIN and not masked:
        raise Broken(
            f"after {STEPS} steps the weights of two processes differ from those of one by {errors[worst]:.2g} of "
            f"the norm of {worst} ({WITHIN:.0e} is allowed), in {share:.2%} of all entries. What to do: draw by (seed, "
            "step, row) and never by process, sum over `run.shards` what is of all rows, and do the same "
            "work in every process"
        )
    costs, own = json.loads((folder / "costs.json").read_text()), _costs(alone)
    for what, cost in own.items():
        if cost != costs.get(what) and not math.isclose(cost or 0, costs.get(what) or 0, rel_tol=1e-9):
            raise Broken(
                f"{what}: two processes count {costs.get(what)}, one counts {cost}. What to do: charge what every "
                "process does in the first one alone, and what each does of its own rows in all of them"
            )


def _share_of_other_entries(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    differing = sum(int(((t - other[n]).abs() > WITHIN * other[n].abs().max()).sum()) for n, t in own.items())
    return differing / max(1, sum(t.numel() for t in own.values()))


def _costs(trained: Trained) -> dict[str, float | None]:
    """Tokens of the domain, and what each part adds to them; seconds are measured, and therefore left out."""
    added = trained.result.added.items()
    return {"tokens": trained.result.tokens} | {
        f"{kind} added by {part}": cost[kind] for part, cost in added for kind in ("tokens", "flops", "bytes")
    }


def _run(trial: Trial) -> Trained:
    return trial.train(trial.parts, trial.states, steps=STEPS)


def _work(rank: int, folder: str, items: Sequence[tuple[str, str, str]]) -> None:
    """One of the processes; `final.safetensors` of each item is written by the first one."""
    log = os.open(f"{folder}/process-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    torch.set_num_threads(1)
    meeting = f"file://{Path(folder).absolute()}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=PATIENCE)
    shards = Shards(rank=rank, world=WORLD, active=True)
    for index, (module, name, architecture) in enumerate(items):
        kind: type[Part] = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        own = Path(folder) / str(index)
        own.mkdir(exist_ok=True)
        trial = Trial(kind=kind, architecture=architecture, folder=own, shards=shards)
        try:
            trained = _run(trial)
        except BaseException as error:
            (own / f"error-{rank}.json").write_text(json.dumps({"error": in_one_line(error, trial)}))
            raise
        if rank == 0:
            (own / "costs.json").write_text(json.dumps(_costs(trained)))
            save_file({name: t.contiguous() for name, t in trained.final.items()}, own / "final.safetensors")
    dist.destroy_process_group()
