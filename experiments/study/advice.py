"""Complete the commands in messages with the name of the study."""

import re

_REPRO = re.compile(r"`dvc repro((?: --?[a-z][a-z-]*)*)((?: [^\s`]+)*)`")


def of_study(message: str, study: str) -> str:
    """Complete every `dvc repro` in the message for the study; '' is the default study, with dvc.yaml in the root.

    DVC runs only the root's stages unless another file is named: for the study demo, `dvc repro train@x` becomes
    `dvc repro experiments/studies/demo/dvc.yaml:train@x`, and without a target all stages of the study run.
    """
    if not study:
        return message
    file = f"experiments/studies/{study}/dvc.yaml"

    def complete(match: re.Match) -> str:
        targets = [target if "dvc.yaml" in target else f"{file}:{target}" for target in match[2].split()]
        return f"`dvc repro{match[1]} {' '.join(targets or [file])}`"

    return _REPRO.sub(complete, message)
