"""Scoring: lm-eval's tasks on local rows, a faster scorer with the same values, probes, and what forgetting is."""

from importlib.metadata import version

SCORING = 6  # raised when the scores of equal weights change by more than rounding: the stages depend on it
PACKAGES = ("lm_eval", "tokenizers", "torch", "transformers")  # whose versions can move a score


def versions() -> dict[str, str]:
    """Installed versions of `PACKAGES`, without what tells builds of one version apart ("+cpu"): the device does."""
    return {name: version(name).partition("+")[0] for name in PACKAGES}
