"""EWC's closed form against the loss it stands for, and its laws."""

from dataclasses import replace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from methods.errors import UserError
from methods.ewc import EWC, diagonal_fisher
from methods.lora import LoRA
from methods.tools.stored import save_importance


def base_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def prepared(part, model, documents, base):
    return part.prepare(model=model, base=base, general=documents, seed=0, fit=None, progress=None)


def loss_form(run, fisher, strength):
    """strength/2 · Σ F (θ − θ₀)² as a differentiable function of what is trained, written out once more."""
    total = 0.0
    for name, f in fisher.items():
        factors = [
            w
            for n, w in run.weights.items()
            if ".lora_" in n and n.split(".lora_")[0].endswith(name.removesuffix(".weight"))
        ]
        if len(factors) == 2:
            moved = (
                run.model.peft_config["default"].lora_alpha
                / run.model.peft_config["default"].r
                * factors[1]
                @ factors[0]
            )
        elif name in run.weights:
            moved = run.weights[name] - run.base[name]
        else:
            continue
        total = total + strength / 2 * (f * moved**2).sum()
    return total


@pytest.mark.parametrize("adapter", [(), (LoRA(rank=3, alpha=7),)])
@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "gptj"])
@pytest.mark.parametrize("scope, bits", [("adapted", 8), ("whole-model", 32)])
def test_closed_form_is_the_gradient_of_the_loss_form(
    make, documents, run_of, drawn, dense, kind, adapter, scope, bits
):
    model, base = make(kind), base_of(make(kind))
    for part in adapter:
        model = part.adapt(model, seed=0)
    ewc = EWC(strength=3.0, scope=scope, bits=bits)
    fisher = prepared(ewc, model, documents, base).importance
    assert len(fisher) == (4 if adapter and scope == "adapted" else len(base))
    run, state = run_of(model, base), {"importance": fisher}
    ewc.begin(run=run, state=state, examples=documents)
    drawn(model)
    wanted = loss_form(run, dense(fisher), 3.0)
    gradients = torch.autograd.grad(wanted, [*run.weights.values()])
    for w in run.weights.values():
        w.grad = torch.ones_like(w)  # it is added to what is there
    value = ewc.before_clip(run=run, state=state, step=0)
    assert wanted > 0
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-12, atol=0)
    for (name, w), g in zip(run.weights.items(), gradients):
        torch.testing.assert_close(w.grad - 1, g, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    anchored = sum(t.nbytes for t in state["anchor"].values())
    assert anchored == (0 if adapter else sum(t.nbytes for t in base.values()))


@pytest.mark.parametrize("estimator", ["empirical", "sampled", "signed", "batched"])
def test_preparation(make, documents, dense, estimator):
    part = EWC(estimator=estimator, samples=4, length=6, batch_size=3, bits=32)
    done = prepared(part, make(), documents, {})
    short = [{n: t[:6] for n, t in d.items()} for d in documents[:4]]
    singles = [{n: t[None] for n, t in d.items()} for d in short]
    if estimator != "batched":
        together = [
            {
                n: pad_sequence([d[n] for d in short], batch_first=True, padding_value=-100 if n == "labels" else 0)
                for n in short[0]
            }
        ]
        together[0]["attention_mask"] = pad_sequence([torch.ones_like(d["input_ids"]) for d in short], batch_first=True)
        wanted = diagonal_fisher(make(), together if estimator == "signed" else singles, estimator)
        for name in wanted:
            torch.testing.assert_close(done.importance[name], wanted[name])
    assert done.tokens == sum(len(d["input_ids"]) for d in short)
    assert done.notes["documents"] == 4 and done.notes.get("batch_size") == (3 if estimator == "batched" else None)
    assert part.report(run=None, state={}).get("batch_size") == (3 if estimator == "batched" else None)
    coded = prepared(replace(part, bits=8), make(), documents, {}).importance
    for name, values in dense(coded).items():
        torch.testing.assert_close(
            values, done.importance[name].double(), rtol=0.06, atol=1e-9 * done.importance[name].max().item()
        )
    bars = []

    class Bar:
        def __init__(self, total, desc, unit):
            self.total, self.n = total, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def update(self, n):
            self.n += n

    part.prepare(model=make(), base={}, general=documents, seed=0, fit=None, progress=Bar)
    assert bars[0].n == bars[0].total == 4


@pytest.mark.parametrize("adapter", [(), (LoRA(rank=2),)])
def test_zero_strength_is_plain_fine_tuning_bit_for_bit(make, documents, train, dense, adapter):
    model = make(dtype=torch.float32)
    for part in adapter:
        model = part.adapt(model, seed=0)
    fisher = prepared(EWC(), model, documents, {}).importance
    plain = train(make(dtype=torch.float32), adapter, documents)
    nothing = train(
        make(dtype=torch.float32), (*adapter, EWC(strength=0.0)), documents, states={"ewc": {"importance": fisher}}
    )
    held = train(
        make(dtype=torch.float32), (*adapter, EWC(strength=1e4)), documents, states={"ewc": {"importance": fisher}}
    )
    assert all(torch.equal(w, nothing.run.weights[n]) for n, w in plain.run.weights.items())
    assert any(not torch.equal(w, held.run.weights[n]) for n, w in plain.run.weights.items())
    poison = {
        "ewc": {"importance": {n: f * torch.nan for n, f in dense(fisher).items()}}
    }  # nothing is added, not zero times something
    spared = train(make(dtype=torch.float32), (*adapter, EWC(strength=0.0)), documents, states=poison)
    assert all(torch.equal(w, spared.run.weights[n]) for n, w in plain.run.weights.items())
    assert [row["penalty"] for row in nothing.curve] == [0, 0, 0] and held.curve[-1]["penalty"] > 0


def test_a_strong_penalty_holds_the_weights(make, documents, train, dense):
    base = base_of(make())
    fisher = prepared(EWC(), make(), documents, base).importance
    moved = []
    for strength in (0.0, 1e6):
        result = train(
            make(),
            (EWC(strength=strength),),
            documents,
            states={"ewc": {"importance": fisher}},
            epochs=6,
            learning_rate=3e-3,
        )
        moved.append(
            sum((dense(fisher)[n] * (w.detach() - base[n]) ** 2).sum().item() for n, w in result.run.weights.items())
        )
    assert moved[1] < 0.2 * moved[0]


def test_a_fisher_of_other_tensors_is_refused(make, documents, run_of):
    state = {"importance": prepared(EWC(), LoRA(targets=("q_proj",)).adapt(make(), seed=0), documents, {}).importance}
    with pytest.raises(UserError, match="ewc: no importance was prepared for .*v_proj"):
        EWC().begin(run=run_of(LoRA().adapt(make(), seed=0), base_of(make())), state=state, examples=[])


def test_bf16_checkpoints_are_held_in_their_own_dtype(make, documents, train):
    base = {n: p.detach().clone() for n, p in make(dtype=torch.bfloat16).named_parameters()}
    model = make(dtype=torch.bfloat16)
    fisher = prepared(EWC(), model, documents, base).importance
    result = train(model, (EWC(strength=1.0),), documents, states={"ewc": {"importance": fisher}}, base=base)
    assert all(t.dtype == torch.bfloat16 for t in result.states["ewc"]["anchor"].values())
    assert all(w.dtype == torch.float32 for w in result.run.weights.values())
    assert result.curve[0]["penalty"] == 0 and result.curve[-1]["penalty"] > 0


def kept(folder, importance):
    folder.mkdir()
    save_importance(importance, folder / "ewc.importance.safetensors")
    return str(folder)


@pytest.mark.parametrize("bits", [8, 32])
def test_the_online_form_adds_what_was_prepared_earlier(make, documents, drawn, dense, tmp_path, bits):
    first, second, third = make(), drawn(make(), 1), drawn(make(), 2)  # a model before and after each domain
    part = EWC(bits=bits, length=7)
    before = prepared(part, first, documents[:3], {})
    alone, last = (prepared(replace(part, bits=32), m, documents[3:], {}).importance for m in (second, third))
    online = replace(part, earlier=kept(tmp_path / "one", before.importance), gamma=0.25, bits=32)
    both = prepared(online, second, documents[3:], {})
    old = dense(before.importance)
    for name, values in both.importance.items():
        torch.testing.assert_close(values.double(), 0.25 * old[name] + alone[name].double(), rtol=1e-6, atol=0)
    assert both.notes["gamma"] == 0.25 and "gamma" not in before.notes
    assert both.tokens == prepared(part, second, documents[3:], {}).tokens  # the earlier text is not read again
    chained = replace(part, earlier=kept(tmp_path / "two", both.importance), bits=32)  # by default nothing is forgotten
    for name, values in prepared(chained, third, documents[3:], {}).importance.items():
        torch.testing.assert_close(values, both.importance[name] + last[name], rtol=1e-6, atol=0)


def test_the_second_domain_is_held_to_the_model_it_starts_from(make, documents, train, tmp_path):
    part = EWC(strength=1e9, bits=32)
    earlier = prepared(part, make(), documents[:3], {}).importance
    between = train(make(), (), documents[:3]).run.model
    base = base_of(between)
    online = replace(part, earlier=kept(tmp_path / "one", earlier))
    importance = prepared(online, between, documents, base).importance
    train(between, (online,), documents, states={"ewc": {"importance": importance}}, clip=1.0, learning_rate=1e-4)
    held = {n: importance[n] > 1e-3 for n in base}
    moved = {n: (p.detach() - base[n]).abs() for n, p in between.named_parameters()}
    start = base_of(make())
    assert sum(int(mask.sum()) for mask in held.values()) > 100
    for name, mask in held.items():  # far nearer to where the second training began than to the first model
        assert moved[name][mask].sum() <= 0.1 * (base[name] - start[name]).abs()[mask].sum()


def test_an_earlier_preparation_that_does_not_fit_is_refused(make, documents, tmp_path):
    fisher = prepared(EWC(bits=32), make(), documents, {}).importance
    with pytest.raises(UserError, match="ewc.earlier is .*nowhere.*, where there is no ewc.importance.safetensors"):
        EWC(earlier=str(tmp_path / "nowhere")).look(shapes={})
    name = next(iter(fisher))
    for wrong, said in (
        ({n: f for n, f in fisher.items() if n != name}, f"no importance of {name}.*whole-model"),
        (fisher | {name: fisher[name][:-1]}, f"{name} in .* has shape .*: name a preparation of the same architecture"),
    ):
        part = EWC(earlier=kept(tmp_path / str(len(wrong[name]) if name in wrong else 0), wrong))
        part.look(shapes={})
        with pytest.raises(UserError, match=said):
            prepared(part, make(), documents, {})
