"""The stub of the compiled module is complete, and the package imports only names that it has."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import weightlift
from support import run_python
from weightlift import _native

STUB = Path(weightlift.__file__).with_name("_native.pyi")
# Only builds for tests have them.
TESTING = {"use_driver_for_testing"}


def parameters(function: ast.FunctionDef) -> list[str]:
    named = function.args
    found = [one.arg for one in (*named.posonlyargs, *named.args, *named.kwonlyargs)]
    return [name for name in found if name != "self"]


def of_stub() -> dict[str, list[str] | None]:
    """Name -> parameters; None for properties and classes."""
    found: dict[str, list[str] | None] = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = parameters(node)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = None
            for member in node.body:
                if isinstance(member, ast.AnnAssign):
                    found[f"{node.name}.{ast.unparse(member.target)}"] = None
                elif isinstance(member, ast.FunctionDef):
                    decorators = {ast.unparse(one) for one in member.decorator_list}
                    found[f"{node.name}.{member.name}"] = (
                        None if "property" in decorators else parameters(member)
                    )
    return found


def of_docstring(function: object) -> list[str]:
    """pybind11 writes the signature into the first line."""
    signature = (inspect.getdoc(function) or "").splitlines()[0]
    (parsed,) = ast.parse(f"def {signature}: ...").body
    assert isinstance(parsed, ast.FunctionDef)
    return parameters(parsed)


def of_module() -> dict[str, list[str] | None]:
    found: dict[str, list[str] | None] = {}
    for name, value in vars(_native).items():
        if name.startswith("_"):
            continue
        if not isinstance(value, type):
            found[name] = of_docstring(value)
            continue
        found[name] = None
        for member, own in vars(value).items():
            if isinstance(own, property):
                found[f"{name}.{member}"] = None
            elif member == "__len__" or not member.startswith("_"):
                function = getattr(value, member)
                found[f"{name}.{member}"] = of_docstring(function)
        # Classes that a program can construct have an __init__; the others raise an error.
        initializer = vars(value).get("__init__")
        if (inspect.getdoc(initializer) or "").startswith("__init__("):
            found[f"{name}.__init__"] = of_docstring(initializer)
    return found


def test_the_stub_is_the_module() -> None:
    stub, module = of_stub(), of_module()
    assert {name: stub[name] for name in stub.keys() - TESTING} == {
        name: module[name] for name in module.keys() - TESTING
    }
    for name in TESTING & module.keys():
        assert stub[name] == module[name]


def test_public_names_are_there() -> None:
    assert len(weightlift.__all__) == len(set(weightlift.__all__))
    for name in weightlift.__all__:
        assert getattr(weightlift, name) is not None
    assert (STUB.parent / "py.typed").exists()


def test_import_starts_nothing() -> None:
    code = """
import sys
import torch
before = set(sys.modules)
import weightlift
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not torch.cuda.is_initialized()
heavy = {"diffusers", "transformers", "accelerate", "huggingface_hub", "rich", "typer", "numpy"}
assert not new & heavy, new & heavy
import os
maps = open("/proc/self/maps").read()
assert "libcuda.so" not in maps
print(weightlift._native.pinned_bytes())
"""
    done = run_python(code)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_a_load_on_the_cpu_starts_no_cuda(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.ones(4)}, tmp_path / "f")
    code = """
import sys
import torch
import weightlift
assert weightlift.load_file(sys.argv[1])["w"].sum() == 4
assert weightlift.load_file(sys.argv[1], dtype="float16")["w"].sum() == 4
assert not torch.cuda.is_initialized()
assert "libcuda.so" not in open("/proc/self/maps").read()
"""
    done = run_python(code, tmp_path / "f")
    assert done.returncode == 0, done.stderr
