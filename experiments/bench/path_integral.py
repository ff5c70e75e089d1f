"""A step of AdamW that adds up ω −= g⊙Δθ, against the plain step of torch's fused AdamW on the same tensors of LLaMA's
shapes.

Ours takes Δθ out of the step, piece by piece; the usual way copies the weights before the step and subtracts them after
it.
"""

from collections.abc import Callable, Iterator

import torch

from experiments.bench.penalty import ADAMW, adamw, shapes
from experiments.bench.race import Goal, Race, race
from methods.part import Run
from methods.tools.adam import AdamW
from methods.tools.path_integral import PathIntegral

TITLE = "path integral inside AdamW's step"
CLIPPED = 0.5


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw).mul_(0.02) for shape in shapes(small=small)]
    gradients = [torch.randn(values.shape, generator=draw).mul_(1e-3) for values in start]

    def inside() -> tuple[Callable[[], None], dict]:
        weights = {f"w{i}": torch.nn.Parameter(values.clone()) for i, values in enumerate(start)}
        base = {name: weight.detach().clone() for name, weight in weights.items()}
        model = torch.nn.ParameterDict(weights)
        run = Run(model=model, weights=weights, base=base, seed=0, device=torch.device("cpu"))
        run.clipped = torch.tensor(CLIPPED)
        part, state = PathIntegral(), {}
        part.begin(run=run, state=state, examples=[])
        optimizer = part.optimizer(run=run, learning_rate=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
        part.optimizer_ready(run=run, state=state, optimizer=optimizer)
        for weight, gradient in zip(weights.values(), gradients):
            weight.grad = gradient.clone()
        return optimizer.step, state["omega"]

    copied = adamw(start, gradients)
    parameters = copied.param_groups[0]["params"]
    omega = [torch.zeros_like(values) for values in start]

    @torch.no_grad()
    def by_copies() -> None:
        before = [p.clone() for p in parameters]
        copied.step()
        for total, p, old in zip(omega, parameters, before):
            total.sub_((p.grad / CLIPPED) * (p - old))

    ours, own_omega = inside()
    unwatched = AdamW(adamw(start, gradients).param_groups[0]["params"], lr=1e-5, weight_decay=0.1)
    ours()
    by_copies()
    largest = max(total.abs().max() for total in omega)
    difference = max((one - other).abs().max() for one, other in zip(own_omega.values(), omega)) / largest
    runners = {
        ADAMW: adamw(start, gradients).step,
        "ours, not watched": unwatched.step,
        "ours": ours,
        "copies of the weights": by_copies,
    }
    facts = {
        "entries": sum(values.numel() for values in start),
        "threads": torch.get_num_threads(),
        "difference": float(f"{difference:.2g}"),
    }
    yield race(
        "A step with ω",
        runners,
        against=ADAMW,
        rounds=rounds or 9,
        facts=facts,
        goals=[] if small else [Goal(runner="ours, not watched", limit=1.1)],
    )
