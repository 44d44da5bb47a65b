"""Children of a process with backends on, started by fork, spawn, forkserver and other ways."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import weightlift as wl
from weightlift.backends import children

# Prints which backends are on in the process and its children; the library is imported first, as
# scripts do.
SCRIPT = """
import multiprocessing
import sys

import safetensors.torch


def state(kind):
    import weightlift.backends
    here = [name for name in weightlift.backends.LIBRARIES if weightlift.backends.is_enabled(name)]
    hooked = hasattr(safetensors.torch.load_file, "__wrapped__")
    startup = [entry for entry in sys.path if entry.endswith("startup")]
    return f"{kind} {','.join(here)} {hooked} {startup} {'sitecustomize' in sys.modules}"


def grandchild(kind):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(state, [kind])[0]


if __name__ == "__main__":
    import weightlift
    for call in sys.argv[1:]:
        exec(call)
    print(state("parent"))
    for kind in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(kind).Pool(1) as pool:
            print(pool.map(state, [kind])[0])
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        print(pool.submit(grandchild, "grandchild").result())
"""
KINDS = ("parent", "fork", "spawn", "forkserver", "grandchild")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "app.py"
    path.write_text(SCRIPT)
    return path


def run(*command: object, **environment: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    child = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**kept, **environment},
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


@pytest.mark.parametrize("command", [["-m", "weightlift"], ["-m", "weightlift", "run"]], ids=str)
def test_a_script_and_all_of_its_children(command: list[str], script: Path) -> None:
    lines = run(*command, script)
    assert [line.split()[0] for line in lines] == list(KINDS)
    for line in lines:
        kind, names, hooked, startup, customized = line.split()
        assert names == "diffusers,transformers,accelerate,safetensors", kind
        assert hooked == "True", kind
        assert startup == "[]", kind
        assert customized == "False", kind


def test_enable_in_the_script_for_the_libraries_it_names(script: Path) -> None:
    lines = run(script, "weightlift.enable('safetensors')")
    assert [line.split(maxsplit=2)[1] for line in lines] == ["safetensors"] * len(KINDS)


def test_disable_undoes_it(script: Path) -> None:
    lines = run("-m", "weightlift", script, "weightlift.disable()")
    assert [line.split()[0] for line in lines] == list(KINDS)
    assert all(line.split(" ")[1] == "" for line in lines)


@pytest.mark.parametrize("calls", [
    ["weightlift.enable()"],
    ["weightlift.enable('safetensors')", "weightlift.enable('diffusers')"],
])  # fmt: skip
def test_the_environment_is_as_before(calls: list[str], tmp_path: Path) -> None:
    code = "import os\nbefore = dict(os.environ)\nimport weightlift\n"
    code += "\n".join(calls)
    code += "\nassert os.environ != before\nweightlift.disable()\nassert os.environ == before"
    run("-c", code)
    run("-c", code, PYTHONPATH=f"{tmp_path}{os.pathsep}")
    run("-c", code, PYTHONPATH=str(tmp_path), WEIGHTLIFT_ENABLE="accelerate")


def test_a_block_ends_with_the_environment_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    before = dict(os.environ)
    with wl.enabled("safetensors"):
        assert os.environ["WEIGHTLIFT_ENABLE"] == "safetensors"
        assert os.environ["PYTHONPATH"] == f"{children._STARTUP}{os.pathsep}/somewhere"
        with wl.enabled("accelerate"):
            assert os.environ["WEIGHTLIFT_ENABLE"] == "accelerate,safetensors"
        assert os.environ["WEIGHTLIFT_ENABLE"] == "safetensors"
    assert dict(os.environ) == before


def test_what_the_user_sets_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with wl.enabled("safetensors"):
        monkeypatch.setenv("PYTHONPATH", f"/own{os.pathsep}{os.environ['PYTHONPATH']}")
    assert os.environ["PYTHONPATH"] == "/own"


def test_the_users_own_sitecustomize(script: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import sys\nsys.customized = __file__\n")
    code = """
    import subprocess, sys, weightlift
    weightlift.enable()
    code = "import sys, sitecustomize; print(sys.customized, sitecustomize.__file__)"
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    """
    expected = str(own / "sitecustomize.py")
    assert run("-c", textwrap.dedent(code), PYTHONPATH=str(own))[0] == f"{expected} {expected}"


def test_an_error_of_the_users_sitecustomize_is_told_as_always(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise ValueError('theirs')\n")
    code = """
    import subprocess, sys, weightlift
    def child():
        return subprocess.run([sys.executable, "-c", "import safetensors; print('ran', 'weightlift'"
                               " in sys.modules)" .replace("import ", "import sys, ")],
                              capture_output=True, text=True)
    before = child()
    weightlift.enable()
    after = child()
    print(before.stderr.splitlines()[1:] == after.stderr.splitlines()[1:], "theirs" in after.stderr)
    print(before.stdout.strip(), after.stdout.strip())
    """
    lines = run("-c", textwrap.dedent(code), PYTHONPATH=str(tmp_path))
    assert lines == ["True True", "ran False ran True"]


def test_another_python_without_weightlift(tmp_path: Path) -> None:
    """``-S``: without the folder that contains weightlift."""
    (tmp_path / "safetensors.py").write_text("loaded = True\n")
    code = """
    import runpy, sys
    sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry]
    sys.meta_path[:] = [f for f in sys.meta_path if "weightlift" not in type(f).__module__]
    sys.modules.pop("weightlift", None)
    import importlib.machinery
    sys.meta_path[:] = [f for f in sys.meta_path if isinstance(f, type)]
    try:
        runpy.run_path(sys.argv[1])
    except ModuleNotFoundError as error:
        assert error.name == "sitecustomize"
    import safetensors
    print(safetensors.loaded)
    """
    startup = Path(children._STARTUP) / "sitecustomize.py"
    environment = {"PYTHONPATH": str(tmp_path), "WEIGHTLIFT_ENABLE": "safetensors"}
    assert run("-S", "-c", textwrap.dedent(code), startup, **environment) == ["True"]
