"""SSU: scores against inputs that a test collects on its own, and the columns that stay the base's."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.pytorch_utils import Conv1D

from methods import registry
from methods.errors import UserError
from methods.part import Run
from methods.ssu import SourceShielded
from methods.tools.process_group import Shards

TEXTS = [torch.tensor(ids) for ids in ([3, 5, 7, 2, 9, 11, 4], [6, 8, 12], [20, 3, 3, 14, 25])]
GENERAL = [{"input_ids": ids, "labels": ids} for ids in TEXTS]


@pytest.fixture
def made(make):
    def of(kind):
        if kind != "gpt2":
            return make(kind)
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=31, n_embd=12, n_layer=2, n_head=2, n_positions=32, eos_token_id=1, resid_pdrop=0.5
        )
        return AutoModelForCausalLM.from_config(config, dtype=torch.float64)

    return of


def inputs_of(model, texts):
    """All inputs of each linear layer, (tokens, in), by the name of its weight."""
    seen = {}
    head = model.get_output_embeddings()
    handles = [
        module.register_forward_hook(
            lambda module, given, out, name=name: seen.setdefault(f"{name}.weight", []).append(given[0][0].detach())
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]
    for ids in texts:
        model(ids[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def calibrated(model, part, general=GENERAL):
    return part.calibrate(model=model, general=general, seed=0, progress=None)


@pytest.mark.parametrize("kind", ["llama-tied", "gptj", "gpt2"])
def test_scores_and_frozen_columns(made, documents, train, kind):
    model, part = made(kind).eval(), SourceShielded(fraction=0.25, samples=2, length=5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = inputs_of(model, [ids[:5] for ids in TEXTS[:2]])
    prepared = calibrated(model.train(), part)
    assert model.training and prepared.tokens == 8 and prepared.calibration.keys() == inputs.keys()
    frozen = {}
    for name, rows in inputs.items():
        weight = before[name].T if kind == "gpt2" else before[name]  # out × in
        for j, score in enumerate(prepared.calibration[name].tolist()):
            column = sum(w**2 for w in weight[:, j].tolist()) ** 0.5
            assert score == pytest.approx(column * sum(x**2 for x in rows[:, j].tolist()) ** 0.5, rel=1e-6)
        order = sorted(range(weight.shape[1]), key=lambda j: -prepared.calibration[name][j])
        frozen[name] = order[: round(0.75 * weight.shape[1])]
    states = {"ssu": {"calibration": prepared.calibration}}
    result = train(model, (part,), documents, states=states, weight_decay=0.5, epochs=2.0)
    for name, p in result.run.weights.items():
        still = (p.detach() == before[name]).T if kind == "gpt2" and name in frozen else p.detach() == before[name]
        if name in frozen:
            columns = torch.zeros(still.shape[1], dtype=torch.bool)
            columns[frozen[name]] = True
            assert torch.equal(still, columns.expand_as(still))
        else:
            assert not still.any(), name  # embeddings, head, norms and biases train
    assert part.report(run=result.run, state=result.states["ssu"]) == {
        "layers": len(frozen),
        "frozen_columns": sum(map(len, frozen.values())),
    }


@pytest.mark.parametrize("kind", ["gptj", "gpt2"])
def test_each_process_has_the_columns_of_its_rows(made, kind):
    model = made(kind)
    base = {name: p.detach() for name, p in model.named_parameters()}
    scores = calibrated(model, SourceShielded()).calibration
    masks = []
    for shards in (Shards(), Shards(rank=0, world=2), Shards(rank=1, world=2)):
        own = {name: shards.local(tensor) for name, tensor in base.items()}
        run = Run(model=model, weights=own, base=base, seed=0, device="cpu", shards=shards)
        state = {"calibration": scores}
        SourceShielded().begin(run=run, state=state, examples=[])
        masks.append({name: mask.expand_as(own[name]) for name, mask in state["frozen"].items()})
    alone, *pair = masks
    for name, mask in alone.items():
        assert torch.equal(torch.cat([rows[name] for rows in pair]), mask), name


def test_without_general_text_it_is_refused(made):
    with pytest.raises(UserError, match="ssu: there is no general text"):
        calibrated(made("gptj"), SourceShielded(), general=[])


def test_beside_an_adapter_it_is_refused():
    with pytest.raises(UserError, match="lora and ssu cannot be combined: ssu freezes columns"):
        registry.build({"ssu": {}, "lora": {}})
