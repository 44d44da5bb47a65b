"""``weightlift run``: runs a script or module as Python does, with all backends on."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import difflib
import pkgutil
import runpy
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from weightlift.core.settings import flag_of_environment

__all__ = ["Job", "parse", "run", "start"]


# Of files that people name without a command, and that Python would fail to read as a script.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".dduf", ".gguf")


class Job(NamedTuple):
    """A script, a folder or archive with a ``__main__.py``, or a module."""

    target: str
    is_module: bool
    arguments: list[str]
    report: bool


def parse(arguments: Sequence[str], commands: Sequence[str]) -> Job | None:
    """Parses ``[run] [--report] [-m MODULE | SCRIPT] ARGS...``; ``None`` for another command.

    ``commands`` win over scripts of the same name.
    """
    rest = list(arguments)
    explicit = rest[:1] == ["run"]
    if explicit:
        del rest[0]
    report = flag_of_environment("WEIGHTLIFT_REPORT")
    while rest[:1] == ["--report"]:
        report = True
        del rest[0]
    if rest == ["-m"]:
        print("weightlift: -m needs the name of a module after it", file=sys.stderr)
        sys.exit(2)
    if rest[:1] == ["-m"]:
        return Job(rest[1], True, rest[2:], report)
    if explicit and not rest and arguments[1:]:
        print("weightlift run: give a script, or -m and a module, after --report", file=sys.stderr)
        sys.exit(2)
    if not rest or rest[0].startswith("-") or (not explicit and rest[0] in commands):
        return None
    if not rest[0] or not Path(rest[0]).exists():
        known = "" if explicit else f"neither a command ({', '.join(commands)}) nor "
        near = [] if explicit else difflib.get_close_matches(rest[0], commands, 1)
        if not explicit and rest[0] in ("help", "version"):
            near = [f"--{rest[0]}"]
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"weightlift: {rest[0]!r} is {known or 'not '}a file{hint}", file=sys.stderr)
        sys.exit(2)
    if Path(rest[0]).suffix.lower() in _WEIGHTS and Path(rest[0]).is_file():
        print(
            f"weightlift: {rest[0]!r} holds weights and is not a script; to see what is in it: "
            f"weightlift inspect {rest[0]}",
            file=sys.stderr,
        )
        sys.exit(2)
    return Job(rest[0], False, rest[1:], report)


def start(job: Job) -> None:
    """Runs a job in this process, as its ``__main__``."""
    from weightlift.backends import enable

    if job.report:
        atexit.register(_print_report)
    enable()
    sys.argv[:] = [job.target, *job.arguments]
    # Python's first entry is the folder of weightlift's command; with -P or -I there is none.
    own_entry = not getattr(sys.flags, "safe_path", sys.flags.isolated)
    if job.is_module:
        if own_entry:
            sys.path[0] = str(Path.cwd())
        with _runpy_errors():
            runpy.run_module(job.target, run_name="__main__", alter_sys=True)
        return
    # Like Python, keeps "./" in the path.
    path = job.target if Path(job.target).is_absolute() else f"{Path.cwd()}/{job.target}"
    if pkgutil.get_importer(path) is not None:  # a folder or archive: runpy adds it to sys.path
        if own_entry:
            del sys.path[0]
        with _runpy_errors():
            runpy.run_path(path, run_name="__main__")
        return
    if own_entry:
        sys.path[0] = str(Path(path).resolve().parent)
    # Not with runpy, which removes the module at its end: threads, atexit and pickle need it.
    loader = SourceFileLoader("__main__", path)
    module = ModuleType("__main__")
    vars(module).update(__file__=path, __cached__=None, __loader__=loader, __builtins__=builtins)
    sys.modules["__main__"] = module
    exec(loader.source_to_code(loader.get_data(path), path), vars(module))


@contextlib.contextmanager
def _runpy_errors() -> Iterator[None]:
    """Prints no traceback if runpy finds no module, like ``python -m``."""
    try:
        yield
    except ImportError as error:
        frame = error.__traceback__
        while frame is not None and frame.tb_frame.f_globals["__name__"] in (__name__, "runpy"):
            frame = frame.tb_next
        if frame is not None:
            raise
        sys.exit(f"weightlift: {error}")


def run() -> None:
    """Run a script or module as `python` does, with all backends on.

    weightlift run [--report] SCRIPT.py ARGS...

    weightlift run [--report] -m MODULE ARGS...

    The word `run` may be left out; with it, a script may have a command's name. --report, or
    WEIGHTLIFT_REPORT=1, prints at exit what was loaded and what fell back to the libraries.
    Launchers that start processes of their own take weightlift as the module: torchrun -m
    weightlift SCRIPT.py.
    """
    print("weightlift run: give a script, or -m and a module; see -h", file=sys.stderr)
    sys.exit(2)


def _print_report() -> None:
    from weightlift.core.report import fallback_reasons, format_bytes, format_seconds, stats

    sums = stats()
    lines = []
    rows = [*sorted(sums.by_caller.items()), ("in all", sums)]
    width = max(len(name) for name, _ in rows)
    for name, own in rows:
        lines.append(
            f"{name:<{width}} {own.loads:>6,} load{'s' if own.loads != 1 else ' '} "
            f"{format_bytes(own.bytes):>9}: {format_bytes(own.mapped_bytes):>9} mapped, "
            f"{format_bytes(own.read_bytes):>9} read; {format_seconds(own.seconds)}"
            + (f"; {own.fallbacks} fallback{'s' * (own.fallbacks != 1)}" if own.fallbacks else "")
        )
    for (caller, reason), count in sorted(fallback_reasons().items()):
        lines.append(f"  {caller}, {count} x by the library itself: {reason}")
    print("\n".join(lines), file=sys.stderr)
