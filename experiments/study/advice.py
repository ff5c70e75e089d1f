"""Commands that a message tells a person to run."""

import re

_REPRO = re.compile(r"`dvc repro((?: --?[a-z][a-z-]*)*)((?: [^\s`]+)*)`")


def of_study(message: str, study: str) -> str:
    """The message with every `dvc repro` in it as the study needs it; '' is the default study, which has dvc.yaml in the root.

    DVC runs the root's stages alone unless the file of others is named: `dvc repro train@x` of the study demo is
    `dvc repro experiments/studies/demo/dvc.yaml:train@x`, and without a target all of its stages are meant.
    """
    if not study:
        return message
    file = f"experiments/studies/{study}/dvc.yaml"

    def named(found: re.Match) -> str:
        targets = [target if "dvc.yaml" in target else f"{file}:{target}" for target in found[2].split()]
        return f"`dvc repro{found[1]} {' '.join(targets or [file])}`"

    return _REPRO.sub(named, message)
