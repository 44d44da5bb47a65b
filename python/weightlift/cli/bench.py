"""``weightlift bench``: one checkpoint, loaded by several libraries."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import errno
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightlift.cli.sources import (
    Bin,
    OpenOptions,
    Revision,
    Subfolder,
    Variant,
    expand,
    open_all,
    print_whole,
)
from weightlift.cli.values import castable_dtype, names_of, one_of, size_text, whole_number
from weightlift.core.errors import CheckpointError, FormatError
from weightlift.core.requirements import require

if TYPE_CHECKING:
    from weightlift.bench.comparison import Comparison
    from weightlift.bench.streaming import StreamRun

__all__ = ["bench"]

_PICTURES = (".png", ".svg", ".pdf", ".jpg", ".webp")


class Device(enum.Enum):
    CPU = "cpu"
    CUDA = "cuda"


def bench(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            show_default=False,
            help="Files of one checkpoint, a folder, a pipeline's folder, or the id of a "
            "repository on the Hub: its files are loaded together. With --from-pretrained: a "
            "model's or pipeline's folder or id; module:Class after it where its configuration "
            "names no class, or alone, for a model made by default.",
        ),
    ],
    from_pretrained: Annotated[
        bool,
        typer.Option(
            "--from-pretrained",
            help="Measure from_pretrained by the library alone and with the backend on.",
        ),
    ] = False,
    distributed: Annotated[
        int | None,
        typer.Option(
            "--distributed",
            parser=whole_number(1),
            metavar="N",
            help="Load with N processes on gloo, replicated and sharded, on the CPU; a folder or "
            "files of .safetensors.",
        ),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Measure a step of a model that is larger than --memory, on the CPU, against "
            "accelerate's offload to the disk and diffusers' group offload: the folder of a model "
            "of transformers, or stack:2GB for one that is made.",
        ),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            parser=size_text,
            metavar="SIZE",
            help="With --stream: bytes that weights may take, such as 500MB; 2GB by default.",
            show_default=False,
        ),
    ] = None,
    subfolder: Subfolder = None,
    variant: Variant = None,
    use_bin: Bin = False,
    revision: Revision = None,
    device: Annotated[
        Device,
        typer.Option(
            parser=one_of(Device),
            autocompletion=names_of(Device),
            metavar="cpu|cuda",
            help="Where the tensors go; to the CPU by default.",
            show_default=False,
        ),
    ] = Device.CPU,
    dtype: Annotated[
        str | None,
        typer.Option(
            parser=castable_dtype,
            metavar="DTYPE",
            help="Load floating-point tensors as this, such as bfloat16.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Whom to compare with, separated by commas; safetensors,torch by default.",
            show_default=False,
        ),
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.py",
            help="A Python file with further libraries for --against.",
        ),
    ] = None,
    cold: Annotated[
        bool | None,
        typer.Option(
            "--cold/--warm",
            help="Drop the files from the page cache before each load; by default warm, with "
            "--from-pretrained both.",
            show_default=False,
        ),
    ] = None,
    repeat: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(1),
            metavar="N",
            help="Measurements of each; by default 5, with --from-pretrained 3.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT.json", help="Write all figures here, as JSON."),
    ] = None,
    plot_out: Annotated[
        Path | None, typer.Option("--plot", metavar="OUT.png", help="Draw the medians here.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all figures as JSON, and no table.")
    ] = False,
) -> None:
    """Measure how fast a checkpoint loads, against other libraries.

    Each measurement runs in its own process, which imports everything before the clock starts. It
    loads all tensors and touches all pages (on CUDA: synchronises).

    Examples:

      weightlift bench model.safetensors --dtype bfloat16

      weightlift bench --from-pretrained org/model --cold --output out.json
    """
    _check_together(locals())
    require("torch", "weightlift bench")
    _check_outputs(paths, output, plot_out, as_json)
    options = OpenOptions(subfolder, variant, use_bin, revision=revision)
    if stream:
        with _tables(shown=not as_json):
            runs = _bench_stream(paths, memory or "2GB", repeat or 5, bool(cold), plot_out)
        _write(output, as_json, {"streams": [dataclasses.asdict(run) for run in runs]})
        if runs[0].error:
            raise typer.Exit(1)
        return
    if distributed is not None:
        _check_safetensors(paths)
        with _tables(shown=not as_json):
            figures = _bench_ranks([Path(path) for path in paths], distributed, repeat or 5)
        _write(output, as_json, figures)
        return
    dtype = None if dtype is None else _dtype(dtype)
    if device is Device.CUDA:
        from weightlift.load.allocation import TorchAllocator

        TorchAllocator()  # raises the reason if there is no GPU
    with _tables(shown=not as_json):
        if from_pretrained:
            states = [True, False] if cold is None else [cold]
            found = _bench_models(_local(paths), device.value, dtype, states, repeat or 3)
        else:
            others = _others("safetensors,torch" if against is None else against, adapters)
            one = _bench_files(
                _files(paths, options),
                device.value,
                dtype,
                ["weightlift", *others],
                bool(cold),
                repeat or 5,
                adapters,
            )
            found = [one]
    _write(output, as_json, {"comparisons": [one.to_json() for one in found]})
    if plot_out is not None and any(one.samples for one in found):
        from weightlift.bench.plot import plot
        from weightlift.bench.runs import rounds_of

        plot(found, plot_out, f"Time to load, median of {rounds_of(found)}")
    if not all(one.job.contender in one.samples for one in found):
        raise typer.Exit(1)


@contextlib.contextmanager
def _tables(*, shown: bool) -> Iterator[None]:
    """What is printed inside is shown, or nothing of it."""
    with contextlib.nullcontext() if shown else contextlib.redirect_stdout(io.StringIO()):
        yield


def _write(output: Path | None, as_json: bool, found: Mapping[str, object]) -> None:
    """The figures as JSON, to a file and to stdout."""
    from weightlift.bench.runs import to_json

    if output is None and not as_json:
        return
    text = json.dumps(to_json(found), indent=2)
    if output is not None:
        output.write_text(text + "\n")
    if as_json:
        print(text)


# What each kind of measurement takes, beside PATH, --repeat, --json and --output.
_TAKES = {
    "--stream": {"--memory", "--cold/--warm", "--plot"},
    "--distributed": set[str](),
    "--from-pretrained": {"--device", "--dtype", "--cold/--warm", "--plot"},
}
# The parameters of these options.
_KINDS = {
    "--stream": "stream",
    "--distributed": "distributed",
    "--from-pretrained": "from_pretrained",
}
_OPTIONS = {
    "--subfolder": "subfolder",
    "--variant": "variant",
    "--bin": "use_bin",
    "--revision": "revision",
    "--against": "against",
    "--adapters": "adapters",
    "--device": "device",
    "--dtype": "dtype",
    "--cold/--warm": "cold",
    "--plot": "plot_out",
    "--memory": "memory",
}
_BY_DEFAULT = (None, Device.CPU)


def _check_together(parameters: Mapping[str, object]) -> None:
    """An option that would have no effect is a mistake.

    Raises:
        typer.BadParameter: two kinds of measurement at once, or an option of another kind.
    """
    chosen = [kind for kind, name in _KINDS.items() if parameters[name] not in (None, False)]
    if len(chosen) > 1:
        raise typer.BadParameter("one of them at a time", param_hint=" and ".join(chosen))
    given = [
        option
        for option, name in _OPTIONS.items()
        if parameters[name] not in _BY_DEFAULT and (name != "use_bin" or parameters[name])
    ]
    if not chosen:
        if "--memory" in given:
            raise typer.BadParameter("it goes with --stream", param_hint="--memory")
        return
    unused = [option for option in given if option not in _TAKES[chosen[0]]]
    if unused:
        raise typer.BadParameter(
            f"this has no effect with {chosen[0]}: leave it out", param_hint=", ".join(unused)
        )


def _check_outputs(
    paths: Sequence[str], output: Path | None, plot_out: Path | None, as_json: bool
) -> None:
    """Before anything is measured.

    Raises:
        OSError: a file cannot be written there.
        typer.BadParameter: no picture has this suffix, or a file after --json, which takes none.
    """
    for path in paths:
        if as_json and path.endswith(".json") and not path.endswith(".index.json"):
            raise typer.BadParameter(
                f"{path}: --json prints; a file is written by --output {path}", param_hint="PATH"
            )
    for out in (output, plot_out):
        if out is None:
            continue
        folder = out.absolute().parent
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder: name a file in it", str(out))
        if not folder.is_dir():
            raise FileNotFoundError(
                errno.ENOENT, "the folder does not exist; make it first", str(out)
            )
        if not os.access(out if out.exists() else folder, os.W_OK):
            raise PermissionError(errno.EACCES, "this user may not write it", str(out))
    if plot_out is not None:
        require("matplotlib", "--plot")
    if plot_out is not None and plot_out.suffix.lower() not in _PICTURES:
        raise typer.BadParameter(
            f"{plot_out} is no name of a picture: it ends in one of {', '.join(_PICTURES)}",
            param_hint="--plot",
        )


def _check_safetensors(paths: list[str]) -> None:
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(errno.ENOENT, "there is no such file or folder", path)
        is_file = Path(path).is_file()
        if is_file and Path(path).suffix != ".safetensors":
            raise typer.BadParameter(f"{path} is not a .safetensors file", param_hint="PATH")
        if not is_file and not any(Path(path).glob("*.safetensors")):
            raise typer.BadParameter(f"{path}: no .safetensors file is in it", param_hint="PATH")


def _bench_stream(
    paths: list[str],
    memory: str,
    repeat: int,
    cold: bool,
    plot_out: Path | None,
) -> list[StreamRun]:
    from rich.console import Console

    from weightlift.bench.progress import progress_of
    from weightlift.bench.streaming import (
        CONTENDERS,
        Steps,
        compare_streams,
        describe,
        plot_timeline,
    )

    if len(paths) != 1:
        raise typer.BadParameter("give one model", param_hint="--stream")
    with progress_of(len(CONTENDERS)) as (begin, step):
        steps = Steps(count=repeat, cold=cold)
        runs = compare_streams(paths[0], memory, steps=steps, begin=begin, step=step)
    console = Console(highlight=False)
    console.print(
        f"A step of {paths[0]} in {memory}, {'cold' if cold else 'warm'}",
        style="bold",
        markup=False,
    )
    for line in describe(runs):
        console.print(line, markup=False, soft_wrap=True)
    if plot_out is not None and runs[0].events:
        plot_timeline(runs[0], plot_out, f"A step of {paths[0]} in {memory}")
    return runs


def _files(paths: list[str], options: OpenOptions) -> list[Path]:
    """The weight files of the arguments: given files, and all of a folder, pipeline or id."""
    found: dict[str, None] = {}
    for path in expand(paths):
        if Path(path).is_file():
            if options != OpenOptions():
                options.open(path)  # says which option a file does not take
            _check_torch_file(path)
            found[path] = None
        else:
            for _, checkpoint in open_all(path, options):
                found.update(dict.fromkeys(checkpoint.paths))
    return [Path(path) for path in found]


def _check_torch_file(path: str) -> None:
    """A file of several state dicts is nothing that a library loads.

    Raises:
        CheckpointError: it has several, or none.
    """
    from weightlift.checkpoint.resolve import torch_format_of

    if torch_format_of(path) is None:
        return
    try:
        OpenOptions().open(path)
    except CheckpointError as error:
        found = str(error).partition("; choose")[0]
        raise CheckpointError(
            f"{found}; write the tensors to be loaded into a file, by `weightlift convert {path} "
            "model.safetensors --state-dict-key KEY`"
        ) from None
    except FormatError:
        return  # each library is shown with its own error


def _local(paths: list[str]) -> list[str]:
    """Hub ids as folders of the cache with the files that ``from_pretrained`` needs."""
    from weightlift.checkpoint.hub import HubArguments, list_files, snapshot

    found = []
    for path in paths:
        if Path(path).exists() or ":" in path or path.count("/") != 1:
            found.append(path)
            continue
        names = list_files(path, HubArguments())
        kind = "safetensors" if any(name.endswith(".safetensors") for name in names) else "bin"
        patterns = ["*.json", "*.txt", "*.model", f"*.{kind}"]
        found.append(str(snapshot(path, patterns, HubArguments())))
    return found


def _others(against: str, adapters: Path | None) -> list[str]:
    """The contenders of ``--against``, without duplicates."""
    from weightlift.bench.contenders import AGAINST, CONTENDERS, read_adapters

    try:
        known = read_adapters(adapters)
    except (OSError, ValueError, ImportError, SyntaxError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        said = said.removeprefix(f"{adapters}: ")
        raise typer.BadParameter(f"{adapters}: {said}", param_hint="--adapters") from None
    except Exception as error:  # of the user's own lines
        said = f"{type(error).__name__}: {error}"
        raise typer.BadParameter(f"{adapters}: {said}", param_hint="--adapters") from error
    offered = [*AGAINST, *(name for name in known if name not in CONTENDERS)]
    names = dict.fromkeys(part.strip() for part in against.split(","))
    others = [name for name in names if name not in ("", "weightlift")]
    for name in others:
        if name not in known:
            near = difflib.get_close_matches(name, offered, 1)
            hint = f": {near[0]!r} is meant?" if near else ""
            raise typer.BadParameter(
                f"{name!r} is not one of {', '.join(offered)}{hint}", param_hint="--against"
            )
    return others


def _dtype(dtype: str) -> str | None:
    """torch's name of it; none for ``"auto"``."""
    from weightlift.core import dtypes

    name = dtypes.parse_dtype(dtype)
    return None if name is None else dtypes.TORCH_NAMES[name]


def _bench_files(
    paths: list[Path],
    device: str,
    dtype: str | None,
    contenders: list[str],
    cold: bool,
    repeat: int,
    adapters: Path | None,
) -> Comparison:
    from rich.console import Console

    from weightlift.bench.runs import compare_files
    from weightlift.bench.tables import comparison_table, describe_run, notes, verdicts

    found = compare_files(
        paths, device, dtype, contenders, cold=cold, repeat=repeat, adapters=adapters
    )
    console = Console(highlight=False)
    console.print(found.name, style="bold", markup=False)
    console.print(describe_run(found), style="dim")
    if found.samples:
        console.print()
        print_whole(console, comparison_table(found, contenders[0]))
    for line in [*verdicts(found, contenders[0]), *notes(found)]:
        console.print(line, markup=False, soft_wrap=True)
    return found


def _bench_models(
    arguments: list[str], device: str, dtype: str | None, states: list[bool], repeat: int
) -> list[Comparison]:
    from rich.console import Console

    from weightlift.bench.runs import compare_models
    from weightlift.bench.tables import (
        describe_run,
        forward_notes,
        models_table,
        notes,
        verdicts,
    )

    title, found = compare_models(arguments, device, dtype, states, repeat)
    console = Console(highlight=False)
    console.print(title, style="bold", markup=False)
    for one in found:
        console.print(describe_run(one), style="dim")
    console.print()
    if any(one.samples for one in found):
        print_whole(console, models_table(found))
    lines = [line for one in found for line in verdicts(one, "backend")]
    lines += [line for one in found for line in [*notes(one), *forward_notes(one)]]
    for line in dict.fromkeys(lines):
        console.print(line, markup=False, soft_wrap=True)
    return found


def _bench_ranks(files: list[Path], ranks: int, repeat: int) -> dict[str, Any]:
    from rich.console import Console

    from weightlift.bench.ranks import measure_ranks
    from weightlift.bench.tables import distributed_table
    from weightlift.core.report import format_bytes, format_count

    console = Console(highlight=False)
    by = format_count(ranks, "process", "processes")
    with Console(stderr=True).status(f"measuring loads by {by}"):
        found = measure_ranks(files, ranks, repeat)
    size = format_bytes(found["file_bytes"])
    console.print(f"{files[0].name}, {size}, by {by} on gloo", style="bold", markup=False)
    console.print()
    print_whole(console, distributed_table(found))
    return found
