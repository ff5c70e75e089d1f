"""Scores and movement that are kept by everything they depend on."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """Hex sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def folder_of(root: Path, key: Mapping[str, Any]) -> Path:
    """The folder in which what depends on `key` alone is kept."""
    return root / digest(key)[:32]
