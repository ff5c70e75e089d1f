"""The loop against a plain one, and the promises that hold for every method."""

import math

import pytest
import torch

from experiments.model.random_models import build
from experiments.training.batches import collate, schedule
from experiments.training.engine import TrainingFailed, final_weights, fit
from experiments.training.loss import summed_nll
from experiments.training.master_weights import MasterWeights
from experiments.training.settings import TrainSettings, learning_rate
from methods.errors import UserError
from methods.tools.architecture import head, hidden_states
from tests.experiments.test_loss import ragged

SIZES = (7, 12, 3, 30, 21, 9, 14, 5, 26, 11)


def settings(**changes):
    return TrainSettings(**({"learning_rate": 1e-3, "batch": 4, "micro_batch": 4, "length": 64, "probes": 0} | changes))


def run(model, **changes):
    chosen = changes.pop("settings", settings())
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    return fit(
        **(
            {"model": model, "parts": (), "examples": ragged(sizes=SIZES), "settings": chosen, "seed": 3, "base": base}
            | changes
        )
    )


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_masters_take_the_gradient_of_a_loss_of_themselves():
    """A part's loss may be of `run.weights`: its gradient stands beside that of the bf16 module, whatever the last
    step left there.
    """
    ids = torch.arange(12)[None]
    model, other = (build("llama", seed=0, dtype=torch.bfloat16) for _ in range(2))
    masters = MasterWeights(model, base={})
    hidden_states(other, ids, None).float().square().sum().backward()
    for _ in range(2):
        masters.zero()
        for _ in range(2):
            loss = (
                hidden_states(model, ids, None).float().square().sum()
            )  # before the penalty, whose backward so comes first
            (loss + sum(weight.square().sum() for weight in masters.weights.values())).backward()
        masters.complete()
        for name, p in other.named_parameters():
            torch.testing.assert_close(
                masters.weights[name].grad, 2 * p.grad.float() + 4 * masters.weights[name].detach()
            )


def test_equals_a_plain_loop():
    chosen = settings(weight_decay=0.1, schedule="cosine", warmup=0.4, epochs=2)
    ours = build("llama", seed=0, dtype=torch.float64)
    result = run(ours, settings=chosen)
    plain = build("llama", seed=0, dtype=torch.float64)
    examples = ragged(sizes=SIZES)
    plan = schedule([len(e["input_ids"]) for e in examples], 4, 3, 2)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, weight_decay=0.1)
    for step, indices in enumerate(plan):
        batch = collate([examples[i] for i in indices])
        optimizer.param_groups[0]["lr"] = learning_rate(chosen, step, len(plan))
        optimizer.zero_grad()
        logits = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:]  # transformers' own loss would round the logits to float32
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for name, value in weights(plain).items():
        torch.testing.assert_close(result.run.weights[name].detach(), value, rtol=1e-9, atol=1e-12)
    assert result.tokens == 2 * sum(SIZES)
    assert result.steps == len(plan)


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_accumulation_does_not_change_the_weights(architecture):
    whole, pieces = (build(architecture, seed=0, dtype=torch.float64) for _ in range(2))
    run(whole)
    run(pieces, settings=settings(micro_batch=1))
    for name, value in weights(whole).items():
        # 1e-6: attention and norms compute in float32 inside transformers, whatever the model's dtype
        torch.testing.assert_close(dict(pieces.named_parameters())[name].detach(), value, rtol=1e-6, atol=1e-8)


def test_two_runs_are_equal_bit_for_bit_with_and_without_probes():
    def probe(model):
        torch.rand(3)  # a probe that draws would show; the real one restores what it drew
        return {"x": 1.0}

    first, second, probed = (build("llama", seed=0) for _ in range(3))
    run(first), run(second)
    result = run(probed, settings=settings(probes=2), probe=probe)
    for name, value in weights(first).items():
        assert torch.equal(weights(second)[name], value)
        assert torch.equal(weights(probed)[name], value)
    assert [row["step"] for row in result.curve if "probe_x" in row] == [0, 2, 3]


def test_float32_masters_keep_what_bf16_loses():
    chosen = settings(learning_rate=1e-6, schedule="constant", epochs=4)
    model = build("llama", seed=0, dtype=torch.bfloat16)
    before = weights(model)
    result = run(model, settings=chosen)
    moved = [(result.run.weights[n].detach() - before[n].float()).abs().max() for n in before]
    assert all(m > 0 for m in moved)  # every tensor learned ...
    norm = "model.norm.weight"
    assert torch.equal(weights(model)[norm], before[norm])  # ... though bf16 cannot show 1e-6 beside 1


def test_final_weights_are_the_masters():
    model = build("llama", seed=0, dtype=torch.bfloat16)
    result = run(model)
    final = final_weights(result, ())
    assert final.keys() == result.run.weights.keys()
    assert all(t.dtype == torch.float32 for t in final.values())


def test_loss_of_a_step_is_over_its_labelled_tokens():
    model = build("llama", seed=0)
    examples = ragged(sizes=SIZES)
    plan = schedule([len(e["input_ids"]) for e in examples], 4, 3, 1)
    batch = collate([examples[i] for i in plan[0]])
    with torch.no_grad():
        nll = summed_nll(
            hidden_states(model, batch["input_ids"], batch["attention_mask"]), batch["labels"], head(model)
        )
    first = run(model).curve[0]
    assert first["loss"] == pytest.approx(float(nll) / int((batch["labels"][:, 1:] != -100).sum()), rel=1e-5)


def test_a_loss_that_is_not_a_number_stops_the_run():
    model = build("llama", seed=0)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = math.nan
        model.model.embed_tokens.weight[:, 1] = math.nan
    with pytest.raises(TrainingFailed, match="loss is nan at step 1.*learning_rate"):
        run(model)


@pytest.mark.parametrize(
    ("key", "value"), [("learning_rate", 0.0), ("batch", 0), ("warmup", 1.0), ("clip", -1.0), ("schedule", "step")]
)
def test_settings_out_of_range_are_named(key, value):
    with pytest.raises(UserError, match=f"train.{key} is {value!r}"):
        settings(**{key: value})


def test_checkpointing_changes_nothing_but_memory():
    plain, saved = (build("llama", seed=0, dtype=torch.float64) for _ in range(2))
    run(plain)
    run(saved, settings=settings(checkpointing=True))
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(saved)[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gptj", marks=pytest.mark.thorough)])
def test_compiled_blocks_give_the_same_weights(architecture, monkeypatch):
    compiled = []

    def without_code_generation(function):
        compiled.append(function)
        return real(
            function, backend="aot_eager"
        )  # graphs are captured and differentiated; generating code takes minutes

    real = torch.compile
    monkeypatch.setattr(torch, "compile", without_code_generation)
    torch._dynamo.reset()
    plain, ours = (build(architecture, seed=0) for _ in range(2))
    run(plain)
    run(ours, settings=settings(compile=True))
    assert len(compiled) == 2
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 4, "every block has a graph of its own: a deep model would run out of them"
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(ours)[name], value, rtol=1e-4, atol=1e-6)
