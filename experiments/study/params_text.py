"""Method blocks written into the text of a params.yaml: lines are added and no other byte changes.

ruamel's round trip moves comments and joins wrapped lists in files that people wrote, so it is asked only where things
stand, and the outcome is read again and compared.
"""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from analysis.families import family
from methods.errors import UserError

WIDTH = 120  # a list in one line that would become longer goes on in the next


def with_methods(
    text: str, *, blocks: Mapping[str, Mapping[str, Any]], grid: Sequence[str], behind: str, where: str
) -> str:
    """The text with `blocks` under methods: and the names `grid` in grid.methods, both behind the last of `behind`'s family.

    Raises UserError where the file is not laid out as one method a line.
    """
    document = YAML().load(text)
    expected = YAML(typ="safe", pure=True).load(text)
    expected["methods"] |= blocks
    expected["grid"]["methods"] = expected["grid"]["methods"] + list(grid)
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    edits = []
    if grid:
        edits.append(_into_list(lines, document["grid"]["methods"], grid, behind))
    if blocks:
        edits.append(_into_methods(lines, document["methods"], blocks, behind))
    for row, new in sorted(
        edits, key=lambda edit: edit[0].start, reverse=True
    ):  # from below, so that rows above keep their numbers
        lines[row.start : row.stop] = new
    made = "".join(lines)
    if not _says(made, expected):
        raise UserError(
            f"{where}: cannot add methods to this layout: write `methods:` with one method a line, and `grid.methods` as a list of names"
        )
    return made


def _into_methods(lines: list[str], methods, blocks: Mapping, behind: str) -> tuple[slice, list[str]]:
    """The lines of the blocks, and where they go: behind all lines of the last member that are indented deeper than its name."""
    last = [name for name in methods if family(name) == family(behind)][-1]
    row, column, *_ = methods.lc.data[last]
    end = row
    for at in range(row + 1, len(lines)):
        if lines[at].strip():
            if len(lines[at]) - len(lines[at].lstrip()) <= column:
                break
            end = at
    new = [f"{' ' * column}{name}: {_flow(block)}\n" for name, block in blocks.items()]
    return slice(end + 1, end + 1), new


def _into_list(lines: list[str], names, added: Sequence[str], behind: str) -> tuple[slice, list[str]]:
    """The changed lines of grid.methods: the names behind the last member of the family that is there, else at the end."""
    at = max((k for k, name in enumerate(names) if family(name) == family(behind)), default=len(names) - 1)
    row, column = names.lc.data[at][:2]
    line = lines[row]
    if not names.fa.flow_style():
        return slice(row + 1, row + 1), [f"{line[:column]}{name}\n" for name in added]
    quotes = 2 if line[column] in "\"'" else 0
    cut = column + len(names[at]) + quotes
    text = ", ".join(added)
    first = names.lc.data[0][1]
    joint = ", " if len(line.rstrip()) + len(text) + 2 <= WIDTH else ",\n" + " " * first
    return slice(row, row + 1), (line[:cut] + joint + text + line[cut:]).splitlines(keepends=True)


def _flow(value: Any) -> str:
    """A block in one line, floats as `100.0` and `1.0e+6`, which YAML 1.1 and 1.2 both read as numbers."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return repr(value)
    digits, exponent = Decimal(repr(value)).normalize().as_tuple()[1:]
    first, *rest = digits
    sign = "-" if value < 0 else ""
    return f"{sign}{first}.{''.join(map(str, rest)) or 0}e{exponent + len(digits) - 1:+d}"


def _says(text: str, expected: dict) -> bool:
    """Whether the text is YAML for what is expected; names of the grid may stand in any order."""
    try:
        found = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return False
    ordered = lambda raw: raw | {"grid": raw["grid"] | {"methods": sorted(raw["grid"]["methods"])}}
    return ordered(found) == ordered(expected)
