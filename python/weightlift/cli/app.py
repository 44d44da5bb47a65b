"""The sub-commands, for typer."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable

import typer

from weightlift.cli import COMMANDS

__all__ = ["app"]

app = typer.Typer(
    name="weightlift",
    help="Loads model weights from files to the CPU, pinned memory or CUDA devices.",
    epilog="weightlift SCRIPT.py ARGS..., weightlift -m MODULE ARGS...: see `weightlift run -h`.",
    no_args_is_help=True,
    # Plain text: no word of it is cut, however narrow the terminal.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _help(function: Callable[..., None]) -> str:
    """The docstring, a line for each paragraph: the terminal wraps it, and nobody before it.
    Indented lines, which are to be copied, stay as they are (``\\b``)."""
    text = inspect.getdoc(function) or ""
    parts: list[str] = []
    for part in re.split(r"\n\n+", text):
        if not part.startswith(" "):
            parts.append(" ".join(part.split()))
        elif parts[-1].startswith("\b"):
            parts[-1] += f"\n{part}"
        else:
            parts.append(f"\b\n{part}")
    return "\n\n".join(parts)


for _name in COMMANDS:
    _function = getattr(importlib.import_module(f"weightlift.cli.{_name}"), _name)
    app.command(
        _name,
        help=_help(_function),
        short_help=_help(_function).partition("\n")[0],
        options_metavar="[--report] [-m MODULE | SCRIPT.py] ARGS..."
        if _name == "run"
        else "[OPTIONS]",
    )(_function)


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from weightlift.core.version import __version__

        print(__version__)
        raise typer.Exit
