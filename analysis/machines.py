"""What was measured of machines, not of a study: the check of a GPU and the benchmarks."""

from pathlib import Path

from methods.errors import UserError
from methods.tools.files import read_json


def newest_gpu_check(root: Path) -> dict | None:
    """The newest check of a GPU. It belongs to the machine, not to a study, and lies in the default study's results."""
    checks = [check for check in map(read_json, shared_files(root, "gpu")) if not check.get("tiny")]
    return max(checks, key=lambda check: check.get("when") or "", default=None)


def newest_benchmarks(root: Path) -> dict[Path, dict]:
    """The newest record of every benchmark, by its path; like the GPU check, they belong to the machine.

    Raises UserError for a file that is not a record as `python -m experiments bench` writes it.
    """
    newest: dict[str, tuple[Path, dict]] = {}
    for path in shared_files(root, "bench"):
        record = read_json(path)
        if wrong := _not_a_benchmark(record):
            raise UserError(
                f"{path} is not a benchmark's record ({wrong}): delete it, or write it again with "
                f"`python -m experiments bench {path.stem}`"
            )
        if path.stem not in newest or record["when"] > newest[path.stem][1]["when"]:
            newest[path.stem] = path, record
    return dict(newest[name] for name in sorted(newest))


def shared_files(root: Path, folder: str) -> list[Path]:
    """The JSON files of a folder in the default study's results, whichever study `root` belongs to."""
    return [path for place in (root / folder, root.parent / folder) for path in sorted(place.glob("*.json"))]


def _not_a_benchmark(record) -> str:
    """Why a file's content is not a benchmark's record; empty if it is one."""
    try:
        for key in ("title", "text", "when"):
            if not isinstance(record[key], str):
                return f"{key} is not a text"
        if not record["races"]:
            return "it holds no race"
        for race in record["races"]:
            for row in race["rows"]:
                for key in ("seconds_min", "seconds_median", "ratio_min", "ratio_median"):
                    float(row[key])
            if race["against"] not in (runners := [row["runner"] for row in race["rows"]]):
                return f"{race['against']!r} is not a runner of {race['title']!r}"
            for goal in race["goals"]:
                goal["text"], goal["met"]
                if goal["runner"] not in runners:
                    return f"the goal of {goal['runner']!r} has no runner"
            race["title"], race["rounds"], dict(race["facts"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
