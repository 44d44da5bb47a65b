"""``weightlift`` and ``python -m weightlift``: runs a command or a script, and prints errors."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from typing import NoReturn

from weightlift.cli import COMMANDS
from weightlift.cli.run import parse, start
from weightlift.core.errors import WeightliftError
from weightlift.core.requirements import missing_library
from weightlift.core.settings import flag_of_environment, unknown_variables

__all__ = ["main", "print_error"]

# Arguments of the Python calls that are options of the same name.
_ARGUMENTS = (
    *("subfolder", "variant", "state_dict_key", "prefix", "revision", "dtype", "max_shard_size"),
    *("stem", "device"),
)


def main() -> None:
    """Runs the command line.

    An error of weightlift or of the operating system prints one line on stderr and ends with exit
    status 1; wrong usage ends with 2. ``WEIGHTLIFT_DEBUG=1`` shows the traceback. Exceptions of a
    script are not caught.
    """
    try:
        job = parse(sys.argv[1:], COMMANDS)
    except WeightliftError as error:  # of an environment variable
        _exit(error)
    if job is not None:
        start(job)
        return
    if sys.argv[1:] == ["--version"]:  # without the command line's libraries
        from weightlift.core.version import __version__

        print(__version__)
        sys.exit(0)
    try:
        debug = flag_of_environment("WEIGHTLIFT_DEBUG")
    except WeightliftError as error:
        _exit(error)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that its encoding lacks are no error
            stream.reconfigure(errors="backslashreplace")
    _log_in_options()
    # The error of such a file says it, and without lines of torch's.
    warnings.filterwarnings("ignore", "Detected pickle protocol")
    for text in unknown_variables():
        print(f"warning: {text}", file=sys.stderr)
    try:
        from weightlift.cli.app import app

        app(prog_name="weightlift")
    except (WeightliftError, OSError) as error:
        if debug:
            raise
        _exit(error)
    except KeyboardInterrupt:  # while the commands are imported; typer ends them so too
        sys.exit(130)
    except ModuleNotFoundError as error:
        if debug or not error.name or error.name.partition(".")[0] == "weightlift":
            raise
        _exit(missing_library(error.name, " ".join(["weightlift", *sys.argv[1:2]])))


class _InOptions(logging.Formatter):
    """Log lines with options instead of Python arguments."""

    def format(self, record: logging.LogRecord) -> str:
        return _as_options(super().format(record))


def _log_in_options() -> None:
    log = logging.getLogger("weightlift")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_InOptions())
        log.addHandler(handler)


def _exit(error: BaseException) -> NoReturn:
    print_error(error)
    sys.exit(1)


def print_error(error: BaseException) -> None:
    """One line on stderr, in the command line's words."""
    text = f"error: {_one_line(error)}"
    try:
        from rich.console import Console
        from rich.text import Text
    except ModuleNotFoundError:
        print(text, file=sys.stderr)
    else:
        Console(stderr=True, soft_wrap=True).print(Text(text, style="red"))


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror  # without the number
    else:
        text = str(error) or type(error).__name__
    return _as_options(" ".join(text.split()))


def _as_options(text: str) -> str:
    """Replaces Python arguments in an error text by options."""
    text = text.replace("use_safetensors=False", "--bin")
    text = text.replace("give os.path.expanduser(path)", "write the whole path, or $HOME")
    text = text.replace("id of a Hub repository to load_checkpoint", "id of a Hub repository")
    text = text.replace("variant=None", "what is taken without --variant")

    def option_name(found: re.Match[str]) -> str:
        return f"--{found[1].replace('_', '-')}"

    def option(found: re.Match[str]) -> str:
        value = (found[2] or "").strip("'\"")
        return f"{option_name(found)} {value}".rstrip()

    names = "|".join(_ARGUMENTS)
    text = re.sub(rf"\b({names})=('[^']*'|\"[^\"]*\"|\w+)?", option, text)
    text = re.sub(rf"\b({names})(?= is ['\"])", option_name, text)
    return re.sub(r"\b(state_dict_key|max_shard_size)\b", option_name, text)
