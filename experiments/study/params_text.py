"""Add method blocks to the text of a params.yaml without changing any other byte.

ruamel's round trip moves comments and joins wrapped lists in files that people wrote, so only its positions are used,
and the new text is parsed and compared with what is expected.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from analysis.families import family
from methods.errors import UserError
from methods.settings import shown

PLAIN = re.compile(r"[A-Za-z/][\w./@+-]*(?::[\w./@+-]+)*")  # text that needs no quotes
WORDS = ("yes", "no", "on", "off", "true", "false", "null")  # of YAML 1.1 or 1.2
MOST, DEPTH = 1_000_000, 100  # values in a file of settings, and how deep they lie
WIDTH = 120  # a one-line list that would become longer continues on the next line
QUOTED = "a text that begins with one of { [ % @ ` must be in quotes"
REMEDIES = {  # part of the parser's message → what to do
    "mapping values are not allowed": "a second colon: put a text with a colon in quotes",
    r"character '\t'": "a tab: indent with spaces",
    "unhashable key": QUOTED,
    "that cannot start any token": QUOTED,
}


def read_yaml(path: Path) -> dict:
    """Read a YAML 1.2 mapping (`1e-3` is a number, as it is for DVC). Raises UserError with the line of a mistake."""
    if not path.is_file():
        raise UserError(f"{path.name} not found at {path}: copy another study's there, or correct the study's name")
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path.name} line {line} has bytes that are not UTF-8: save the file as UTF-8") from error
    except DuplicateKeyError as error:
        key = error.problem.removeprefix("found duplicate ").partition(" with value")[0]
        raise UserError(
            f"{path.name} line {error.problem_mark.line + 1}: the {key} is already in this block: keep one of the two"
        ) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(text for text in (error.problem, error.context) if text)
        problem = next((words for part, words in REMEDIES.items() if part in problem), problem)
        raise UserError(
            f"{path.name} is not valid YAML: line {mark.line + 1}, column {mark.column + 1}: {problem}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path.name} is not valid YAML: it nests lists or mappings without end") from error
    # ValueError: a date that does not exist; LookupError: `!!bool maybe`; OverflowError: "\UFFFFFFFF"
    except (YAMLError, ValueError, LookupError, OverflowError) as error:
        raise UserError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(
            f"{path.name} {'is empty' if raw is None else 'must be a mapping of blocks'}: "
            "it needs at least grid, domains and train; models, general and methods also, unless the root's has them"
        )
    if (size := _size(raw, {})) > MOST:
        raise UserError(
            f"{path.name} has {size:,} values when its aliases (*) are written out, and a study has at most {MOST:,}: "
            "write out what is meant"
        )
    return raw


def _size(value: Any, known: dict[int, int], depth: int = 0) -> int:
    """The number of values in YAML, those behind an alias each time; `known` are the sizes of lists and mappings."""
    if not isinstance(value, dict | list) or depth > DEPTH:  # a list within itself is refused by name later
        return 1
    if id(value) not in known:
        inside = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(inner, known, depth + 1) for inner in inside)
    return known[id(value)]


def refuse_odd(value: Any, *, where: str = "", above: tuple[int, ...] = (), seen: set[int] | None = None) -> None:
    """Refuse YAML that a file of settings cannot hold: keys that are not text, dates, bytes, sets, half characters,
    zero characters, whole numbers of more than 64 bits, and aliases inside their own anchor. The message names the path
    of keys.
    """
    seen = set() if seen is None else seen
    if id(value) in above:
        raise UserError(f"{where} contains itself: an alias (*) is inside its own anchor (&); write out what is meant")
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            half = "half of a character (\\ud800 to \\udfff)"
            raise UserError(f"{where} is {shown(value)}: it has {half}; write the character itself")
        if "\0" in value:
            raise UserError(f"{where} is {shown(value)}: it has a zero character (\\0): take it out")
    elif isinstance(value, dict | list):
        if id(value) in seen:
            return
        seen.add(id(value))
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, list):
                path = where
            elif isinstance(key, str):
                refuse_odd(key, where=f"a key of {where or 'params.yaml'}")
                path = f"{where}.{key}" if where else key
            elif isinstance(key, int) and where.endswith(".doc_to_choice"):  # lm-eval takes the values alone
                path = where
            else:
                if isinstance(key, int):  # of so many digits that it cannot be shown
                    refuse_odd(key, where=f"a key of {where or 'params.yaml'}")
                raise UserError(f"{where or 'params.yaml'}: the key {shown(key)} is not text: put it in quotes")
            refuse_odd(inner, where=path, above=(*above, id(value)), seen=seen)
    elif isinstance(value, int) and value.bit_length() > 64:  # no library takes it, and Python may not even write it
        raise UserError(f"{where} is a whole number of {value.bit_length()} bits: write one of at most 63")
    elif isinstance(value, date):
        raise UserError(f"{where} is {value}, which YAML reads as a date: put it in quotes")
    elif value is not None and not isinstance(value, bool | int | float):
        raise UserError(f"{where} is {shown(value)}: write text, a number, true, false, null, a list or a mapping")


def with_methods(
    text: str, *, blocks: Mapping[str, Mapping[str, Any]], grid: Sequence[str], behind: str, where: str
) -> str:
    """Add `blocks` under methods: and the names `grid` to grid.methods, both after the last of `behind`'s family.

    A file that has no method of this family, because the study takes it over from the root, gets them at the end.

    Raises UserError if the file does not have one method a line.
    """
    document = YAML().load(text)
    expected = YAML(typ="safe", pure=True).load(text)
    expected["methods"] = (expected.get("methods") or {}) | blocks
    expected["grid"]["methods"] = expected["grid"]["methods"] + list(grid)
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    edits = []
    if grid:
        edits.append(_into_list(lines, document["grid"]["methods"], grid, behind))
    if blocks:
        edits.append(_into_methods(lines, document.get("methods"), blocks, behind))
    # from the bottom, so that the rows above keep their numbers
    for row, new in sorted(edits, key=lambda edit: edit[0].start, reverse=True):
        lines[row.start : row.stop] = new
    made = "".join(lines)
    if not _is_yaml_of(made, expected):
        raise UserError(
            f"{where}: cannot add methods to this layout: write `methods:` with one method a line, "
            "and `grid.methods` as a list of names"
        )
    return made


def _into_methods(lines: list[str], methods, blocks: Mapping, behind: str) -> tuple[slice, list[str]]:
    """The lines of the blocks, and their position: after the last member and its more deeply indented lines."""
    if not methods:
        return slice(len(lines), len(lines)), [
            "\nmethods:\n",
            *(f"  {name}: {flow(block)}\n" for name, block in blocks.items()),
        ]
    members = [name for name in methods if family(name) == family(behind)] or list(methods)
    row, column, *_ = methods.lc.data[members[-1]]
    end = row
    for at in range(row + 1, len(lines)):
        if lines[at].strip():
            if len(lines[at]) - len(lines[at].lstrip()) <= column:
                break
            end = at
    new = [f"{' ' * column}{name}: {flow(block)}\n" for name, block in blocks.items()]
    return slice(end + 1, end + 1), new


def _into_list(lines: list[str], names, added: Sequence[str], behind: str) -> tuple[slice, list[str]]:
    """The changed lines of grid.methods: the names after the last member of the family in it, else at the end."""
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


def flow(value: Any) -> str:
    """A value on one line, with floats as `100.0` and `1.0e+6`, which YAML 1.1 and 1.2 both read as numbers."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in WORDS:
        return value
    if isinstance(value, float):
        return _number(value)
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return repr(value)
    digits, exponent = Decimal(repr(value)).normalize().as_tuple()[1:]
    first, *rest = digits
    sign = "-" if value < 0 else ""
    return f"{sign}{first}.{''.join(map(str, rest)) or 0}e{exponent + len(digits) - 1:+d}"


def _is_yaml_of(text: str, expected: dict) -> bool:
    """Whether the text is YAML for what is expected; the order of the grid's methods does not matter."""
    try:
        documents = (YAML(typ="safe", pure=True).load(text), expected)
    except YAMLError:
        return False
    one, other = (raw | {"grid": raw["grid"] | {"methods": sorted(raw["grid"]["methods"])}} for raw in documents)
    return one == other
