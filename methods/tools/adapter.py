"""Low-rank adapters of linear layers: wrapped by peft, merged for scoring, and saved in peft's format.

`Adapter` is what parts with such an adapter share. The weights that are scored are merged, W + s·B·A, and rounded to
the checkpoint's dtype; merging the saved adapter again gives the same bits (`merged`).
"""

from __future__ import annotations

import difflib
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from methods.errors import UserError
from methods.part import Part, setting
from methods.tools.architecture import base_name
from methods.tools.effective import Factored, adapter_names, factored_weights, lora_layers, start_of
from methods.tools.files import writing

PIECE = 1 << 17  # entries merged at a time: few enough for the processor's cache
# the ends of names in a saved adapter
SAVED = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


@dataclass(frozen=True, kw_only=True)
class Adapter(Part):
    rank: int = setting(8, phase="prepare", within="[1, inf)", help="rank of the update")
    alpha: float = setting(32.0, phase="prepare", within="(0, inf)", help="the update's scale is alpha/rank")
    dropout: float = setting(0.0, phase="prepare", within="[0, 1)", help="dropout on the adapter's input")
    targets: tuple[str, ...] = setting(
        ("q_proj", "v_proj"), phase="prepare", help="last names of the linear layers to adapt"
    )

    @property
    def _alpha(self) -> float:
        return self.alpha

    def adapt(self, model, *, seed, state=None):
        return self._wrapped(model, seed=seed)

    def _wrapped(self, model: nn.Module, *, seed: int, **config) -> nn.Module:
        """The model with adapters by peft; `config` of LoraConfig beside this part's own settings."""
        from peft import LoraConfig, get_peft_model

        self._layers(model)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self._alpha,
            lora_dropout=self.dropout,
            target_modules=sorted(self.targets),
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            **config,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's advice concerns no setting of this part
            torch.manual_seed(seed)  # peft draws A in float32 on the CPU, whatever the model's dtype and device
            return get_peft_model(model, config, autocast_adapter_dtype=False)

    def _layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers to adapt, by name in the bare model. Raises UserError for a target that cannot be adapted."""
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        if not self.targets:
            raise UserError(f"{self.key}.targets is empty: name at least one linear layer of {_known(linear)}")
        for target in self.targets:
            named = [module for name, module in linear.items() if _ends(name, target)]
            if not named:
                near = difflib.get_close_matches(target, _known(linear), n=3, cutoff=0.4) or _known(linear)
                raise UserError(
                    f"{self.key}.targets: {target!r} is no linear layer of this model; "
                    f"nearest: {', '.join(near)} (all: {', '.join(_known(linear))})"
                )
            if any(module is model.get_output_embeddings() for module in named):
                raise UserError(
                    f"{self.key}.targets: {target!r} is the head, which cannot be adapted (often it is also the "
                    "embedding): leave it out"
                )
        return {name: module for name, module in linear.items() if any(_ends(name, target) for target in self.targets)}

    def finish(self, *, run, state, final, measure=None):
        changed = dict(final)
        for weight in factored_weights(run):
            factors = self._update(weight, state)
            if run.shards.first:
                base = final[weight.name] if weight.name in final else run.base[weight.name]
                changed[weight.name] = merged(base, **factors, scale=weight.scaling, transposed=weight.transposed)
        return changed

    def _update(self, weight: Factored, state: dict) -> dict[str, Tensor]:
        """The whole tensors that `merged` takes, by their names there; every process must call it."""
        return dict(zip(("a", "b"), weight.update(), strict=True))

    def save(self, *, run, state, folder):
        """Write adapter/adapter_model.safetensors and adapter/adapter_config.json, sorted unlike peft's own."""
        adapted = factored_weights(run)
        updates = {weight.layer: self._update(weight, state) for weight in adapted}
        tensors = {
            f"{layer}.{SAVED[part]}": tensor.cpu().contiguous()
            for layer, update in updates.items()
            for part, tensor in update.items()
        }
        if not run.shards.first:
            return
        out = folder / "adapter"
        out.mkdir(parents=True, exist_ok=True)
        with writing(out / "adapter_model.safetensors"):
            save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
        (out / "adapter_model.safetensors").chmod(0o644)
        rank = len(updates[adapted[0].layer]["a"])
        config = {
            "fan_in_fan_out": any(weight.transposed for weight in adapted),
            "base_model_name_or_path": None,
            "bias": "none",
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self._alpha * (rank // self.rank),
            "lora_dropout": self.dropout,
            "peft_type": "LORA",
            "r": rank,
            "target_modules": sorted(self.targets),
            "task_type": "CAUSAL_LM",
            "use_rslora": False,
            **self._saved(),
        }
        (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def _saved(self) -> dict[str, object]:
        """Entries of adapter_config.json in place of those that `save` writes."""
        return {}

    def report(self, *, run, state):
        adapted = factored_weights(run)
        entries = sum(math.prod(run.shapes[name]) for name in adapter_names(run.model) if name in run.weights)
        return {"adapted_layers": len(adapted), "trained_entries": entries, "scale": adapted[0].scaling}


def merged(
    weight: Tensor, *, a: Tensor, b: Tensor, scale: float, transposed: bool = False, magnitude: Tensor | None = None
) -> Tensor:
    """W + s·B·A (W out × in, A rank × in, B out × rank) on the CPU, in float32, or in float64 for a float64 W.

    transposed   W is in × out, and (s·B·A)ᵀ is added
    magnitude    DoRA's m (out,): the lengths that the rows of the sum are given

    The bits are the same on every machine and with any number of threads: the order of summation in a matrix product is
    not defined, so the ranks are added one after the other in float64, and the sum is rounded once.
    """
    if transposed:
        return merged(weight.T, a=a, b=b, scale=scale, magnitude=magnitude).T.contiguous()
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    out = torch.empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    size = max(1, PIECE // a.shape[1])
    for at in range(0, len(out), size):
        rows = slice(at, at + size)
        total, product = (torch.zeros(len(out[rows]), a.shape[1], dtype=torch.float64) for _ in range(2))
        for of_b, of_a in zip(b[rows].T, a):
            total += torch.mul(of_b[:, None], of_a, out=product)  # addcmul rounds only once on some machines
        total.mul_(scale).add_(weight[rows].cpu())
        if magnitude is not None:
            total.mul_((magnitude[rows].cpu().double() / row_norms(total))[:, None])
        out[rows] = total
    return out


def row_norms(matrix: Tensor) -> Tensor:
    """‖row‖ of a matrix (rows,), in float64 on the CPU; halves are added, so that the order of summation is fixed."""
    norms = []
    for rows in matrix.detach().split(max(1, PIECE // matrix.shape[1])):
        squares = rows.cpu().double().square()
        while squares.shape[1] > 1:
            half = -(-squares.shape[1] // 2)
            squares[:, : squares.shape[1] - half] += squares[:, half:]
            squares = squares[:, :half]
        norms.append(squares[:, 0].sqrt())
    return torch.cat(norms)


def read_adapter(folder: Path) -> tuple[dict[str, dict[str, Tensor]], float, bool]:
    """The adapter that `save` wrote: by base name of each weight what `merged` takes ("a", "b", with DoRA "magnitude"),
    the scale, and whether weights are in × out. Raises ValueError, LookupError, TypeError or SafetensorError for files
    that are damaged."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("adapter_config.json is no object")
    tensors = load_file(folder / "adapter_model.safetensors")
    parts = [part for part in SAVED if part != "magnitude" or config.get("use_dora")]
    layers = [name.removesuffix(SAVED["a"]) for name in tensors if name.endswith(f".{SAVED['a']}")]
    updates = {base_name(f"{layer}weight"): {part: tensors[layer + SAVED[part]] for part in parts} for layer in layers}
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    return updates, scale, config.get("fan_in_fan_out", False)


def saved_entries(model: nn.Module) -> int:
    """Entries of the tensors that `save` writes: two of each factor where both are trained from a start."""
    entries = 0
    for _, layer in lora_layers(model):
        own = sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("base_layer."))
        entries += own * (2 if start_of(layer) and all(layer.start_trained) else 1)
    return entries


def _ends(name: str, target: str) -> bool:
    """Whether a module has this last name, as peft looks for it."""
    return name == target or name.endswith(f".{target}")


def _known(linear: dict[str, nn.Module]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in linear})
