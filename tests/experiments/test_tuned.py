"""What is kept of a cell: folders that rebuild its weights, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.model import tuned, weights
from experiments.model.base import load_tensors
from experiments.model.random_models import build
from experiments.model.shape import shape_of
from experiments.study.schema import Model
from experiments.training.log import TrainingFailed
from methods.errors import UserError
from methods.ewc import EWC
from methods.fisher_merge import FisherMerge
from methods.lora import LoRA
from methods.model_tailor import ModelTailor
from methods.part import Run
from methods.wise_ft import WiSEFT

BLOCK = {"source": "random:llama", "dtype": "bfloat16", "config": {"vocab_size": 300}}
PART = LoRA(rank=3, alpha=7.0, targets=("q_proj", "down_proj"))
DORA = LoRA(rank=3, alpha=7.0, targets=("q_proj", "down_proj"), dora=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model in bf16."""
    out = tmp_path_factory.mktemp("base") / "model"
    weights.materialise(name="tiny", block=Model(**BLOCK), packages={}, out_dir=out)
    return out


@pytest.fixture
def moved(folder):
    """Final weights in float32: one tensor as it was, the others moved by 1 %."""
    draw = torch.Generator().manual_seed(3)
    base = load_tensors(folder)
    return {
        name: base[name].float() * (1 + 0.01 * torch.randn(base[name].shape, generator=draw))
        for name in sorted(base)[1:]
    }


@pytest.fixture
def adapted(folder, tmp_path, request):
    """A folder with the adapter of a model that LoRA has wrapped and noise has trained, and its final weights."""
    part, state = getattr(request, "param", PART), {}
    model = part.adapt(weights.load_model(folder, dtype=torch.float32), seed=0)
    run = Run(
        model=model,
        weights={n: p for n, p in model.named_parameters() if p.requires_grad},
        base=load_tensors(folder),
        seed=0,
        device="cpu",
    )
    part.optimizer_ready(run=run, state=state, optimizer=None)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in run.weights.values():
            p.add_(0.05 * torch.randn(p.shape, generator=draw))
    out = tmp_path / "adapted"
    part.save(run=run, state=state, folder=out)
    return out, part.finish(run=run, state=state, final={})


def ordinary(folder, final, target):
    """The plain Hugging Face folder of the same weights, written here."""
    shutil.copytree(folder, target)
    (target / "base.json").unlink()
    base = load_tensors(folder)
    (target / "model.safetensors").unlink()
    save_file(
        {n: final[n].bfloat16() if n in final else base[n].clone() for n in base},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    return target


def test_a_difference_rebuilds_the_model_and_its_folder(folder, moved, tmp_path):
    plain = ordinary(folder, moved, tmp_path / "plain")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    digest = tuned.keep(tmp_path / "cell", folder=folder, base=load_tensors(folder), final=moved)
    assert digest == weights.tensor_sha256(plain) == tuned.weights_sha256(tmp_path / "cell")
    assert {path.name for path in (tmp_path / "cell").iterdir()} == {"delta.safetensors", "weights.json"}
    sizes = [path.stat().st_size for path in (tmp_path / "cell").iterdir()]
    assert tuned.kept_bytes(tmp_path / "cell") == sum(sizes) < 0.6 * (plain / "model.safetensors").stat().st_size
    for dtype in (torch.bfloat16, torch.float32):
        model, found = tuned.load(tmp_path / "cell", folder=folder, dtype=dtype)
        expected = weights.load_model(plain, dtype=dtype).state_dict()
        assert found == digest and not model.training
        assert model.state_dict().keys() == expected.keys()
        assert all(
            torch.equal(tensor, expected[name]) and tensor.dtype == dtype for name, tensor in model.state_dict().items()
        )
    tuned.write_folder(tmp_path / "cell", folder=folder, target=tmp_path / "made")
    assert {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()} == {
        path.name: path.read_bytes() for path in plain.iterdir()
    }
    assert {
        path.name: path.read_bytes() for path in folder.iterdir()
    } == before  # the model was rebuilt in memory that its file is mapped to


@pytest.mark.parametrize(("adapted", "part"), [(PART, PART), (DORA, DORA)], indirect=["adapted"], ids=["lora", "dora"])
def test_an_adapter_is_all_that_is_kept(folder, adapted, part, tmp_path):
    out, final = adapted
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    plain = ordinary(folder, final, tmp_path / "plain")
    digest = tuned.keep(out, folder=folder, base=load_tensors(folder), final=final)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == files | {"weights.json"}
    assert json.loads((out / "weights.json").read_text())["kind"] == "adapter"
    assert tuned.load(out, folder=folder, dtype=torch.bfloat16)[1] == digest == weights.tensor_sha256(plain)
    tuned.write_folder(out, folder=folder, target=tmp_path / "made")
    assert weights.tensor_sha256(tmp_path / "made") == digest
    shape = shape_of("tiny", Model(**BLOCK), folder)
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert tuned.expected_bytes(shape=shape, parts=(part,), checkpoint=torch.bfloat16) == sum(
        t.nbytes for t in tensors.values()
    )


@pytest.mark.parametrize("touched", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_what_another_part_changed_is_kept_beside_the_adapter(folder, adapted, tmp_path, touched):
    out, final = adapted
    tensor = (final[touched] if touched in final else load_tensors(folder)[touched].float()).clone()
    tensor.view(-1)[0] += 0.25
    final = final | {touched: tensor}
    digest = tuned.keep(out, folder=folder, base=load_tensors(folder), final=final)
    assert json.loads((out / "weights.json").read_text())["kind"] == "delta" and (out / "adapter").is_dir()
    assert (
        tuned.load(out, folder=folder, dtype=torch.bfloat16)[1]
        == digest
        == weights.tensor_sha256(ordinary(folder, final, tmp_path / "plain"))
    )


def test_a_folder_is_written_in_the_files_of_its_base(adapted, tmp_path):
    out, final = adapted
    folder = tmp_path / "sharded"
    build("llama", seed=0, dtype=torch.bfloat16, vocab_size=300).save_pretrained(folder, max_shard_size=20_000)
    (folder / "base.json").write_text(json.dumps({"sha256": weights.tensor_sha256(folder)}))
    digest = tuned.keep(out, folder=folder, base=load_tensors(folder), final=final)
    tuned.write_folder(out, folder=folder, target=tmp_path / "made")
    files = {path.name for path in folder.iterdir()} - {"base.json"}
    assert {path.name for path in (tmp_path / "made").iterdir()} == files and len(files) > 4
    found, expected = load_tensors(tmp_path / "made"), tuned.rounded(load_tensors(folder), final)
    assert weights.tensor_sha256(tmp_path / "made") == digest and sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    loaded = weights.load_model(tmp_path / "made", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_model_takes_memory_of_its_own_for_changed_tensors_alone(folder, tmp_path):
    """The pages of a mapped file that are written to become the process's own."""
    base = load_tensors(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    tuned.keep(tmp_path / "cell", folder=folder, base=base, final={name: -base[name].float()})
    kept, _ = tuned.tensors(tmp_path / "cell", folder=folder)
    assert set(kept.changed) == {name}
    model = weights.load_model(folder, dtype=torch.bfloat16)
    before = {key: tensor._version for key, tensor in model.state_dict().items()}
    tuned.fill(model, kept.items())
    assert {key for key, tensor in model.state_dict().items() if tensor._version != before[key]} == {name}
    zero = torch.zeros_like(base["model.norm.weight"])
    tuned.fill(model, [("model.norm.weight", zero), ("model.norm.weight", -zero)])
    assert model.state_dict()["model.norm.weight"].signbit().all()


def test_tensors_that_were_read_are_not_held(tmp_path):
    save_file({f"t{i}": torch.zeros(1 << 18) for i in range(32)}, tmp_path / "x.safetensors")  # a MiB each
    tensors = load_tensors(tmp_path / "x.safetensors")
    assert sum(tensor.sum().item() for tensor in tensors.values()) == 0  # every page is read
    mapped = Path("/proc/self/smaps")
    if not mapped.is_file():
        pytest.skip("this system does not tell what is mapped")
    assert str(tmp_path) not in mapped.read_text()


def test_expected_bytes():
    shape = shape_of("tiny", Model(**BLOCK), Path("nowhere"))
    entries = shape.parameters
    for dtype, bits in ((torch.bfloat16, 4), (torch.float16, 7), (torch.float32, 20), (torch.float64, 64)):
        assert tuned.expected_bytes(shape=shape, parts=(), checkpoint=dtype) == entries * bits // 8


def test_a_part_that_changes_finished_weights_keeps_their_difference_beside_the_adapter():
    shape, lora = shape_of("tiny", Model(**BLOCK), Path("nowhere")), LoRA(rank=2)
    alone = tuned.expected_bytes(shape=shape, parts=(lora,), checkpoint=torch.bfloat16)
    assert tuned.expected_bytes(shape=shape, parts=(lora, EWC()), checkpoint=torch.bfloat16) == alone
    sizes = {  # WiSE-FT shares the adapter's training, and Fisher merging trains by itself
        tuned.expected_bytes(shape=shape, parts=(lora, part), checkpoint=torch.bfloat16)
        for part in (WiSEFT(), FisherMerge(), ModelTailor())
    }
    assert len(sizes) == 1 and sizes.pop() > alone


def test_what_does_not_fit_is_refused(folder, moved, adapted, tmp_path):
    out = tmp_path / "cell"
    digest = tuned.keep(out, folder=folder, base=load_tensors(folder), final=moved)
    other = tmp_path / "other"
    weights.materialise(name="tiny", block=Model(**BLOCK | {"seed": 1}), packages={}, out_dir=other)
    with pytest.raises(UserError, match="made beside a base with base_sha256"):
        tuned.load(out, folder=other, dtype=torch.bfloat16)
    retokenised = tmp_path / "retokenised"
    shutil.copytree(folder, retokenised)
    (retokenised / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="base_files_sha256"):
        tuned.load(out, folder=retokenised, dtype=torch.bfloat16)
    about = json.loads((out / "weights.json").read_text())
    (out / "weights.json").write_text(json.dumps(about | {"weights_sha256": "0" * 64}))
    with pytest.raises(UserError, match=f"gives weights {digest[:12]}, not the 000000000000"):
        tuned.write_folder(out, folder=folder, target=tmp_path / "made")
    assert not (tmp_path / "made").exists()
    (out / "weights.json").write_text(json.dumps(about | {"version": 0}))
    with pytest.raises(UserError, match="is of version 0, this program reads 1"):
        tuned.load(out, folder=folder, dtype=torch.bfloat16)
    (out / "weights.json").unlink()
    with pytest.raises(UserError, match="holds no weights.json"):
        tuned.load(out, folder=folder, dtype=torch.bfloat16)
    out, final = adapted
    tuned.keep(out, folder=folder, base=load_tensors(folder), final=final)
    file = out / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    with pytest.raises(UserError, match="gives weights"):
        tuned.load(out, folder=folder, dtype=torch.bfloat16)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match="is damaged or no adapter"):
        tuned.load(out, folder=folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("adapted", [DORA], indirect=True)
def test_an_adapter_without_a_tensor_or_with_one_of_another_length_is_damaged(folder, adapted):
    out, final = adapted
    tuned.keep(out, folder=folder, base=load_tensors(folder), final=final)
    file = out / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    for end in ("lora_B.weight", "lora_magnitude_vector"):
        name = next(name for name in whole if name.endswith(end))
        save_file({n: tensor for n, tensor in whole.items() if n != name}, file)
        with pytest.raises(UserError, match="is damaged or no adapter"):
            tuned.load(out, folder=folder, dtype=torch.bfloat16)
        save_file(whole | {name: whole[name][:-1]}, file)
        with pytest.raises(UserError, match="has factors"):
            tuned.load(out, folder=folder, dtype=torch.bfloat16)


def test_weights_that_cannot_be_the_bases_are_refused_by_name(folder, moved, tmp_path):
    base, name = load_tensors(folder), min(moved)
    with pytest.raises(UserError, match="extra.weight is no tensor of the base model"):
        tuned.keep(tmp_path / "a", folder=folder, base=base, final=moved | {"extra.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=f"{name} is .*, the base's is"):
        tuned.keep(tmp_path / "b", folder=folder, base=base, final=moved | {name: moved[name][:1]})
    for value in (float("nan"), float("inf"), 3.4e38):  # the last one is finite in float32, and not in bfloat16
        broken = moved[name].clone()
        broken.view(-1)[3] = value
        with pytest.raises(
            TrainingFailed, match=f"{name} is damaged, 1 of its .* lower train.learning_rate or a part's strength"
        ):
            tuned.keep(tmp_path / "c", folder=folder, base=base, final=moved | {name: broken})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])  # the last is finite, and not in bfloat16
def test_weights_that_training_left_without_numbers_are_no_cells(folder, moved, tmp_path, value):
    name = next(iter(moved))
    broken = moved | {name: moved[name].float().index_fill(0, torch.tensor([0]), value)}
    with pytest.raises(
        TrainingFailed,
        match=f"the weights after the last step: {name} is damaged, .* values are NaN or infinite: lower train.lear",
    ):
        tuned.keep(tmp_path / "cell", folder=folder, base=load_tensors(folder), final=broken)
    assert not (tmp_path / "cell/weights.json").exists()
