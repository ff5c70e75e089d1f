"""One short script a pipeline stage: each reads files, does one thing and writes files."""
