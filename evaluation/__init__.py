"""Scoring: lm-eval's tasks on local rows, a faster scorer with the same values, probes, and what counts as forgetting."""

SCORING = 3  # raised when the scores of equal weights change by more than rounding: the stages depend on it
