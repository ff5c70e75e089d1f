"""Preparations in the local store, each by the hash of everything that it depends on, and what a training loads."""

import fcntl
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from hashlib import sha256 as new_sha256
from pathlib import Path

import torch
from safetensors.torch import save_file

import evaluation
from evaluation.encode import encode_text
from evaluation.rendered import read_jsonl
from experiments.model import tuned, weights
from experiments.model.base import dtype_of, load_tensors
from experiments.model.positions import refuse_documents_without_a_label, refuse_long_documents
from experiments.model.shape import shape_of
from experiments.stages import resolve
from experiments.stages.prepare import GENERAL
from experiments.study import provenance, whole
from experiments.training import hardware, memory, preparation, processes
from experiments.training.progress import bar
from experiments.training.resume import Resume
from methods.errors import UserError
from methods.part import TENSORS, Prepared, prepares
from methods.tools import source_code
from methods.tools import stored as layout
from methods.tools.files import folder_sha256, need_room, read_json, sha256, write_json, writing
from methods.tools.importance import totals
from methods.tools.process_group import Shards
from methods.tools.stored import load_importance, save_importance


def stored(study, model: str, method: str, seed: int) -> tuple[Path, bool]:
    """The store's folder with this preparation in `out/`, and whether it was there before. It is computed otherwise."""
    where = hardware.device(study.device)
    shards = processes.join(where)
    key = store_key(study, model, method, seed, where)
    store = study.paths.local / "prepared" / key
    resume = study.paths.resume / "prepare" / key
    with _one_at_a_time(resume.with_suffix(".lock")) if shards.first else nullcontext():
        if shards.broadcast(shards.first and _whole(store)):
            return store, True
        if shards.first:
            need_room(
                study.paths.work, 2 * _expected_bytes(study, model, method), f"the preparation of {method} on {model}"
            )
        with whole.folder(store) if shards.first else nullcontext(store) as made:
            costs = _compute(study, model, method, seed, made / "out", key=key, shards=shards)
            if shards.first:
                write_json(made / "costs.json", costs)
                write_json(made / "manifest.json", {"sha256": folder_sha256(made / "out")})
        if shards.first:
            shutil.rmtree(resume, ignore_errors=True)
    shards.barrier()
    return store, False


def in_store(study, model: str, method: str, seed: int) -> bool:
    """Whether `stored` would find this preparation."""
    key = store_key(study, model, method, seed, hardware.device(study.device))
    return _whole(study.paths.local / "prepared" / key)


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Wait while another process computes the same preparation: `prepare` and `drift` may ask for it together."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        with suppress(OSError):  # a disk without locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("another process computes this preparation: waiting for it", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _expected_bytes(study, model: str, method: str) -> int:
    folder, where = study.paths.model(model), hardware.device(study.device)
    checkpoint = dtype_of(read_json(folder / "base.json", "dtype"))
    return memory.stored(
        shape=shape_of(model, study.models[model], folder),
        parts=study.methods[method].parts,
        checkpoint_dtype=checkpoint,
        compute_dtype=study.compute_dtype(model, checkpoint, where),
        device_type=where.type,
    )


def store_key(study, model: str, method: str, seed: int, where: torch.device) -> str:
    """The hash of everything that the preparation depends on.

    That is: the settings that `resolve` writes; the base's weights, config and tokenizer; general text; device and
    compute dtype; versions of libraries; and the seed, where the preparation draws random numbers.
    """
    folder = study.paths.model(model)
    info = read_json(folder / "base.json", "sha256", "dtype")
    depends = {
        "settings": resolve.prepare(study, model, method),
        "base": info["sha256"],
        "base_files": tuned.files_sha256(folder),
        "layout": source_code.digest(Path(layout.__file__)),
        "general": sha256(study.paths.data / "general" / "importance.jsonl"),
        "seed": seed if resolve.seeded(study.methods[method].parts) else None,
        "device": where.type,
        "compute_dtype": str(study.compute_dtype(model, dtype_of(info), where)),
        "versions": evaluation.versions(),
    }
    return new_sha256(resolve.text(depends).encode()).hexdigest()[:32]


def _compute(study, model_name: str, method: str, seed: int, out: Path, *, key: str, shards: Shards) -> dict:
    """Let every part prepare, write what it made into `out`, and return the measured costs."""
    where = hardware.device(study.device)
    folder = study.paths.model(model_name)
    checkpoint = dtype_of(read_json(folder / "base.json", "sha256", "dtype"))
    computing = study.compute_dtype(model_name, checkpoint, where)
    tokenizer = weights.load_tokenizer(folder)
    settings = study.prepare_settings(model=model_name, method=method)
    general = encoded_text(study.paths.data / "general" / "importance.jsonl", tokenizer)
    general = _learnable(general, name="importance", warn=shards.first)
    parts, shape = study.methods[method].parts, shape_of(model_name, study.models[model_name], folder)
    longest = max(len(example["input_ids"]) for example in general)
    refuse_long_documents(study, model=model_name, method=method, shape=shape, longest=longest)
    predicted = memory.refuse(
        what=f"preparing {method} on {model_name}",
        available=hardware.available_memory(where),
        phase="prepare",
        shape=shape,
        parts=parts,
        settings=settings,
        longest=longest,
        checkpoint_dtype=checkpoint,
        compute_dtype=computing,
        device_type=where.type,
        processes=shards.world if shards.active else None,
    )
    hardware.reset_peak(where)
    if shards.first:
        out.mkdir(parents=True)

    def make(trains: bool):
        # a model that is trained by several processes is cut on the CPU; another one is needed whole on its device
        return weights.load_model(folder, dtype=computing, device="cpu" if shards.active and trains else where)

    def resume(part: str) -> Resume:
        return Resume(
            study.paths.resume / "prepare" / key / part,
            every=settings.checkpoint_seconds,
            identity={"preparation": key, "part": part, "device": where.type, "compute_dtype": str(computing)},
            shards=shards,
        )

    added, notes = {}, {}
    for made in preparation.prepare(
        parts,
        make=make,
        general=general,
        base=load_tensors(folder),
        # what other seeds reuse must not depend on the seed that came first
        seed=seed if resolve.seeded(parts) else 0,
        settings=settings,
        resume=resume,
        progress=bar,
        shards=shards,
        tokenizer=tokenizer,
        device=where,
        compute_dtype=computing,
    ):
        name, prepared = made.part.key, made.prepared
        if prepared.importance and not any(totals(values)[0] for values in prepared.importance.values()):
            raise UserError(
                f"methods.{method}.{name}: the importance of every weight came out as 0, so that nothing would be "
                "held: the general text gives no gradient; look at `general`, and at the numbers of the base model"
            )
        notes[name] = notes.get(name, {}) | prepared.notes
        costs = {"tokens": prepared.tokens, "flops": made.flops, "seconds": made.seconds}
        added[name] = added_up([added[name], costs]) if name in added else costs
        if shards.first:
            _write(out, name, prepared)
    peak = int(shards.sum(torch.tensor(hardware.peak_memory_bytes(where))).item())
    if not shards.first:
        return {}
    write_json(out / "prepared.json", notes)
    return {
        "seconds_prepare": sum(costs["seconds"] for costs in added.values()),
        "tokens_prepare": sum(costs["tokens"] for costs in added.values()),
        "peak_memory_bytes": peak,
        "predicted_memory_bytes": predicted,
        "added": {name: costs | {"bytes": _bytes(out, f"{name}.*")} for name, costs in added.items()},
        **{f"bytes_{kind}": _bytes(out, f"*.{kind}") for kind in TENSORS},
        "processes": shards.world,
        "hardware": hardware.describe(where),
        "versions": provenance.versions(),
        "git": provenance.git(study.paths.root),
        "when": provenance.now(),
    }


def added_up(costs: Iterable[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Costs by kind, added up; None where one of them is not known."""
    costs = list(costs)
    return {kind: None if None in (each := [one[kind] for one in costs]) else sum(each) for kind in costs[0]}


def _write(out: Path, name: str, prepared: Prepared) -> None:
    for kind in TENSORS:
        tensors, path = getattr(prepared, kind), out / f"{name}.{kind}.safetensors"
        if tensors and kind == "importance":
            save_importance(tensors, path)
        elif tensors:
            with writing(path):
                save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path)


def encoded_text(path: Path, tokenizer, length: int | None = None) -> list[dict]:
    """General text as examples, one for each document with every token labelled, cut at `length` tokens if given."""
    examples = []
    for row in read_jsonl(path):
        ids = torch.tensor(encode_text(tokenizer, row["text"])[:length])
        examples.append({"input_ids": ids, "labels": ids.clone()})
    return examples


def _learnable(examples: list[dict], *, name: str, warn: bool) -> list[dict]:
    """The documents with a token to predict. One of a single token has no gradient, but would count in every mean."""
    learnable = [example for example in examples if (example["labels"][1:] != -100).any()]
    if not learnable:
        refuse_documents_without_a_label(1, name=name, count=len(examples))
    if warn and (left_out := len(examples) - len(learnable)):
        print(
            f"general: {left_out} of {len(examples)} documents are a single token with nothing to predict: "
            "they are left out",
            flush=True,
        )
    return learnable


def load_states(folder: Path, parts) -> dict[str, dict]:
    """What was prepared for each part: {key: {"notes": {...}, "importance": {...}, ...}}, with the kinds that exist."""
    states: dict[str, dict] = {}
    for part in parts:
        states[part.key] = {"notes": read_json(folder / "prepared.json").get(part.key, {})}
        for kind in TENSORS:
            path = folder / f"{part.key}.{kind}.safetensors"
            if path.is_file():
                states[part.key][kind] = load_importance(path) if kind == "importance" else dict(load_tensors(path))
    return states


def load_general(path: Path, tokenizer) -> list[dict]:
    """General text for parts that read it in training, encoded as for `prepare`; empty without such a file or text."""
    examples = encoded_text(path, tokenizer) if path.is_file() else []
    return _learnable(examples, name="replay", warn=False) if examples else []


def _whole(store: Path) -> bool:
    """Whether the store's folder is as it was written; a damaged preparation is computed again."""
    try:
        return read_json(store / "manifest.json", "sha256")["sha256"] == folder_sha256(store / "out")
    except UserError:
        return False


def refuse_damaged(study, cell) -> None:
    """Raise UserError where the cell's preparation is not, byte for byte, the one in the local store, if that is there.

    Text that was copied beside it is compared with the rows of the stage `data`.
    """
    out, stated = study.paths.prepared(model=cell.model, method=cell.method, seed=cell.seed), {}
    if any(map(prepares, study.methods[cell.method].parts)):
        key = store_key(study, cell.model, cell.method, cell.seed, hardware.device(study.device))
        store = study.paths.local / "prepared" / key
        if _whole(store):
            stated = {path.name: sha256(path) for path in (store / "out").iterdir()}
    if (out / GENERAL).is_file():
        stated[GENERAL] = sha256(study.paths.data / "general" / "replay.jsonl")
    for name, digest in stated.items():
        if not (out / name).is_file() or sha256(out / name) != digest:
            raise UserError(
                f"{out / name} is not what the stage `prepare` wrote (it is cut off, changed or missing): run "
                f"`dvc repro --force --single-item prepare@{cell.model}-{cell.method}-{cell.seed}`"
            )


def _bytes(out: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in out.glob(f"{pattern}.safetensors"))
