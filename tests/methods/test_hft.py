"""HFT: which half of each block trains, counted by the roles that this test knows of each architecture."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from methods import registry
from methods.errors import UserError
from methods.hft import HalfFineTuning
from methods.tools.architecture import units

LAYERS = 4
ROLES = {  # of a block: names of matrices and norms, and how many of them train in each half of the blocks
    "llama-tied": (("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"), ("layernorm",), 2),
    "gptj": (("q_proj", "k_proj", "v_proj", "out_proj"), ("fc_in", "fc_out"), ("ln_1",), 1),
    "gpt2": (("c_attn", "attn.c_proj"), ("c_fc", "mlp.c_proj"), ("ln_",), 2),
}


@pytest.fixture
def made(make):
    def of(kind):
        if kind != "gpt2":
            return make(kind, num_hidden_layers=LAYERS)
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=31, n_embd=12, n_layer=LAYERS, n_head=2, n_positions=32, eos_token_id=1)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float64)

    return of


def trained_units(model, words, index):
    """Modules of block `index` whose name contains one of the words: whether they train."""
    found = {}
    for name, p in model.named_parameters():
        if f".{index}." in name and any(word in name for word in words):
            found.setdefault(name.rpartition(".")[0], set()).add(p.requires_grad)
    assert all(len(states) == 1 for states in found.values())  # a bias goes with its matrix
    return [states.pop() for states in found.values()]


@pytest.mark.parametrize("kind", ROLES)
def test_half_of_each_role_trains(made, kind):
    attention, ffn, norms, _ = ROLES[kind]
    model = HalfFineTuning().adapt(made(kind), seed=0)
    for words, whole in ((attention, len(attention)), (ffn, len(ffn)), (norms, ROLES[kind][3])):
        counts = []
        for index in range(LAYERS):
            trains = trained_units(model, words, index)
            assert len(trains) == whole
            counts.append(sum(trains))
        if whole % 2 == 0:
            assert counts == [whole // 2] * LAYERS
        else:
            assert sorted(counts) == [whole // 2] * (LAYERS // 2) + [whole // 2 + 1] * (LAYERS // 2)
    inside = sum(".layers." in name or ".h." in name for name, _ in model.named_parameters())
    outside = [p for name, p in model.named_parameters() if ".layers." not in name and ".h." not in name]
    assert all(p.requires_grad for p in outside) and len(outside) + inside == len(list(model.parameters()))


@pytest.mark.parametrize("fraction, counts", [(0.0, {0}), (0.25, {0, 1}), (0.75, {2, 3}), (1.0, {3})])
def test_another_share(made, fraction, counts):
    model = HalfFineTuning(fraction=fraction).adapt(made("llama-tied"), seed=0)
    assert {sum(trained_units(model, ROLES["llama-tied"][1], index)) for index in range(LAYERS)} == counts


def test_the_draw_is_of_the_seed_and_differs_between_blocks(made):
    def trains(seed):
        return [p.requires_grad for p in HalfFineTuning().adapt(made("llama-tied"), seed=seed).parameters()]

    assert trains(0) == trains(0) != trains(1)
    model = HalfFineTuning().adapt(made("llama-tied"), seed=0)
    blocks = [tuple(p.requires_grad for p in block.parameters()) for block in model.model.layers]
    assert len(set(blocks)) > 1


@pytest.mark.parametrize("redraw", ["never", "epoch"])
def test_what_is_frozen_does_not_move_and_has_no_state(made, documents, train, redraw):
    seen = []

    class Watched(HalfFineTuning):
        key = "hft"

        def after_step(self, *, run, **_):
            model = dict(run.model.named_parameters())
            seen.append({name: p.detach().clone() for name, p in model.items()})

    model = made("llama-tied")
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = train(model, (Watched(redraw=redraw),), documents, batch=3, micro_batch=3, epochs=2.0, weight_decay=0.1)
    moved = [{n for n in base if not torch.equal(one[n], two[n])} for one, two in zip([base, *seen], seen)]
    inside = {name for name in base if ".layers." in name}
    assert all(base.keys() - inside <= names for names in moved)
    assert moved[0] == moved[1] and moved[2] == moved[3]  # two steps an epoch
    assert (moved[1] == moved[2]) == (redraw == "never")
    if redraw == "never":
        assert moved[0] == result.run.weights.keys() < base.keys()
        assert len(result.optimizer.state) == len(moved[0])
    entries = sum(base[name].numel() for name in inside)
    share = sum(base[name].numel() for name in moved[-1] & inside) / entries
    assert result.method.reports(result.run)["hft"] == {"trained_share_of_blocks": pytest.approx(share)}


def test_beside_an_adapter_it_is_refused():
    with pytest.raises(UserError, match="hft and lora cannot be combined: hft freezes matrices of the base"):
        registry.build({"hft": {}, "lora": {}})


def test_units_of_experts_are_their_matrices():
    """Stacked experts are parameters of one module, each a matrix of its own."""
    block = torch.nn.Module()
    block.attention = torch.nn.Linear(3, 3)
    block.attention.layer_idx = 0
    block.experts = torch.nn.Module()
    block.experts.up, block.experts.down = (torch.nn.Parameter(torch.zeros(2, 3, 4)) for _ in range(2))
    block.norm = torch.nn.LayerNorm(3)
    assert units(block) == {
        "attention": [["attention.weight", "attention.bias"]],
        "ffn": [["experts.up"], ["experts.down"]],
        "norm": [["norm.weight", "norm.bias"]],
    }
