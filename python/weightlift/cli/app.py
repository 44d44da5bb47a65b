"""The sub-commands, for typer."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import typer
import typer.core

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


class _Command(typer.core.TyperCommand):
    """A command whose error names the last argument where that alone is missing: the parser gives
    the first value to the last of them, and would miss the one before."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        arguments: list[Any] = [one for one in self.params if one.param_type_name == "argument"]
        try:
            return super().parse_args(ctx, list(args))
        except typer.BadParameter as error:
            is_missing = type(error).__name__ == "MissingParameter"
            if is_missing and len(arguments) > 1 and error.param is arguments[0]:
                given = self.make_parser(ctx).parse_args(list(args))[0]
                if isinstance(given.get(arguments[-1].name), str):
                    error.param = arguments[-1]
            raise


for _name in COMMANDS:
    _function = getattr(importlib.import_module(f"weightlift.cli.{_name}"), _name)
    app.command(
        _name,
        cls=_Command,
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
