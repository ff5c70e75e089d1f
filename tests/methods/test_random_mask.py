"""The random mask: what is frozen stays the base's, and the draw is of the seed and of nothing else."""

import pytest
import torch

from methods.part import Run
from methods.random_mask import RandomMask
from methods.tools.process_group import Shards

SETTINGS = {"weight_decay": 0.1, "epochs": 2.0}


@pytest.mark.parametrize("by", ["entry", "column", "tensor"])
@pytest.mark.parametrize("kind", ["llama-tied", "gptj"])
def test_what_is_drawn_moves_and_nothing_else(make, documents, train, kind, by):
    model = make(kind)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    part = RandomMask(fraction=0.5, by=by)
    result = train(model, (part,), documents, seed=3, **SETTINGS)
    masks = result.states["random_mask"]["frozen"]
    assert masks.keys() == {name for name, p in base.items() if p.dim() >= 2}
    moved, entries = 0, 0
    for name, weight in result.run.weights.items():
        still = masks[name].expand_as(weight) if name in masks else torch.zeros_like(weight, dtype=torch.bool)
        assert torch.equal(weight == base[name], still) or "embed" in name  # rows of tokens that no text has
        assert torch.equal(weight[still], base[name][still])
        if name in masks:
            moved, entries = moved + int((~still).sum()), entries + still.numel()
    assert part.report(run=result.run, state=result.states["random_mask"]) == {
        "realised_fraction": pytest.approx(moved / entries)
    }
    if by == "column":  # of the inputs, as a linear layer without a transpose multiplies them
        assert all(mask.shape == (1, base[name].shape[1]) for name, mask in masks.items())


def drawn(shape, *, seed=0, draw=0, inputs=1, shards=Shards(), **settings):
    weight = torch.zeros(shape)
    own = {"w": shards.local(weight)}
    run = Run(model=torch.nn.Module(), weights=own, base={}, seed=seed, device="cpu", shards=shards)
    run.shapes = {"w": weight.shape}
    return RandomMask(**settings)._mask(run, "w", draw, inputs=inputs)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.999])
def test_the_share_that_moves(fraction):
    mask = drawn((700, 500), fraction=fraction)
    assert mask.float().mean().item() == pytest.approx(1 - fraction, abs=4 * 0.5 / 350_000**0.5)
    columns = drawn((3, 40_000), fraction=fraction, by="column")
    assert columns.shape == (1, 40_000) and columns.float().mean().item() == pytest.approx(1 - fraction, abs=0.01)


def test_the_draw_is_of_the_seed_and_not_of_the_processes():
    whole = drawn((700, 500), fraction=0.3)  # more than a piece
    rows = [drawn((700, 500), fraction=0.3, shards=Shards(rank=rank, world=3)) for rank in range(3)]
    assert torch.equal(torch.cat(rows), whole)
    assert torch.equal(drawn((700, 500), fraction=0.3), whole)
    stored = {"fraction": 0.3, "by": "column", "inputs": 0}  # in × out, so that a column is a row
    rows = [drawn((70, 50), **stored, shards=Shards(rank=rank, world=3)) for rank in range(3)]
    assert torch.equal(torch.cat(rows), drawn((70, 50), **stored))
    assert torch.equal(torch.cat(rows).T, drawn((50, 70), **stored | {"inputs": 1}))
    for other in ({"seed": 1}, {"draw": 1}):
        assert 0.5 < (drawn((700, 500), fraction=0.3, **other) == whole).float().mean() < 0.65  # .7² + .3² = .58
    assert (drawn((700, 500), fraction=0.2) >= whole).all()  # a smaller fraction moves some of the same entries


def test_drawn_anew_each_few_steps(make, documents, train):
    seen = []

    class Watched(RandomMask):
        key = "random_mask"

        def after_step(self, *, state, **_):
            seen.append(state["frozen"]["model.embed_tokens.weight"].clone())

    train(make(), (Watched(fraction=0.5, every=2),), documents, batch=1, micro_batch=1)
    assert len(seen) == 6
    same = [torch.equal(one, two) for one, two in zip(seen, seen[1:])]
    assert same == [True, False, True, False, True]


def test_linear_layers_alone(make, documents, train):
    result = train(make(), (RandomMask(fraction=0.5, scope="linear"),), documents)
    masks = result.states["random_mask"]["frozen"]
    assert len(masks) == 7 * 2 and all(".layers." in name for name in masks)
