"""The engine against transformers' own Trainer on the same work: all weights, the same batch of rows in every step,
fused AdamW on float32 weights, a constant rate, clipping at 1, no evaluation, logging or checkpoints; only the steps
are timed. The engine leaves out the padding mask, has attention of its own on the CPU, computes logits only where there
is a label, and computes in bf16 on a copy of its float32 weights, where the Trainer casts them at every use (autocast);
a Trainer on bf16 weights has no float32 ones and loses small updates.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from experiments.bench import subject
from experiments.bench.race import Race
from experiments.bench.stepwise import Pausing, race_of_steps
from experiments.bench.subject import Subject
from experiments.training.batches import Example, collate
from experiments.training.engine import fit

TITLE = "A step of the engine and of transformers' Trainer"
ROUNDS = 7
RATE = 1.0e-4
ENGINE = "engine"


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    rounds = rounds or ROUNDS
    random, real = subject.find(small=small, real=False), subject.find(small=small)
    for on in (random, *([real] if real.name != random.name else [])):
        batch = on.batch()
        trainers = {"Trainer": torch.float32}
        if on.dtype != torch.float32:
            trainers = {"Trainer, autocast": torch.float32, f"Trainer, {on.dtype_name} weights": on.dtype}
        works = {ENGINE: partial(_engine, on, batch, 1 + rounds)}
        works |= {name: partial(_trainer, on, batch, 1 + rounds, weights) for name, weights in trainers.items()}
        title = f"{on.name}: a step of {len(batch)} rows"
        timed, losses = race_of_steps(title, works, against=next(iter(trainers)), rounds=rounds)
        rounded = {name: [round(loss, 5) for loss in own] for name, own in losses.items()}
        timed.facts.update(on.facts(batch), **{"loss of each step": rounded})
        yield timed


def _engine(on: Subject, batch: list[Example], steps: int, pause: Callable[[], None]) -> list[float]:
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
    losses: list[torch.Tensor] = []

    class PausingCallback(TrainerCallback):
        def on_step_end(self, *_, **__):
            pause()

    class Recording(Trainer):
        def compute_loss(self, *arguments, **named):
            loss = super().compute_loss(*arguments, **named)
            losses.append(loss.detach())
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
        trainer = Recording(
            model=model, args=settings, train_dataset=batch, data_collator=collate, callbacks=[PausingCallback()]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [loss.item() for loss in losses]
