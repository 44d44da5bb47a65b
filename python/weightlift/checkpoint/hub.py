"""Access to the Hub through huggingface_hub, with weightlift's errors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import itertools
import os
import re
import warnings
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlift.core.errors import ArgumentError, ReadError, read_error
from weightlift.core.given import check_flag, check_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = [
    "HubArguments",
    "cached_files",
    "commit_of",
    "download",
    "list_files",
    "snapshot",
    "subfolder_text",
]

_COMMIT = re.compile(r"[0-9a-f]{40}")


def subfolder_text(subfolder: str | os.PathLike[str]) -> str:
    """
    Raises:
        ArgumentError: ``subfolder`` is no path.
    """
    if isinstance(subfolder, (str, os.PathLike)):
        if Path(subfolder).is_absolute():
            raise ArgumentError(
                f"subfolder is {str(subfolder)!r}; it must be a folder inside the given one, such "
                "as 'unet'"
            )
        return str(subfolder)
    raise ArgumentError(f"subfolder is {subfolder!r}; it must be text, such as 'unet'")


@dataclasses.dataclass(frozen=True)
class HubArguments:
    """The arguments for access to a Hub repository.

    Attributes:
        cache_dir: the cache; huggingface_hub's own (``HF_HUB_CACHE``) by default.
        force_download: download files again that are in the cache.
        local_files_only: use only the cache and make no request.
        token: ``None`` sends the stored token, if there is one; ``False`` sends none; ``True``
            requires the stored one; or a token.
        revision: a branch, a tag or a commit; ``main`` by default.
        subfolder: the folder of the repository that file names are relative to.
        mirror: the endpoint to use instead of ``HF_ENDPOINT``, only with these arguments. The
            stored token is not sent to it, nor to hosts that it redirects to.
    """

    cache_dir: str | os.PathLike[str] | None = None
    force_download: bool = False
    local_files_only: bool = False
    token: str | bool | None = None
    revision: str | None = None
    subfolder: str | None = None
    mirror: str | None = None

    def __post_init__(self) -> None:
        check_text("revision", self.revision, "main")
        check_text("mirror", self.mirror, "https://hub.example.org")
        check_flag("force_download", self.force_download)
        if not isinstance(self.cache_dir, (str, os.PathLike)) and self.cache_dir is not None:
            raise ArgumentError(f"cache_dir is {self.cache_dir!r}; it must be the path of a folder")
        check_flag("local_files_only", self.local_files_only)
        if not isinstance(self.token, (str, bool)) and self.token is not None:
            raise ArgumentError(  # not its value, which may be a secret
                f"token is {type(self.token).__name__}; it must be text, True, False or None"
            )
        if self.subfolder is not None:
            object.__setattr__(self, "subfolder", subfolder_text(self.subfolder))
        if self.mirror is not None and not re.match(r"https?://[^/]", self.mirror):
            raise ArgumentError(
                f"mirror is {self.mirror!r}; it must be the URL of an endpoint with the Hub's "
                "interface, such as 'https://hub.example.org'"
            )
        if self.force_download and self.local_files_only:
            raise ArgumentError(
                "force_download=True and local_files_only=True contradict each other: leave out "
                "one of them"
            )

    @classmethod
    def pop_from(cls, arguments: MutableMapping[str, Any]) -> HubArguments:
        """Removes these arguments from keyword arguments, including deprecated ones.

        ``use_auth_token`` means ``token``; ``resume_download`` has no effect; ``proxies`` has no
        effect for a single call and warns once per process.
        """
        given = {
            field.name: arguments.pop(field.name)
            for field in dataclasses.fields(cls)
            if field.name in arguments
        }
        former = arguments.pop("use_auth_token", None)
        if former is not None:
            if given.get("token") is not None:
                raise ArgumentError("use_auth_token is the old name of token: give only token")
            given["token"] = former
        arguments.pop("resume_download", None)
        if arguments.pop("proxies", None):
            _warn_of_proxies()
        for flag in ("force_download", "local_files_only"):
            given[flag] = given.get(flag) or False
        given["subfolder"] = given.get("subfolder") or None
        return cls(**given)

    def pinned(self, repo_id: str) -> HubArguments:
        """The same arguments with a commit as revision, so that all files come from one commit,
        whatever is pushed meanwhile. Makes one request, or none if the revision is a commit.

        Raises:
            ReadError: neither the Hub nor the cache knows the repository or its revision.
        """
        from huggingface_hub.errors import (  # type: ignore[attr-defined]
            HTTPError,
            RevisionNotFoundError,
            RevisionResolutionError,
        )

        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            return self
        resolve = functools.partial(
            self.api().resolve_revision,
            repo_id,
            revision=self.revision,
            cache_dir=self._cache,
        )
        with _hub_errors(repo_id, self):
            try:
                commit = resolve(local_files_only=self.local_files_only).resolved
            except RevisionNotFoundError:
                raise
            except HTTPError as error:
                # Refused (expired token, deleted repository), or a proxy without answer: the cache
                # is used, as in a download file by file.
                try:
                    commit = resolve(local_files_only=True).resolved
                except RevisionResolutionError:
                    raise error from None
        return dataclasses.replace(self, revision=commit)

    @property
    def _cache(self) -> str:
        from huggingface_hub import constants

        return os.fspath(self.cache_dir or constants.HF_HUB_CACHE)

    def api(self) -> HfApi:
        """huggingface_hub's client with the endpoint and the token of these arguments."""
        from huggingface_hub import HfApi

        from weightlift.core.version import __version__

        token = False if self.mirror is not None and self.token is None else self.token
        return HfApi(
            endpoint=self.mirror.rstrip("/") if self.mirror else None,
            token=token,
            library_name="weightlift",
            library_version=__version__,
        )


def download(repo_id: str, filename: str, arguments: HubArguments) -> Path:
    """The path in the cache of a repository's file, which is downloaded if missing.

    Raises:
        ReadError: there is no such file (``"not_found"``), revision (``"revision_not_found"``) or
            repository (``"repository_not_found"``), each also a ``FileNotFoundError``; access
            is refused (``"permission_denied"``, a ``PermissionError``); the Hub is unreachable
            and the file is not in the cache (``"not_cached"``, a ``FileNotFoundError``); or the
            download failed (``"read_failed"``).
    """
    with _hub_errors(repo_id, arguments, filename):
        path = arguments.api().hf_hub_download(
            repo_id,
            filename,
            subfolder=arguments.subfolder,
            revision=arguments.revision,
            cache_dir=arguments._cache,
            force_download=arguments.force_download,
            local_files_only=arguments.local_files_only,
        )
    return Path(path)


def snapshot(repo_id: str, patterns: Sequence[str], arguments: HubArguments) -> Path:
    """Downloads the files that match glob patterns, several at a time.

    Returns:
        The files' folder in the cache: that of the commit, or ``subfolder`` in it.

    Raises:
        ReadError: as ``download``; a pattern without matches is no error.
    """
    prefix = glob.escape(f"{arguments.subfolder}/") if arguments.subfolder else ""
    with _hub_errors(repo_id, arguments, ", ".join(patterns)):
        folder = arguments.api().snapshot_download(
            repo_id,
            revision=arguments.revision,
            cache_dir=arguments._cache,
            force_download=arguments.force_download,
            local_files_only=arguments.local_files_only,
            allow_patterns=[prefix + pattern for pattern in patterns],
        )
    return Path(folder, arguments.subfolder or "")


def list_files(repo_id: str, arguments: HubArguments) -> list[str]:
    """The names of a repository's files, relative to ``subfolder``, sorted.

    If the Hub is unreachable or ``local_files_only``, the files in the cache.

    Raises:
        ReadError: neither the Hub nor the cache has the repository or its revision.
    """
    from huggingface_hub import errors

    arguments = arguments.pinned(repo_id)
    api = arguments.api()
    with _hub_errors(repo_id, arguments):
        names: Sequence[str] | None = None
        unreachable: Exception | None = None
        if not arguments.local_files_only:
            try:
                names = api.list_repo_files(repo_id, revision=arguments.revision)
            except errors.RevisionNotFoundError:
                raise
            except (errors.OfflineModeIsEnabled, errors.HTTPError) as error:  # type: ignore[attr-defined]
                unreachable = error
        if names is None:
            names = cached_files(repo_id, arguments)
            if names is None:
                raise unreachable or errors.LocalEntryNotFoundError("")
    prefix = f"{arguments.subfolder}/" if arguments.subfolder else ""
    return sorted(name[len(prefix) :] for name in names if name.startswith(prefix))


def cached_files(repo_id: str, arguments: HubArguments) -> list[str] | None:
    """The names of a commit's files in the cache; ``None`` if there are none. Makes no request.

    Args:
        repo_id: the repository.
        arguments: the arguments after ``pinned``.
    """
    from huggingface_hub import errors

    try:
        folder = arguments.api().snapshot_download(
            repo_id,
            revision=arguments.revision,
            cache_dir=arguments._cache,
            local_files_only=True,
            allow_patterns=[],
        )
    except errors.LocalEntryNotFoundError:
        return None
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in found]


def commit_of(path: str | os.PathLike[str]) -> str | None:
    """The commit of a file in a Hub cache; ``None`` for any other file."""
    parts = Path(path).parts
    for parent, name in itertools.pairwise(parts[:-1]):
        if parent == "snapshots":
            return name if _COMMIT.fullmatch(name) else None
    return None


@functools.cache
def _warn_of_proxies() -> None:
    warnings.warn(
        "proxies= has no effect: set the environment variables HTTPS_PROXY and HTTP_PROXY, which "
        "huggingface_hub uses for the whole process",
        UserWarning,
        stacklevel=4,
    )


@contextlib.contextmanager
def _hub_errors(repo_id: str, arguments: HubArguments, filename: str = "") -> Iterator[None]:
    from huggingface_hub import errors

    kinds = (errors.HTTPError, errors.OfflineModeIsEnabled, errors.RevisionResolutionError)  # type: ignore[attr-defined]
    try:
        yield
    except kinds as error:
        raise _translate(error, repo_id, arguments, filename) from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the cache's disk, which names the file
        raise _translate(error, repo_id, arguments, filename) from error


def _no_such_path(path: str, reason: str) -> str:
    """The message for text that is neither an existing path nor a repository id."""
    text = "there is no such file or folder"
    is_path = path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/")
    if not path:
        return f"{text}: the path is empty"
    return text if is_path else f"{text}, and it is not a repository id: {reason}"


def _translate(
    error: Exception, repo_id: str, arguments: HubArguments, filename: str
) -> ReadError | ArgumentError:
    from huggingface_hub import constants, errors

    endpoint = (arguments.mirror or constants.ENDPOINT).rstrip("/")
    revision = f"revision {arguments.revision or constants.DEFAULT_REVISION!r}"
    place = "/".join(part for part in (repo_id, arguments.subfolder, filename) if part)
    if type(error) is ValueError and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "Force download failed due to the above error."
    reason = " ".join(str(getattr(error, "server_message", None) or error).split())
    refused = isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403)
    log_in = "give token= or log in with `hf auth login`"

    if isinstance(error, errors.HFValidationError):
        code, text = "not_found", _no_such_path(repo_id, reason)
        place = repo_id
    elif type(error) is ValueError:
        return ArgumentError(f"{place}: {error}")
    elif isinstance(error, errors.RevisionNotFoundError):
        code, text = "revision_not_found", f"{endpoint} has no {revision} of this repository"
    elif isinstance(error, errors.RemoteEntryNotFoundError):
        code, text = "not_found", f"{endpoint} has no such file in {revision}"
    elif isinstance(error, errors.GatedRepoError):
        code = "permission_denied"
        text = (
            f"gated: ask for access on {endpoint}/{repo_id} and {log_in}; {endpoint} says: {reason}"
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        code = "repository_not_found"
        text = (
            f"no such folder, and {endpoint} has no such repository, or it is private: then "
            f"{log_in}; {endpoint} says: {reason}"
        )
    elif refused:
        code, text = "permission_denied", f"{endpoint} refuses: {reason}; {log_in}"
    elif isinstance(
        error,
        (
            errors.LocalEntryNotFoundError,
            errors.OfflineModeIsEnabled,
            errors.RevisionResolutionError,
        ),
    ):
        if arguments.local_files_only:
            reason = "local_files_only=True forbids a request to the Hub"
        elif constants.is_offline_mode():
            reason = "HF_HUB_OFFLINE forbids a request to the Hub"
        else:
            reason = f"{endpoint} did not answer: {error.__cause__ or reason}"
        code = "not_cached"
        text = f"{revision} is not in the cache {arguments._cache}, and {reason}"
        if not filename:
            text = f"there is no such file or folder, and as the id of a repository: {text}"
    else:
        code, text = (
            "read_failed",
            f"{endpoint}: {reason}; the partial download was deleted, try again",
        )
    return read_error(code, text, place)
