"""What a study takes over from the root's params.yaml where it does not write its own.

`models`, `tasks`, `methods`, `packages` and `suites` are taken over name by name: a block that the study writes stands
in place of the root's of the same name, as a whole. A method may say `like:` its own name to begin from the root's.
`general` is taken over as a whole. Nothing else is: the grid and the domains are the study's question, and rates and
lengths (`train:`) are chosen for its models and domains, so that a change of the default study's would train the cells
of every other study again.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import create_model

from experiments.study.blocks import Block, key
from experiments.study.params_text import read_yaml, refuse_odd
from experiments.study.paths import Paths
from experiments.study.schema import TAKEN_OVER, Params
from experiments.study.validation import check_models, validate
from methods.errors import UserError
from methods.tools.names import unknown

FROM_ROOT = " (in the root's params.yaml, from which the study takes over what it does not write)"

_Root: Any = create_model(
    "Root", __base__=Block, **{name: (Params.model_fields[name].annotation, key("", None)) for name in TAKEN_OVER}
)


def file(paths: Paths) -> str | None:
    """The root's params.yaml, relative to the root, if the study of these paths takes blocks over from it."""
    root = Paths(root=paths.root).params
    return root.name if paths.study and root.is_file() else None


def completed(own: Mapping[str, Any], *, paths: Paths) -> Mapping[str, Any]:
    """The blocks `own` of a params.yaml together with those that it takes over, as they are written.

    Raises UserError that names the root's file for a mistake in the root's blocks.
    """
    if not file(paths):
        return own
    try:
        raw = read_yaml(paths.root / "params.yaml")
        if wrong := [name for name in raw if name not in Params.model_fields]:
            raise unknown("key", wrong[0], Params.model_fields, where="params.yaml")
        root = {name: raw[name] for name in TAKEN_OVER if raw.get(name)}
        refuse_odd(root)
        check_models(validate(_Root, root).models or {})
    except UserError as error:
        raise UserError(f"{error}{FROM_ROOT}") from error
    whole = dict(own)
    if isinstance(own.get("methods"), dict):
        own = own | {"methods": {name: _from_root(name, block, root) for name, block in own["methods"].items()}}
        whole["methods"] = own["methods"]
    for name, blocks in root.items():
        written = own.get(name)
        if not written:
            whole[name] = blocks
        elif name != "general" and isinstance(written, dict):
            whole[name] = blocks | written
    return whole


def attributed(message: str, paths: Paths) -> str:
    """The message, with the root's file named if it begins with the path of a block that the study takes over."""
    begins = re.match(r"(models|tasks|methods|general)\b(?:\.([a-z0-9_-]+))?", message)
    if begins is None or not file(paths) or message.endswith(FROM_ROOT):
        return message
    kind, name = begins.groups()
    try:
        own = read_yaml(paths.params)
    except UserError:
        return message
    written = own.get(kind) or {}
    taken_over = not written if kind == "general" else name is not None and name not in written
    return message + FROM_ROOT if taken_over else message


def _from_root(name: str, block: Any, root: Mapping[str, Any]) -> Any:
    """A method's block, put on the root's of its own name if it says `like:` that name."""
    above = root.get("methods", {}).get(name)
    if not (isinstance(block, dict) and block.get("like") == name and isinstance(above, dict)):
        return block
    return laid_over(above, {key: value for key, value in block.items() if key != "like"})


def laid_over(base: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    """A method's block with the settings of `block`, part by part, in the place of those of `base`."""
    merged = dict(base)
    for part, own in block.items():
        settings = own is None or isinstance(own, dict)
        merged[part] = {**(merged.get(part) or {}), **(own or {})} if settings else own
    return merged
