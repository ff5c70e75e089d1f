"""Scores of a model on the rows of an audit, kept by everything that they depend on."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel

from evaluation import SCORING, harness, versions
from evaluation.encode import encode_rolling
from evaluation.token_losses import token_losses
from experiments.audit import adapters, kept, tokenizers
from experiments.audit.data import Data
from experiments.audit.models import Model
from experiments.model import weights
from experiments.model.shape import Shape
from experiments.training import hardware
from methods.errors import UserError
from methods.tools import model_folder
from methods.tools.files import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model scored: as scores.json and items.csv.gz hold it, the seconds it took, whether it was kept before."""

    scores: Mapping[str, Any]
    items: pd.DataFrame
    seconds: float
    again: bool


class Folders:
    """The folders of models, where an adapter's is made when it is first asked for and deleted at the end."""

    def __init__(self, work: Path):
        self._work, self._made, self._stack = work, {}, ExitStack()

    def __enter__(self) -> "Folders":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def of(self, model: Model) -> Path:
        """The folder of the model's weights in Hugging Face layout. Raises UserError where an adapter does not fit."""
        if model.adapter is None:
            return model.folder
        if model.weights not in self._made:
            self._work.mkdir(parents=True, exist_ok=True)
            out = Path(self._stack.enter_context(TemporaryDirectory(dir=self._work, prefix="merged-"))) / "model"
            adapters.merge(
                model.adapter,
                base=self.of(model.base),
                tokenizer=model.tokenizer,
                out=out,
                given=model.given,
                rows=adapters.embedding_rows(model.adapter, model.base),
            )
            self._made[model.weights] = out
        return self._made[model.weights]


def score(
    model: Model,
    *,
    data: Data,
    folders: Folders,
    work: Path,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    where: torch.device,
    reference: Model | None = None,
) -> Scores:
    """The model's scores: those that are kept, or new ones, which are then kept.

    settings    what `harness.score` takes beside the model
    reference   the base whose predictions KL is measured against; None where the two do not predict the same tokens
    """
    key = _key(model, data, settings, dtype, where) | {"reference": reference and reference.weights}
    out = kept.folder_of(work / "scores", key)
    again = (out / "key.json").is_file()
    if not again:
        began = perf_counter()
        loaded = _loaded(model, folders.of(model), dtype=dtype, where=where, models=1 if reference is None else 2)
        digest = model.weights if model.adapter is None else weights.tensor_sha256(folders.of(model))
        scores, items = harness.score(
            model=loaded,
            tokenizer=model.tokenizer,
            tasks_dir=data.folder,
            weights_sha256=digest,
            kept=work.parent / "tokens",
            **settings,
        )
        if "bytes" not in items:
            sizes = pd.Series([len(text.encode()) for text in data.texts])
            general = items["task"] == "general"
            items["bytes"] = items["doc_id"].map(sizes).where(general)
            items["tokens"] = items["gold"].where(general)
        if reference is not None:
            items = _with_kl(items, loaded, model, reference, data, folders=folders, dtype=dtype, where=where)
        harness.save(scores, items, out)
        write_json(out / "evaluate.json", {"seconds": perf_counter() - began})
        write_json(out / "key.json", key)  # the last file: without it nothing is kept
    items = pd.read_csv(out / "items.csv.gz", dtype={"task": str}, keep_default_na=False, na_values=[""])
    seconds = read_json(out / "evaluate.json", "seconds")["seconds"]
    return Scores(scores=read_json(out / "scores.json"), items=items, seconds=seconds, again=again)


def _loaded(model: Model, folder: Path, *, dtype: torch.dtype, where: torch.device, models: int) -> PreTrainedModel:
    """The model to score; UserError where memory has no room for `models` of its size, or where it is damaged."""
    needed = models * Shape(config=model.config).parameters * dtype.itemsize
    if (free := hardware.available_memory(where)) is not None and free < needed:
        raise UserError(
            f"too little memory to score {model.given}: {needed / 2**30:.1f} GiB needed on {where.type} in "
            f"{str(dtype).removeprefix('torch.')}, {free / 2**30:.1f} GiB free; close other programs, use another "
            "--device, or state --dtype bfloat16"
        )
    loaded = weights.load_model(folder, dtype=dtype, device=where)
    model_folder.refuse_not_finite(dict(loaded.named_parameters()), model.given, then="save or fetch it again")
    return loaded


def _key(
    model: Model, data: Data, settings: Mapping[str, Any], dtype: torch.dtype, where: torch.device
) -> dict[str, Any]:
    """Everything that a model's scores depend on."""
    return {
        "weights": model.weights,
        "config": model.config_sha256,
        "tokenizer": tokenizers.sha256(model.tokenizer),
        "rows": data.sha256,
        "settings": json.loads(json.dumps(settings, default=str)),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else hardware.describe(where)["cpu"],
        "scoring": SCORING,
        "versions": versions(),
    }


def _with_kl(items, loaded, model: Model, reference: Model, data: Data, *, folders: Folders, dtype, where):
    """The items with KL(base‖tuned) and its reverse of each general passage, in nats per token."""
    sequences = []
    for text in data.texts:
        context, ids = encode_rolling(model.tokenizer, text)
        sequences.append(([*context, *ids], [False] + [True] * len(ids)))
    same = reference.weights == model.weights
    base = loaded if same else weights.load_model(folders.of(reference), dtype=dtype, device=where)
    losses = token_losses(loaded, sequences, reference=base, description="KL of general text")
    rows = items["task"] == "general"
    for name in ("kl", "kl_reverse"):
        items.loc[rows, name] = [getattr(one, name) / one.tokens if one.tokens else None for one in losses]
    return items
