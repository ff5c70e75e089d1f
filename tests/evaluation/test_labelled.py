"""Labels of conversations against transformers' own marks, and by decoding what is labelled."""

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from evaluation import chat
from evaluation.encode import encode_rolling
from evaluation.labelled import encode_row, shortened
from experiments.model.random_models import EOS_ID, byte_tokenizer
from methods.errors import UserError

SPECIAL = (
    "<s> </s> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <bos> "
    "<start_of_turn> <end_of_turn> <|end|> <|endoftext|>"
).split()


def answer(text: str, marks: bool) -> str:
    """The part of a template that writes an answer and the end of its turn."""
    return "{% generation %}{{ " + text + " }}{% endgeneration %}" if marks else "{{ " + text + " }}"


def chatml(marks):
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        + answer("m['content'] + '<|im_end|>'", marks)
        + "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def llama3(marks):
    head = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    return (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ "
        + head
        + " }}{% if m['role'] == 'assistant' %}"
        + answer("m['content'] | trim + '<|eot_id|>'", marks)
        + "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )


def llama2(marks):
    """[INST] with the system turn inside of the first user turn, and roles that alternate."""
    return (
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
        "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if m['role'] == 'user' %}"
        "{{ '<s>[INST] ' + (system if loop.index0 == 0 else '') + m['content'].strip() + ' [/INST]' }}{% else %}"
        + answer("' ' + m['content'].strip() + ' </s>'", marks)
        + "{% endif %}{% endfor %}"
    )


def zephyr(marks):
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}"
        + answer("m['content'] + '</s>'", marks)
        + "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )


def gemma(marks):
    return (
        "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<start_of_turn>model\n' }}"
        + answer("m['content'] | trim + '<end_of_turn>'", marks)
        + "{% else %}{{ '<start_of_turn>user\n' + m['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )


ENDS = {chatml: "<|im_end|>", llama3: "<|eot_id|>", llama2: " </s>", zephyr: "</s>", gemma: "<end_of_turn>"}
LONG = [
    {"role": "system", "content": "Be brief: ünïcode, 日本語."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4, héhé 🙂"},
    {"role": "user", "content": "assistant\nand <<SYS>> 3?"},
    {"role": "assistant", "content": "No. 4, héhé 🙂\n\nis 2 + 2"},
    {"role": "user", "content": "No."},
    {"role": "assistant", "content": "No."},
]
CHATS = {"system, three answers": LONG, "one answer": LONG[1:3], "three answers": LONG[1:]}


@pytest.fixture(scope="module")
def tokenizer():
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": SPECIAL, "bos_token": "<s>"})
    return made


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("template", ENDS, ids=lambda template: template.__name__)
def test_labels_are_those_that_transformers_gives_where_a_template_marks_them(tokenizer, template, messages):
    if template is gemma:
        messages = [turn for turn in messages if turn["role"] != "system"]
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=template(marks=True), return_assistant_tokens_mask=True, return_dict=True
    )
    for marks in (True, False):
        ids, labels, size = encode_row(tokenizer, {"messages": messages}, template=template(marks=marks))
        assert ids == theirs["input_ids"] and labels == [bool(mask) for mask in theirs["assistant_masks"]]
        answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
        before = " " if template is llama2 else ""
        labelled = tokenizer.decode([token for token, labelled in zip(ids, labels) if labelled])
        assert labelled == "".join(before + text + ENDS[template] for text in answers)
        assert size == sum(len(text.encode()) for text in answers)
        assert chat.learns_to_stop(tokenizer, ids, labels)


@pytest.mark.parametrize("template", ENDS, ids=lambda template: template.__name__)
def test_a_token_over_the_border_is_labelled_as_transformers_labels_it(tokenizer, template):
    """A tokenizer whose tokens run over every border but those of special tokens, such as a line and an answer."""
    messages = [turn for turn in LONG if turn["role"] != "system"]
    texts = [
        tokenizer.apply_chat_template(messages[:count], chat_template=template(marks=False), tokenize=False)
        for count in (2, 4, 6)
    ]
    merged = Tokenizer(BPE())
    merged.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    merged.train_from_iterator(
        texts * 9, BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    )
    other = PreTrainedTokenizerFast(tokenizer_object=merged, bos_token="<s>", eos_token="</s>")
    theirs = other.apply_chat_template(
        messages, chat_template=template(marks=True), return_assistant_tokens_mask=True, return_dict=True
    )
    for marks in (True, False):
        ids, labels, _ = encode_row(other, {"messages": messages}, template=template(marks=marks))
        assert ids == theirs["input_ids"] and labels == [bool(mask) for mask in theirs["assistant_masks"]]
    assert len(ids) < len(texts[-1]) / 2


def test_a_template_that_writes_the_date_writes_one_day(tokenizer):
    """As Llama's and Mistral's do."""
    llama = "{%- if not today is defined %}{%- set today = strftime_now('%d %b %Y') %}{%- endif %}{{- today }}"
    for written, date in (
        (llama, "26 Jul 2024"),
        ("{{ 'On ' + strftime_now('%Y-%m-%d, %A %B') }}", "On 2024-07-26, Friday July"),
    ):
        ids, labels, _ = encode_row(tokenizer, {"messages": LONG[1:]}, template=written + chatml(marks=True))
        _, plain, _ = encode_row(tokenizer, {"messages": LONG[1:]}, template=date + chatml(marks=True))
        assert tokenizer.decode(ids).startswith(f"{date}<|im_start|>user") and labels == plain


def test_a_bos_that_the_template_writes_is_there_once(tokenizer):
    ids, _, _ = encode_row(tokenizer, {"messages": LONG[1:3]}, template=llama2(marks=False))
    assert ids.count(tokenizer.bos_token_id) == 1 == [tokenizer.decode(token) for token in ids].count("<s>")


def test_marks_without_the_end_of_the_turn_are_taken_and_told(tokenizer):
    template = chatml(marks=True).replace(
        "m['content'] + '<|im_end|>' }}{% endgeneration %}", "m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}"
    )
    ids, labels, _ = encode_row(tokenizer, {"messages": LONG[1:3]}, template=template)
    assert tokenizer.decode([token for token, labelled in zip(ids, labels) if labelled]) == "4, héhé 🙂"
    assert not chat.learns_to_stop(tokenizer, ids, labels)


def test_an_end_that_stands_only_behind_the_last_turn_is_of_that_turn_alone(tokenizer):
    """Phi-3's template writes an end of text behind the whole conversation, and ends each turn by another token."""
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
    )
    ids, labels, _ = encode_row(tokenizer, {"messages": LONG[1:]}, template=template)
    expected = "".join(turn["content"] + "<|end|>" for turn in LONG if turn["role"] == "assistant")
    assert tokenizer.decode([token for token, labelled in zip(ids, labels) if labelled]) == expected


def test_without_a_token_that_ends_turns_all_that_the_template_writes_is_labelled(tokenizer):
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    ids, labels, _ = encode_row(tokenizer, {"messages": LONG}, template=template)
    expected = "".join(turn["content"] + "\n\n" for turn in LONG if turn["role"] == "assistant")
    assert tokenizer.decode([token for token, labelled in zip(ids, labels) if labelled]) == expected


def test_what_a_template_writes_for_the_last_answer_alone_is_labelled_there(tokenizer):
    """Qwen3 writes empty thinking before the last answer and before no other."""
    thinking = "'<think>\n\n</think>\n\n' if loop.last else ''"
    template = chatml(marks=False).replace(
        "{{ m['content'] + '<|im_end|>' }}{% else %}",
        "{{ (" + thinking + ") + m['content'] + '<|im_end|>' }}{% else %}",
    )
    ids, labels, _ = encode_row(tokenizer, {"messages": LONG[1:5]}, template=template)
    expected = f"{LONG[2]['content']}<|im_end|><think>\n\n</think>\n\n{LONG[4]['content']}<|im_end|>"
    assert tokenizer.decode([token for token, labelled in zip(ids, labels) if labelled]) == expected


@pytest.mark.parametrize(
    "template",
    [
        chatml(False).replace(
            "m['content'] + '<|im_end|>' }}{% else",
            "('<think></think>' if loop.last else '') + m['content'] + '<|im_end|>' }}{% else",
        ),
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
    ],
    ids=["thinking before the last answer", "an end behind the last turn"],
)
def test_a_turn_of_the_user_is_not_labelled_where_the_tokens_of_turns_are_plain_text(template):
    """A template of another model: this tokenizer has none of its tokens."""
    plain = byte_tokenizer()
    ids, labels, _ = encode_row(plain, {"messages": LONG[1:5]}, template=template)
    labelled = plain.decode([token for token, labelled in zip(ids, labels) if labelled])
    first, last = (turn["content"] + "<|im_end|>\n" for turn in LONG[2:5:2])
    before, behind = ("<think></think>", "") if "think" in template else ("", "<|endoftext|>")
    assert labelled == first + before + last + behind


SYSTEM_LAST = (  # Mistral's third template writes the system turn into the last turn of the user
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.index0 >= messages | length - 3 else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (gemma(False), LONG, "the chat template refuses it: System role not supported"),
        (llama2(False), [LONG[1], LONG[1], LONG[2]], "refuses it: Conversation roles must alternate"),
        (SYSTEM_LAST, LONG, "turn 3, and .*earlier turns are rewritten"),
        (
            chatml(False).replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"),
            LONG,
            "writes '<think>.*turn 3, and '4, héhé",
        ),
        (
            chatml(False).replace(
                "m['content'] + '<|im_end|>' }}{% else", "m['content'].split('</think>')[-1] + '<|im_end|>' }}{% else"
            ),
            [LONG[1], {"role": "assistant", "content": "<think>hm</think>4"}],
            "leaves out or rewrites a part of the answer '<think>hm</think>4'",
        ),
        ("{% for m in messages %}{{ m['content'] }", LONG, "is not valid Jinja: line 1"),
        ("{{ messages[0].nothing.at.all }}", LONG, "the chat template (fails on|refuses) it"),
        (
            "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
            + chatml(False),
            LONG[2:],
            "it begins with a turn of the assistant, for which",
        ),
        (
            "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>' }}"
            "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
            LONG[2:],
            "it begins with a turn of the assistant, for which",
        ),
        (chatml(True), LONG[:2], "marks nothing of this conversation"),
        (None, LONG, "has no chat template: name a file"),
    ],
)
def test_a_conversation_that_a_template_does_not_take_is_refused_by_name(tokenizer, template, messages, message):
    with pytest.raises(UserError, match=message):
        encode_row(tokenizer, {"messages": messages}, template=template)


def test_a_conversation_is_cut_behind_the_last_answer_that_fits(tokenizer):
    ids, labels, _ = encode_row(tokenizer, {"messages": LONG}, template=chatml(marks=False))
    whole, _, _ = encode_row(tokenizer, {"messages": LONG[:5]}, template=chatml(marks=False))
    end = len(whole) - 1  # without the line that the template writes behind the turn
    for length in (len(ids) - 2, end + 1, end):  # behind the last answer is a line, too
        cut, kept = shortened(ids, labels, length)
        assert cut == ids[:end] and kept == labels[:end] and cut[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    first, _ = shortened(ids, labels, end - 1)
    assert tokenizer.decode(first).endswith("4, héhé 🙂<|im_end|>")
    assert shortened(ids, labels, len(ids)) == (ids, labels)
    assert shortened(ids, labels, 20) is None


def test_a_document_is_labelled_from_its_first_token_to_its_end():
    plain = byte_tokenizer()
    ids, labels, size = encode_row(plain, {"text": "héllo"})
    context, text = encode_rolling(plain, "héllo")
    assert ids == [*context, *text, EOS_ID] and labels == [False] + [True] * 7 and size == 6


def test_a_pair_is_labelled_on_its_completion_and_end():
    row = {"context": "Q: é", "choices": [" A"], "gold": 0, "end": True}
    ids, labels, size = encode_row(byte_tokenizer(), row)
    assert [token for token, labelled in zip(ids, labels) if labelled] == [*b" A", EOS_ID] and size == 2
    assert ids[:5] == [*"Q: é".encode()]
    assert encode_row(byte_tokenizer(), row | {"context": "Q: é ", "choices": ["A"]}) == (ids, labels, size)
