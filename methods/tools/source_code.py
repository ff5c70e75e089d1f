"""A hash of a module's code that a rewritten comment, a new layout or a moved file does not change.

It is the hash of the syntax tree without what cannot change a result: docstrings, annotations, the paths that names are
imported from, `__all__`, a part's `shares` (whose modules are hashed themselves), and blocks under `if
TYPE_CHECKING:`. An import counts with the original and the bound name, if the module uses it. Equal trees have equal
hashes on Python 3.11 to 3.13.
"""

import ast
import functools
from hashlib import sha256
from pathlib import Path
from typing import Any

_IGNORED_FIELDS = ("annotation", "returns", "type_comment", "type_params", "kind", "ctx")
_NAMES_ONLY = ("__all__", "shares")  # lists of names whose objects are hashed elsewhere


def digest(path: Path) -> str:
    """Hex sha256 of the code in a file of Python source."""
    facts = path.stat()
    return _digest(path, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=256)  # every cell of a study has the same few files
def _digest(path: Path, *_: int) -> str:
    return digest_of(path.read_text(encoding="utf-8"))


def digest_of(source: str) -> str:
    """Hex sha256 of Python source, as described above. Raises SyntaxError where it is not Python."""
    tree = ast.parse(source)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = sorted(
        {
            (alias.name, bound)
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if (bound := alias.asname or alias.name.partition(".")[0]) in used
        }
    )
    return sha256(repr((imported, _tuples(tree))).encode()).hexdigest()


def _tuples(node: Any) -> Any:
    """The tree as nested tuples of (kind, named children); absent and empty children are left out."""
    if isinstance(node, list):
        return tuple(_tuples(child) for child in node if not _is_ignored(child))
    if isinstance(node, ast.AnnAssign):  # `x: int = 3` counts as `x = 3`
        node = ast.Assign(targets=[node.target], value=node.value)
    if not isinstance(node, ast.AST):
        return (type(node).__name__, repr(node))
    fields = (
        (name, value)
        for name, value in ast.iter_fields(node)
        if name not in _IGNORED_FIELDS and value is not None and value != []
    )
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and _is_text(node.body[:1]):
        fields = ((name, value[1:] if name == "body" else value) for name, value in fields)
    return (type(node).__name__, *((name, _tuples(value)) for name, value in fields))


def _is_ignored(node: Any) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" and not node.orelse
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(target, ast.Name) and target.id in _NAMES_ONLY for target in targets)


def _is_text(body: list[ast.stmt]) -> bool:
    return (
        bool(body)
        and isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    )
