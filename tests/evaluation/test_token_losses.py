"""Nats and KL of labelled tokens against a plain computation in float64."""

import random
from copy import deepcopy

import pytest
import torch
from torch import nn

from evaluation import encode
from evaluation.lm import SharedPrefixLM
from evaluation.token_losses import HiddenRows, hidden_rows, token_losses
from experiments.model.random_models import build
from methods.errors import UserError
from methods.tools.architecture import logits_of
from tests.evaluation.conftest import TEXT


def ragged(seed: int = 0):
    """Sequences of 1 to 60 ids with every third labelled, and two without a label."""
    draw = random.Random(seed)
    lengths = [1, 2, 3, 17, 17, 40, 60, 5]
    sequences = [([draw.randrange(256) for _ in range(n)], [draw.random() < 0.4 for _ in range(n)]) for n in lengths]
    return [*sequences, (sequences[5][0], [False] * 40), (sequences[4][0], [True] * 17)]


@torch.no_grad()
def plain(model, reference, ids, labels):
    """(nats, tokens, kl, kl_reverse) of one sequence from whole softmaxes in float64."""
    p, p0 = (each(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1) for each in (model, reference))
    at = torch.tensor(labels[1:], dtype=torch.bool)
    nats = -p.gather(1, torch.tensor(ids[1:], dtype=torch.long)[:, None])[at].sum()
    forward, reverse = (p0.exp() * (p0 - p)).sum(-1)[at].sum(), (p.exp() * (p - p0)).sum(-1)[at].sum()
    return nats.item(), int(at.sum()), forward.item(), reverse.item()


@pytest.fixture(params=["llama", "gptj"])
def pair(request):
    """A model and a reference, with different weights everywhere."""
    model = build(request.param, seed=0)
    # a head with a bias that is not zero, where there is one
    if getattr(model.lm_head, "bias", None) is not None:
        nn.init.normal_(model.lm_head.bias)
    return model, build(request.param, seed=1)


@pytest.mark.parametrize("tokens", [1, 64, 1024])
def test_sums_equal_whole_softmaxes_in_float64(pair, tokens):
    model, reference = pair
    found = token_losses(model, ragged(), reference=reference, tokens=tokens)
    for (ids, labels), losses in zip(ragged(), found, strict=True):
        nats, count, kl, reverse = plain(*pair, ids, labels)
        assert losses.tokens == count
        assert (losses.nats, losses.kl, losses.kl_reverse) == pytest.approx((nats, kl, reverse), rel=1e-4, abs=1e-5)
        assert not count or min(losses.kl, losses.kl_reverse) > 0.01  # the models do differ


def test_without_a_reference_there_is_no_kl(pair):
    with_one, without = token_losses(pair[0], ragged(), reference=pair[1]), token_losses(pair[0], ragged())
    assert [each.nats for each in without] == [each.nats for each in with_one]
    assert {(each.kl, each.kl_reverse) for each in without} == {(None, None)}


def test_hidden_rows_of_a_reference_stand_for_it_to_the_bit(pair):
    model, reference = pair
    kept = HiddenRows(rows=hidden_rows(reference, ragged()), logits_of=logits_of(reference))
    assert [len(rows) for rows in kept.rows] == [sum(labels[1:]) for _, labels in ragged()]
    assert token_losses(model, ragged(), reference=kept) == token_losses(model, ragged(), reference=reference)


def test_a_model_against_itself_or_an_equal_one_is_exactly_zero(pair):
    model = pair[0].bfloat16()
    kept = HiddenRows(rows=hidden_rows(model, ragged()), logits_of=logits_of(model))
    for same in (model, deepcopy(model), kept):
        assert {(x.kl, x.kl_reverse) for x in token_losses(model, ragged(), reference=same)} == {(0.0, 0.0)}


def test_a_long_sequence_is_read_in_windows_and_every_label_counts_once(pair):
    model, reference = pair
    draw = random.Random(2)
    ids, labels = [draw.randrange(256) for _ in range(50)], [draw.random() < 0.5 for _ in range(50)]
    whole = HiddenRows(rows=hidden_rows(reference, [(ids, labels)], max_length=16), logits_of=logits_of(reference))
    (found,) = token_losses(model, [(ids, labels)], reference=whole, max_length=16)
    expected, at = [0.0] * 4, 1
    for context, continuation in encode.windows(ids[1:], prefix=ids[0], max_length=16):
        own = labels[at : at + len(continuation)]
        parts = plain(model, reference, context + continuation, [False] * len(context) + own)
        expected, at = [a + b for a, b in zip(expected, parts)], at + len(continuation)
    assert (found.nats, found.tokens, found.kl, found.kl_reverse) == pytest.approx(expected, rel=1e-4)
    assert found.tokens == sum(labels[1:])


def test_whole_texts_have_the_nats_of_lm_evals_rolling_windows(pair, byte_tokenizer):
    requests = [type("Request", (), {"args": (row["text"],)}) for row in TEXT]
    rolling = SharedPrefixLM(pretrained=pair[0], tokenizer=byte_tokenizer, batch_size=4).loglikelihood_rolling(requests)
    texts = [encode.encode_rolling(byte_tokenizer, row["text"]) for row in TEXT]
    sequences = [(context + ids, [True] * (len(ids) + 1)) for context, ids in texts]
    found = token_losses(pair[0], sequences)
    assert [-each.nats for each in found] == pytest.approx(rolling, rel=1e-6)
    assert [each.tokens for each in found] == [len(ids) for _, ids in texts]


def test_a_reference_of_another_vocabulary_is_refused():
    with pytest.raises(UserError, match="logits of 258 tokens and its reference of 300"):
        token_losses(build("llama", seed=0), ragged(), reference=build("llama", seed=0, vocab_size=300))
