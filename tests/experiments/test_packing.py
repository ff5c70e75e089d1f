"""Examples packed in one row: logits, loss and gradients of each as if it were alone."""

import importlib.util
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments.model.random_models import build
from experiments.training.batches import collate, collate_packed, pack
from experiments.training.loss import summed_nll
from methods.tools.architecture import backbone, head, hidden_states, keeps_apart

SIZES = (7, 1, 12, 1, 1, 3)
NO_FLASH = "flash_attention_2 needs a CUDA GPU and flash_attn"


def implementation(name):
    runs = torch.cuda.is_available() and importlib.util.find_spec("flash_attn")
    return pytest.param(name, marks=pytest.mark.skipif(name == "flash_attention_2" and not runs, reason=NO_FLASH))


IMPLEMENTATIONS = [implementation(name) for name in ("eager", "sdpa", "flash_attention_2")]


def model_of(architecture, attention, dtype):
    model = build(architecture, seed=0, dtype=dtype)
    if attention == "sdpa":
        assert model.config._attn_implementation == "sdpa"
        return model
    if attention == "flash_attention_2":
        if architecture == "gptj":
            pytest.skip("transformers' flash attention for GPT-J knows no packed rows")
        dtype = torch.bfloat16
    other = AutoModelForCausalLM.from_config(model.config, attn_implementation=attention, dtype=dtype)
    other.load_state_dict(model.state_dict())
    return other.eval().to("cuda" if attention == "flash_attention_2" else "cpu")


def examples(sizes=SIZES, seed=0):
    draw = torch.Generator().manual_seed(seed)
    made = []
    for index, size in enumerate(sizes):
        ids = torch.randint(0, 256, (size,), generator=draw)
        labels = ids.clone()
        if index % 2 == 0:
            labels[: size // 3] = -100  # of the others every token is labelled, the first too
        made.append({"input_ids": ids, "labels": labels})
    return made


def close(found, wanted, dtype):
    tolerance = {torch.float64: 1e-5, torch.float32: 2e-5, torch.bfloat16: 5e-2}[
        dtype
    ]  # a float64 model's norms compute in float32
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_pack_fills_rows_and_loses_nothing():
    lengths = [5 + (i * 37) % 90 for i in range(203)]
    rows = pack(lengths, 256)
    assert sorted(itertools.chain(*rows)) == list(range(203))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 256
    assert len(rows) <= 1.05 * sum(lengths) / 256
    assert all(row == sorted(row) for row in rows) and rows == sorted(rows)
    assert rows == pack(list(lengths), 256)


@pytest.mark.parametrize(
    ("lengths", "tokens", "rows"),
    [
        ([], 8, []),
        ([3], 8, [[0]]),
        ([4, 4], 8, [[0, 1]]),
        ([4, 5], 8, [[0], [1]]),
        ([3, 20, 4, 1], 8, [[0, 2, 3], [1]]),  # too long for any row
        ([1, 1, 1], 1, [[0], [1], [2]]),
        ([2, 6, 3, 5], 8, [[0, 1], [2, 3]]),
    ],
)
def test_pack(lengths, tokens, rows):
    assert pack(lengths, tokens) == rows


def test_a_packed_row():
    row = collate_packed(examples())
    assert set(row) == {"input_ids", "labels", "position_ids"}  # and no attention_mask
    assert {tuple(t.shape) for t in row.values()} == {(1, sum(SIZES))}
    assert row["position_ids"][0].tolist() == [p for size in SIZES for p in range(size)]
    borders = [sum(SIZES[:i]) for i in range(len(SIZES))]
    assert (row["labels"][0, borders] == -100).all()
    # as many labels as each example alone has behind its first token
    assert (row["labels"] != -100).sum() == sum((e["labels"][1:] != -100).sum() for e in examples())
    assert all(
        (e["labels"][0] == e["input_ids"][0]).all() for e in examples()[1::2]
    )  # the examples are left as they were


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", ["gptj", "llama"])
def test_logits_are_those_of_each_alone(architecture, attention, dtype):
    model = model_of(architecture, attention, dtype)
    row = collate_packed(examples(), model.device)
    packed = head(model)(hidden_states(model, row["input_ids"], None, row["position_ids"]))[0]
    alone = [head(model)(hidden_states(model, e["input_ids"][None].to(model.device), None))[0] for e in examples()]
    close(packed, torch.cat(alone), model.dtype)


@pytest.mark.parametrize("sizes", [SIZES, (9,), (1,), (1, 1), (1, 8), (8, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", ["gptj", "llama"])
def test_loss_and_gradients_are_the_sums_over_each_alone(architecture, attention, dtype, sizes):
    model = model_of(architecture, attention, dtype)

    def run(batches):
        model.zero_grad(set_to_none=False)
        total = 0.0
        for batch in batches:
            loss = summed_nll(
                hidden_states(model, batch["input_ids"], None, batch.get("position_ids")), batch["labels"], head(model)
            )
            loss.backward()
            total += loss.item()
        return total, {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        }

    packed, packed_gradients = run([collate_packed(examples(sizes), model.device)])
    alone, alone_gradients = run([collate([e], model.device) for e in examples(sizes)])
    padded, _ = run([collate(examples(sizes), model.device)])
    assert packed == pytest.approx(alone, rel=1e-2 if model.dtype == torch.bfloat16 else 1e-5)
    assert packed == pytest.approx(padded, rel=1e-2 if model.dtype == torch.bfloat16 else 1e-5)
    assert (packed > 0) == (max(sizes) > 1)
    for name, gradient in packed_gradients.items():
        close(gradient, alone_gradients[name], model.dtype)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["gptj", "llama"])
def test_what_packing_must_not_be_given(architecture, attention):
    """With a mask, a cache or positions that do not restart, transformers lets examples see each other, silently."""
    model = model_of(architecture, attention, torch.float32)
    row = collate_packed(examples())
    right = hidden_states(model, row["input_ids"], None, row["position_ids"])
    through = torch.arange(sum(SIZES)).unsqueeze(0)
    plain = {"input_ids": row["input_ids"], "position_ids": row["position_ids"], "use_cache": False}
    close(backbone(model)(**plain).last_hidden_state, right, torch.float32)
    for change in (
        {"attention_mask": torch.ones_like(row["input_ids"])},
        {"use_cache": True},
        {"position_ids": through},
    ):
        wrong = backbone(model)(**plain | change).last_hidden_state
        gap = (head(model)(wrong) - head(model)(right))[0].abs().amax(dim=-1)
        assert gap[: SIZES[0]].max() < 1e-4  # the first example has nobody before it
        assert gap[SIZES[0] :].min() > 0.05, change.keys()


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", ["gptj", "llama"])
@pytest.mark.parametrize("training", [True, False])
def test_whether_a_model_keeps_examples_apart_is_tried(architecture, attention, training):
    model = model_of(architecture, attention, torch.float32).train(training)
    assert keeps_apart(model)
    assert model.training is training


def test_a_model_that_does_not_is_found_out():
    model = build("gptj", seed=0)
    given = model.transformer.forward
    # what flash_attention_2 does in GPT-J: positions reach the rotation, and not the mask
    model.transformer.forward = lambda **batch: given(**batch | {"attention_mask": torch.ones_like(batch["input_ids"])})
    assert not keeps_apart(model)


def test_dropout_does_not_keep_them_from_being_told_apart():
    model = build("gptj", seed=0, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    before = torch.get_rng_state()
    assert keeps_apart(model)
    assert torch.equal(torch.get_rng_state(), before)
