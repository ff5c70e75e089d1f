"""What layers read, against the sum that defines it."""

import pytest
import torch

from methods.tools.covariance import covariances


def inputs(model, layer, documents):
    """What a layer reads in each document."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0]))
    with torch.no_grad():
        for document in documents:
            model(input_ids=document["input_ids"][None])
    hook.remove()
    return seen


@pytest.mark.parametrize("kind, target", [("llama-tied", "down_proj"), ("gpt2", "c_attn")])
def test_covariances_are_the_mean_over_documents_of_scaled_inputs(made, text, kind, target):
    model = made(kind).train()
    layers = {name: m for name, m in model.named_modules() if name.endswith(f".{target}")}
    found = covariances(model, layers, text)
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())
    model.eval()
    for name, layer in layers.items():
        wanted = 0
        for x in inputs(model, layer, text):
            x = x / max(x.max(), -x.min())
            wanted = wanted + sum(torch.outer(row, row) for row in x) / len(text)
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-9)
    backwards = covariances(model, layers, text[::-1])
    assert all(torch.equal(backwards[name], c) for name, c in found.items())  # the order of a sum changes no bit
