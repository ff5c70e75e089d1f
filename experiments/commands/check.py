"""check: whether a part keeps the laws that hold for all of them (experiments/laws).

    python -m experiments check mofo
    python -m experiments check PART            of another package, by the entry point `holdfast.parts`

Prints one line a law; the exit status is 1 where one fails. docs/parts.md says what to do then.
"""

import os
import tempfile
from pathlib import Path

from experiments.laws import processes
from experiments.laws.laws import LAWS, ONCE, PROCESSES, Verdict, judge
from experiments.laws.trial import ARCHITECTURES, Trial
from experiments.training.progress import bar
from methods import registry


def main(name: str) -> int:
    """Print the verdicts on the part `name`; returns the exit status. Raises UserError where there is no such part."""
    kind = registry.part(name)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or torch's profiler writes a line each time it starts and stops
    failed = False
    with (
        tempfile.TemporaryDirectory() as folder,
        bar(total=len(LAWS) + 1, desc=f"check {name}", unit="law") as progress,
    ):
        trials = [Trial(kind=kind, architecture=a, folder=Path(folder) / a) for a in ARCHITECTURES]
        for law in (*LAWS, PROCESSES):
            verdicts = _verdicts(law, trials, Path(folder))
            shown = next((verdict for verdict in verdicts if verdict.status == "failed"), verdicts[0])
            progress.write(str(shown))
            progress.update()
            failed = failed or shown.status == "failed"
    return int(failed)


def _verdicts(law: str, trials: list[Trial], folder: Path) -> list[Verdict]:
    if law == PROCESSES:
        return processes.judge(trials, folder / "processes")
    return [judge(law, trial) for trial in (trials[:1] if law in ONCE else trials)]
