"""GPT-J's published checkpoint is one .bin of pickled tensors: a file of its shape is made here and converted.

By default it has two narrow blocks. The real shape takes 24 GB of disk below pytest's `--basetemp`, some minutes, and
hardly any memory:

    HOLDFAST_FULL_SIZE=1 python -m pytest -n 0 tests/experiments/test_bin_at_full_size.py
"""

import os
import re
import threading
from pathlib import Path

import pytest
import torch

from experiments.bench import sizes
from experiments.model import random_models, weights
from experiments.model.base import load_tensors
from experiments.study.schema import Model
from methods.tools.files import sha256

FULL = bool(os.environ.get("HOLDFAST_FULL_SIZE"))
MEMORY = 2 << 30  # bytes that a process may take beside its mapped files; the model is 12 GB
STATUS = Path("/proc/self/status")


class Watched:
    """The most memory of its own that the process takes inside the block, in bytes."""

    def __enter__(self):
        self.most, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self):
        while not self._done.wait(0.05):
            self.most = max(self.most, 1024 * int(re.search(r"RssAnon:\s+(\d+)", STATUS.read_text())[1]))

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()


def mapped(file, shape, number):
    """A tensor that lies in a sparse file: its first row has numbers of its own, the rest are zeros."""
    count = shape.numel()
    with file.open("wb") as made:
        made.truncate(2 * count)
    tensor = torch.from_file(str(file), shared=True, size=count, dtype=torch.bfloat16)
    row = shape[-1]
    tensor[:row] = torch.arange(row, dtype=torch.float32).remainder(97).add(number).bfloat16()
    return tensor.view(shape)


@pytest.mark.skipif(not STATUS.is_file(), reason="this system does not tell what memory a process takes")
def test_a_bin_is_mapped_and_written_tensor_by_tensor(tmp_path):
    shape = sizes.shape_named("gptj-6b", tiny=not FULL)
    sources, old = tmp_path / "sources", tmp_path / "old"
    for folder in (sources, old):
        folder.mkdir()
    expected = {
        name: mapped(sources / str(number), p.shape, number)
        for number, (name, p) in enumerate(shape.build().named_parameters())
    }
    positions = shape.config.max_position_embeddings  # buffers that GPT-J's file has, and this version does not
    buffers = {
        f"transformer.h.{block}.attn.{name}": tensor
        for block in range(shape.config.n_layer)
        for name, tensor in (
            ("bias", torch.ones(1, 1, positions, positions, dtype=torch.uint8).tril()),
            ("masked_bias", torch.tensor(-1e9)),
        )
    }
    torch.save(expected | buffers, old / "pytorch_model.bin")
    shape.config.save_pretrained(old)
    random_models.byte_tokenizer().save_pretrained(old)
    if FULL:
        assert (old / "pytorch_model.bin").stat().st_size > 12e9
    block = Model(source=f"path:{old}", dtype="bfloat16", bin_sha256=sha256(old / "pytorch_model.bin"))
    with Watched() as memory:
        made = weights.materialise(name="gptj", block=block, packages={}, out_dir=tmp_path / "new")
    assert memory.most < MEMORY
    found = load_tensors(tmp_path / "new")
    assert found.keys() == expected.keys() and made["parameters"] == shape.parameters
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) == (3 if FULL else 1)
