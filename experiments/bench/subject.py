"""What benchmarks of whole steps work on: the default study's model and rows if work/ has them, else random ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from experiments.model import weights
from experiments.model.base import dtype_of, load_tensors
from experiments.model.random_models import build, byte_tokenizer
from experiments.study import config
from experiments.study.config import Study
from experiments.training import hardware
from experiments.training.batches import Example, schedule
from experiments.training.examples import encoded
from experiments.training.prepared import encoded_text
from experiments.training.settings import TrainSettings
from methods.tools.files import read_json


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, rows of a domain and general text, on the CPU, with the default study's settings.

    make     a new model in `dtype`, in which forward and backward run
    base     θ₀ by parameter name, in the checkpoint's own dtype
    domain   examples whose answers alone are labelled; `general` has a label on every token
    tokenizer  for parts that sample or encode text
    """

    name: str
    study: Study
    make: Callable[[], PreTrainedModel]
    dtype: torch.dtype
    base: Mapping[str, Tensor]
    domain: list[Example]
    general: list[Example]
    tokenizer: Any

    @property
    def tiny(self) -> bool:
        return sum(tensor.numel() for tensor in self.base.values()) < 1e6

    def steps(self, method: str, batch: list[Example], count: int) -> TrainSettings:
        """The study's settings of `method` for `count` steps on one batch."""
        model, domain = _first(self.study)
        settings = self.study.settings(model=model, domain=domain, method=method)
        return replace(settings, batch=len(batch), micro_batch=len(batch), epochs=float(count), probes=0)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def facts(self, batch: list[Example]) -> dict[str, object]:
        """What a reader needs to know of a race of steps on `batch`."""
        return {
            "tokens a step": sum(len(example["input_ids"]) for example in batch),
            "weights": sum(tensor.numel() for tensor in self.base.values()),
            "computed in": self.dtype_name,
            "threads": torch.get_num_threads(),
        }

    def batch(self, size: int = 8) -> list[Example]:
        """The batch of the domain's first epoch whose number of tokens is the median."""
        lengths = [len(example["input_ids"]) for example in self.domain]
        plan = sorted(schedule(lengths, size, 0, 1.0), key=lambda rows: sum(lengths[i] for i in rows))
        return [self.domain[i] for i in plan[len(plan) // 2]]


def find(*, small: bool, real: bool = True) -> Subject:
    """The default study's, or a random one where that is missing or not wanted (`real`), or a tiny one (`small`)."""
    study = config.load()
    model, domain = _first(study)
    folder, data = study.paths.model(model), study.paths.data
    train, general = data / "train" / domain / "train.jsonl", data / "general" / "importance.jsonl"
    if real and not small and all(path.is_file() for path in (folder / "base.json", train, general)):
        return _real(study, folder, train, general)
    return _random(study, small=small)


def _first(study: Study) -> tuple[str, str]:
    return study.grid.models[0], study.grid.domains[0]


def _real(study: Study, folder: Path, train: Path, general: Path) -> Subject:
    model, domain = _first(study)
    dtype = study.compute_dtype(model, dtype_of(read_json(folder / "base.json")), hardware.device("cpu"))
    tokenizer = weights.load_tokenizer(folder)
    length = study.settings(model=model, domain=domain, method=study.grid.methods[0]).length
    return Subject(
        name=f"{model}, {domain}",
        study=study,
        make=partial(weights.load_model, folder, dtype=dtype),
        dtype=dtype,
        base=load_tensors(folder),
        domain=encoded(train, tokenizer, length),
        general=encoded_text(general, tokenizer, length),
        tokenizer=tokenizer,
    )


def _random(study: Study, *, small: bool) -> Subject:
    sizes = {} if small else {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "vocab_size": 8192}
    make = partial(build, "llama", seed=0, **sizes)
    model, draw = make(), torch.Generator().manual_seed(0)
    longest = 24 if small else 160

    def examples(count: int, labelled: float) -> list[Example]:
        drawn = []
        for length in torch.randint(longest // 2, longest + 1, (count,), generator=draw).tolist():
            ids = torch.randint(2, model.config.vocab_size, (length,), generator=draw)
            labels = ids.clone()
            labels[: length - max(1, int(labelled * length))] = -100
            drawn.append({"input_ids": ids, "labels": labels})
        return drawn

    return Subject(
        name=f"random Llama of {sum(p.numel() for p in model.parameters()) / 1e6:.2g} M weights, random rows",
        study=study,
        make=make,
        dtype=torch.float32,
        base={name: p.detach().clone() for name, p in model.named_parameters()},
        domain=examples(64, 0.1),
        general=examples(64, 1.0),
        tokenizer=byte_tokenizer(),
    )
