"""Compares the SHA-256 of files with the published ones."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import weightlift._native as _native
from weightlift.core.errors import CheckpointError, FormatError

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["HashCheck", "Identity", "identity_of", "published_sha256", "verify_file"]

# (device, inode), because a name may be given to another file.
Identity: TypeAlias = "tuple[int, int]"

_SUMS = ("SHA256SUMS", "sha256sums.txt")


def published_sha256(path: str | Path) -> tuple[str, str] | None:
    """The published SHA-256 of a file, and its source.

    In a Hub cache a large file is a link to a blob that is named after its SHA-256 (small files
    have a git hash of 40 digits). ``NAME.sha256`` or ``SHA256SUMS`` beside a file, in the format of
    sha256sum(1), may also have it.
    """
    path = Path(path)
    target = path.resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name, "the Hub cache"
    single = path.with_name(path.name + ".sha256")
    for sums in (single, *(path.with_name(name) for name in _SUMS)):
        if not sums.is_file():
            continue
        for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
            found = _parse_sum(line.strip("\r\n"))
            if found and (found[1] == path.name or (sums == single and not found[1])):
                return found[0], sums.name
    return None


def _parse_sum(line: str) -> tuple[str, str] | None:
    """(SHA-256, name) of a line of sha256sum(1): in text or binary mode, with ``--tag``, with
    ``./NAME`` and with escaped names."""
    escaped = line.startswith("\\")
    tagged = re.fullmatch(r"\\?SHA256 \((.*)\) = ([0-9a-fA-F]{64})\s*", line)
    plain = re.fullmatch(r"\s*\\?([0-9a-fA-F]{64})(?:[ \t]+\*?(.*?))?\s*", line)
    if tagged:
        name, digest = tagged[1], tagged[2]
    elif plain:
        digest, name = plain[1], plain[2] or ""
    else:
        return None
    if escaped:
        escapes = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}
        name = re.sub(r"\\[\\nr]", lambda found: escapes[found[0]], name)
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return digest.lower(), name


class HashCheck:
    """Compares the SHA-256 of files with the known ones during the load, several files at once. The
    load and the check read the same pages of the page cache."""

    def __init__(self, files: Iterable[tuple[str, Identity]]) -> None:
        self._files = dict(files)
        for path in self._files:  # before anything is read
            _required_sha256(path)
        self._stopped = threading.Event()
        self._checks: list[Future[None]] = []

    def start(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        pool = ThreadPoolExecutor(max(min(len(self._files), int(_native.machine()["cpus"])), 1))
        self._checks = [
            pool.submit(verify_file, path, identity, self._stopped)
            for path, identity in self._files.items()
        ]
        pool.shutdown(wait=False)

    def result(self) -> None:
        """Waits for the hashes, and raises an error for the first file that differs."""
        try:
            for check in self._checks:
                check.result()
        finally:
            self.stop()

    def stop(self) -> None:
        self._stopped.set()


def _required_sha256(path: str | Path) -> tuple[str, str]:
    known = published_sha256(path)
    if known is None:
        raise CheckpointError(
            f"{path}: its SHA-256 is unknown: the file is not in a Hub cache, and there is no "
            "SHA256SUMS file beside it; make one with sha256sum, or load without verify=True"
        )
    return known


def identity_of(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def verify_file(
    path: str | Path, identity: Identity, stopped: threading.Event | None = None
) -> None:
    """Compares a file's SHA-256 with the known one.

    ``identity`` is that of the loaded file, in case the name is given to another file meanwhile.
    ``stopped`` ends the check early.

    Raises:
        CheckpointError: the published SHA-256 is unknown.
        FormatError: the SHA-256 differs (code ``"hash_mismatch"``).
    """
    known = _required_sha256(path)
    digest = hashlib.sha256()
    with Path(path).open("rb", buffering=0) as file:
        if identity_of(os.fstat(file.fileno())) != identity:
            raise FormatError(
                "hash_mismatch",
                "another file took this name during the load; load it again",
                str(path),
            )
        buffer = bytearray(1 << 20)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            digest.update(view[:count])
            if stopped is not None and stopped.is_set():
                return
    if digest.hexdigest() != known[0]:
        raise FormatError(
            "hash_mismatch",
            f"its SHA-256 is {digest.hexdigest()}, and {known[1]} says {known[0]}: the file is "
            "damaged or was changed; download it again",
            str(path),
        )
