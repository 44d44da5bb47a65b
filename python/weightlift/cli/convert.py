"""``weightlift convert``: converts checkpoints of any form to safetensors."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from weightlift.cli.sources import (
    SOURCE_HELP,
    Bin,
    OpenOptions,
    Prefix,
    Revision,
    StateDictKey,
    Subfolder,
    Variant,
    components_of,
    expand,
)
from weightlift.cli.values import castable_dtype, size_text
from weightlift.core.report import format_bytes

__all__ = ["convert"]

_log = logging.getLogger("weightlift")

# Files that belong to the weights beside them: configurations and vocabularies.
_COMPANIONS = (".json", ".txt", ".model")
# Size limit of a companion file: a tokenizer may have tens of megabytes.
_MOST_BYTES = 1 << 28
_OTHER_FORMATS = (
    *(".bin", ".pt", ".pth", ".ckpt", ".dduf", ".gguf", ".msgpack", ".h5", ".onnx", ".npz"),
    *(".json", ".pkl", ".pickle", ".npy", ".zip", ".tar", ".gz", ".tgz", ".txt", ".yaml", ".yml"),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """The options for the files to write."""

    dtype: str | None
    max_shard_size: str
    stem: str | None
    variant: str | None


@dataclasses.dataclass(frozen=True)
class Written:
    """A written checkpoint.

    Attributes:
        files: names below ``target``; the target's own name if it is a file.
        bytes: the bytes of the files.
    """

    source: str
    target: str
    tensors: int
    files: list[str]
    bytes: int


def convert(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE", help=SOURCE_HELP, show_default=False)
    ],
    last: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A .safetensors file, or a folder.", show_default=False
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            parser=castable_dtype,
            metavar="DTYPE",
            help="Cast floating-point tensors, to bfloat16 for example.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            parser=size_text,
            metavar="SIZE",
            help="Largest file of a folder, such as 5GB; 10GB by default.",
            show_default=False,
        ),
    ] = None,
    subfolder: Subfolder = None,
    variant: Variant = None,
    to_variant: Annotated[
        str | None, typer.Option(help="Of the files in the target.", show_default=False)
    ] = None,
    stem: Annotated[
        str | None,
        typer.Option(
            help="What the names in a folder begin with; the source's.", show_default=False
        ),
    ] = None,
    state_dict_key: StateDictKey = None,
    prefix: Prefix = None,
    use_bin: Bin = False,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no result.")] = False,
) -> None:
    """Write checkpoints as safetensors: from .bin, to other shards, to another dtype.

    TARGET is a .safetensors file or a folder, and must not exist. A pipeline is converted component
    by component, and its other files are copied. With several SOURCEs, each becomes a file in the
    folder.

    Tensors are streamed, so that a checkpoint may be larger than the memory. A failed conversion
    leaves nothing behind; nothing is overwritten.

    Examples:

      weightlift convert pytorch_model.bin model.safetensors

      weightlift convert org/model out/ --dtype bf16 --max-shard-size 5GB

      weightlift convert 'checkpoints/*.bin' out/
    """
    from weightlift.core.paths import target_text
    from weightlift.core.requirements import require

    require("torch", "weightlift convert")
    if not last:
        raise typer.BadParameter("it is empty", param_hint="TARGET")
    paths, target = expand(sources), Path(target_text(last))
    wanted = Target(dtype, max_shard_size or "10GB", stem, to_variant)
    options = OpenOptions(subfolder, variant, use_bin, state_dict_key, prefix, revision)
    for option, value in (("--stem", stem), ("--to-variant", to_variant)):
        if value is not None and (not value or "/" in value or "\0" in value):
            raise typer.BadParameter(f"{value!r} is no part of a file name", param_hint=option)
    is_file = _is_file(target)
    for option, value in (
        ("--max-shard-size", max_shard_size), ("--stem", stem), ("--to-variant", to_variant),
    ):  # fmt: skip
        if is_file and value is not None:
            raise typer.BadParameter(
                f"it goes with a folder as the target, and {target} is a file", param_hint=option
            )
    if is_file and len(paths) > 1:
        raise typer.BadParameter(
            f"{len(paths)} sources need a folder, and {target} is a file", param_hint="TARGET"
        )
    parts = [] if subfolder is not None else components_of(paths[0], revision)
    if parts and is_file:
        raise typer.BadParameter(
            f"{paths[0]} is a pipeline: name a folder, or a component by --subfolder "
            f"({', '.join(parts)})",
            param_hint="TARGET",
        )
    with _Bar(as_json or quiet) as progress:
        if len(paths) > 1:
            written = _convert_files(paths, target, wanted, options, progress)
        elif parts:
            written = _convert_pipeline(paths[0], parts, target, wanted, options, progress)
        else:
            written = [_convert(paths[0], target, wanted, options, None, progress)]
    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in written], indent=2))
    elif not quiet:
        for one in written:
            print(
                f"{one.target}: {one.tensors:,} tensor{'s' * (one.tensors != 1)}, "
                f"{format_bytes(one.bytes)} in {len(one.files)} file{'s' * (len(one.files) != 1)}"
            )


def _is_file(target: Path) -> bool:
    suffix = target.suffix.lower()
    if suffix == ".safetensors":
        return True
    if target.is_dir():
        return False
    near = difflib.get_close_matches(suffix, [".safetensors"], cutoff=0.7)
    if near or suffix in _OTHER_FORMATS:
        hint = ": .safetensors is meant?" if near else ": only safetensors are written"
        raise typer.BadParameter(
            f"{target} is neither a .safetensors file nor a folder{hint}",
            param_hint="TARGET",
        )
    return False


class _Bar:
    """A progress bar on stderr for the checkpoint being written."""

    def __init__(self, hidden: bool) -> None:
        from rich import progress
        from rich.console import Console

        columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn())
        self._progress = progress.Progress(
            "[bold]{task.description}",
            *columns,
            transient=True,
            console=Console(stderr=True),
            disable=hidden or not Console(stderr=True).is_terminal,
        )

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def of(self, what: str) -> Callable[[int, int], None]:
        task = self._progress.add_task(what, total=None)
        return lambda done, total: self._progress.update(task, completed=done, total=total)


def _convert(
    path: str,
    target: Path,
    wanted: Target,
    options: OpenOptions,
    component: str | None,
    bar: _Bar,
    shown: Path | None = None,
) -> Written:
    """``shown``: one of several targets, by the name that it gets in the end."""
    from weightlift.convert import convert_checkpoint

    checkpoint = options.open(path, component)
    subfolder = options.subfolder if component is None else component
    if not Path(path).exists():
        from weightlift.checkpoint.hub import HubArguments, snapshot

        beside = f"{subfolder}/" if subfolder else ""
        patterns = [f"{beside}*{suffix}" for suffix in _COMPANIONS]
        snapshot(path, patterns, HubArguments(revision=options.revision))
    companions = _companions(checkpoint.paths, subfolder)
    if shown is not None and companions:
        _log.warning(
            "%s: not copied are %s: convert %s alone, to a folder, to have them beside the weights",
            shown,
            ", ".join(sorted(companions)),
            path,
        )
        companions = {}
    files = convert_checkpoint(
        checkpoint,
        target,
        dtype=wanted.dtype,
        max_shard_size=wanted.max_shard_size,
        stem=wanted.stem or _stem(checkpoint.paths, subfolder),
        variant=wanted.variant,
        companions=companions,
        progress=bar.of(component or Path(path).name),
    )
    where = target.parent if target.suffix.lower() == ".safetensors" else target
    size = sum((where / file).stat().st_size for file in files)
    title = path if component is None else f"{path} [{component}]"
    return Written(title, str(target), len(checkpoint), list(files), size)


def _convert_files(
    paths: list[str], target: Path, wanted: Target, options: OpenOptions, bar: _Bar
) -> list[Written]:
    """Converts each source to a file of its name in the folder ``target``."""
    names: dict[str, str] = {}
    for path in paths:
        name = f"{Path(path).stem if Path(path).is_file() else Path(path).name}.safetensors"
        if name in names:
            raise typer.BadParameter(
                f"{names[name]} and {path} would both become {name}", param_hint="SOURCE"
            )
        names[name] = path
    with _NewFolder(target) as folder:
        made = [
            _convert(path, folder / name, wanted, options, None, bar, shown=target / name)
            for name, path in names.items()
        ]
    return [_moved(one, folder, target) for one in made]


def _convert_pipeline(
    path: str, parts: list[str], target: Path, wanted: Target, options: OpenOptions, bar: _Bar
) -> list[Written]:
    """Converts each component into a folder of its name, and copies all other files."""
    with _NewFolder(target) as folder:
        made = [_convert(path, folder / part, wanted, options, part, bar) for part in parts]
        for name, content in _rest_of_pipeline(path, parts, options.revision):
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    return [_moved(one, folder, target) for one in made]


def _moved(written: Written, folder: Path, target: Path) -> Written:
    place = target / Path(written.target).relative_to(folder)
    return dataclasses.replace(written, target=str(place))


class _NewFolder:
    """A folder beside ``target`` that replaces it on success and is removed on an error."""

    def __init__(self, target: Path) -> None:
        from weightlift.core.errors import ArgumentError

        if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
            raise ArgumentError(f"{target} exists: remove it, or give another target")
        self._target = target

    def __enter__(self) -> Path:
        from weightlift.core.atomic import naming_target, temporary_beside

        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._folder = temporary_beside(self._target)
        with naming_target(self._target, self._folder):
            self._folder.mkdir()
        return self._folder

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        from weightlift.core.atomic import naming_target, put_folder_in_place

        try:
            if kind is None:
                with naming_target(self._target, self._folder):
                    put_folder_in_place(self._folder, self._target)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


def _rest_of_pipeline(
    path: str, parts: list[str], revision: str | None
) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the small files outside of components with weights."""
    if Path(path).suffix.lower() == ".dduf":
        from weightlift.checkpoint.dduf import open_dduf

        archive = open_dduf(path)
        for name in archive.entries:
            if name.partition("/")[0] not in parts and name.endswith(_COMPANIONS):
                yield name, archive.read(name)
        return
    root = Path(path)
    if not root.is_dir():
        from weightlift.checkpoint.hub import HubArguments, snapshot

        patterns = [f"*{suffix}" for suffix in _COMPANIONS]
        root = snapshot(path, patterns, HubArguments(revision=revision))
    for file in sorted(root.rglob("*")):
        name = file.relative_to(root).as_posix()
        if (
            file.is_file()
            and name.partition("/")[0] not in parts
            and not any(part.startswith(".") for part in Path(name).parts)
            and file.suffix in _COMPANIONS
            and file.stat().st_size <= _MOST_BYTES
        ):
            yield name, file.read_bytes()


def _stem(paths: list[str], subfolder: str | None) -> str:
    names = [Path(path).name for path in paths[:1]]
    if names and names[0].endswith(".dduf"):
        from weightlift.checkpoint.dduf import open_dduf

        names = [name.removeprefix(f"{subfolder}/") for name in open_dduf(paths[0]).entries]
    diffusers = any(name.startswith("diffusion_pytorch_model") for name in names)
    return "diffusion_pytorch_model" if diffusers else "model"


def _companions(paths: list[str], subfolder: str | None) -> dict[str, bytes]:
    """The small files beside the weights, without indexes; also in an archive's component."""
    if not paths:
        return {}
    first = Path(paths[0])
    if first.suffix == ".dduf":
        from weightlift.checkpoint.dduf import open_dduf

        archive = open_dduf(first)
        prefix = f"{subfolder}/" if subfolder else ""
        return {
            name[len(prefix) :]: archive.read(name)
            for name in archive.entries
            if name.startswith(prefix)
            and "/" not in name[len(prefix) :]
            and name.endswith(_COMPANIONS)
            and not name.endswith(".index.json")
        }
    return {
        path.name: path.read_bytes()
        for path in sorted(first.parent.iterdir())
        if path.suffix in _COMPANIONS
        and ".index." not in path.name
        and path.is_file()
        and path.stat().st_size <= _MOST_BYTES
        and (first.parent / "config.json").is_file()
    }
