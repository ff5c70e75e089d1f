"""Encoding against HFLM's own, for tokenizers with and without BOS and with tokens across the border."""

import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from evaluation import encode, harness, lm
from evaluation.probe import encoded, load_probes, probe
from evaluation.task import make_task, render
from experiments.model.random_models import build
from experiments.model.random_models import byte_tokenizer as make_byte_tokenizer
from methods.errors import UserError
from tests.evaluation.conftest import TEXT, write_rows

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


def with_end():
    """The byte tokenizer, putting <|eos|> behind every text."""
    backend = Tokenizer.from_str(make_byte_tokenizer().backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="$A <|eos|>", special_tokens=[("<|eos|>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>", pad_token="<|pad|>")


def without_specials():
    """The byte tokenizer without BOS, EOS and padding."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(make_byte_tokenizer().backend_tokenizer.to_str())
    )


def trained(kind):
    """Tokenizers of the other families, trained on a few sentences."""
    special, text = (
        ["<unk>", "<s>", "</s>"],
        ["Question: what is water? Answer: wet.", "The border of the word, the end.", "é 漢 字"] * 4,
    )
    if kind == "metaspace":  # as LLaMA-2's
        backend, trainer = (
            Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True)),
            trainers.BpeTrainer(vocab_size=150, special_tokens=special),
        )
        backend.pre_tokenizer, backend.decoder = (
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            decoders.Metaspace(prepend_scheme="first"),
        )
    elif kind == "unigram":  # as T5's, which strips spaces and puts </s> behind a text
        backend, trainer = (
            Tokenizer(models.Unigram()),
            trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>"),
        )
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace("  ", " ")]
        )
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind == "wordpiece":  # as BERT's, which lowers the case
        backend, trainer = (
            Tokenizer(models.WordPiece(unk_token="<unk>")),
            trainers.WordPieceTrainer(vocab_size=120, special_tokens=special),
        )
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
    else:  # as GPT-2's
        backend, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(vocab_size=330, special_tokens=special)
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(text, trainer)
    if kind in ("metaspace", "wordpiece"):
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def phrases(count):
    """Pairs of prompt and answer that meet in every way: at a space, at a line's end, at punctuation, inside a word."""
    draw, pieces = (
        random.Random(4),
        [
            "water",
            " wet",
            "Question:",
            "\n",
            " ",
            "  ",
            "the bor",
            "der",
            "?",
            ".",
            "é",
            " 漢",
            "'s",
            "<s>",
            "12",
            "The",
        ],
    )

    def text():
        return "".join(draw.choices(pieces, k=draw.randint(1, 5)))

    return [(text(), text()) for _ in range(count)]


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


@pytest.mark.parametrize("kind", ["metaspace", "unigram", "wordpiece", "byte-level"])
def test_pairs_that_hflm_can_score_are_hflms_with_every_family_of_tokenizers(kind, tiny_llama):
    tokenizer, compared = trained(kind), 0
    recorder = Recorder(pretrained=tiny_llama, tokenizer=tokenizer, batch_size=1)
    for context, continuation in phrases(200):
        head, tail = recorder._encode_pair(context, continuation)
        if head and tail:
            ids, start = encode.answer_pair(tokenizer, context, continuation)
            assert (ids[:start], ids[start:]) == (head, tail), (context, continuation)
            compared += 1
    assert compared > 150


def test_an_end_of_text_that_the_tokenizer_adds_stands_nowhere(tiny_llama, tasks_dir):
    plain, ending = make_byte_tokenizer(), with_end()
    assert (
        ending.encode("a") == [97, 256]
        and encode.appended(ending) == [256]
        and encode.appended(plain) == encode.appended(with_bos()) == []
    )
    for context, continuation in [*PAIRS[:6], *phrases(50)]:
        assert encode.encode_pair(ending, context, continuation) == encode.encode_pair(plain, context, continuation)
    assert encode.encode_pair(ending, "a", "b", end=True) == ([97, 98, 256], 1)
    assert (
        encode.encode_text(ending, "a<|eos|>") == [97, 256] and encode.encode_text(ending, "") == []
    )  # what the text itself says stays
    found, right = (
        harness.score(model=tiny_llama, tokenizer=tokenizer, tasks_dir=tasks_dir)[1] for tokenizer in (ending, plain)
    )
    assert found.equals(right)
    asked, _ = lm.build(tiny_llama, ending, scorer="hflm", batch_size=2)
    ids, seen = asked.tok_batch_encode(["ab", "c"])
    assert ids.tolist() == [[97, 98], [257, 99]] and seen.tolist() == [[1, 1], [0, 1]]


def test_without_a_prefix_a_text_is_scored_from_its_second_token(tiny_llama, tasks_dir, tmp_path):
    """The nats of a text are the model's own loss times its tokens less one; choices behind a prompt are not
    touched.
    """
    tokenizer = without_specials()
    scores, items = harness.score(model=tiny_llama, tokenizer=tokenizer, tasks_dir=tasks_dir)
    asked, _ = lm.build(tiny_llama, tokenizer, scorer="hflm", batch_size=2)
    texts = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(row["text"],), idx=0) for row in TEXT]
    for row, found, theirs in zip(
        TEXT, items[items.task == "general"].itertuples(), asked.loglikelihood_rolling(texts), strict=True
    ):
        ids = torch.tensor([list(row["text"].encode())])
        assert found.tokens == ids.shape[1] - 1 and theirs == pytest.approx(-found.score, rel=1e-5)
        if ids.shape[1] <= 512:  # one window
            assert found.score == pytest.approx(
                tiny_llama(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1), rel=1e-4
            )
    _, right = harness.score(model=tiny_llama, tokenizer=make_byte_tokenizer(), tasks_dir=tasks_dir)
    assert items[items.task != "general"].equals(right[right.task != "general"])
    nats = scores["general"]["nats_per_token"]
    assert probe(model=tiny_llama, sets={"general": encoded(TEXT, tokenizer)})["perplexity"] == pytest.approx(
        torch.tensor(nats).exp().item(), rel=1e-4
    )
    assert encoded([{"text": "a"}], tokenizer) == []  # nothing to score
    (tmp_path / "probe").mkdir()
    write_rows(tmp_path / "probe" / "general.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="probe set general: its texts have no token to score"):
        load_probes(tmp_path / "probe", tokenizer)
    with pytest.raises(UserError, match="the answer ' yes' has no prompt.*bos_token"):
        encode.encode_pair(tokenizer, "", " yes")
    with pytest.raises(UserError, match="no EOS token: name `eos_token`"):
        encode.encode_pair(tokenizer, "a", "b", end=True)


def test_answers_are_written_with_an_end_of_text_or_refused(tiny_llama):
    asked, plain = (
        lm.build(tiny_llama, tokenizer, scorer="shared-prefix", batch_size=1)[0]
        for tokenizer in (without_specials(), make_byte_tokenizer())
    )

    def request(prompt):
        return [
            Instance(
                request_type="generate_until",
                doc={},
                arguments=(prompt, {"until": [], "max_gen_toks": 9}),
                idx=0,
                metadata=("sums", 2, 1),
            )
        ]

    assert asked.generate_until(request("1 + 1 =")) == plain.generate_until(
        request("1 + 1 =")
    )  # the model's own end of text
    with pytest.raises(UserError, match="task sums, row 3 .*the prompt has no token"):
        asked.generate_until(request(""))
    theirs, _ = lm.build(tiny_llama, without_specials(), scorer="hflm", batch_size=1)
    with pytest.raises(
        UserError, match="task sums: lm-eval's HFLM writes answers only with a tokenizer that has an EOS"
    ):
        theirs.generate_until(request("1 + 1 ="))
    tiny_llama.generation_config.eos_token_id = None
    with pytest.raises(UserError, match="task sums: written answers have to end"):
        asked.generate_until(request("1 + 1 ="))
    nothing = Instance(request_type="loglikelihood_rolling", doc={}, arguments=("",), idx=0)
    assert asked.loglikelihood_rolling([nothing]) == [0.0]


def test_an_answer_without_a_token_is_told_with_its_row(tiny_llama):
    for tokenizer, context, answer, reason in (
        (with_merges(), PAIRS[0][0], PAIRS[0][1], "runs over the border"),
        (make_byte_tokenizer(), "a", "", "nothing in it"),
        (make_byte_tokenizer(), "", "", "nothing in it"),
        (trained("unigram"), "the", " ", "nothing in it"),
    ):
        with pytest.raises(UserError, match=reason):
            encode.answer_pair(tokenizer, context, answer)
        for scorer in lm.SCORERS:
            asked, _ = lm.build(tiny_llama, tokenizer, scorer=scorer, batch_size=1)
            request = Instance(
                request_type="loglikelihood", doc={}, arguments=(context, answer), idx=0, metadata=("birds", 4, 1)
            )
            with pytest.raises(UserError, match="task birds, row 5 of those scored: the answer"):
                asked.loglikelihood([request])
        with pytest.raises(UserError, match="a probe row: the answer"):
            encoded([{"context": context, "choices": [answer], "gold": 0}], tokenizer)


def test_an_answer_longer_than_the_model_is_told_with_its_row(tiny_llama, tmp_path):
    """Also where another model with more positions was asked before, and the ids were kept."""
    request = Instance(
        request_type="loglikelihood", doc={}, arguments=("a", "b" * 513), idx=0, metadata=("birds", 0, 1)
    )
    longer, _ = lm.build(
        build("llama", seed=0, max_position_embeddings=600),
        make_byte_tokenizer(),
        scorer="shared-prefix",
        batch_size=1,
        kept=tmp_path,
    )
    for kept in (None, tmp_path):
        asked, _ = lm.build(tiny_llama, make_byte_tokenizer(), scorer="shared-prefix", batch_size=1, kept=kept)
        with pytest.raises(UserError, match="task birds, row 1.*has 513 tokens, but the model takes 512"):
            asked.loglikelihood([request])
        assert longer.loglikelihood([request])[0][0] < 0 and len(list(tmp_path.iterdir())) == 1


def test_tokens_over_the_border_are_said(capsys):
    asked, _ = lm.build(build("llama", seed=0, vocab_size=330), with_merges(), scorer="shared-prefix", batch_size=1)
    pairs = [PAIRS[3], ("x", "y"), ("ends in spaces   ", "then this")]
    asked.loglikelihood(
        [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0, metadata=("birds", 7, 1))
            for pair in pairs
        ]
    )
    assert (
        "1 of 3 answers begin inside a token of the whole text, the first in task birds, row 8"
        in capsys.readouterr().out
    )


def test_the_tokenizers_differ_where_they_should():
    byte, bos, merged = make_byte_tokenizer(), with_bos(), with_merges()
    assert encode.encode_pair(bos, "a", "b")[0][0] == bos.bos_token_id
    assert encode.encode_pair(byte, "a", "b") == ([97, 98], 1)
    assert encode.encode_pair(byte, "", "b") == ([byte.eos_token_id, 98], 1)
    ids, start = encode.encode_pair(merged, *PAIRS[3])  # the border is inside a token: the whole is not the sum
    assert ids != merged.encode("".join(PAIRS[3]))


def test_training_ids_are_those_hflm_scores_for_the_gold_choice(tasks_dir, tiny_llama):
    tokenizer = with_bos()
    for name, task_name, metric in (
        ("science", "sciq", "acc"),
        ("hellaswag", "hellaswag", "acc_norm"),
        ("lambada_openai", "lambada_openai", "acc"),
        ("copa", "copa", "acc"),
    ):
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
