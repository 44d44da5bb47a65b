"""``weightlift verify``: whether a checkpoint is whole, without loading it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import typer

import weightlift._native as _native
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.integrity import Identity, published_sha256, verify_file
from weightlift.cli.sources import (
    Bin,
    OpenOptions,
    Paths,
    Revision,
    StateDictKey,
    Subfolder,
    Variant,
    components_of,
    expand,
    place_of,
)
from weightlift.core.errors import CheckpointError, FormatError
from weightlift.core.report import format_bytes, format_count

__all__ = ["verify"]

_PIECE = 1 << 24


def verify(
    paths: Paths,
    subfolder: Subfolder = None,
    variant: Variant = None,
    use_bin: Bin = False,
    state_dict_key: StateDictKey = None,
    revision: Revision = None,
    require_hashes: Annotated[
        bool, typer.Option("--require-hashes", help="A file whose hash nobody knows is an error.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print no result; the exit status tells.")
    ] = False,
) -> None:
    """Check headers, indexes, checksums and SHA-256 hashes; no tensor is loaded.

    Hashes are compared with what the Hub cache or a SHA256SUMS file beside the weights says. Exit
    status 1 if anything is wrong.

    Examples:

      weightlift verify model/

      weightlift verify org/model --require-hashes --json

      weightlift verify '*.safetensors' --quiet && echo whole
    """
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    options = OpenOptions(subfolder, variant, use_bin, state_dict_key, revision=revision)
    every = expand(paths)
    for path, component, checkpoint in _opened(every, options):
        title = place_of(path, options.subfolder)
        if component is not None:
            title = f"{path} [{component}]"
        if isinstance(checkpoint, FormatError | CheckpointError):
            if component is None and len(every) == 1 and not (as_json or quiet):
                raise checkpoint
            found.append(_damaged(title, checkpoint))
            if not as_json and not quiet:
                print(f"{title}: {found[-1]['files'][0]['result']}")
            continue
        total = checkpoint.stored_bytes
        total += sum(tensor.nbytes for tensor in checkpoint.in_memory.values())
        one: dict[str, Any] = {
            "title": title,
            "tensors": len(checkpoint),
            "bytes": total,
            "files": [],
        }
        found.append(one)
        if not as_json and not quiet:
            print(
                f"{title}: {len(checkpoint):,} tensor{'s' * (len(checkpoint) != 1)}, "
                f"{format_bytes(total)}; headers and index are consistent"
            )
        new = [(file, identity) for file, identity in checkpoint.files if file not in seen]
        seen.update(file for file, _ in new)
        with ThreadPoolExecutor(max(1, int(_native.machine()["cpus"]))) as pool:
            results = pool.map(lambda file: _check(*file), new)
            for (file, _), (result, damaged, known) in zip(new, results, strict=True):
                one["files"].append(
                    {"path": file, "result": result, "damaged": damaged, "hash_known": known}
                )
                if not as_json and not quiet:
                    print(f"  {file}: {result}")
    files = [file for one in found for file in one["files"]]
    damaged_files = sum(file["damaged"] for file in files)
    unknown = sum(not file["hash_known"] and not file["damaged"] for file in files)
    if as_json:
        content: dict[str, Any] = {"path": every[0]} if len(every) == 1 else {"paths": every}
        content |= {"checkpoints": found, "damaged": damaged_files, "hashes_unknown": unknown}
        print(json.dumps(content, indent=2))
    elif unknown and not quiet:
        print(_unknown_text(unknown, len(files)))
    if damaged_files or (require_hashes and unknown):
        raise typer.Exit(1)


def _opened(
    paths: Sequence[str], options: OpenOptions
) -> Iterator[tuple[str, str | None, Checkpoint | FormatError | CheckpointError]]:
    """The checkpoints, or each component's of a pipeline; what is wrong with one, where it cannot
    be opened: the others are looked at none the less."""
    for path in paths:
        components: list[str | None] = []
        try:
            if options.subfolder is None:
                components += components_of(path, options.revision)
        except (FormatError, CheckpointError) as error:
            yield path, None, error
            continue
        for component in components or [None]:
            try:
                yield path, component, options.open(path, component)
            except (FormatError, CheckpointError) as error:  # noqa: PERF203 - of each component
                yield path, component, error


def _damaged(title: str, error: FormatError | CheckpointError) -> dict[str, Any]:
    """The result of a checkpoint that cannot be opened."""
    path = getattr(error, "path", None) or title
    said = str(error).removeprefix(f"{title}: ")
    file = {"path": path, "result": f"DAMAGED: {said}", "damaged": True, "hash_known": False}
    return {"title": title, "tensors": 0, "bytes": 0, "files": [file]}


def _unknown_text(unknown: int, files: int) -> str:
    if unknown == 1:
        which = "the file" if files == 1 else f"1 of the {files} files"
        return (
            f"{which} is in no Hub cache and has no SHA256SUMS beside it: whether it is what was "
            "published is not known"
        )
    if unknown == files:
        return (
            f"none of the {files} files is in a Hub cache or has a SHA256SUMS beside it: whether "
            "they are what was published is not known"
        )
    return (
        f"{unknown} of the {files} files are in no Hub cache and have no SHA256SUMS beside them: "
        "whether they are what was published is not known"
    )


def _check(path: str, identity: Identity) -> tuple[str, bool, bool]:
    """What to say of a file, whether it is damaged, and whether its hash is known."""
    known = published_sha256(path)
    results = []
    try:
        records = _check_records(path)
        if records:
            match = "matches" if records == 1 else "match"
            results.append(f"{format_count(records, 'checksum')} {match}")
        if known is not None:
            verify_file(path, identity)
            results.append(f"SHA-256 as {known[1]} says")
        else:
            results.append("SHA-256 not known")
    except (FormatError, CheckpointError) as error:
        said = str(error).removeprefix(f"{path}: ")
        return f"DAMAGED: {said}", True, known is not None
    return ", ".join(results), False, known is not None


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
