"""Folders without a whole causal language model are refused by name: by `plan` if the config shows it, and by
`model`.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.model import weights
from experiments.model.shape import shape_of
from experiments.study.schema import Model
from methods.errors import UserError
from methods.tools.model_folder import refuse_not_finite

UP = "model.layers.1.mlp.up_proj.weight"
CUT = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "whole"
    weights.materialise(name="m", block=Model(source="random:llama"), packages={}, out_dir=folder)
    return folder


def config(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def content(name, text):
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def tensors(change):
    def apply(folder):
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return apply


def all_of(*changes):
    return lambda folder: [change(folder) for change in changes]


def renamed(folder):
    (folder / "model.safetensors").rename(folder / CUT)


def value(tensor, number):
    return tensor.clone().index_fill_(0, torch.tensor([3]), number)


IN_CONFIG = {
    "bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"is quantised \(bitsandbytes: .*dequantize",
    ),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), r"is quantised \(gptq"),
    "within text_config": (
        config(text_config={"quantization_config": {"quant_method": "mxfp4"}}),
        r"is quantised \(mxfp4",
    ),
    "quantised somehow": (config(quantization_config={"bits": 8}), "is quantised .by a method without a name"),
    "MLX": (
        config(quantization={"group_size": 64, "bits": 4}),
        "is quantised .by a method without a name: quantization in",
    ),
    "unknown architecture": (
        config(model_type="new-thing"),
        "config.json names the model_type 'new-thing', which transformers .* does not have",
    ),
    "no architecture": (config(model_type=None), "config.json names the model_type None"),
    "an image model": (config(model_type="vit"), "vit has no causal language model"),
    "encoder and decoder": (config(model_type="bart", is_encoder_decoder=True), "is an encoder and decoder .bart."),
    "a size of another type": (config(hidden_size="wide"), "transformers cannot use its config.json .*hidden_size"),
    "sizes that do not go together": (
        config(num_attention_heads=3),
        "transformers cannot use its config.json .*multiple",
    ),
    "not JSON": (content("config.json", "{"), "has no config.json that can be read"),
    "a list": (content("config.json", "[]"), "has no config.json that can be read: it holds no JSON object"),
    "nested without end": (content("config.json", "[" * 100_000), "has no config.json that can be read"),
    "UTF-16": (
        content("config.json", '{"model_type": "llama"}'.encode("utf-16")),
        "has no config.json that can be read",
    ),
    "an adapter": (
        all_of(
            content("adapter_config.json", '{"base_model_name_or_path": "org/base"}'),
            lambda folder: (folder / "config.json").unlink(),
        ),
        "holds an adapter of org/base .adapter_config.json., not a model: merge it",
    ),
    "a model and an adapter": (content("adapter_config.json", "[]"), "holds an adapter .* which of the two is meant"),
}
IN_WEIGHTS = {
    "an activation that is none": (
        config(hidden_act="nope"),
        "cannot be loaded as a causal language model .KeyError: 'nope'",
    ),
    "another vocabulary": (
        config(vocab_size=300),
        r"does not fit its config.json: .*embed_tokens.weight has shape \[258, 32\], the config gives \[300, 32\]",
    ),
    "fewer layers": (config(num_hidden_layers=1), "does not fit its config.json: it has model.layers.1.*fewer layers"),
    "more layers": (config(num_hidden_layers=3), "lacks 9 of the model's tensors .model.layers.2"),
    "no layers": (config(num_hidden_layers=0), "does not fit its config.json, which gives .* no place"),
    "another architecture": (config(model_type="gpt2"), "lacks .* of the model's tensors"),
    "a tensor missing": (
        tensors(lambda t: {n: v for n, v in t.items() if n != UP}),
        f"lacks 1 of the model's tensors .{UP}",
    ),
    "another shape": (
        tensors(lambda t: t | {UP: torch.ones(3, 3)}),
        rf"{UP} has shape \[3, 3\], the config gives \[48, 32\]",
    ),
    "codes": (tensors(lambda t: t | {UP: t[UP].to(torch.uint8)}), f"is quantised or damaged: {UP} is stored as U8"),
    "eight bits": (tensors(lambda t: t | {UP: t[UP].to(torch.float8_e4m3fn)}), f"{UP} is stored as F8_E4M3"),
    "NaN": (
        tensors(lambda t: t | {UP: value(t[UP], float("nan"))}),
        f"{UP} is damaged, 32 of its 1,536 values are NaN or infinite",
    ),
    "infinity": (tensors(lambda t: t | {UP: value(t[UP], float("-inf"))}), f"{UP} is damaged, 32 of its 1,536 values"),
    "a pointer of Git LFS": (
        content("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        "no safetensors file",
    ),
    "a pickle": (content("model.safetensors", b"\x80\x02}q\x00."), "no safetensors file"),
    "no tensors": (tensors(lambda t: {}), "lacks 21 of the model's tensors"),
    "a file of the index missing": (
        all_of(
            renamed,
            content(
                "model.safetensors.index.json",
                json.dumps({"weight_map": {"a": CUT, "b": "model-00002-of-00002.safetensors"}}),
            ),
        ),
        "lacks model-00002-of-00002.safetensors, which its .*index.json names",
    ),
    "a damaged index": (
        all_of(renamed, content("model.safetensors.index.json", "{")),
        "has no model.safetensors.index.json that can be read",
    ),
    "an index of files elsewhere": (
        all_of(renamed, content("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}')),
        "names no files beside it",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "holds no tokenizer that transformers can load",
    ),
    "an empty tokenizer": (content("tokenizer.json", "{}"), "holds no tokenizer"),
    "a tokenizer at which its library panics": (
        content("tokenizer.json", '{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}'),
        "holds no tokenizer that transformers can load",
    ),
    "a length in quotes": (
        content("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": "512"}'),
        "model_max_length in tokenizer_config.json is '512': write a number",
    ),
    "a tokenizer with code of its own": (
        content(
            "tokenizer_config.json", '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'
        ),
        "has a tokenizer that needs code of its own",
    ),
    "a tokenizer's config that is a list": (content("tokenizer_config.json", "[]"), "holds no tokenizer"),
    "generation settings that are a list": (content("generation_config.json", "[]"), "cannot be loaded"),
}


def damaged(whole, tmp_path, change):
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    change(folder)
    return folder, {"source": f"path:{folder}"}


@pytest.mark.parametrize("case", IN_CONFIG)
def test_what_its_config_shows_is_refused_by_plan_and_by_model(whole, tmp_path, case):
    change, message = IN_CONFIG[case]
    folder, block = damaged(whole, tmp_path, change)
    with pytest.raises(UserError, match=f"^models.mine: {folder}:? {message}"):
        shape_of("mine", Model(**block), tmp_path / "not made yet")
    with pytest.raises(UserError, match=f"^model 'mine': {folder}:? {message}"):
        weights.materialise(name="mine", block=Model(**block), packages={}, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", IN_WEIGHTS)
def test_what_its_files_show_is_refused_by_model(whole, tmp_path, case):
    change, message = IN_WEIGHTS[case]
    folder, block = damaged(whole, tmp_path, change)
    with pytest.raises(UserError, match=f"^model 'mine': .*{message}"):
        weights.materialise(name="mine", block=Model(**block), packages={}, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_lies_here_is_planned_by_its_own_config(whole, tmp_path):
    assert (
        shape_of("mine", Model(source=f"path:{whole}"), tmp_path / "not made yet").parameters
        == json.loads((whole / "base.json").read_text())["parameters"]
    )


def test_tensors_that_have_no_place_are_left_out_with_a_message(whole, tmp_path, capsys):
    change = tensors(
        lambda t: (
            t | {"value_head.weight": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        )
    )
    folder, block = damaged(whole, tmp_path, change)
    made = weights.materialise(name="mine", block=Model(**block), packages={}, out_dir=tmp_path / "out")
    assert made["sha256"] == json.loads((whole / "base.json").read_text())["sha256"]
    assert (
        capsys.readouterr().out
        == f"{folder} has 1 tensors that its config gives no place, and which are left out (value_head.weight…)\n"
    )


def test_a_value_too_large_for_the_dtype_asked_for(whole, tmp_path):
    _, block = damaged(whole, tmp_path, tensors(lambda t: t | {UP: value(t[UP], 1e5)}))
    weights.materialise(name="mine", block=Model(**block), packages={}, out_dir=tmp_path / "out")
    with pytest.raises(
        UserError,
        match=f"path:.*: the weights in torch.float16: {UP} is damaged, 32 of .*float16 holds no value beyond 65504",
    ):
        weights.materialise(
            name="mine", block=Model(**block | {"dtype": "float16"}), packages={}, out_dir=tmp_path / "half"
        )


def test_finite_weights_of_every_dtype_pass():
    every = {
        str(d): torch.tensor([torch.finfo(d).max, torch.finfo(d).min, 0.0], dtype=d)
        for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    refuse_not_finite(every | {"none": torch.empty(0), "whole": torch.tensor([7])}, "the weights", then="no")
    with pytest.raises(
        UserError, match="the weights: b is damaged, 1 of its 2 values .*, and 1 more tensors hold such: no"
    ):
        refuse_not_finite(
            {"a": torch.ones(2), "b": torch.tensor([1, torch.nan]), "c": torch.tensor(torch.inf)},
            "the weights",
            then="no",
        )


def test_the_folder_of_the_hubs_cache_is_distinguished_from_the_one_inside_it(whole, tmp_path):
    inside = tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(whole, inside)
    with pytest.raises(
        UserError,
        match="models--a--b is a folder of the hub's cache, and no model folder: give the one inside it, such as "
        f"{inside}",
    ):
        weights.materialise(
            name="mine", block=Model(source=f"path:{tmp_path / 'models--a--b'}"), packages={}, out_dir=tmp_path / "out"
        )
