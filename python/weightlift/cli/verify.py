"""``weightlift verify``: whether a checkpoint is whole, without loading it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from weightlift import _native
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.integrity import Identity, known_sha256, verify_file
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.core.errors import CheckpointError, FormatError
from weightlift.core.report import format_bytes

__all__ = ["verify"]

_PIECE = 1 << 24


def verify(
    path: Annotated[
        str, typer.Argument(help="A file, a folder, a pipeline's folder, or a .dduf file.")
    ],
    subfolder: Annotated[str | None, typer.Option(help="Within the folder.")] = None,
    variant: Annotated[str | None, typer.Option(help="Such as fp16.")] = None,
    require_hashes: Annotated[
        bool, typer.Option("--require-hashes", help="A file whose hash nobody knows is an error.")
    ] = False,
) -> None:
    """Check headers, indexes, checksums and SHA-256 hashes; no tensor is loaded.

    Hashes are compared with what the Hub cache or a SHA256SUMS file beside the weights says. Exit
    status 1 if anything is wrong.
    """
    problems = 0
    unknown = 0
    seen: set[str] = set()
    for title, checkpoint in _checkpoints(path, subfolder, variant):
        total = sum(sum(part.sizes()) for part in checkpoint.parts)
        total += sum(tensor.nbytes for tensor in checkpoint.in_memory.values())
        print(
            f"{title}: {len(checkpoint)} tensors, {format_bytes(total)}; "
            "headers and index are consistent"
        )
        files = [(path, identity) for path, identity in checkpoint.files if path not in seen]
        seen.update(path for path, _ in files)
        with ThreadPoolExecutor(max(1, int(_native.machine()["cpus"]))) as pool:
            for (file, _), (said, wrong, known) in zip(
                files, pool.map(lambda file: _check(*file), files), strict=True
            ):
                print(f"  {file}: {said}")
                problems += wrong
                unknown += not known
    if unknown:
        print(
            f"{unknown} of the files are in no Hub cache and have no SHA256SUMS beside them: "
            "whether they are what was published is not known"
        )
    if problems or (require_hashes and unknown):
        raise typer.Exit(1)


def _check(path: str, identity: Identity) -> tuple[str, bool, bool]:
    """What to say of a file, whether it is damaged, and whether its hash is known."""
    known = known_sha256(path)
    said = []
    try:
        records = _check_records(path)
        if records:
            said.append(f"{records} checksums match")
        if known is not None:
            verify_file(path, identity)
            said.append(f"SHA-256 as {known[1]} says")
        else:
            said.append("SHA-256 not known")
    except (FormatError, CheckpointError) as error:
        return f"DAMAGED: {error}", True, known is not None
    return ", ".join(said), False, known is not None


def _check_records(path: str) -> int:
    """Compares the CRC-32 of an archive's records; how many there were."""
    try:
        archive = _native.Archive.open(path)
    except FormatError as error:
        if error.code == "not_archive":
            return 0
        raise
    checked = 0
    for name, begin, count, crc32, _ in archive.records():
        if crc32 == 0:  # torch.serialization.set_crc32_options(False) writes none
            continue
        found = 0
        for start in range(0, count, _PIECE):
            piece = archive.read(begin + start, min(_PIECE, count - start))
            found = zlib.crc32(piece, found)
        if found != crc32:
            raise FormatError(
                "checksum_mismatch",
                f"record {name!r} has the CRC-32 {found:08x}, and the archive says {crc32:08x}: "
                "the file is damaged; download it again",
                path,
            )
        checked += 1
    return checked


def _checkpoints(
    path: str, subfolder: str | None, variant: str | None
) -> Iterator[tuple[str, Checkpoint]]:
    components: list[str | None] = [subfolder]
    folder = Path(path)
    if subfolder is None and folder.suffix == ".dduf":
        from weightlift.checkpoint.dduf import open_dduf

        archive = open_dduf(path)
        components = [
            name
            for name in archive.folders()
            if any(e.startswith(f"{name}/") and e.endswith(".safetensors") for e in archive.entries)
        ]
    elif subfolder is None and (folder / "model_index.json").is_file():
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        components = [
            name
            for name in index
            if (folder / name).is_dir()
            and any(p.suffix in (".safetensors", ".bin") for p in (folder / name).iterdir())
        ]
    for component in components:
        title = path if component is None else f"{path} [{component}]"
        yield title, open_checkpoint(path, subfolder=component, variant=variant)
