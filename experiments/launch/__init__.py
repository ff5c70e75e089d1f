"""Run a study's stages on many workers: what waits for what, where it runs, and how its results get into dvc.lock."""
