"""The chunked loss against transformers' own."""

import pytest
import torch

from experiments.training import loss
from experiments.training.batches import collate
from methods.tools.architecture import head, hidden_states


def ragged(seed=0, sizes=(7, 12, 3)):
    draw = torch.Generator().manual_seed(seed)
    out = []
    for size in sizes:
        ids = torch.randint(0, 256, (size,), generator=draw)
        labels = ids.clone()
        labels[: size // 2] = -100
        out.append({"input_ids": ids, "labels": labels})
    return out


@pytest.mark.parametrize("model_name", ["tiny_llama", "tiny_llama_untied", "tiny_gptj"])
def test_sum_equals_transformers_loss(model_name, request):
    model = request.getfixturevalue(model_name)
    batch = collate(ragged())
    ours = loss.summed_nll(
        hidden_states(model, batch["input_ids"], batch["attention_mask"]), batch["labels"], head(model)
    )
    theirs = model(**batch).loss  # mean over labelled tokens
    asked = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(ours / asked, theirs, rtol=1e-5, atol=1e-6)


def test_chunks_change_neither_value_nor_gradient(tiny_llama, monkeypatch):
    batch = collate(ragged(sizes=(9, 9)))

    def run():
        tiny_llama.zero_grad()
        value = loss.summed_nll(
            hidden_states(tiny_llama, batch["input_ids"], batch["attention_mask"]), batch["labels"], head(tiny_llama)
        )
        value.backward()
        return value.detach(), tiny_llama.model.embed_tokens.weight.grad.clone()

    whole = run()
    monkeypatch.setattr(loss, "CHUNK", 2)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_padding_does_not_matter(tiny_gptj):
    examples = ragged()
    together = collate(examples)
    total = loss.summed_nll(
        hidden_states(tiny_gptj, together["input_ids"], together["attention_mask"]), together["labels"], head(tiny_gptj)
    )
    alone = 0
    for example in examples:
        batch = collate([example])
        alone += loss.summed_nll(hidden_states(tiny_gptj, batch["input_ids"], None), batch["labels"], head(tiny_gptj))
    torch.testing.assert_close(total, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunk", [2, 1024])
def test_kl_is_that_of_torchs_distributions(monkeypatch, reverse, chunk):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    draw = torch.Generator().manual_seed(0)
    hidden, others = (torch.randn(5, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    heads = [torch.nn.Linear(4, 11, dtype=torch.float64) for _ in range(2)]
    weights = torch.rand(5, generator=draw, dtype=torch.float64)
    tensors = [hidden.requires_grad_(), heads[0].weight, heads[0].bias]
    ours, theirs = (
        torch.distributions.Categorical(logits=head(rows) / 1.7) for head, rows in zip(heads, (hidden, others))
    )
    pair = (ours, theirs) if reverse else (theirs, ours)
    wanted = (weights * torch.distributions.kl_divergence(*pair)).sum()
    value = loss.summed_kl(hidden, others, *heads, weights=weights, temperature=1.7, reverse=reverse)
    torch.testing.assert_close(value, wanted)
    for own, theirs_ in zip(torch.autograd.grad(value, tensors), torch.autograd.grad(wanted, tensors)):
        torch.testing.assert_close(own, theirs_)


@pytest.mark.parametrize("reverse", [False, True])
def test_kl_of_equal_predictions_has_no_gradient_at_all(reverse):
    rows, head = torch.randn(7, 4).requires_grad_(), torch.nn.Linear(4, 301)
    loss.summed_kl(rows, rows.detach(), head, head, temperature=0.9, reverse=reverse).backward()
    assert not rows.grad.any() and not head.weight.grad.any()
