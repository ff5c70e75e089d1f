"""Scores of a model on the rows of an audit, kept by everything that they depend on."""

import gc
import json
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel

from evaluation import SCORING, harness, versions
from evaluation.token_losses import HiddenRows
from experiments.audit import adapters, kept
from experiments.audit.data import Data
from experiments.audit.models import Model
from experiments.model import reference as references
from experiments.model import weights
from experiments.model.shape import Shape
from experiments.training import hardware
from methods.errors import UserError, out_of_memory
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
    template: bool | str,
    dtype: torch.dtype,
    where: torch.device,
    reference: Model | None = None,
) -> Scores:
    """The model's scores: those that are kept, or new ones, which are then kept.

    settings    what `harness.score` takes beside the model
    template    the chat template of the prompts, or False
    reference   the base whose predictions KL is measured against; None where the two do not predict the same tokens
    Raises UserError where memory has no room.
    """
    settings = {**settings, "chat_template": template}
    key = _key(model, data, settings, dtype, where) | {"reference": reference and reference.weights}
    out = kept.folder_of(work / "scores", key)
    if known := _read(out):
        return known
    began, how = perf_counter(), {"data": data, "folders": folders, "work": work, "settings": settings}
    try:
        scores, items = _scored(model, reference, **how, dtype=dtype, device=where)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"out of memory while scoring {model.given}: lower --batch-size (it is {settings['batch_size']}), state "
            "--dtype bfloat16, or use a machine with more"
        ) from error
    harness.save(scores, items, out)
    write_json(out / "key.json", key)
    write_json(out / "evaluate.json", {"seconds": perf_counter() - began})  # the last: without it nothing is kept
    return replace(_read(out), again=False)


def _read(out: Path) -> Scores | None:
    """The scores that are kept in a folder; None where there are none, or where a file is damaged."""
    try:
        seconds = read_json(out / "evaluate.json", "seconds")["seconds"]
        items = pd.read_csv(
            out / "items.csv.gz", dtype={"task": str, "choices": str}, keep_default_na=False, na_values=[""]
        )
        return Scores(scores=read_json(out / "scores.json", "tasks"), items=items, seconds=seconds, again=True)
    except (UserError, OSError, EOFError, ValueError, zlib.error):
        return None


def _scored(
    model: Model,
    reference: Model | None,
    *,
    data: Data,
    folders: Folders,
    work: Path,
    settings: Mapping[str, Any],
    **how: Any,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """What `harness.score` gives of a model, `how` its dtype and device; one model is in memory at a time."""
    base = None if reference is None else _predictions(reference, data, settings, folders, work, **how)
    folder = folders.of(model)
    return harness.score(
        model=_loaded(model, folder, **how),
        tokenizer=model.tokenizer,
        tasks_dir=data.folder,
        weights_sha256=model.weights if model.adapter is None else weights.tensor_sha256(folder),
        kept=work.parent / "tokens",
        reference=base,
        **settings,
    )


def _loaded(model: Model, folder: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model to score; UserError where memory has no room for it, or where it is damaged."""
    needed = Shape(config=model.config).parameters * dtype.itemsize
    if (hardware.available_memory(device) or 0) < 2 * needed:
        gc.collect()  # the model before this one
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if (free := hardware.available_memory(device)) is not None and free < needed:
        raise UserError(
            f"too little memory to score {model.given}: {needed / 2**30:.1f} GiB needed on {device.type} in "
            f"{str(dtype).removeprefix('torch.')}, {free / 2**30:.1f} GiB free; close other programs, use another "
            "--device, or state --dtype bfloat16"
        )
    loaded = weights.load_model(folder, dtype=dtype, device=device)
    model_folder.refuse_not_finite(dict(loaded.named_parameters()), model.given, then="save or fetch it again")
    return loaded


def _predictions(
    base: Model, data: Data, settings: Mapping[str, Any], folders: Folders, work: Path, **how: Any
) -> HiddenRows | PreTrainedModel | None:
    """What the base predicts of the general text, kept for the next tuned model, as `harness.score` takes it."""
    return references.reference(
        folders.of(base),
        key=(base.weights, base.config_sha256, base.tokenizer_sha256),
        sequences=harness.general_passages(data.folder, base.tokenizer),
        tokens=harness.pass_tokens(settings["batch_size"]),
        kept=work.parent / "reference",
        **how,
    )


def _key(
    model: Model, data: Data, settings: Mapping[str, Any], dtype: torch.dtype, where: torch.device
) -> dict[str, Any]:
    """Everything that a model's scores depend on."""
    return {
        "weights": model.weights,
        "config": model.config_sha256,
        "tokenizer": model.tokenizer_sha256,
        "rows": data.sha256,
        "settings": json.loads(json.dumps(settings, default=str)),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else hardware.describe(where)["cpu"],
        "scoring": SCORING,
        "versions": versions(),
    }
