"""Whether a file holds the bytes that it was published with: SHA-256 against what is known."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from weightlift.errors import CheckpointError, FormatError

__all__ = ["known_sha256", "verify_file"]

_SUMS = ("SHA256SUMS", "sha256sums.txt")


def known_sha256(path: str | Path) -> tuple[str, str] | None:
    """The SHA-256 that a file should have, and who says so.

    In a Hub cache the file is a link to a blob that is named after its SHA-256 (large files; small
    ones have a git hash of 40 digits). Beside any file, ``NAME.sha256`` or a ``SHA256SUMS`` file in
    the format of sha256sum(1) may tell.
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
            found = re.fullmatch(r"([0-9a-fA-F]{64})(?:[ \t]+\*?(.*))?", line.strip())
            if found and (found[2] == path.name or (sums == single and not found[2])):
                return found[1].lower(), sums.name
    return None


def verify_file(path: str | Path, identity: tuple[int, int]) -> None:
    """Compares a file's SHA-256 with the known one.

    ``identity`` is the (device, inode) of the file that is going to be loaded: were the name given
    to another file meanwhile, the hash would speak of that one.

    Raises:
        CheckpointError: nobody says what it should be.
        FormatError: it is another (code ``"hash_mismatch"``).
    """
    known = known_sha256(path)
    if known is None:
        raise CheckpointError(
            f"{path}: nothing says which SHA-256 it should have: it is in no Hub cache, and there "
            "is no SHA256SUMS file beside it; make one with sha256sum, or load without verify=True"
        )
    digest = hashlib.sha256()
    with Path(path).open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if (status.st_dev, status.st_ino) != identity:
            raise FormatError(
                "hash_mismatch",
                "the name was given to another file while it was being loaded; load it again",
                str(path),
            )
        buffer = bytearray(1 << 20)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            digest.update(view[:count])
    if digest.hexdigest() != known[0]:
        raise FormatError(
            "hash_mismatch",
            f"its SHA-256 is {digest.hexdigest()}, and {known[1]} says {known[0]}: the file is "
            "damaged or was changed; download it again",
            str(path),
        )
