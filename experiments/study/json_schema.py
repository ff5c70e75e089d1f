"""The JSON Schema of params.yaml, from which an editor completes keys: `python -m experiments schema` writes it."""

from collections.abc import Mapping
from typing import Any

from pydantic import create_model

from experiments.study.blocks import Block, Name, key, settings_block
from experiments.study.schema import TAKEN_OVER, MethodTrain, Params
from methods.part import Part

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(parts: Mapping[str, type[Part]]) -> dict[str, Any]:
    """The JSON Schema of params.yaml, with the settings of these parts."""
    blocks: Any = {
        name: (settings_block(part, name=part.__name__), key(f"{part.line} {part.paper}".rstrip(), None))
        for name, part in parts.items()
    }
    method: Any = create_model(
        "Method",
        __base__=Block,
        __doc__="A method: its parts with their settings.",
        like=(str, key("Name of the method whose block this one starts from.", None)),
        train=(
            MethodTrain,
            key("Training settings for this method; precedence train < domain < model < method.", None),
        ),
        **blocks,
    )
    params = create_model("Params", __base__=Params, methods=(dict[Name, method], Params.model_fields["methods"]))
    document = {"$schema": DIALECT} | _plain(params.model_json_schema())
    document["required"] = [name for name in document["required"] if name not in TAKEN_OVER]
    return document


def _plain(node: Any) -> Any:
    """The schema as the loader reads blocks: other names are refused, and null is an empty block, list or mapping that
    need not be written; without titles.
    """
    if isinstance(node, list):
        return [_plain(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    kept = {name: _plain(value) for name, value in node.items()}
    if isinstance(node.get("title"), str):
        del kept["title"]
    if "default" in node and node["default"] is None:
        del kept["default"]
    if "patternProperties" in node:
        kept["additionalProperties"] = False
    if node.get("type") == "object":
        required = node.get("required", ())
        kept["type"] = "object" if required else ["object", "null"]
        for name, value in kept.get("properties", {}).items():
            options = value.get("anyOf", [value])
            if name in required:
                for option in options:
                    if option.get("$ref") == "#/$defs/Rows":  # a path alone stands for the block
                        option["type"] = ["object", "string"]
                    elif "$ref" in option or option.get("type") == ["object", "null"]:
                        option["type"] = "object"
            elif "default" not in value:
                for option in options:
                    if option.get("type") == "array":
                        option["type"] = ["array", "null"]
    return kept
