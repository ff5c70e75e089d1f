"""Encoding against HFLM's own, for tokenizers with and without BOS and with tokens across the border."""

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from evaluation import encode
from evaluation.task import make_task, render
from experiments.random_models import byte_tokenizer as make_byte_tokenizer

PAIRS = [
    ("Question: what?\nAnswer:", " water"),
    ("ends in spaces   ", "then this"),
    ("ends in a newline\n", "then this"),
    ("the the th", "e the border is inside a token"),
    ("", "nothing before this"),
    ("", "<|bos|>starts with the prefix"),
    ("<|bos|>begins with it", " and goes on"),
    ("é 漢", "字"),
    ("x", " "),
]


def with_bos():
    """The byte tokenizer, putting <|bos|> in front of every text as LLaMA's does."""
    backend = Tokenizer.from_str(make_byte_tokenizer().backend_tokenizer.to_str())
    backend.add_special_tokens(["<|bos|>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")


def with_merges():
    """A trained BPE whose tokens run across words, so that context and whole are cut differently."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|eos|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the the border of the water. Answer: water"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>", pad_token="<|eos|>")


class Recorder(HFLM):
    """HFLM that keeps what it would score."""

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        self.recorded = [(context, continuation) for _, context, continuation in requests]
        return [(0.0, True)] * len(requests)


@pytest.mark.parametrize("make", [make_byte_tokenizer, with_bos, with_merges])
def test_pairs_are_encoded_as_hflm_encodes_them(make, tiny_llama):
    tokenizer = make()
    recorder = Recorder(pretrained=tiny_llama, tokenizer=tokenizer, batch_size=1)
    asked = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in PAIRS]
    recorder.loglikelihood(asked, disable_tqdm=True)
    for (context, continuation), (head, tail) in zip(PAIRS, recorder.recorded, strict=True):
        ids, start = encode.encode_pair(tokenizer, context, continuation)
        assert (ids[:start], ids[start:]) == (head, tail), (context, continuation)


def test_the_tokenizers_differ_where_they_should():
    byte, bos, merged = make_byte_tokenizer(), with_bos(), with_merges()
    assert encode.encode_pair(bos, "a", "b")[0][0] == bos.bos_token_id
    assert encode.encode_pair(byte, "a", "b") == ([97, 98], 1)
    assert encode.encode_pair(byte, "", "b") == ([byte.eos_token_id, 98], 1)
    ids, start = encode.encode_pair(merged, *PAIRS[3])  # the border is inside a token: the whole is not the sum
    assert ids != merged.encode("".join(PAIRS[3]))


def test_training_ids_are_those_hflm_scores_for_the_gold_choice(tasks_dir, tiny_llama):
    tokenizer = with_bos()
    for name, task_name, metric in (("science", "sciq", "acc"), ("hellaswag", "hellaswag", "acc_norm"),
                                    ("lambada_openai", "lambada_openai", "acc"), ("copa", "copa", "acc")):  # fmt: skip
        task = make_task(name, task_name, tasks_dir / f"{name}.jsonl", metric=metric)
        task.build_all_requests()
        recorder = Recorder(pretrained=tiny_llama, tokenizer=tokenizer, batch_size=1)
        recorder.loglikelihood(task.instances, disable_tqdm=True)
        scored = {(i.doc_id, i.idx): pair for i, pair in zip(task.instances, recorder.recorded, strict=True)}
        for number, row in enumerate(render(task)):
            for which, choice in enumerate(row["choices"]):
                ids, start = encode.encode_pair(tokenizer, row["context"], choice)
                assert (ids[:start], ids[start:]) == scored[number, which]


@pytest.mark.parametrize("size", [0, 1, 4, 5, 6, 10, 23])
def test_windows_are_lm_evals(size):
    ids = list(range(100, 100 + size))
    theirs = get_rolling_token_windows(token_list=ids, prefix_token=1, max_seq_len=5, context_len=1)
    ours = list(encode.windows(ids, prefix=1, max_length=5))
    assert ours == [make_disjoint_window(pair) for pair in theirs]
    assert [token for _, piece in ours for token in piece] == ids


def test_max_length_is_hflms(tiny_llama, tiny_gptj, byte_tokenizer):
    for model in (tiny_llama, tiny_gptj):
        assert encode.max_length(model, byte_tokenizer) == HFLM(pretrained=model, tokenizer=byte_tokenizer).max_length
