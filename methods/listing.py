"""The list of parts, for the terminal and for docs/methods, from the registry."""

from __future__ import annotations

import json
import typing
from pathlib import Path

from methods import registry
from methods.part import Part, overrides, phase_of
from methods.settings import declared, describe

BEGIN, END = "<!-- from the registry: begin -->", "<!-- from the registry: end -->"
DOCS = Path(__file__).parent.parent / "docs" / "methods"
ACTS_ON = {
    "calibrate": "the base before training",
    "prepare": "the base before training",
    "adapt": "the model",
    "epoch": "training rows",
    "examples": "training rows",
    "batch": "micro-batches",
    "token_weights": "token weights",
    "batch_weights": "token weights",
    "loss": "loss",
    "second_gradient": "gradient",
    "before_clip": "gradient",
    "optimizer": "optimizer",
    "after_step": "weights after a step",
    "finish": "finished weights",
}


def lines() -> str:
    """All parts, a line each, for a terminal."""
    parts = registry.parts()
    width = max(map(len, parts))
    return "\n".join(f"{key:{width}}  {part.line}" for key, part in parts.items())


def described(part: type[Part]) -> str:
    """Title, paper, one line, settings and what it cannot run beside, for a terminal."""
    lines = [f"{part.key}  ({part.title})  {part.paper}".rstrip(), f"    {part.line}"]
    rows = settings(part)
    width = max((len(row[0]) for row in rows), default=0)
    shown = max((len(row[2]) for row in rows), default=0)
    for name, kind, default, help, _ in rows:
        lines.append(f"    {name:{width}}  {default:{shown}}  {help}" + (f" ({kind})" if help else kind))
    lines += [f"    {name}: {text}" for name, text in facts(part).items()]
    excludes = {} if isinstance(part.excludes, property) else part.excludes  # a property: it depends on settings
    for reason in dict.fromkeys(excludes.values()):
        names = ", ".join(name for name, why in excludes.items() if why == reason)
        lines.append(f"    not beside {names}: {reason}")
    return "\n".join(lines)


def facts(part: type[Part]) -> dict[str, str]:
    """What a part acts on and when, its neutral setting, and the laws that it declares it cannot keep by nature."""
    own = part.neutral
    neutral = own if isinstance(own, str) else ", ".join(f"{name}: {yaml(value)}" for name, value in own.items())
    exceptions = [f"frozen entries may differ from the base: {part.frozen}"] if part.frozen else []
    if part.decomposed:
        exceptions.append(
            f"the base's logits are equal within {part.decomposed:g} of their norm, its weights being kept as a sum"
        )
    if part.beside:
        exceptions.append(f"it runs beside {' and '.join(part.beside)}")
    # such a part chooses before a step what it does not move
    acts_on = ACTS_ON | ({"examples": "which weights move"} if phase_of(part) in ("adapt", "mask") else {})
    return {
        "acts on": ", ".join(dict.fromkeys(words for hook, words in acts_on.items() if overrides(part, hook))),
        "phase": phase_of(part),
        "neutral setting": neutral or "not declared",
        "exceptions": "; ".join(exceptions) or "none",
    }


def settings(part: type[Part]) -> list[tuple[str, str, str, str, str]]:
    """(name, type in words, default in force, help, phase) of each setting."""
    kinds = typing.get_type_hints(part)
    rows = []
    for field in declared(part):
        within = field.metadata["within"]
        kind = describe(kinds[field.name]) + (f" in {within}" if within else "")
        rows.append(
            (field.name, kind, yaml(field.metadata["default"]), field.metadata["help"], field.metadata["phase"])
        )
    return rows


def yaml(value: object) -> str:
    """A default as it is written in params.yaml."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float) and (abs(value) >= 1e4 or 0 < abs(value) < 1e-2):
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa)}e{int(exponent):+d}"  # PyYAML reads 1e-3 as text and 1.0e-3 as a number
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value)
    return "''" if value == "" else str(value)


def block(part: type[Part]) -> str:
    """The generated block of a part's page."""
    source = f"Source: <{part.paper}>. " if part.paper else ""
    lines = [BEGIN, "", f"**{part.title}**: {part.line} {source}Part `{part.key}`.", ""]
    lines += ["| setting | default | what | type | changes |", "|---|---|---|---|---|"]
    for name, kind, default, help, phase in settings(part):
        stages = "preparation and training" if phase == "prepare" else "training"
        lines.append(f"| `{name}` | `{default}` | {help} | {kind} | {stages} |")
    own = facts(part)
    lines += ["", f"| {' | '.join(own)} |", "|---" * len(own) + "|", f"| {' | '.join(own.values())} |"]
    return "\n".join([*lines, "", END])


def with_block(text: str, part: type[Part]) -> str:
    """A page with its generated block brought up to date."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + block(part) + after


def write_docs() -> list[Path]:
    """Bring the pages of the built-in parts up to date; returns those that changed."""
    pages: dict[Path, str] = {}
    for key in registry.built_in():
        part, path = registry.parts()[key], DOCS / f"{key}.md"
        old = path.read_text() if path.is_file() else f"# {part.title}\n\n{BEGIN}\n{END}\n"
        pages[path] = with_block(old, part)
    changed = [path for path, text in pages.items() if not path.is_file() or path.read_text() != text]
    for path in changed:
        path.write_text(pages[path])
    return changed
