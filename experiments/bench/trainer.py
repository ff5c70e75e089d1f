"""The engine against transformers' own Trainer on the same work: all weights, the same batch of rows in every step,
fused AdamW on float32 weights, a constant rate, clipping at 1, no evaluation, logging or checkpoints; only the steps
are timed. The engine leaves out the padding mask, has attention of its own on the CPU, computes logits only where there
is a label, and computes in bf16 on a copy of its float32 weights, where the Trainer casts them at every use (autocast);
a Trainer on bf16 weights has no float32 ones and loses small updates.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from experiments.bench.race import Race, race

if TYPE_CHECKING:
    import torch

    from experiments.bench.subject import Subject
    from experiments.training.batches import Example

TITLE = "A step of the engine and of transformers' Trainer"
ROUNDS = 7
RATE = 1.0e-4
ENGINE = "engine"


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    import torch

    from experiments.bench import subject
    from experiments.bench.stepwise import Stepwise

    rounds = rounds or ROUNDS
    random, real = subject.find(small=small, real=False), subject.find(small=small)
    for on in (random, *([real] if real.name != random.name else [])):
        batch, losses = on.batch(), {}
        trainers = {"Trainer": torch.float32}
        if on.dtype != torch.float32:
            trainers = {"Trainer, autocast": torch.float32, f"Trainer, {_name(on.dtype)} weights": on.dtype}
        work = {ENGINE: partial(_engine, on, batch, 1 + rounds)}
        work |= {name: partial(_trainer, on, batch, 1 + rounds, weights) for name, weights in trainers.items()}
        runs = {name: Stepwise(each) for name, each in work.items()}
        with contextlib.redirect_stderr(io.StringIO()):  # the engine's bar
            for run in runs.values():
                run.go()
            found = race(
                f"{on.name}: a step of {len(batch)} rows",
                {name: run.go for name, run in runs.items()},
                against=next(iter(trainers)),
                rounds=rounds,
                warm=0,
            )
            for name, run in runs.items():
                run.go()
                losses[name] = [round(loss, 5) for loss in run.result]
        found.facts.update(
            {
                "tokens a step": sum(len(e["input_ids"]) for e in batch),
                "weights": sum(t.numel() for t in on.base.values()),
                "computed in": _name(on.dtype),
                "threads": torch.get_num_threads(),
                "loss of each step": losses,
            }
        )
        yield found


def _engine(on: Subject, batch: list[Example], steps: int, pause: Callable[[], None]) -> list[float]:
    from experiments.bench.stepwise import Pausing
    from experiments.training.engine import fit

    settings = replace(
        on.steps("full", batch, steps),
        learning_rate=RATE,
        schedule="constant",
        warmup=0.0,
        weight_decay=0.0,
        clip=1.0,
        moments="float32",
    )
    result = fit(
        model=on.make(),
        parts=(Pausing(pause=pause),),
        examples=batch,
        settings=settings,
        seed=0,
        base=on.base,
        compute_dtype=on.dtype,
    )
    return [row["loss"] for row in result.curve]


def _trainer(
    on: Subject, batch: list[Example], steps: int, weights: torch.dtype, pause: Callable[[], None]
) -> list[float]:
    """`weights` is what they are kept in; the engine's dtype is what is computed in either way."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from experiments.training.batches import collate

    found: list[torch.Tensor] = []

    class Pausing(TrainerCallback):
        def on_step_end(self, *_, **__):
            pause()

    class Heard(Trainer):
        def compute_loss(self, *arguments, **named):
            loss = super().compute_loss(*arguments, **named)
            found.append(loss.detach())
            return loss

    model = on.make().to(weights)
    model.set_attn_implementation("sdpa")
    with TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=len(batch),
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=weights != on.dtype,
            use_cpu=True,
            seed=0,
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Heard(model=model, args=settings, train_dataset=batch, data_collator=collate, callbacks=[Pausing()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [loss.item() for loss in found]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
