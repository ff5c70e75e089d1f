"""The block `settle:` of a model that is made of another one by training an adapter on a mix of general rows."""

from typing import Any

from pydantic import create_model

from experiments.study.blocks import Block, Count, Name, Positive, Sha256, Train, key


class Low(Block):
    """The adapter: LoRA on all linear layers but the head."""

    rank: Count = key("Rank of the update; a rank of 16 is 9.8 MB for SmolLM2-135M, and 10 MB are allowed.", 16)
    alpha: Positive = key("The update's scale is alpha/rank.", 32.0)


class Gate(Block):
    """When a model counts as settled: plain fine-tuning on new rows of the mix no longer lowers general nats."""

    learning_rate: Positive = key("Rate of the plain fine-tuning; that of the study's method without parts.")
    steps: Count = key("Optimizer steps of the plain fine-tuning.", 40)
    nats: Positive = key("Nats a token below which the upper 95 % bound of the improvement must be.", 0.01)
    every: Count = key("Steps of settling before each gate; the rate falls to 0 before it.", 100)
    most: Count = key("Steps of settling after which the model is recorded as not settled.", 400)


Settle: Any = create_model(
    "Settle",
    __base__=Block,
    __doc__="How a model is made of another one, by `python -m experiments settle NAME`.",
    **{
        "from": (Name, key("Name of the block under `models:` that is settled.")),
        "mix": (
            dict[Name, Positive],
            key(
                "What is trained on, by weight: `general` (the settling set of general text) and names of blocks "
                "under `tasks:`, of whose rows those are taken that are neither scored nor probed."
            ),
        ),
        "lora": (Low, key("The adapter.", Low)),
        "train": (Train, key("Training settings of the adapter; nothing is taken over from other blocks.", Train)),
        "gate": (Gate, key("When the model counts as settled.")),
        "adapter_sha256": (Sha256, key("sha256 of results/settled/NAME/adapter.safetensors.", None)),
        "sha256": (Sha256, key("sha256 of the merged tensors, as `model` compares it.", None)),
    },
)
