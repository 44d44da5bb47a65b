"""``weightlift run``: a script sees the same as under ``python``."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support import entry, file_bytes
from weightlift.cli import COMMANDS
from weightlift.cli.app import app
from weightlift.cli.run import Job, parse

SCRIPT = """
import json, os, sys, threading, atexit
import helper

def main_name():
    import __main__
    return vars(__main__).get("main_name") is main_name

def tell(when):
    print(json.dumps([when, main_name()]))

print(json.dumps({
    "argv": [os.path.abspath(sys.argv[0]), *sys.argv[1:]],
    "path": os.path.abspath(sys.path[0]),
    "name": __name__,
    "file": os.path.abspath(__file__),
    "package": __package__ or None,
    "spec": __spec__ and __spec__.name,
    "doc": __doc__,
    "future": str(main_name.__annotations__),
    "flags": {name for name in ("typer", "rich", "torch") if name in sys.modules} == set(),
    "helper": helper.__name__,
    "code": main_name.__code__.co_filename,
}))
"""
ENDS = {
    "return": "",
    "exit": "sys.exit(7)",
    "text": "sys.exit('good bye')",
    "error": "raise OSError(2, 'no such thing', 'thing')",
    # A process that a shell starts in the background ignores SIGINT.
    "interrupt": "import os, signal, time; signal.signal(2, signal.default_int_handler); "
    "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "bench").write_text("print('the script')")
    package = tmp_path / "package"
    package.mkdir()
    for name, text in (("__init__", ""), ("__main__", SCRIPT), ("module", SCRIPT), ("helper", "")):
        (package / f"{name}.py").write_text(text)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", SCRIPT)
        archive.writestr("helper.py", "")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link.py").symlink_to("../script.py")
    return tmp_path


def run(
    cwd: Path, *arguments: str, weightlift: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *(["-m", "weightlift"] if weightlift else []), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["script.py"],
        ["script.py", "-x", "--report", "-m", "bench", "--", ""],
        ["./script.py", "--help"],
        ["elsewhere/link.py"],
        ["-m", "package", "-x", "--version"],
        ["-m", "package.module", "a"],
        ["package", "b"],
        ["archive.zip"],
    ],
)
def test_as_python_runs_it(folder: Path, arguments: list[str]) -> None:
    expected = run(folder, *arguments, weightlift=False)
    assert expected.returncode == 0, expected.stderr
    for front in ([], ["run"]):
        done = run(folder, *front, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == expected.stdout


@pytest.mark.parametrize("end", ENDS)
def test_ends_as_under_python(folder: Path, end: str) -> None:
    (folder / "end.py").write_text(f"import sys\nprint(len(sys.argv), flush=True)\n{ENDS[end]}\n")
    expected = run(folder, "end.py", "x", weightlift=False)
    done = run(folder, "end.py", "x")
    assert done.returncode == expected.returncode
    assert done.stdout == expected.stdout == "2\n"
    assert done.stderr.splitlines()[-3:] == expected.stderr.splitlines()[-3:]
    assert bool(done.stderr) == (end not in ("return", "exit"))


def test_main_stays_after_its_end(folder: Path) -> None:
    (folder / "late.py").write_text(
        "import atexit, pickle, threading\n"
        "class Thing: pass\n"
        "def late():\n"
        "    threading.main_thread().join(); print(type(pickle.loads(pickle.dumps(Thing()))))\n"
        "threading.Thread(target=late).start()\n"
    )
    done = run(folder, "late.py")
    assert done.stdout == "<class '__main__.Thing'>\n", done.stderr


def test_all_backends_are_on(folder: Path) -> None:
    (folder / "on.py").write_text(
        "import sys; assert 'weightlift' in sys.modules; from weightlift import backends\n"
        "print(all(map(backends.is_enabled, backends.LIBRARIES)))\n"
        "assert not {'torch', 'diffusers', 'transformers', 'accelerate'} & set(sys.modules)\n"
    )
    assert run(folder, "on.py").stdout == "True\n"


LOADS = """
import sys
from weightlift.backends import report_fallback
report_fallback("diffusers", "a reason", warn=False)
if "load" in sys.argv:
    from safetensors.torch import load_file
    assert list(load_file("weights")) == ["w"]
sys.exit(3)
"""


def test_report(folder: Path) -> None:
    (folder / "weights").write_bytes(file_bytes({"w": entry("F32", [1000, 500])}))
    (folder / "loads.py").write_text(LOADS)
    quiet = run(folder, "loads.py", "--report")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (3, "", "")
    done = run(folder, "--report", "loads.py", "load")
    assert (done.returncode, done.stdout) == (3, "")
    diffusers, safetensors, total, reason = done.stderr.splitlines()
    assert total.split()[:6] == ["in", "all", "1", "load", "2.0", "MB:"]
    assert safetensors.split()[:5] == ["safetensors", "1", "load", "2.0", "MB:"]
    assert diffusers.split()[:5] == ["diffusers", "0", "loads", "0", "B:"]
    assert total.split()[-2:] == diffusers.split()[-2:] == ["1", "fallback"]
    assert "fallback" not in safetensors
    assert "diffusers" in reason
    assert "a reason" in reason
    for done in (
        run(folder, "run", "--report", "-m", "loads"),
        run(folder, "loads.py", WEIGHTLIFT_REPORT="1"),
    ):
        assert (done.returncode, done.stdout) == (3, "")
        assert len(done.stderr.splitlines()) == 3


def test_commands_go_first(folder: Path) -> None:
    assert "the script" not in run(folder, "bench").stdout
    assert run(folder, "./bench").stdout == "the script\n"
    assert run(folder, "run", "bench").stdout == "the script\n"
    assert [command.name for command in app.registered_commands] == list(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["insepct", "x"], ["insepct", ", ".join(COMMANDS), "nor a file"]),
        (["run", "missing.py"], ["missing.py", "not a file"]),
        (["run"], ["give a script"]),
        (["run", "--report"], ["--report"]),
        (["run", "-m"], ["name of a module"]),
        (["-m"], ["name of a module"]),
        (["--nonsense", "script.py"], ["--nonsense"]),
    ],
)
def test_wrong_use(folder: Path, arguments: list[str], words: list[str]) -> None:
    done = run(folder, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "nowhere"], "nowhere"),
        (["-m", "nowhere.at.all"], "nowhere"),
        (["-m", "package.nowhere"], "package.nowhere"),
        (["-m", "bare"], "bare.__main__"),
        (["elsewhere"], "__main__"),
    ],
)
def test_what_cannot_be_run(folder: Path, arguments: list[str], words: str) -> None:
    (folder / "bare").mkdir()
    (folder / "bare" / "__init__.py").touch()
    expected = run(folder, *arguments, weightlift=False)
    done = run(folder, *arguments)
    assert (done.returncode, done.stdout) == (expected.returncode, "") == (1, "")
    assert words in done.stderr
    assert words in expected.stderr
    assert len(done.stderr.splitlines()) == len(expected.stderr.splitlines()) == 1


def test_imports_that_fail_in_what_runs(folder: Path) -> None:
    (folder / "fails.py").write_text("import nowhere")
    (folder / "package" / "__main__.py").write_text("import runpy; runpy.run_module('nowhere')")
    for arguments in (["-m", "fails"], ["-m", "package"], ["package"]):
        done = run(folder, *arguments)
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert "nowhere" in done.stderr.splitlines()[-1]


def test_parse(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for arguments, job in {
        ("run", "--report", "bench", "--report"): Job("bench", False, ["--report"], True),
        ("--report", "-m", "bench", "-m"): Job("bench", True, ["-m"], True),
        ("run", "run"): None,
        ("run", "-h"): None,
        ("--version",): None,
        (): None,
    }.items():
        if arguments == ("run", "run"):
            (folder / "run").touch()
            job = Job("run", False, [], False)
        assert parse(arguments, COMMANDS) == job


def test_help_tells_of_it(folder: Path) -> None:
    text = " ".join(run(folder, "run", "-h").stdout.split())
    for word in ("-m MODULE", "SCRIPT.py", "WEIGHTLIFT_REPORT"):
        assert word in text
