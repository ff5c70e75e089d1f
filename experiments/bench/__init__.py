"""`python -m experiments bench`: each fast path against its plain or library counterpart, interleaved in one process.

A module of this package that has `TITLE` and `measure` is a benchmark under its own name; `command` finds it, runs it
and writes results/bench/<name>.json with a figure.
"""
