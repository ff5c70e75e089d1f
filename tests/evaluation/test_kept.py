"""Kept token ids: the same scores with and without, and nothing stale or damaged is ever used."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from evaluation import harness
from evaluation.kept import KeptTokens
from evaluation.lm import SharedPrefixLM
from experiments.model.random_models import build
from experiments.model.random_models import byte_tokenizer as make_tokenizer

TEXTS = [("a b", " c"), ("", "é"), ("a b", " dd"), ("ends ", "x")]
PAIRS = [([1, 2], [3]), ([256], [4, 5]), ([1, 2], [6, 7, 8]), ([9], [10])]


def test_what_is_kept_comes_back(tmp_path, byte_tokenizer):
    kept = KeptTokens(tmp_path / "new", byte_tokenizer, [None, 256])
    assert kept.load(TEXTS) is None
    kept.save(TEXTS, PAIRS)
    assert KeptTokens(tmp_path / "new", make_tokenizer(), [None, 256]).load(TEXTS) == PAIRS
    assert len(list((tmp_path / "new").iterdir())) == 1  # no half-written file stays


def test_other_texts_settings_tokenizers_and_versions_find_nothing(tmp_path, byte_tokenizer, monkeypatch):
    KeptTokens(tmp_path, byte_tokenizer, [None, 256]).save(TEXTS, PAIRS)
    assert KeptTokens(tmp_path, byte_tokenizer, [None, 256]).load([*TEXTS[:3], ("ends", " x")]) is None
    assert KeptTokens(tmp_path, byte_tokenizer, [None, 256]).load(TEXTS[::-1]) is None
    assert KeptTokens(tmp_path, byte_tokenizer, [True, 256]).load(TEXTS) is None
    other = make_tokenizer()
    other.add_tokens(["dd"])
    assert KeptTokens(tmp_path, other, [None, 256]).load(TEXTS) is None
    monkeypatch.setattr("evaluation.kept.version", lambda name: "0")
    assert KeptTokens(tmp_path, byte_tokenizer, [None, 256]).load(TEXTS) is None


def test_a_damaged_file_is_not_used(tmp_path, byte_tokenizer):
    kept = KeptTokens(tmp_path, byte_tokenizer, None)
    kept.save(TEXTS, PAIRS)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    at = whole.index(np.array([1, 2, 3, 256], dtype=np.int32).tobytes())
    for damaged in (b"", whole[:40], whole[:-30], b"x" * len(whole), whole[:at] + b"\x07" + whole[at + 1 :]):
        file.write_bytes(damaged)
        assert kept.load(TEXTS) is None
    np.savez(
        file, ids=np.arange(13, dtype=np.int32), lengths=np.ones((4, 2), dtype=np.int64)
    )  # whole, but not of these
    assert kept.load(TEXTS) is None
    kept.save(TEXTS, PAIRS)
    assert kept.load(TEXTS) == PAIRS


def test_a_tokenizer_in_python_keeps_nothing(tmp_path):
    kept = KeptTokens(tmp_path / "new", object(), None)
    kept.save(TEXTS, PAIRS)
    assert kept.load(TEXTS) is None and not (tmp_path / "new").exists()


@pytest.mark.parametrize("saved", [False, True])
def test_the_second_model_encodes_nothing_and_scores_the_same(saved, tasks_dir, tmp_path, byte_tokenizer, monkeypatch):
    tokenizer = byte_tokenizer
    if saved:  # a cell has its own copy of the tokenizer
        byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    scored = []
    for seed, kept in ((0, tmp_path / "kept"), (1, None)):
        scored.append(
            harness.score(model=build("llama", seed=seed), tokenizer=byte_tokenizer, tasks_dir=tasks_dir, kept=kept)[1]
        )
    monkeypatch.setattr(SharedPrefixLM, "_encode_pair", lambda *_: pytest.fail("encoded again"))
    again = harness.score(
        model=build("llama", seed=1), tokenizer=tokenizer, tasks_dir=tasks_dir, kept=tmp_path / "kept"
    )[1]
    assert again.equals(scored[1]) and not again.log_likelihood.equals(scored[0].log_likelihood)
