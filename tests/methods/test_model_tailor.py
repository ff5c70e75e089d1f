"""Model Tailor: the compensation against least squares column by column, the choice of entries, and runs."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from experiments.training.engine import final_weights
from methods.errors import UserError
from methods.lora import LoRA
from methods.model_tailor import ModelTailor, _standard
from methods.part import Part
from methods.tools.compensation import patched


@pytest.fixture
def layer():
    """Base and tuned weights (5 × 12), and inputs (12 × 40) that are correlated, as a layer's are."""
    draw = np.random.default_rng(0)
    base, inputs = draw.normal(size=(5, 12)), draw.normal(size=(12, 4)) @ draw.normal(size=(4, 40))
    return base, base + 0.1 * draw.normal(size=(5, 12)), inputs + 0.3 * draw.normal(size=(12, 40))


def run_patch(base, tuned, inputs, *, kept, damp=1e-9, **settings):
    """`patched` with the entries `kept`, whatever the scores are."""
    blocks, settings = iter(range(99)), {"block": 12, "sign": -1.0} | settings

    def choose(moved, weight, d, may):
        start = next(blocks) * settings["block"]
        return torch.from_numpy(kept[:, start : start + moved.shape[1]])

    tensors = (torch.from_numpy(array) for array in (base, tuned, inputs @ inputs.T))
    return patched(*tensors, choose=choose, damp=damp, **settings).numpy()


def least_squares(base, tuned, inputs, kept):
    """Column after column: what is left makes up, as well as it can, for the entry that was just undone."""
    weight = tuned.copy()
    for row in range(len(weight)):
        for j in range(weight.shape[1]):
            new = weight[row, j] if kept[row, j] else base[row, j]
            lost = (weight[row, j] - new) * inputs[j]
            weight[row, j] = new
            if j + 1 < weight.shape[1]:
                weight[row, j + 1 :] += np.linalg.lstsq(inputs[j + 1 :].T, lost, rcond=None)[0]
    return weight


@pytest.mark.parametrize("block", [12, 5, 1])
def test_the_compensation_is_that_of_least_squares(layer, block):
    kept = np.random.default_rng(1).random((5, 12)) < 0.4
    actual = run_patch(*layer, kept=kept, block=block)
    np.testing.assert_allclose(actual, least_squares(*layer, kept), rtol=1e-5, atol=1e-6)
    assert (actual[~kept] == layer[0][~kept]).all()  # the base's own values


def test_subtracting_lowers_the_layers_error_and_adding_raises_it(layer):
    base, tuned, inputs = layer
    errors = {}
    for sign in (-1.0, 0.0, 1.0):
        errors[sign] = 0.0
        for seed in range(20):
            kept = np.random.default_rng(seed).random((5, 12)) < 0.3
            actual = run_patch(*layer, kept=kept, sign=sign, damp=0.01)
            errors[sign] += ((actual @ inputs - tuned @ inputs) ** 2).sum()
    assert errors[-1.0] < 0.7 * errors[0.0] and errors[1.0] > 1.5 * errors[0.0]


def test_an_entry_that_was_not_tuned_stays_the_bases(layer):
    base, tuned, inputs = layer
    tuned[:, 7] = base[:, 7]
    actual = run_patch(base, tuned, inputs, kept=np.ones((5, 12), bool) & (np.arange(12) != 3))
    assert (actual[:, 7] == base[:, 7]).all() and (actual[:, 8] != tuned[:, 8]).all()


def test_a_layer_that_reads_only_zeros(layer):
    kept = np.random.default_rng(1).random((5, 12)) < 0.4
    actual = run_patch(layer[0], layer[1], 0 * layer[2], kept=kept)
    np.testing.assert_array_equal(actual, np.where(kept, layer[1], layer[0]))


@pytest.mark.parametrize("sensitivity", ["change", "weight"])
def test_the_entries_of_a_block_are_chosen_by_both_scores(layer, sensitivity):
    base, tuned, _ = layer
    moved, d, may = tuned - base, np.linspace(0.5, 2.0, 12), np.random.default_rng(2).random((5, 12)) < 0.9
    part = ModelTailor(fraction=0.25, sensitivity=sensitivity)
    kept = part._choose(*map(torch.from_numpy, (moved, tuned, d, may))).numpy()

    def z(values):
        return (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)

    score = z(np.abs(moved)) + z(((moved if sensitivity == "change" else tuned) / d) ** 2)
    score[~may] = -np.inf
    wanted = score >= np.sort(score.ravel())[-15]
    assert kept.sum() == 15 and (kept == wanted).all()


def base_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def inputs_of(model, rows, path):
    """All inputs of one linear layer (in × tokens), by running the model row by row."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        for row in rows:
            model(row["input_ids"][None])
    handle.remove()
    return torch.cat(seen).T.double()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=31, n_positions=32)).double().eval()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["llama-tied", "gptj", "gpt2"])
def test_a_run_patches_the_layers_with_the_inputs_of_its_own_rows(make, documents, train, kind, adapter):
    fresh, targets = (gpt2, ("c_attn",)) if kind == "gpt2" else (lambda: make(kind), ("q_proj", "v_proj"))
    # in blocks of four columns, which divide every width: the scores of two columns are ±1 each, equal but for rounding
    base, part = base_of(fresh()), ModelTailor(fraction=0.3, samples=4, block=4)
    adapters = (LoRA(rank=2, targets=targets),) if adapter else ()
    parts = (*adapters, part)
    tuned = final_weights(train(fresh(), adapters, documents), adapters)
    result = train(fresh(), parts, documents)
    final = final_weights(result, parts)
    rows = result.states["model_tailor"]["rows"]
    assert len(rows) == 4 and len({tuple(row["input_ids"].tolist()) for row in rows}) == 4
    linear = [n for n, m in fresh().named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    linear = [name for name in linear if name != "lm_head" and f"{name}.weight" in tuned]
    assert final.keys() == {f"{name}.weight" for name in linear}  # everything else is the base's again
    trained = fresh()
    trained.load_state_dict(tuned, strict=False)
    for path in linear:
        inputs, name = inputs_of(trained, rows, path), f"{path}.weight"
        old, new, made = (t[name].T if kind == "gpt2" else t[name] for t in (base, tuned, final))
        # changes of low rank have rows in proportion, whose scores are equal but for rounding: with LoRA only the
        # compensation is compared
        blocks = iter((made != old).split(4, dim=1))
        choose = (lambda *_: next(blocks)) if adapter else part._choose  # noqa: B023
        wanted = patched(old, new, inputs @ inputs.T, choose=choose, damp=0.01, block=4)
        torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-9)
        changed = (made != old).double().mean()
        assert 0 < changed <= 0.3 + 0.05
        if kind == "llama-tied" and not adapter:
            plain = torch.where(made != old, new, old)
            assert (made @ inputs - new @ inputs).norm() < (plain @ inputs - new @ inputs).norm()
    assert 0.2 < part.report(run=result.run, state=result.states["model_tailor"])["kept"] < 0.35
    assert result.method.total()["model_tailor"]["tokens"] == sum(len(row["input_ids"]) for row in rows)


def test_the_ends_are_the_two_models_and_the_rest_may_stay_tuned(make, documents, train):
    tuned = final_weights(train(make(), (), documents), ())
    result = train(make(), (ModelTailor(),), documents)
    base, rest = base_of(make()), {name for name in tuned if "norm" in name or "embed" in name}
    for fraction in (0.0, 0.5, 1.0):
        for other in ("base", "tuned"):
            final = final_weights(result, (ModelTailor(fraction=fraction, rest=other),))
            assert final.keys() == (tuned.keys() if other == "tuned" or fraction == 1 else tuned.keys() - rest)
            same = {name for name, tensor in final.items() if torch.equal(tensor, tuned[name])}
            assert same == (tuned.keys() if fraction == 1 else rest & final.keys())
            if fraction == 0:
                assert all(torch.equal(tensor, base[name]) for name, tensor in final.items() if name not in rest)


def test_a_row_whose_changes_are_all_of_one_size_has_no_score():
    """Less its mean it varies by rounding alone, which must not become a score."""
    values = torch.rand(3, 7, dtype=torch.float64)
    values[1], values[2] = 0.1, 0.0
    scores = _standard(values)
    assert (scores[1:] == 0).all() and scores[0].std(correction=0).item() == pytest.approx(1)


def test_a_damping_too_small_for_few_inputs_is_named(make, documents, train):
    parts = (ModelTailor(samples=1, damp=1e-30),)
    with pytest.raises(UserError, match="model_tailor.damp is 1e-30: with it the inputs' products of .*weight have no"):
        final_weights(train(make(), parts, documents), parts)


def test_layers_are_measured_in_groups_that_fit(make, documents, train, monkeypatch):
    parts = (ModelTailor(fraction=0.3),)
    at_once = final_weights(train(make(), parts, documents), parts)
    monkeypatch.setattr("methods.tools.compensation.GROUP", 1)
    result = train(make(), parts, documents)
    one_by_one = final_weights(result, parts)
    assert all(torch.equal(one_by_one[name], tensor) for name, tensor in at_once.items())
    tokens = sum(len(row["input_ids"]) for row in documents)
    assert result.method.total()["model_tailor"]["tokens"] == len(at_once) * tokens


def test_a_training_that_changes_no_linear_layer_is_refused(make, documents, train):
    class OnlyNorms(Part):
        key, capabilities = "only_norms", frozenset({"adapts"})

        def adapt(self, model, **_):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("norm" in name)
            return model

    parts = (OnlyNorms(), ModelTailor())
    with pytest.raises(UserError, match="model_tailor: training changed no linear layer"):
        final_weights(train(make(), parts, documents), parts)
