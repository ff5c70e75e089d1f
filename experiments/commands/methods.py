"""methods: write docs/methods.md, one row for each built-in part, with what it costs beside plain fine-tuning.

    python -m experiments methods

The costs are those of the block of the root's params.yaml that has the part and the fewest others, on the study's first
model, for one optimizer step on `ROWS` rows of `LENGTH` tokens, `LABELLED` of which are learned: tokens and FLOPs as
`plan` counts them, and memory as it predicts it. Nothing is loaded.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from experiments.model.base import as_dtype
from experiments.model.shape import Shape, shape_of
from experiments.study import config
from experiments.training import memory
from experiments.training.flops import Flops
from experiments.training.settings import TrainSettings
from methods import listing, registry
from methods.part import Part, overrides, prepares

PAGE = Path("docs/methods.md")
ROWS, LENGTH, LABELLED, DOCUMENTS, LONGEST = 8, 128, 16, 256, 256
MEBI, WIDTH = 2**20, 120
COSTS = (
    f"One step of {ROWS} rows of {LENGTH} tokens, {LABELLED} of each learned, on {{model}}, against one of plain "
    "fine-tuning of all weights; of the block in params.yaml that has the part and the fewest others. Tokens and FLOPs "
    "are counted, and memory is predicted, as `python -m experiments plan` does it; work on weights alone, such as "
    "that of `muon`, is not among these FLOPs. *Preparation*: tokens that are read or written, of "
    f"{DOCUMENTS} documents of {LONGEST} tokens, and the training rows where they are read before the first step. "
    "*Held*: what the parts keep in memory beside the weights, their gradients and the moments while they train. What "
    "a run really takes stands in its record and in the report; seconds are measured by `make bench steps`."
)

LEFT_OUT = {
    "FOGO (2606.10406)": "no official code is published, and the summaries disagree on its constants and on how the "
    "codebook is updated: what we would build could not be checked against anything.",
    "SLAO (2512.23017)": "it merges the adapters of a sequence of tasks, with a weight that its summaries give in "
    "different forms; a grid of single domains has no such sequence.",
    "MSSR (2603.09892)": "it schedules replay over a sequence of tasks by an estimate of memory strength; with one "
    "domain it is `replay`.",
    "DiSC (2602.16093)": "it continues pre-training on documents whose suffixes are predicted by a teacher that has "
    "read the prefix; rows of a prompt and a short answer have no such suffix. `kl` and `sdft` cover distillation.",
    "Anchored learning (2605.04468)": "the formula of its moving anchor is not in what is public; `sdft` has a moving "
    "teacher, and `kl` the fixed one.",
}


def main() -> None:
    """Write docs/methods.md from the registry and the root's params.yaml."""
    PAGE.write_text(page(config.load("")), encoding="utf-8")
    print(f"wrote {PAGE}")


def page(study: Any) -> str:
    """The text of docs/methods.md."""
    kinds = [registry.parts()[key] for key in registry.built_in()]
    lines = [
        "# Methods",
        "",
        "Written by `python -m experiments methods`. A method is a composition of parts, a block under `methods:` in",
        f"params.yaml; these {len(kinds)} parts are built in. [parts.md](parts.md) tells how to write your own.",
        "",
        *_table(("part", "what it does", "acts on", "phase", "needs", "paper", "blocks in params.yaml"), facts(study)),
        "",
        "## What a part costs",
        "",
        fill(COSTS.format(model=study.grid.models[0]), WIDTH),
        "",
        *_table(
            ("part", "block", "preparation, tokens", "added to a step, tokens", "FLOPs", "held, MiB", "peak memory"),
            _costs(study),
        ),
        "",
        "## What is left out, and why",
        "",
        *(f"- **{name}**: {reason}" for name, reason in LEFT_OUT.items()),
    ]
    return "\n".join(lines) + "\n"


def facts(study: Any) -> Iterator[tuple[str, ...]]:
    """The rows of the first table."""
    for key in registry.built_in():
        kind = registry.parts()[key]
        own = listing.facts(kind)
        paper = kind.paper and f"[{kind.paper.rstrip('/').rpartition('/')[2]}]({kind.paper})"
        blocks = ", ".join(f"`{name}`" for name in _blocks(study, key)) or "none"
        yield f"[`{key}`](methods/{key}.md)", kind.line, own["acts on"], own["phase"], _needs(kind), paper, blocks


def _needs(kind: type[Part]) -> str:
    needs = [f"`{name}`" for name in kind.beside]
    if overrides(kind, "calibrate") or overrides(kind, "prepare"):
        needs.append("a preparation" + (" for each seed" if "seeded_preparation" in kind.capabilities else ""))
    if "general" in kind.capabilities:
        needs.append("general text while it trains")
    return ", ".join(needs) or "nothing"


def _costs(study: Any) -> Iterator[tuple[str, ...]]:
    name = study.grid.models[0]
    block = study.models[name]
    shape, checkpoint = shape_of(name, block, study.paths.model(name)), as_dtype(block.dtype or "bfloat16")
    bare = Flops(shape.build())
    plain = bare.step(lengths=[LENGTH] * ROWS, labelled=LABELLED * ROWS)
    least = _memory(shape, (), checkpoint)["total"]
    for key in registry.built_in():
        blocks = _blocks(study, key)
        if not blocks or "provides_weights" in registry.parts()[key].capabilities:
            continue
        parts = study.methods[blocks[0]].parts
        (part,) = (part for part in parts if part.key == key)
        flops = Flops(shape.build(parts=memory.adapting(parts))) if memory.adapting(parts) else bare
        each = [other.added() for other in parts]
        own = part.added()
        trained = sum(one.trained - one.replaced for one in each)
        step = (1 + trained) * flops.step(lengths=[LENGTH] * ROWS, labelled=LABELLED * ROWS)
        step += sum(one.read for one in each) * bare.forward(lengths=[LENGTH] * ROWS, predicted=LABELLED * ROWS)
        kinds = _memory(shape, parts, checkpoint)
        held = sum(kinds[kind] for kind in ("anchor", "importance", "state"))
        yield (
            f"`{key}`",
            f"`{blocks[0]}`",
            f"{_prepared(part):,.0f}" + (f" + {own.begin:.0%} of the training rows'" if own.begin else ""),
            f"{own.trained + own.read:.0%}",
            f"{step / plain:.2f} ×",
            f"{held / MEBI:,.0f}",
            f"{kinds['total'] / least:.2f} ×",
        )


def _prepared(part: Part) -> float:
    """Tokens of general text that the part reads while it prepares."""
    if not prepares(part):
        return 0.0
    return sum(
        ((each.training or {}).get("epochs") or 1.0) * sum(each.cut([LONGEST] * DOCUMENTS))
        for each in part.preparation()
    )


def _memory(shape: Shape, parts: Sequence[Part], checkpoint: Any) -> Mapping[str, int]:
    return memory.predict(
        phase="train",
        parts=parts,
        settings=TrainSettings(batch=ROWS, micro_batch=ROWS, length=LENGTH),
        shape=shape,
        checkpoint_dtype=checkpoint,
        compute_dtype=checkpoint,
        device_type="cpu",
        processes=None,
    )


def _blocks(study: Any, key: str) -> list[str]:
    """Methods of params.yaml that have this part, those with the fewest parts first."""
    having = [name for name, method in study.methods.items() if any(part.key == key for part in method.parts)]
    return sorted(having, key=lambda name: len(study.methods[name].parts))


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
