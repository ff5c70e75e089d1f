"""Files inside a data set stay closed, wherever they point."""

import json
from pathlib import Path

import datasets
import pytest
from pyarrow import parquet

from experiments.data import media, rows
from experiments.data.data_sets import DataSets
from experiments.study import schema
from methods.errors import UserError
from tests.experiments.hub_server import Hub

STRUCT = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
FILE_AS_STRUCT = {"image": STRUCT, "more": datasets.List(STRUCT)}


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


def pictured(url: str) -> datasets.Dataset:
    given = [{"question": f"q{n}", "image": {"bytes": None, "path": f"{url}/someone/{n}.png"}} for n in range(3)]
    features = {"question": datasets.Value("string"), "image": datasets.Image()}
    features |= {"more": datasets.List(datasets.Image()), "any": datasets.Json()}
    given = [row | {"more": [row["image"]], "any": {"a": [1, "b"]}} for row in given]
    return datasets.Dataset.from_list(given, features=datasets.Features(features))


def save(made: datasets.Dataset, folder: Path) -> None:
    """As `save_to_disk` of someone who wants the reader to fetch: it would put the pictures into the file itself."""
    plain = made.cast(
        datasets.Features({name: FILE_AS_STRUCT.get(name, made.features[name]) for name in made.features})
    )
    plain.save_to_disk(str(folder))
    about = json.loads((folder / "dataset_info.json").read_text())
    about["features"] = made.features.to_dict()
    (folder / "dataset_info.json").write_text(json.dumps(about))


def test_a_picture_that_lies_on_the_network_is_not_fetched(tmp_path, hub):
    made = pictured(hub.url)
    save(made, tmp_path / "saved")
    (tmp_path / "hub/someone/rows").mkdir(parents=True)
    table = made.data.table.cast(made.features.arrow_schema)  # `to_parquet` would put the pictures into the file
    parquet.write_table(table, tmp_path / "hub/someone/rows/train-00000-of-00001.parquet")
    block = schema.Rows.model_validate({"local": str(tmp_path / "saved")})
    local = rows.read(block, packages={}, prefer="pypi", where="tasks.own").rows
    data_sets = DataSets(folder=tmp_path / "hub", hashes=tmp_path / "hashes")
    splits, _ = data_sets("someone/rows", None, {})
    block = schema.Rows.model_validate({"hub": {"path": str(tmp_path / "hub/someone/rows"), "split": "train"}})
    named = rows.read(block, packages={}, prefer="hub", where="tasks.own").rows
    for found in (local, list(splits["train"]), named):
        assert [row["question"] for row in found] == ["q0", "q1", "q2"]
        assert found[0]["image"] == found[0]["more"][0] == {"bytes": None, "path": f"{hub.url}/someone/0.png"}
        assert found[0]["any"] == {"a": [1, "b"]}
    assert hub.asked == []


@pytest.mark.parametrize("reader", ["sql", "pandas", "iceberg", "xml", "webdataset"])
def test_readers_that_open_databases_networks_or_archives_are_refused(tmp_path, reader):
    block = schema.Rows.model_validate({"hub": {"path": reader, "split": "train"}})
    for read in (
        lambda: rows.read(block, packages={}, prefer="hub", where="tasks.own"),
        lambda: DataSets(folder=None, hashes=tmp_path)(reader, None, {"con": f"sqlite:///{tmp_path}/made.db"}),
    ):
        with pytest.raises(UserError, match=f"{reader}' is a reader of the library `datasets`, and of these only"):
            read()
    assert not list(tmp_path.iterdir())


def test_a_data_set_without_files_is_the_same_object():
    plain = datasets.Dataset.from_list([{"a": 1, "b": ["x"], "c": {"d": "e"}}])
    assert media.unopened(plain) is plain
