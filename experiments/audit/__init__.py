"""Audit of two models: resolve them, score both, compare. `python -m experiments audit BASE TUNED` puts it together."""
