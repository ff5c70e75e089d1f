"""The paper behind hierarchical importance (arXiv 2501.13669) claims preparation about 20 times faster and 10-15 % of
the storage of EWC-LoRA's, which computes and keeps a Fisher of the whole model. Here everyone prepares from the same
documents: its importance, along a phase of LoRA training; the whole model's Fisher as the published scripts approximate
it, from batches of 8 and of 1; and an exact Fisher of the adapted matrices alone, in the same bits. Only `prepare` is
timed, as in a cell; storage is of real files.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from experiments.bench import running, subject
from experiments.bench.race import Race, race
from methods.ewc import EWC
from methods.tools.stored import save_importance

TITLE = "Preparing importance: 20 times faster, 10-15 % of the storage?"
OURS, SAME = "hierarchical", "Fisher, adapted matrices"
PUBLISHED = {8: "EWC-LoRA, batches of 8", 1: "EWC-LoRA, batches of 1"}
CLAIM = {"times_faster": 20.0, "storage": (0.10, 0.15)}
# documents the published code reads: hierarchical's own phase, and the two Fisher scripts by their batch size
EPOCHS, DOCUMENTS = 5, {OURS: 2000, 8: 5000, 1: 20000}


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Times of a baseline are multiples of hierarchical's; storage is hierarchical's as a share of a baseline's."""

    documents: int
    tokens: int
    times: dict[int, float]  # the published baseline's, by its batch size
    times_same: float
    storage: float  # of the published baseline's files
    storage_same: float
    entries: float  # importances kept, as a share of the published baseline's

    def by_arithmetic(self) -> dict[int, float]:
        """The times at the published numbers of documents; documents are taken to be equally long."""
        return {size: ratio * DOCUMENTS[size] / (DOCUMENTS[OURS] * EPOCHS) for size, ratio in self.times.items()}

    def sentence(self) -> str:
        """What was found of the claim and where the difference comes from."""
        most, larger = max(self.times.values()), max(self.by_arithmetic().values())
        low, high = CLAIM["storage"]
        each = " and ".join(f"{_times(ratio)} (batches of {size})" for size, ratio in self.times.items())
        time = (
            f"On the same {self.documents} documents ({self.tokens:,} tokens) the published baseline takes {each} as "
            f"long to prepare as hierarchical importance; the paper claims about {CLAIM['times_faster']:g} times. An "
            f"exact Fisher of the adapted matrices alone takes {_times(self.times_same)} as long. "
        )
        if most >= CLAIM["times_faster"] / 2:
            time += "So work per token accounts for most of the claim"
        elif larger >= CLAIM["times_faster"] / 2:
            time += (
                f"The published numbers of documents would make it {_times(larger)} (arithmetic): with them, most of "
                "the claim is accounted for"
            )
        else:
            time += (
                f"The published numbers of documents would make it {_times(larger)} at most (arithmetic): what is left "
                "of the claim comes neither from work per token nor from the documents, as measured here"
            )
        if self.times_same < 1:
            time += ", and a Fisher gives importance of the same matrices in less time"
        storage = (
            f". Its importance takes {_percent(self.storage)} of the published baseline's storage, where the paper "
            f"claims {_percent(low)} to {_percent(high)}: "
        )
        if self.storage < self.entries * 0.95:
            storage += (
                f"{_percent(self.entries)} because only the adapted matrices are kept, the rest of the way because an "
                "entry is kept in fewer bits. "
            )
        else:
            storage += f"the adapted matrices are {_percent(self.entries)} of the weights. "
        if abs(self.storage_same - 1) < 0.1:
            storage += (
                f"A Fisher of the same matrices, kept in the same way, takes as much ({_percent(self.storage_same)}): "
                "the saving comes from what is kept, not from the kind of importance."
            )
        else:
            storage += (
                "Of the storage of a Fisher of the same matrices, kept in the same way, it takes "
                f"{_percent(self.storage_same)}."
            )
        return time + storage


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    on = subject.find(small=small)
    documents = on.general[: 6 if small else 16]
    hierarchical = on.study.methods["hierarchical"].parts
    adapting = tuple(part for part in hierarchical if "adapts" in part.capabilities)
    own = next(part for part in hierarchical if part.key == "hierarchical")
    given = {"samples": len(documents), "length": own.length}
    contestants = {
        OURS: (*adapting, replace(own, samples=len(documents), epochs=1.0)),
        **{
            name: (*adapting, EWC(scope="whole-model", estimator="batched", batch_size=size, bits=32, **given))
            for size, name in PUBLISHED.items()
        },
        SAME: (*adapting, EWC(bits=own.bits, **given)),
    }
    common = {
        "make": on.make,
        "base": on.base,
        "general": documents,
        "device": torch.device("cpu"),
        "compute_dtype": on.dtype,
        "settings": replace(on.study.prepare_settings(model=on.study.grid.models[0], method="hierarchical"), probes=0),
    }
    sizes: dict[str, dict[str, int]] = {}
    tokens: dict[str, int] = {}

    def seconds(name: str) -> float:
        preparation = running.prepare(parts=contestants[name], **common)
        if name not in sizes:
            sizes[name] = _stored(preparation.states, plain=name in PUBLISHED.values())
        tokens[name] = preparation.tokens
        return preparation.seconds

    timed = race(
        f"{on.name}: {len(documents)} documents of general text",
        {name: partial(seconds, name) for name in contestants},
        against=OURS,
        rounds=rounds or 3,
        warm=int(small),
        own_clock=True,
    )
    whole = sizes[PUBLISHED[8]]
    findings = Findings(
        documents=len(documents),
        tokens=tokens[OURS],
        times={size: timed.ratio_median(name) for size, name in PUBLISHED.items()},
        times_same=timed.ratio_median(SAME),
        storage=sizes[OURS]["importance"] / whole["importance"],
        storage_same=sizes[OURS]["importance"] / sizes[SAME]["importance"],
        entries=sizes[OURS]["entries"] / whole["entries"],
    )
    facts = {
        "sentence": findings.sentence(),
        "paper: times faster": CLAIM["times_faster"],
        "paper: share of the storage": list(CLAIM["storage"]),
        "times as long, EWC-LoRA by batch size": {str(size): _short(t) for size, t in findings.times.items()},
        "times as long, Fisher of the adapted matrices": _short(findings.times_same),
        "share of EWC-LoRA's storage": _short(findings.storage),
        "share of EWC-LoRA's entries": _short(findings.entries),
        "share of the storage of a Fisher of the adapted matrices": _short(findings.storage_same),
        "arithmetic, not measured: times as long at the published numbers of documents, by batch size": {
            str(size): _short(t) for size, t in findings.by_arithmetic().items()
        },
        "published documents, hierarchical": f"{DOCUMENTS[OURS]:,} in {EPOCHS} epochs",
        "published documents, EWC-LoRA by batch size": {str(size): DOCUMENTS[size] for size in PUBLISHED},
        "tokens read": tokens,
        "microseconds a token": {n: _short(1e6 * median(timed.seconds[n]) / tokens[n]) for n in contestants},
        "entries": {name: size.pop("entries") for name, size in sizes.items()},
        **{f"bytes_stored by {name}": size for name, size in sizes.items()},
        "computed in": on.dtype_name,
        "threads": torch.get_num_threads(),
        "not in it": "the published scripts copy every gradient to the CPU, and train in 8 bits where the Fisher "
        "is in full precision",
    }
    timed.facts.update(facts)
    yield timed


def _stored(states: dict[str, dict], *, plain: bool) -> dict[str, int]:
    """Bytes of the files, and entries of importance. `plain`: a float an entry, as in published checkpoints."""
    (state,) = states.values()
    sizes = {"entries": sum(values.numel() for values in state["importance"].values())}
    with TemporaryDirectory() as folder:
        for kind, tensors in state.items():
            path = Path(folder) / kind
            if kind == "importance" and not plain:
                save_importance(tensors, path)
            else:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            sizes[kind] = path.stat().st_size
    return sizes


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _times(ratio: float) -> str:
    return f"{_short(ratio):g} times"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
