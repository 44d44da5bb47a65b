"""``weightlift convert``: a checkpoint of any form becomes safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.core.report import format_bytes

__all__ = ["convert"]

# What lies beside weights and belongs to them: configurations and vocabularies.
_COMPANIONS = (".json", ".txt", ".model")
# Of a companion: a tokenizer may have tens of megabytes.
_MOST_BYTES = 1 << 28


def convert(
    source: Annotated[
        str,
        typer.Argument(help="A file, a folder, a .dduf file, or the id of a repository."),
    ],
    target: Annotated[
        Path, typer.Argument(help="A .safetensors file, or a folder; not one that is there.")
    ],
    dtype: Annotated[
        str | None, typer.Option(help="Cast floating-point tensors, such as bfloat16.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest file of a folder, such as 5GB.")
    ] = "10GB",
    subfolder: Annotated[
        str | None, typer.Option(help="In a folder or repository; of a .dduf file, the component.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Of the source, such as fp16.")] = None,
    to_variant: Annotated[str | None, typer.Option(help="Of the target.")] = None,
    stem: Annotated[
        str | None, typer.Option(help="What the names in a folder begin with; the source's.")
    ] = None,
    state_dict_key: Annotated[
        str | None, typer.Option(help="Where in a torch file the tensors are.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Of the names that are wanted; it is stripped.")
    ] = None,
    use_bin: Annotated[bool, typer.Option("--bin", help="Take .bin, not safetensors.")] = False,
    revision: Annotated[str | None, typer.Option(help="Of a repository.")] = None,
) -> None:
    """Write a checkpoint as safetensors: from .bin, to other shards, to another dtype.

    Tensors are streamed, so that a checkpoint may be larger than the memory; nothing is left
    behind if it fails, and nothing is overwritten.
    """
    from rich import progress
    from rich.console import Console

    from weightlift.convert import convert_checkpoint

    checkpoint = open_checkpoint(
        source,
        subfolder=subfolder,
        variant=variant,
        use_safetensors=False if use_bin else None,
        state_dict_key=state_dict_key,
        prefix=prefix,
        revision=revision,
    )
    columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn())
    console = Console(stderr=True)
    with progress.Progress("[bold]converting", *columns, transient=True, console=console) as bar:
        task = bar.add_task("converting", total=None)
        files = convert_checkpoint(
            checkpoint,
            target,
            dtype=dtype,
            max_shard_size=max_shard_size,
            stem=stem or _stem(checkpoint.paths, subfolder),
            variant=to_variant,
            companions=_companions(checkpoint.paths, subfolder),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    where = target.parent if target.suffix == ".safetensors" else target
    size = sum((where / file).stat().st_size for file in files)
    print(f"{target}: {len(checkpoint)} tensors, {format_bytes(size)} in {len(files)} files")


def _stem(paths: list[str], subfolder: str | None) -> str:
    names = [Path(path).name for path in paths[:1]]
    if names and names[0].endswith(".dduf"):
        from weightlift.checkpoint.dduf import open_dduf

        names = [name.removeprefix(f"{subfolder}/") for name in open_dduf(paths[0]).entries]
    diffusers = any(name.startswith("diffusion_pytorch_model") for name in names)
    return "diffusion_pytorch_model" if diffusers else "model"


def _companions(paths: list[str], subfolder: str | None) -> dict[str, bytes]:
    """The small files beside the weights, without their indexes; of an archive's component too."""
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
