"""The sub-commands, as typer has them."""

from __future__ import annotations

import importlib

import typer

from weightlift.cli import COMMANDS

__all__ = ["app"]

app = typer.Typer(
    name="weightlift",
    help="Loads model weights as fast as the hardware allows.",
    epilog="weightlift SCRIPT.py ARGS..., weightlift -m MODULE ARGS...: see `weightlift run -h`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name in COMMANDS:
    app.command(_name)(getattr(importlib.import_module(f"weightlift.cli.{_name}"), _name))


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from weightlift.core.version import __version__

        print(__version__)
        raise typer.Exit
