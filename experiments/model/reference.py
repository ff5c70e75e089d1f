"""What the base predicts of texts, without the base in memory beside the model that is compared with it.

The base's last hidden states of the texts are kept once in a folder, a file for everything they depend on: weights,
config and tokenizer, texts, dtype, batches, device and versions. Logits come from them through the base's own head: the
class's own forward, in which only what lies behind the decoder has weights. A damaged file is made again; all of them
may be deleted at any time. Scores are the same with and without them.
"""

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from evaluation import encode, versions
from evaluation.token_losses import HiddenRows, Labelled, hidden_rows
from experiments.model import delta, weights
from experiments.model.base import load_tensors
from experiments.study import whole
from methods.tools import architecture, model_folder

CHECKED = 64  # rows of which the head's logits are compared with the base's


def reference(
    folder: Path,
    *,
    key: Sequence[str],
    sequences: Sequence[Labelled],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    kept: Path,
) -> HiddenRows | PreTrainedModel | None:
    """The base of `folder` as `token_losses` takes it, in `dtype` on `device`; None without a sequence.

    key     hashes of the base's weights, and of its config and tokenizer
    tokens  padded tokens of a forward pass, as they will be in `token_losses`
    kept    the folder of the kept hidden states

    It is the model itself, which then needs its room beside the other one, where logits depend on more of it than its
    head.
    """
    if not sequences:
        return None
    file = kept / f"{_digest(key, sequences, tokens, dtype, device)}.safetensors"
    counts = [sum(labels[1:]) for _, labels in sequences]
    head = _head(folder, dtype=dtype, device=device)
    rows = head and _read(file, counts)
    if rows is None:
        base = weights.load_model(folder, dtype=dtype, device=device)
        limit = encode.max_length(base, weights.load_tokenizer(folder))
        about = {"tokens": tokens, "max_length": limit, "description": "reading text with the base"}
        rows = hidden_rows(base, sequences, **about)
        if head is None or not _alike(head, architecture.logits_of(base), torch.cat(rows)[:CHECKED].to(device)):
            return base
        _write(file, torch.cat(rows))
        del base
        gc.collect()  # before the other model is loaded
    return HiddenRows(rows=rows, logits_of=head)


def _digest(
    key: Sequence[str], sequences: Sequence[Labelled], tokens: int, dtype: torch.dtype, device: torch.device
) -> str:
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:  # what decides how its kernels round
        where = f"{device.type} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
    texts = [[list(ids), [int(label) for label in labels]] for ids, labels in sequences]
    content = json.dumps([*key, texts, tokens, str(dtype), where, versions()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


@torch.no_grad()
def _head(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """The base's map from last hidden states to logits, with the tensors behind its decoder; None where it needs more.

    Tied embeddings are read under the other name.
    """
    try:
        config = model_folder.config_of(folder, str(folder))
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
        decoder = architecture.backbone(shell)
        inside = next(f"{name}." for name, child in shell.named_children() if child is decoder)
        kept, tied = load_tensors(folder), shell.all_tied_weights_keys
        behind = [name for name in shell.state_dict() if not name.startswith(inside)]
        found = {name: kept[name if name in kept else tied[name]].to(device=device, dtype=dtype) for name in behind}
    except Exception:  # names of another version, or a class that is not built without numbers
        return None
    shell.load_state_dict(found, strict=False, assign=True)
    return architecture.logits_of(shell)


@torch.no_grad()
def _alike(head: Callable[[Tensor], Tensor], base: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
    """Whether both give the same logits of some rows, bit for bit."""
    try:
        ours = head(rows)
    except Exception:  # the class's own forward, where it reads a tensor that is not there
        return False
    return ours.device == rows.device and delta.same(ours, base(rows))


def _read(file: Path, counts: Sequence[int]) -> list[Tensor] | None:
    """The rows of each sequence; None where they are not kept, or the file is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            rows, digest = opened.get_tensor("rows"), opened.metadata()["sha256"]
    except (OSError, SafetensorError, LookupError, TypeError):
        return None
    undamaged = len(rows) == sum(counts) and delta.sha256_of({"rows": rows}) == digest
    return list(rows.split(list(counts))) if undamaged else None


def _write(file: Path, rows: Tensor) -> None:
    try:
        with whole.file(file) as made:
            save_file({"rows": rows}, made, metadata={"sha256": delta.sha256_of({"rows": rows})})
    except (OSError, SafetensorError) as error:
        print(f"{file} cannot be written ({error}): the next model reads the texts with the base again", flush=True)
