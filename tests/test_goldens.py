"""Golden weights of every method, and the laws that hold across methods."""

import json
from dataclasses import replace

import pytest
import torch

from experiments.training.settings import NUMERICS
from tests import goldens

STORED = json.loads(goldens.FILE.read_text())
# transformers' norms and rotary embeddings compute in float32 even in float64 models
TOLERANCE = 1e-6


def test_goldens_are_of_these_numerics():
    assert STORED["numerics"] == NUMERICS, "NUMERICS was raised: run `python -m tests.goldens` in the same commit"
    assert STORED["cells"].keys() == {f"{a}/{m}" for a in goldens.ARCHITECTURES for m in goldens.METHODS}


@pytest.mark.parametrize("cell", sorted(STORED["cells"]))
def test_final_weights(cell):
    architecture, method = cell.split("/")
    found = goldens.signature(goldens.final(architecture, goldens.METHODS[method]))
    wanted = STORED["cells"][cell]
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        scale = max(1.0, max(abs(v) for v in values))
        for ours, theirs in zip(found[name], values, strict=True):
            assert abs(ours - theirs) <= TOLERANCE * scale, (
                f"{cell} {name}: {ours} is not {theirs}; raise NUMERICS if that is meant"
            )


def test_methods_differ():
    signatures = [json.dumps(STORED["cells"][f"llama/{m}"]) for m in goldens.METHODS]
    assert len(set(signatures)) == len(signatures)


@pytest.mark.parametrize("method", sorted(goldens.METHODS))
def test_accumulation_multiplies_nothing(method):
    """A penalty added to every micro-batch's loss would count four times here; dropout is off, for it draws by
    batch.
    """
    blocks = {
        key: value | ({"dropout": 0.0} if key == "lora" else {}) for key, value in goldens.METHODS[method].items()
    }
    whole = goldens.final("llama", blocks, settings=replace(goldens.SETTINGS, micro_batch=4))
    pieces = goldens.final("llama", blocks, settings=replace(goldens.SETTINGS, micro_batch=1))
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=1e-5, atol=1e-7)
