"""schema: the JSON Schema of params.yaml, from which an editor completes keys, types and help.

The first line of each params.yaml names the file for editors that use the YAML language server:

    # yaml-language-server: $schema=params.schema.json
"""

import json
from pathlib import Path

from experiments.study.json_schema import json_schema
from methods import registry

FILE = "params.schema.json"


def main() -> None:
    """Write params.schema.json with the settings of every part that is installed."""
    Path(FILE).write_text(text(registry.parts()))
    print(f"wrote {FILE}")


def text(parts: dict[str, type]) -> str:
    """The file's text for these parts by name."""
    return json.dumps(json_schema(parts), indent=1, ensure_ascii=False) + "\n"
