"""The data sets of lm-eval's tasks: from the hub, from its cache, or from a folder in the hub's layout."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.data import media
from experiments.model import hub
from experiments.study import local_files
from experiments.study.secrets import redacted
from methods.errors import UserError, shortened

COMMIT = re.compile("[0-9a-f]{40}")
BUILDERS = ("arrow", "csv", "json", "parquet", "text")  # readers of `datasets`, whose files stand in `data_files`


@dataclass(kw_only=True)
class DataSets:
    """Reads each data set once.

    folder   in which data sets lie as OWNER/NAME, instead of on the hub
    hashes   folder in which the hashes of files are remembered
    """

    folder: Path | None
    hashes: Path
    read_before: dict[str, tuple[Mapping[str, Any], str]] = field(default_factory=dict)

    def __call__(self, path: str, name: str | None, arguments: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        """(rows by split, where they are from with its commit or hash). Raises UserError saying what is missing."""
        key = repr((path, name, sorted(arguments.items(), key=str)))
        if key not in self.read_before:
            self.read_before[key] = self._read(path, name, dict(arguments))
        return self.read_before[key]

    def place(self, path: str) -> str:
        """The folder in `folder` that holds the data set OWNER/NAME."""
        at = self.folder / path
        if not at.is_dir():
            raise UserError(
                f"{self.folder} (data.hub) has no folder {path}: put the files of that data set's repository there, or "
                "leave data.hub out to read the hub"
            )
        return str(at)

    def source(self, path: str) -> str:
        """The name of the data set in `folder`, with the hash of its files."""
        digest = local_files.digests([self.place(path)], kept=self.hashes)[self.place(path)]
        return f"folder:{path}@{digest[:16]}"

    def _read(self, path: str, name: str | None, arguments: dict[str, Any]) -> tuple[Mapping[str, Any], str]:
        import datasets

        datasets.logging.set_verbosity_error()
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else every load is reported to a counter outside the hub
        refuse_reader(path)
        revision = arguments.pop("revision", None)
        at, commit = path, None
        if self.folder is not None:
            at = self.place(path)
            # `datasets` would take a changed folder, or another one of this name, for the one it read before
            arguments["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE) / self.source(path).partition("@")[2])
        elif path not in BUILDERS:
            commit = hub.data_set_commit(path, revision=revision)
        try:
            pinned = {"revision": commit or revision} if self.folder is None and path not in BUILDERS else {}
            splits = datasets.load_dataset(at, name, **arguments, **pinned)
        except ImportError as error:
            raise UserError(f"data set {path!r} needs a Python package that is not installed: {error}") from error
        except Exception as error:  # datasets and its HTTP library raise many types
            raise _refused(error, path, revision, folder=self.folder) from error
        splits = {"train": splits} if isinstance(splits, datasets.Dataset) else splits
        splits = datasets.DatasetDict({name: media.unopened(rows) for name, rows in splits.items()})
        if self.folder is not None:
            return splits, self.source(path) + (f"/{name}" if name else "")
        cached = {Path(file["filename"]).parent.name for part in splits.values() for file in part.cache_files}
        found = set(filter(COMMIT.fullmatch, cached)) | ({commit} - {None})
        if len(found) > 1:
            raise UserError(
                f"data set {path!r} in the local cache has commit {', '.join(sorted(found - {commit}))}, not {commit}: "
                "download that revision with HF_HUB_OFFLINE unset"
            )
        for one in found:
            hub.refuse_damaged_data_set(path, commit=one)
        return splits, f"hub:{path}@{next(iter(found), 'unknown revision')}" + (f"/{name}" if name else "")


def refuse_reader(path: str) -> None:
    """Refuse readers of `datasets` that are named in place of a data set, other than those of plain tables and texts.

    Among the others are some that open databases, catalogues on the network and archives.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if path in {*_PACKAGED_DATASETS_MODULES, "sql", "spark", "generator", "cache"} - {*BUILDERS}:
        raise UserError(
            f"data set {path!r} is a reader of the library `datasets`, and of these only {', '.join(BUILDERS)} are "
            "used: save the rows as one of them"
        )


def _refused(error: Exception, path: str, revision: str | None, *, folder: Path | None) -> UserError:
    message = " ".join(redacted(str(error)).split())[:300]
    if "Dataset scripts are no longer supported" in message:
        return UserError(f"data set {path!r} is made by a program of its repository, which is not run: {message}")
    if folder is not None:
        inner = f" ({redacted(shortened(error.__cause__))})" if error.__cause__ else ""
        return UserError(f"data set {path!r} in {folder} (data.hub) cannot be read: {message}{inner}")
    return hub.refused(error, kind="data set", name=path, revision=revision)
