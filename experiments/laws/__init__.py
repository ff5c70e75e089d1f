"""The laws that every part is held to, and the tiny world in which it is tried; `python -m experiments check PART`."""
