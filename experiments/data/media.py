"""Pictures, sounds and other files inside a data set stay as they are stored: {"bytes", "path"}.

`datasets` would open each when its row is read: with libraries for many formats, and from the address in `path`, which
is on the network where whoever made the data set wants it.
"""

from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def unopened(rows: "Dataset") -> "Dataset":
    """The data set with its columns of files left closed."""
    for name, feature in rows.features.items():
        if (closed := _closed(feature)) != feature:
            rows = rows.cast_column(name, closed)
    return rows


def _closed(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _closed(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_closed(inner) for inner in feature]
    if is_dataclass(feature) and hasattr(feature, "decode") and type(feature).__name__ != "Json":
        return replace(feature, decode=False)
    if is_dataclass(feature) and hasattr(feature, "feature"):  # a list
        return replace(feature, feature=_closed(feature.feature))
    return feature
