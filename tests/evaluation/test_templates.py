"""Templates of a stranger's params.yaml reach rows and nothing else."""

from copy import copy

import lm_eval.utils
import pytest
import yaml
from jinja2 import BaseLoader, Environment, StrictUndefined
from jinja2.exceptions import SecurityError

from evaluation import chat, chat_template, documents, gold
from evaluation.catalogue import named
from evaluation.shipped import SHIPPED, shipped_config
from evaluation.task import make_task, render
from evaluation.templates import environment
from experiments.data import rows
from experiments.study.schema import Shaped
from methods.errors import UserError
from tests.evaluation.conftest import SCIQ, write_rows

RUN = "{{ cycler.__init__.__globals__.os.system('touch ' ~ '%s') }}"
ATTACKS = [
    RUN,
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch %s') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}%s",
    "{{ '{0.__class__.__init__.__globals__}'.format(question) }}%s",
    "{{ (question|attr('__class__')) }}%s",
    "{{ lipsum.__globals__['os'].popen('touch %s').read() }}",
]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target", "doc_to_choice", "description"])
def test_a_template_runs_no_program(tmp_path, attack, key):
    trap = tmp_path / "trap"
    with pytest.raises(UserError, match="unsafe|not a list of choices"):
        task = {"include": "sciq", key: attack % trap}
        render(make_task("own", task, write_rows(tmp_path / "rows.jsonl", SCIQ), metric="acc"))
    assert not trap.exists()


def test_neither_does_a_template_of_lm_evals_own_rows(tmp_path):
    trap = tmp_path / "trap"
    config = {"output_type": "generate_until", "doc_to_text": RUN % trap, "doc_to_target": "a", "test_split": "test"}
    config |= {"metric_list": [{"metric": "exact_match"}]}
    with pytest.raises(UserError, match="unsafe"):
        documents.kept("own", config, docs=[{"question": "q"}], examples=())
    with pytest.raises(SecurityError, match="unsafe"):
        gold.is_text(RUN % trap, {"question": "q"})
    assert not trap.exists()


def test_neither_does_a_chat_template_or_a_template_of_rows(tmp_path, byte_tokenizer):
    trap, turns = tmp_path / "trap", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UserError, match="unsafe"):
        chat_template.choose(copy(byte_tokenizer), RUN % trap)
    with pytest.raises(UserError, match="unsafe"):
        chat.encode(byte_tokenizer, turns, template=RUN % trap)
    for shaped in ({"set": {"a": RUN % trap}}, {"keep": RUN.strip("{} ") % trap}):
        with pytest.raises(UserError, match="unsafe"):
            rows.shape([{"a": "b"}], Shaped(**shaped), where="tasks.own")
    with pytest.raises(UserError, match="unsafe"):
        rows.text({"a": "b"}, RUN % trap, where="general")
    assert not trap.exists()


def test_a_template_changes_no_row():
    rows = [{"choices": ["a"]}]
    with pytest.raises(SecurityError):
        environment.from_string("{{ choices.append('b') }}").render(rows[0])
    assert rows == [{"choices": ["a"]}]


def test_lm_eval_itself_renders_in_the_sandbox():
    assert lm_eval.utils.env is environment
    with pytest.raises(SecurityError):
        lm_eval.utils.apply_template("{{ x.__class__ }}", {"x": 1})


def test_the_sandbox_writes_what_lm_eval_writes():
    plain = Environment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    plain.filters |= environment.filters
    row = {"choices": {"text": ["a", "b"], "label": ["A", "B"]}, "question": " Why?\n", "answer": "B", "n": 3}
    for template in (
        "{{question.strip()}}\nAnswer:\n",
        "{% for i in range(choices['text']|length) %}{{'ABCD'[i]}}. {{choices.text[i]}}\n{% endfor %}",
        "{{choices.label.index(answer)}}",
        "{{question|regex_replace('W', 'w')}}{{ '%s %d' % (answer, n) }}{{ '{} {}'.format(answer, n) }}",
        "{{question.split(' ')[:-1]|join(' ')}}{% set x = n + 1 %}{{x ** 2}}",
    ):
        assert environment.from_string(template).render(row) == plain.from_string(template).render(row)


@pytest.mark.parametrize("name", ["non_greedy_robustness_math_algebra", "ask_gec_p0", "cruxeval_input"])
def test_a_task_that_runs_texts_as_programs_is_refused(name):
    for ask in (shipped_config, lambda task: named(task, name="own")):
        with pytest.raises(UserError, match="runs (texts as programs|the programs that a model writes)"):
            ask(name)


def test_a_file_of_prompts_is_not_read(tmp_path):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(yaml.safe_dump({"prompts": {"one": {"doc_to_text": "x", "doc_to_target": "y"}}}))
    task = {"include": "sciq", "use_prompt": f"{prompts}:one"}
    with pytest.raises(UserError, match="use_prompt is .*write its templates"):
        make_task("own", task, write_rows(tmp_path / "rows.jsonl", SCIQ), metric="acc")
    with pytest.raises(UserError, match="use_prompt is .*write its templates"):
        named(task, name="own")


@pytest.mark.thorough
def test_every_template_that_lm_eval_ships_is_valid_in_the_sandbox():
    templates = 0
    for file in SHIPPED.rglob("*.yaml"):
        text = file.read_text(encoding="utf-8", errors="ignore")
        assert not any(word in text for word in (".append(", ".__", ".pop(", ".update(")), file
        templates += "{{" in text
    assert templates > 1000
