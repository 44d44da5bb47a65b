"""The errors for missing libraries, and the result of ``dir``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import weightlift as wl
from support import entry, file_bytes

# A Python in which these libraries are not installed.
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def run_without(*names: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=names) + code],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes({"w": entry("F32", [3])}))
    return path


def test_calls_without_torch_say_what_brings_it(file: Path) -> None:
    calls = [
        "wl.load_file(file)",
        "wl.load_checkpoint(file)",
        "wl.load_state_dict(file)",
        "wl.safe_open(file)",
        "wl.save_file({}, file + '.new')",
        "wl.ModelMixin",
        "wl.get_parameter_dtype",
    ]
    code = f"""
import weightlift as wl
file = {str(file)!r}
assert "w" in wl.open_checkpoint(file)
for call in {calls!r}:
    try:
        eval(call)
    except ModuleNotFoundError as error:
        assert isinstance(error, wl.WeightliftError) and error.name == "torch", call
        print(error)
"""
    done = run_without("torch", code=code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(calls)
    assert all("needs torch, which is not installed: pip install torch" in line for line in lines)


@pytest.mark.parametrize("command", [["convert", "FILE", "OUT"], ["bench", "FILE"]])
def test_commands_without_torch_end_with_one_line(command: list[str], file: Path) -> None:
    places = {"FILE": str(file), "OUT": str(file.parent / "out.safetensors")}
    arguments = [places.get(word, word) for word in command]
    code = f"""
sys.argv = ["weightlift", *{arguments!r}]
from weightlift.cli.main import main
main()
"""
    done = run_without("torch", code=code)
    assert done.returncode == 1
    (line,) = filter(None, done.stderr.splitlines())
    assert "torch, which is not installed: pip install torch" in line


@pytest.mark.parametrize(
    ("missing", "command"), [("typer", ["inspect", "FILE"]), ("rich", ["bench", "FILE"])]
)
def test_the_command_line_names_its_extra(missing: str, command: list[str], file: Path) -> None:
    code = f"""
sys.argv = {["weightlift", *(str(file) if word == "FILE" else word for word in command)]!r}
from weightlift.cli.main import main
main()
"""
    # typer needs rich.
    done = run_without(missing, "rich", "typer", code=code)
    assert done.returncode == 1, done.stderr
    (line,) = filter(None, done.stderr.splitlines())
    assert line.startswith("error: weightlift ")
    assert "is not installed: pip install 'weightlift[cli]'" in line


def test_the_version_needs_no_library() -> None:
    code = """
sys.argv = ["weightlift", "--version"]
from weightlift.cli.main import main
main()
"""
    done = run_without("rich", "typer", code=code)
    assert (done.returncode, done.stdout) == (0, f"{wl.__version__}\n"), done.stderr


def test_a_script_runs_without_the_command_lines_libraries(tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text("import sys; print(sys.argv[1:])")
    code = f"""
sys.argv = ["weightlift", {str(script)!r}, "--x"]
from weightlift.cli.main import main
main()
"""
    done = run_without("rich", "typer", "msgpack", "matplotlib", code=code)
    assert (done.returncode, done.stdout) == (0, "['--x']\n"), done.stderr


def test_a_load_needs_no_optional_library(file: Path) -> None:
    """And calls that need one name the extra, before anything is read."""
    flax = file.parent / "flax_model.msgpack"
    flax.write_bytes(b"\x80")
    code = f"""
import weightlift as wl
from weightlift.checkpoint.flax_msgpack import read_flax_tree
from weightlift.core.errors import WeightliftError
assert wl.load_file({str(file)!r})["w"].shape == (3,)
for call in (
    lambda: wl.load_file({str(file)!r}, progress=True),
    lambda: list(read_flax_tree({str(flax)!r})),
):
    try:
        call()
    except WeightliftError as error:
        print(error)
"""
    done = run_without("rich", "typer", "msgpack", "matplotlib", "jax", "flax", code=code)
    assert done.returncode == 0, done.stderr
    progress, msgpack = done.stdout.splitlines()
    assert progress == (
        "progress=True needs rich, which is not installed: pip install 'weightlift[cli]'"
    )
    assert str(flax) in msgpack
    assert "needs msgpack, which is not installed: pip install 'weightlift[flax]'" in msgpack


def test_dir_shows_the_public_names_alone() -> None:
    assert dir(wl) == sorted(wl.__all__)
    for name in wl.__all__:
        assert getattr(wl, name) is not None
