"""The arguments of commands: files, folders, pipelines, ``.dduf`` files and Hub ids."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.hub import HubArguments, list_files
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.core.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "SOURCE_HELP",
    "Bin",
    "OpenOptions",
    "Paths",
    "Prefix",
    "Revision",
    "StateDictKey",
    "Subfolder",
    "Variant",
    "components_of",
    "expand",
    "name_width",
    "open_all",
    "place_of",
    "print_whole",
    "safe_text",
    "shorten",
    "title_of",
]

SOURCE_HELP = (
    "A file (.safetensors, .bin, .ckpt, .dduf, ...), a folder, a pipeline's folder, or the id of a "
    "repository on the Hub."
)
PATHS_HELP = f"{SOURCE_HELP} Several, and quoted patterns such as '*.safetensors', too."
Paths = Annotated[list[str], typer.Argument(metavar="PATH", help=PATHS_HELP, show_default=False)]
Subfolder = Annotated[
    str | None,
    typer.Option(
        help="In a folder or repository; of a pipeline or .dduf file, the component.",
        show_default=False,
    ),
]
Variant = Annotated[str | None, typer.Option(help="Such as fp16.", show_default=False)]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a repository.", show_default=False),
]
Bin = Annotated[bool, typer.Option("--bin", help="Use .bin instead of safetensors.")]
StateDictKey = Annotated[
    str | None, typer.Option(help="Where in a torch file the tensors are.", show_default=False)
]
Prefix = Annotated[
    str | None,
    typer.Option(help="Of the names that are wanted; it is stripped.", show_default=False),
]
_WEIGHTS = (".safetensors", ".bin")


@dataclasses.dataclass(frozen=True)
class OpenOptions:
    """Options of the command line for ``open_checkpoint``."""

    subfolder: str | None = None
    variant: str | None = None
    use_bin: bool = False
    state_dict_key: str | None = None
    prefix: str | None = None
    revision: str | None = None

    def open(self, path: str, subfolder: str | None = None) -> Checkpoint:
        if self.revision is not None and os.path.lexists(path):
            raise ArgumentError(
                f"{path} is on this machine; --revision {self.revision} is for a repository of "
                "the Hub"
            )
        return open_checkpoint(
            path,
            subfolder=self.subfolder if subfolder is None else subfolder,
            variant=self.variant,
            use_safetensors=False if self.use_bin else None,
            state_dict_key=self.state_dict_key,
            prefix=self.prefix,
            revision=self.revision,
        )


def expand(paths: Sequence[str]) -> list[str]:
    """The paths, with patterns that the shell has left (quoted ones) replaced by what fits.

    Raises:
        CheckpointError: nothing fits a pattern.
    """
    found = []
    for path in paths:
        if Path(path).exists() or not glob.has_magic(path):
            found.append(path)
            continue
        fits = sorted(glob.glob(path))  # noqa: PTH207 - of an absolute path too
        if not fits:
            raise CheckpointError(f"{path}: no file fits this pattern")
        found += fits
    return found


def components_of(path: str, revision: str | None = None) -> list[str]:
    """The components with weights of a pipeline or ``.dduf`` file; none: it is neither.

    Raises:
        ReadError: there is no such path, and no such repository.
    """
    place = Path(path)
    if place.suffix.lower() == ".dduf":
        from weightlift.checkpoint.dduf import open_dduf

        names = list(open_dduf(path).entries)
    elif place.is_dir():
        # Path.is_file raises in a folder without rights, and names a file that nobody named.
        if not os.path.isfile(place / "model_index.json"):  # noqa: PTH113
            return []
        names = [
            f"{folder.name}/{file.name}"
            for folder in sorted(place.iterdir())
            if folder.is_dir()
            for file in folder.iterdir()
        ]
    elif place.exists() or place.suffix or path.count("/") > 1 or place.is_absolute():
        return []
    else:
        names = list_files(path, HubArguments(revision=revision))
        if "model_index.json" not in names:
            return []
    found = (name.partition("/") for name in names if name.endswith(_WEIGHTS))
    return sorted({folder for folder, _, rest in found if rest and "/" not in rest})


def open_all(path: str, options: OpenOptions) -> Iterator[tuple[str | None, Checkpoint]]:
    """The checkpoint at ``path``, or each component's of a pipeline, with the component's name.

    Raises:
        CheckpointError, FormatError, ReadError: as ``open_checkpoint``.
    """
    components = components_of(path, options.revision) if options.subfolder is None else []
    if not components:
        yield None, options.open(path)
    for component in components:
        yield component, options.open(path, component)


def title_of(paths: Sequence[str]) -> str:
    """One name for several paths."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def safe_text(text: str) -> str:
    """Names come from strangers: no escape sequence reaches the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def place_of(path: str, component: str | None) -> str:
    """What is written of a component: its own path."""
    if not component:
        return path
    if Path(path).suffix.lower() == ".dduf":
        return f"{path} [{component}]"
    return f"{path.rstrip('/')}/{component}"


def print_whole(console: Console, table: Table) -> None:
    """A table that is wider than the terminal is wrapped by the terminal: nothing of it is cut."""
    from rich.measure import Measurement

    width = console.width
    needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.width = max(width, needed)
    try:
        console.print(table)
    finally:
        console.width = width


def name_width(console: int, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """What a table as wide as the console leaves for names, before these columns."""
    taken = sum(
        3 + max(len(title), *(len(row[place]) for row in rows))  # padding, and the box's own
        for place, title in enumerate(titles)
    )
    return max(16, console - taken - 3)


def shorten(text: str, width: int) -> str:
    """At most ``width`` characters: what is longer loses its middle."""
    if len(text) <= width or width < 5:
        return text
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"
