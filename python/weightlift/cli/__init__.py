"""The command line: ``weightlift COMMAND``, the same as ``python -m weightlift COMMAND``.

Commands import torch and matplotlib when they need them, so that ``inspect`` starts at once.
"""

from __future__ import annotations

import os
import sys

import typer

from weightlift.cli.bench import bench
from weightlift.cli.doctor import doctor
from weightlift.cli.inspect import inspect
from weightlift.errors import WeightliftError

__all__ = ["app", "main"]

app = typer.Typer(
    name="weightlift",
    help="Loads model weights as fast as the hardware allows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(inspect)
app.command()(doctor)
app.command()(bench)


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from weightlift import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Runs the command line.

    An error that weightlift or the operating system names ends as one line on stderr and exit
    status 1; a wrong use as 2. ``WEIGHTLIFT_DEBUG=1`` shows the traceback.
    """
    try:
        app()
    except (WeightliftError, OSError) as error:
        if os.environ.get("WEIGHTLIFT_DEBUG") == "1":
            raise
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, soft_wrap=True).print(Text(f"error: {_one_line(error)}", style="red"))
        sys.exit(1)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())
