"""What `show` prints of a domain's training examples, and of which model it takes the tokenizer."""

import re

import pytest
import torch

from experiments.commands import show
from experiments.model.random_models import EOS_ID, build, byte_tokenizer
from experiments.study.paths import Paths
from experiments.training.examples import IGNORED
from methods.errors import UserError
from tests.experiments.test_formats import CHATS, conversation, study, template


def test_show_prints_what_is_learned_and_what_is_left_out(tmp_path, capsys):
    rows = [*CHATS, {"messages": conversation("a", "")}]
    made = study(tmp_path, rows, "chat", chat_template=template(tmp_path))
    show.main(made, domain="d", rows=2, model="")
    said = capsys.readouterr().out
    assert re.search(r"^system: s<\|eos\|>user: ask \d+\?<\|eos\|>assistant: «say \d+\.<\|eos\|>»$", said, re.MULTILINE)
    assert "1 of 61 rows cannot be used: an empty answer (" in said and said.count("---") == 2
    assert "d: chat; 51 train, 3 probe, 6 test rows; 51 training examples of at most 64 tokens" in said
    example = {"input_ids": torch.tensor([*b"abc", EOS_ID]), "labels": torch.tensor([IGNORED, IGNORED, 99, EOS_ID])}
    assert show.marked(example, byte_tokenizer(), colour=True) == "ab\033[32mc<|eos|>\033[0m"
    with pytest.raises(UserError, match="unknown domain 'e'"):
        show.main(made, domain="e", rows=1, model="")
    away = made.model_copy(update={"models": {"tiny": made.models["tiny"].model_copy(update={"source": "hub:a/b"})}})
    with pytest.raises(UserError, match="the tokenizer of tiny is not on this machine yet: `dvc repro model@tiny`"):
        show.main(away, domain="d", rows=1, model="")
    # a study that takes the model over from the default study, where it is
    (tmp_path / "params.yaml").write_text("models: {tiny: {source: hub:a/b}}")
    byte_tokenizer().save_pretrained(default := Paths(root=tmp_path).model("tiny"))
    build("llama", seed=0).config.save_pretrained(default)
    block = type(made.models["tiny"]).model_validate({"source": "hub:a/b"})
    own = {"paths": Paths(root=tmp_path, study="own"), "models": {"tiny": block}}
    show.main(made.model_copy(update=own), domain="d", rows=1, model="")
    assert "tokenizer of tiny" in capsys.readouterr().out
