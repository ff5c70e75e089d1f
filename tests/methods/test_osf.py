"""OSF: what stays, what moves, the projection by brute force, and the published form's own set of weights."""

import pytest
import torch
from peft import get_peft_model
from peft.tuners.osf import OSFConfig

from experiments.training.engine import final_weights
from methods.osf import OSF
from methods.part import Part
from methods.tools.architecture import linear_weights


def fitted(make, documents, train, part, *, kind="llama-tied", dtype=torch.float64, others=(), **settings):
    made = part.calibrate(model=make(kind, dtype), general=(), seed=0, progress=None)
    states = {"osf": {"calibration": made.calibration}}
    return train(make(kind, dtype), (*others, part), documents, states=states, **({"epochs": 2.0} | settings))


def complements(weight, k):
    """I − U_h·U_hᵀ and I − V_h·V_hᵀ."""
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return torch.eye(len(u)) - u[:, :k] @ u[:, :k].T, torch.eye(vh.shape[1]) - vh[:k].T @ vh[:k]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama-tied", torch.float64),
        ("gpt2", torch.bfloat16),
        pytest.param("llama-tied", torch.bfloat16, marks=pytest.mark.thorough),
        pytest.param("gptj", torch.float64, marks=pytest.mark.thorough),
        pytest.param("gpt2", torch.float64, marks=pytest.mark.thorough),
    ],
)
def test_strong_directions_and_everything_else_stay(make, documents, train, kind, dtype):
    result = fitted(make, documents, train, OSF(preserved=0.4), kind=kind, dtype=dtype, weight_decay=0.3)
    base, final = result.run.base, final_weights(result, result.method.parts)
    assert final.keys() == linear_weights(make(kind)).keys() and len(final) > 6
    for name, tensor in final.items():
        moved = tensor.double() - base[name].double()
        left, right = complements(base[name], int(0.4 * min(tensor.shape)))
        assert moved.norm() > 1e-2
        near = 1e-6 if dtype == torch.float64 else 1e-5  # bases and weights are in float32 there
        assert (moved - left @ moved @ right).norm() < near * moved.norm()
    assert result.method.reports(result.run)["osf"]["outside"] < 1e-5


def test_gradients_are_projected_and_counted_in_the_norm_as_they_are_then(make, documents, train):
    class Seen(Part):
        key = "seen"
        phase = "mask"  # after the projection

        def __init__(self, phase):
            object.__setattr__(self, "phase", phase)

        def before_clip(self, *, run, state, step):
            state["gradients"] = {name: weight.grad.clone() for name, weight in run.weights.items()}

    class Raw(Seen):
        key = "raw"

    seen = (Raw("penalty"), Seen("mask"))
    result = fitted(make, documents, train, OSF(), others=seen, epochs=1 / 3)
    raw, after = (result.states[key]["gradients"] for key in ("raw", "seen"))
    total = 0.0
    for name, gradient in after.items():
        left, right = complements(result.run.base[name], min(gradient.shape) // 2)
        torch.testing.assert_close(gradient, left @ raw[name] @ right, rtol=1e-6, atol=1e-7)
        assert (gradient - raw[name]).norm() > 0.1 * raw[name].norm()
        total += gradient.square().sum()
    assert result.curve[0]["grad_norm"] == pytest.approx(total.sqrt().item(), rel=1e-5)


def test_without_restore_the_optimizer_leaves_the_subspace(make, documents, train):
    for decay in (0.0, 0.3):
        result = fitted(make, documents, train, OSF(restore=False), weight_decay=decay)
        assert result.method.reports(result.run)["osf"]["outside"] > 0.1


def test_the_share_that_is_kept(make, documents, train):
    for preserved, share in ((0.0, 1.0), (1.0, 0.0)):
        result = fitted(make, documents, train, OSF(preserved=preserved))
        moved = [float((weight.detach() - result.run.base[name]).norm()) for name, weight in result.run.weights.items()]
        assert len(moved) == 14 and all((m > 1e-3) == bool(share) for m in moved)
        if not share:
            assert max(moved) < 1e-5
    plain = train(make(), (), documents, epochs=2.0)
    free = fitted(make, documents, train, OSF(preserved=0.0, others=True))
    assert all(torch.equal(weight, plain.run.weights[name]) for name, weight in free.run.weights.items())


def test_others_are_trained_without_a_projection(make, documents, train):
    result = fitted(make, documents, train, OSF(others=True))
    assert len(result.run.weights) == len(dict(make().named_parameters())) and len(result.states["osf"]["bases"]) == 14


@pytest.mark.parametrize(("adam", "least", "most"), [(False, 0.0, 1e-3), (True, 0.1, 0.5)])
def test_pefts_own_form_moves_within_the_same_weights_until_adam_leaves_them(make, documents, adam, least, most):
    model = get_peft_model(make(dtype=torch.float32), OSFConfig(target_modules=["q_proj", "down_proj"]))
    base = {name: p.detach() for name, p in make(dtype=torch.float32).named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0) if adam else torch.optim.SGD(trained, lr=0.3)
    for row in documents[:4]:
        loss = model(input_ids=row["input_ids"][None], labels=row["input_ids"][None]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = 0
    for name, tensor in model.merge_and_unload().named_parameters():
        moved = tensor.detach().double() - base[name]
        if name.split(".")[-2] in ("q_proj", "down_proj"):
            left, right = complements(base[name], min(tensor.shape) // 2)
            assert moved.norm() > 0.02
            assert least <= (moved - left @ moved @ right).norm() / moved.norm() < most
            changed += 1
        else:
            assert not moved.any()
    assert changed == 4
