"""Tiny real models: random GPT-J and Llama, float32, and the byte-level tokenizer they share."""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes on two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
import torch

from experiments.model.random_models import build
from experiments.model.random_models import byte_tokenizer as make_tokenizer
from tests import warm_python

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_not_searched_for_garbage():
    """A collection takes a fifth of a second where every object of torch, transformers and MLflow is looked at."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny_llama():
    return build("llama", seed=0)


@pytest.fixture
def tiny_llama_untied():
    return build("llama", seed=0, tie_word_embeddings=False)


@pytest.fixture
def tiny_gptj():
    return build("gptj", seed=0)


@pytest.fixture(scope="session")
def byte_tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def warm_folder():
    with warm_python.folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def warm_python_on_path(warm_folder):
    """`python` and `dvc` start without importing libraries, while a module's tests run; see warm_python.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{warm_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
        yield


SLOW = ("test_pipeline.py", "test_interruption.py", "test_sharding.py")


def pytest_collection_modifyitems(items):
    """The files that take longest begin first: a worker that gets one of them last keeps the other one waiting."""
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))
