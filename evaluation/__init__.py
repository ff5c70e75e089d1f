"""Scoring: lm-eval's tasks on local rows, a faster scorer with the same values, probes, and what counts as forgetting."""
