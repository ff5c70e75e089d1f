"""A checkpoint made elsewhere: nothing is trained, its weights are evaluated like those of any method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from methods.errors import UserError
from methods.part import Part, register, setting
from methods.tools import peft_adapter
from methods.tools.checkpoint import fits, read


@register(
    title="Given checkpoint",
    paper="",
    line="Evaluate weights made elsewhere from the same base; their cost is unknown.",
    phase="merge",
    capabilities=frozenset({"provides_weights"}),
)
@dataclass(frozen=True, kw_only=True)
class Given(Part):
    shares = ("methods.tools.checkpoint", "methods.tools.peft_adapter", "methods.tools.rebuilt")

    neutral = "none: nothing is trained"
    frozen = "its weights are made elsewhere"
    trial = {"path": "{checkpoint}"}

    path: str = setting(
        "", path=True, help="folder of a checkpoint or a peft adapter; a relative path starts at the project's root"
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.path:
            raise UserError("given.path is missing: name the folder of the checkpoint to evaluate")

    def look(self, *, shapes):
        fits(self.path, shapes, where="given.path")

    def begin(self, *, run, state, examples, general=()):
        fits(self.path, {}, where="given.path")  # so that a wrong path is refused before anything else is done

    def finish(self, *, run, state, final, measure=None):
        return read(self.path, run, where="given.path")

    def report(self, *, run, state):
        if not peft_adapter.is_adapter(self.path):
            return {"path": self.path}
        config = peft_adapter.read_config(Path(self.path), f"given.path: {self.path}")
        about = {"adapter": peft_adapter.described(config), "adapter_of": config.get("base_model_name_or_path")}
        return {"path": self.path} | about
