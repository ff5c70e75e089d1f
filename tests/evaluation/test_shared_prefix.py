"""The shared-prefix scorer against lm-eval's HFLM and against the definition."""

import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model

from evaluation import shared_prefix
from evaluation.lm import SharedPrefixLM
from experiments.model.random_models import build


def ragged_requests(seed: int = 0) -> list[tuple[tuple, list[int], list[int]]]:
    """Groups of 1 to 5 continuations of 1 to 40 tokens on contexts of 1 to 90, with repeats, too-long and shuffled."""
    draw = random.Random(seed)

    def ids(n):
        return [draw.randrange(256) for _ in range(n)]

    requests = []
    for _ in range(14):
        context = ids(draw.choice([1, 2, 17, 60, 90]))
        requests += [(("", ""), context, ids(draw.choice([1, 1, 2, 9, 40]))) for _ in range(draw.randint(1, 5))]
    context = ids(600)  # longer than the model's 512 positions: cut from the left, elsewhere for each length
    requests += [(("", ""), context, ids(n)) for n in (1, 1, 5, 30)]
    requests += [(("", ""), [7], ids(512)), (("", ""), [7], [9]), requests[0], requests[0]]
    context = ids(20)
    requests += [(("", ""), context, ids(90)) for _ in range(4)]  # mostly continuation: more than one sequence
    draw.shuffle(requests)
    return requests


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_untied", "tiny_gptj"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_equals_hflm_item_for_item(name, batch_size, byte_tokenizer, request):
    model = request.getfixturevalue(name)
    requests = ragged_requests()
    theirs = HFLM(pretrained=model, tokenizer=byte_tokenizer, batch_size=8)._loglikelihood_tokens(
        requests, disable_tqdm=True
    )
    ours = SharedPrefixLM(pretrained=model, tokenizer=byte_tokenizer, batch_size=batch_size)._loglikelihood_tokens(
        requests
    )
    assert shared_prefix.refusal(model) == ""
    for (value, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy


def test_greedy_is_true_for_what_the_model_would_write(tiny_gptj):
    context = [5, 6, 7]
    written = tiny_gptj.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    continuation = written[0, 3:].tolist()
    other = [*continuation[:-1], (continuation[-1] + 1) % 256]
    scored = shared_prefix.log_likelihoods(tiny_gptj, [(context, continuation), (context, other)], max_length=512)
    assert [greedy for _, greedy in scored] == [True, False]


def test_peft_wrapped_model_is_scored_with_its_adapter(tiny_llama):
    torch.manual_seed(0)
    wrapped = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    wrapped.eval()
    requests = [([1, 2, 3, 4], [5, 6, 7]), ([1, 2, 3, 4], [8, 9])]
    scored = shared_prefix.log_likelihoods(wrapped, requests, max_length=512)
    for (context, continuation), (value, _) in zip(requests, scored):
        logits = wrapped(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum()
        assert value == pytest.approx(expected.item(), abs=1e-4)
    with wrapped.disable_adapter():
        assert shared_prefix.log_likelihoods(wrapped, requests, max_length=512)[0][0] != pytest.approx(
            scored[0][0], abs=1e-2
        )


def test_bfloat16_stays_near_float32(tiny_gptj):
    requests = [(c, d) for _, c, d in ragged_requests()]
    exact = shared_prefix.log_likelihoods(tiny_gptj, requests, max_length=512)
    half = shared_prefix.log_likelihoods(tiny_gptj.to(torch.bfloat16), requests, max_length=512)
    for (value, _), (expected, _), (_, continuation) in zip(half, exact, requests):
        assert abs(value - expected) < 0.05 * len(continuation) + 0.05


def test_a_forward_pass_stays_under_its_budget_and_encodes_a_context_once(tiny_llama, monkeypatch):
    seen = []
    real = shared_prefix.backbone(tiny_llama).forward
    monkeypatch.setattr(
        shared_prefix.backbone(tiny_llama), "forward", lambda **call: seen.append(call["input_ids"]) or real(**call)
    )
    requests = [([i] * 30, [j] * 4) for i in range(10) for j in range(4)]
    shared_prefix.refusal(tiny_llama)
    seen.clear()
    shared_prefix.log_likelihoods(tiny_llama, requests, max_length=512, tokens=100)
    assert sum(ids.numel() for ids in seen) == 10 * (30 + 4 * 3)  # no padding here, and no last tokens
    assert max(ids.numel() for ids in seen) <= 100


def test_logits_in_chunks_are_the_same(tiny_llama, monkeypatch):
    requests = [(c, d) for _, c, d in ragged_requests()]
    whole = shared_prefix.log_likelihoods(tiny_llama, requests, max_length=512)
    monkeypatch.setattr(shared_prefix, "LOGITS", 3 * 258)  # three rows at a time
    chunked = shared_prefix.log_likelihoods(tiny_llama, requests, max_length=512)
    assert [v for v, _ in chunked] == pytest.approx([v for v, _ in whole], abs=1e-4)
    assert [g for _, g in chunked] == [g for _, g in whole]


def granite():
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    return GraniteForCausalLM(
        GraniteConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            logits_scaling=4.0,
            initializer_range=0.2,
        )
    ).eval()


def test_logits_that_are_scaled_behind_the_head_are_the_models_own(byte_tokenizer):
    model = granite()
    assert shared_prefix.refusal(model) == ""
    requests = [r for r in ragged_requests() if len(r[1]) + len(r[2]) < 130]
    theirs = HFLM(pretrained=model, tokenizer=byte_tokenizer, batch_size=4)._loglikelihood_tokens(
        requests, disable_tqdm=True
    )
    ours = shared_prefix.log_likelihoods(model, [(c, d) for _, c, d in requests], max_length=512)
    assert [v for v, _ in ours] == pytest.approx([v for v, _ in theirs], abs=1e-3)


def blind():
    """A Llama that leaves masks of one's own out."""
    model = build("llama", seed=0)
    decoder = model.model.forward
    model.model.forward = lambda *, attention_mask=None, **call: decoder(attention_mask=None, **call)
    return model


def sliding():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=8,
            initializer_range=0.2,
        )
    ).eval()


@pytest.mark.parametrize("make, reason", [(blind, "its own forward pass"), (sliding, "whole context")])
def test_a_model_it_does_not_fit_is_refused_and_scored_request_by_request(make, reason, byte_tokenizer):
    model = make()
    assert reason in shared_prefix.refusal(model)
    requests = [r for r in ragged_requests() if len(r[1]) + len(r[2]) < 130]
    theirs = HFLM(pretrained=model, tokenizer=byte_tokenizer, batch_size=4)._loglikelihood_tokens(
        requests, disable_tqdm=True
    )
    ours = shared_prefix.log_likelihoods(model, [(c, d) for _, c, d in requests], max_length=512)
    assert [v for v, _ in ours] == pytest.approx([v for v, _ in theirs], abs=1e-3)


def test_empty_sides_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="request 0"):
        shared_prefix.log_likelihoods(tiny_llama, [([], [1])], max_length=512)


def test_order_of_requests_does_not_matter():
    model = build("llama", seed=1)
    requests = [(c, d) for _, c, d in ragged_requests(1)]
    straight = shared_prefix.log_likelihoods(model, requests, max_length=512)
    backwards = shared_prefix.log_likelihoods(model, requests[::-1], max_length=512)[::-1]
    assert [v for v, _ in straight] == pytest.approx([v for v, _ in backwards], abs=1e-4)


@pytest.mark.parametrize("cached", [1, 7, 2**18])
def test_of_equal_logits_the_first_is_the_argmax(cached, monkeypatch):
    monkeypatch.setattr(shared_prefix, "CACHED", cached)
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 0.0], [0.0, 1.0, 5.0]])
    rows, targets = torch.tensor([2, 0, 0, 1, 0, 1]), torch.tensor([2, 2, 1, 0, 0, 1])
    values, greedy = shared_prefix._pick(logits, torch.nn.Identity(), rows, targets, vocabulary=3)
    assert greedy.tolist() == (logits.argmax(-1)[rows] == targets).tolist() == [True, False, True, True, False, False]
    assert values.tolist() == pytest.approx(logits.double().log_softmax(-1)[rows, targets].tolist(), abs=1e-6)
