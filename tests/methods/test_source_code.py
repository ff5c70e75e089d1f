"""The hash of a part's code: what may be rewritten without a rerun, and what may not."""

import ast

import pytest

from experiments.stages import resolve
from experiments.study import config
from methods import registry
from methods.mofo import MomentumFilter
from methods.tools.source_code import digest, digest_of

CODE = '''
"""A module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from methods.tools.effective import effective_weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pull"]
SCALE = 1.5


class Part:
    """A part."""

    strength: float = 2.0
    shares = ("methods.tools.effective",)

    def pull(self, run: dict, *, step: int = 0) -> Tensor:
        """Pull."""
        # the first weight alone
        value = np.sqrt(SCALE) + self.strength
        return [weight for weight in effective_weights(run) if step > 3][0] * value
'''
SAME = {
    "a rewritten comment": ("# the first weight alone", "# only the first weight counts here"),
    "a docstring": ('"""Pull."""', '"""Pull every weight back to the base."""'),
    "a docstring that is gone": ('        """Pull."""\n', ""),
    "a moved module": ("from methods.tools.effective import", "from methods.effective import"),
    "what it shares, moved": ('("methods.tools.effective",)', '("methods.effective",)'),
    "an annotation": ("run: dict", "run: 'Run'"),
    "an annotation that is gone": ("strength: float = 2.0", "strength = 2.0"),
    "a line that is broken": (
        "np.sqrt(SCALE) + self.strength",
        "(\n            np.sqrt(SCALE)\n            + self.strength\n        )",
    ),
    "quotes and a trailing comma": ('["pull"]', "['pull', ]"),
    "an import that nothing uses": ("import numpy as np", "import numpy as np\nimport os"),
    "an import for annotations": ("from torch import Tensor", "from torch import Tensor, nn"),
    "the order of imports": (
        "import numpy as np\nfrom methods.tools.effective import effective_weights",
        "from methods.tools.effective import effective_weights\nimport numpy as np",
    ),
}
OTHER = {
    "a constant": ("SCALE = 1.5", "SCALE = 1.6"),
    "a default": ("step: int = 0", "step: int = 1"),
    "a setting's default": ("strength: float = 2.0", "strength: float = 2"),
    "a comparison": ("step > 3", "step >= 3"),
    "an operator": ("+ self.strength", "- self.strength"),
    "another function under the same name": ("import effective_weights", "import frozen_weights as effective_weights"),
    "a name": ("def pull", "def push"),
    "a text that is no docstring": ("        # the first weight alone\n", '        print("the first weight alone")\n'),
}


@pytest.mark.parametrize("change", SAME)
def test_what_says_the_same_has_the_same_hash(change):
    old, new = SAME[change]
    assert CODE.count(old) == 1 and digest_of(CODE.replace(old, new)) == digest_of(CODE)


@pytest.mark.parametrize("change", OTHER)
def test_what_says_something_else_has_another_hash(change):
    old, new = OTHER[change]
    assert CODE.count(old) == 1 and digest_of(CODE.replace(old, new)) != digest_of(CODE)


def test_every_parts_file_may_be_laid_out_anew():
    for part in registry.parts().values():
        for path in registry.source_files(part):
            assert digest_of(ast.unparse(ast.parse(path.read_text()))) == digest(path)


@pytest.mark.parametrize(
    "edit, stale",
    [
        (lambda text: text.replace("#", "# rewritten:").replace('"""', '"""Rewritten. ', 1), False),
        (lambda text: text + "\nCONSTANT = 1\n", True),
    ],
)
def test_an_edit_makes_the_cells_of_its_part_stale_and_no_others(edit, stale, tmp_path, monkeypatch):
    study = config.load("demo")
    before = resolve.contents(study)
    files = registry.source_files
    edited = tmp_path / "somewhere" / "mofo.py"  # moved as well
    edited.parent.mkdir()
    (original,) = [path for path in files(MomentumFilter) if path.name == edited.name]
    edited.write_text(edit(original.read_text()))
    monkeypatch.setattr(
        registry, "source_files", lambda part: [edited if path == original else path for path in files(part)]
    )
    changed = {name for name, content in resolve.contents(study).items() if content != before[name]}
    assert changed == ({"train/llama-tiny/sums/mofo.json"} if stale else set())
