"""From examples to batches: the order that a seed draws, batches of similar lengths, right padding or packed rows."""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from experiments.training.settings import TrainSettings
from methods.tools.process_group import Shards

# {"input_ids": (tokens,), "labels": (tokens,)}, -100 where nothing is learned; other tensors (tokens,) come along
Example = dict[str, Tensor]

POOL = 8  # batches whose examples are sorted by length together: less padding, in an order that the seed still draws


def epoch_order(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of example indices for one epoch; the same for equal (lengths, batch, seed, epoch).

    Examples are shuffled, sorted by length inside pools of `POOL` batches, cut, and the batches shuffled.
    A last short batch is kept: every example is seen once an epoch.
    """
    draw = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    cut = []
    for start in range(0, len(order), POOL * batch):
        pool = sorted(order[start : start + POOL * batch], key=lambda i: lengths[i])
        cut += [pool[i : i + batch] for i in range(0, len(pool), batch)]
    draw.shuffle(cut)
    return cut


def schedule(lengths: Sequence[int], batch: int, seed: int, epochs: float) -> list[list[int]]:
    """All batches of a run: `steps` of them, whole epochs first, then the first batches of the next epoch."""
    count = steps(len(lengths), batch, epochs)
    plan: list[list[int]] = []
    while len(plan) < count:
        plan += epoch_order(lengths, batch, seed, len(plan) // epoch_steps(len(lengths), batch))
    return plan[:count]


def epoch_steps(rows: int, batch: int) -> int:
    """Batches of a whole epoch over `rows` examples."""
    return -(-rows // batch)


def steps(rows: int, batch: int, epochs: float) -> int:
    """Batches of a run of `epochs` over `rows` examples.

    A fraction of an epoch is that share of its batches, rounded to a whole number (half to even), which may be 0. A run
    has at least one batch, unless there are no rows.
    """
    whole = epoch_steps(rows, batch)
    return max(min(1, whole), int(epochs) * whole + round((epochs - int(epochs)) * whole))


def tokens(examples: Sequence[Example], settings: TrainSettings, seed: int) -> int:
    """Tokens of the examples in all steps of a run."""
    lengths = [len(example["input_ids"]) for example in examples]
    plan = schedule(lengths, settings.batch, seed, settings.epochs)
    return sum(lengths[index] for batch in plan for index in batch)


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> Example:
    """Right-padded batch: input_ids (0 where padded), labels (-100), attention_mask; each (batch, tokens)."""
    width = max(len(e["input_ids"]) for e in examples)
    batch = {
        "input_ids": torch.zeros(len(examples), width, dtype=torch.long),
        "labels": torch.full((len(examples), width), -100, dtype=torch.long),
        "attention_mask": torch.zeros(len(examples), width, dtype=torch.long),
    }
    for name in carried(examples):
        batch[name] = torch.zeros(len(examples), width, dtype=examples[0][name].dtype)
    for row, example in enumerate(examples):
        size = len(example["input_ids"])
        batch["attention_mask"][row, :size] = 1
        for name in batch.keys() - {"attention_mask"}:
            batch[name][row, :size] = example[name]
    return {name: tensor.to(device) for name, tensor in batch.items()}


def carried(examples: Sequence[Example]) -> list[str]:
    """Names of the tensors beside ids and labels, which all examples of a step have."""
    return [n for n, value in examples[0].items() if isinstance(value, Tensor) and n not in ("input_ids", "labels")]


def pack(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows of example indices of at most `tokens` tokens together: first fit, the longest first.

    An example that is longer has a row of its own. Every example is in one row; indices and rows ascend.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, free in enumerate(room) if lengths[index] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(tokens)
        rows[row].append(index)
        room[row] -= lengths[index]
    return sorted(sorted(row) for row in rows)


def collate_packed(examples: Sequence[Example], device: torch.device | str = "cpu") -> Example:
    """One row of consecutive examples: input_ids, labels and position_ids, each (1, tokens).

    Positions begin at 0 in each example, and there is no attention mask: with one, or with a cache, transformers would
    take the row for a single text (`architecture.keeps_apart`). An example's first token is nobody's label.
    """
    labels = [torch.cat([torch.full_like(e["labels"][:1], -100), e["labels"][1:]]) for e in examples]
    row = {
        "input_ids": torch.cat([e["input_ids"] for e in examples]),
        "labels": torch.cat(labels),
        "position_ids": torch.cat([torch.arange(len(e["input_ids"])) for e in examples]),
    } | {name: torch.cat([e[name] for e in examples]) for name in carried(examples)}
    return {name: tensor.unsqueeze(0).to(device) for name, tensor in row.items()}


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, without waiting for work that is queued on a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def micro_batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def shared(examples: list[Example], shards: Shards, settings: TrainSettings) -> Iterator[tuple[Example, int]]:
    """This process's micro-batches of a step, each with 1; and some with 0, whose loss does not count.

    Processes that share weights compute together, also what a part computes in its hooks: one with fewer micro-batches
    than another computes the step's first example in their place.
    """
    mine, cuts = examples[shards.rank :: shards.world], _cuts(examples, shards, settings)
    joined = collate_packed if settings.pack else collate
    for indices in cuts[shards.rank]:
        yield joined([mine[i] for i in indices]), 1
    for _ in range(max(map(len, cuts)) - len(cuts[shards.rank])):
        yield joined(examples[:1]), 0


def passes(examples: Sequence[Example], *, shards: Shards, settings: TrainSettings) -> int:
    """Micro-batches that all processes together compute of a step with these examples."""
    return sum(map(len, _cuts(examples, shards, settings)))


def _cuts(examples: Sequence[Example], shards: Shards, settings: TrainSettings) -> list[Sequence[Sequence[int]]]:
    """For each process, how its share of the examples is cut into micro-batches: indices in that share."""
    shares = [examples[rank :: shards.world] for rank in range(shards.world)]
    if settings.pack:
        return [pack([len(e["input_ids"]) for e in share], settings.pack) for share in shares]
    return [list(micro_batches(range(len(share)), settings.micro_batch)) for share in shares]
