"""The framework of the backends, with a library made for the test."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
import textwrap
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import weightlift as wl
from backend_support import falls_back
from support import run_python
from weightlift import backends
from weightlift.backends import (
    FallbackToLibrary,
    Hook,
    fall_back,
    patching,
    report_fallback,
    signature_text,
)
from weightlift.core.errors import OutOfMemoryError
from weightlift.core.report import fallback_reasons

LIBRARY = {
    "__init__.py": """
        import importlib, sys, types

        class Lazy(types.ModuleType):
            def __getattr__(self, name):
                if name.startswith("__"):
                    raise AttributeError(name)
                return importlib.import_module(f"{self.__name__}.{name}")

        lazy = Lazy(__name__)
        vars(lazy).update({k: v for k, v in globals().items() if k.startswith("__")})
        lazy.top = lambda path: ("top", path)
        sys.modules[__name__] = lazy
        """,
    "io.py": """
        def load(path: str, *, fast: bool = False, kind: type = dict, **kwargs) -> object:
            "Loads."
            return "stock", path, fast, kwargs
        """,
    "models.py": """
        class Base:
            def plain(self, path): return "stock", self, path
            @classmethod
            def of(cls, path): return "stock", cls, path
            @staticmethod
            def read(path): return "stock", path
        class Derived(Base): pass
        """,
    "user.py": """
        from fakelib.io import load
        """,
}
LOAD = "(path, *, fast=False, kind=..., **kwargs)"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A library ``fakelib``, and a function that sets the backends' hooks."""
    (tmp_path / "fakelib").mkdir()
    for name, code in LIBRARY.items():
        (tmp_path / "fakelib" / name).write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    hooks: dict[str, tuple[Hook, ...]] = {}
    monkeypatch.setattr(patching, "hooks_of", lambda name: hooks.get(name, ()))
    yield lambda **given: hooks.update(given)
    wl.disable()
    for name in [name for name in sys.modules if name.split(".")[0] == "fakelib"]:
        del sys.modules[name]
    assert sys.meta_path == finders


def ours(original: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return ("ours", *args, kwargs)

    return replacement


def load_hook(make: Callable[[Any], Any] = ours, signature: str = LOAD) -> Hook:
    return Hook("fakelib.io", "load", {signature: make})


def test_imported_library(library: Callable[..., None]) -> None:
    library(diffusers=(load_hook(),))
    module = importlib.import_module("fakelib.io")
    original = module.load
    wl.enable("diffusers")
    assert module.load is not original
    assert module.load("f", fast=True) == ("ours", "f", {"fast": True})
    # Anything that looks at it sees the original.
    assert signature_text(module.load) == signature_text(original) == LOAD
    assert (module.load.__name__, module.load.__doc__) == ("load", "Loads.")
    replaced = module.load
    wl.enable("diffusers")
    wl.enable()
    assert module.load is replaced
    wl.disable("diffusers")
    assert module.load is original
    wl.disable("diffusers")
    wl.disable()
    assert module.load is original


def test_hooked_at_import(library: Callable[..., None]) -> None:
    library(
        diffusers=(load_hook(), Hook("fakelib", "top", {"(path)": ours})),
        transformers=(Hook("fakelib.models", "Base.plain", {"(self, path)": ours}),),
    )
    wl.enable("diffusers")
    assert not any(name.startswith("fakelib") for name in sys.modules)
    package = importlib.import_module("fakelib")
    assert "fakelib.io" not in sys.modules
    assert package.top(1) == ("ours", 1, {})  # of what the lazy package left in sys.modules
    assert package.io.load("f") == ("ours", "f", {})
    assert package.models.Base().plain("f")[0] == "stock"  # that backend is off
    # inspect and pkgutil must see no trace.
    assert type(package.io.__loader__).__name__ == "SourceFileLoader"
    assert vars(package.io.__loader__).get("exec_module") is None
    assert package.io.__spec__.loader is package.io.__loader__
    wl.disable()
    assert package.io.load("f")[0] == "stock"
    assert "replacement" not in package.io.load.__qualname__


def test_modules_that_are_not_there_after_all(library: Callable[..., None], tmp_path: Path) -> None:
    """Python's own errors for a missing module and for one that removes itself."""
    (tmp_path / "fakelib" / "gone.py").write_text("import sys\ndel sys.modules[__name__]\n")
    hooks = [Hook(f"fakelib.{name}", "load", {LOAD: ours}) for name in ("gone", "missing")]
    library(diffusers=(load_hook(), *hooks))
    for name in ("gone", "missing"):
        told = []
        for enabled in (False, True):
            with wl.enabled("diffusers") if enabled else contextlib.nullcontext():
                with pytest.raises((ImportError, KeyError)) as caught:
                    importlib.import_module(f"fakelib.{name}")
                told.append((caught.type, str(caught.value)))
        assert told[0] == told[1]
    with wl.enabled("diffusers"):
        assert importlib.import_module("fakelib.io").load("f")[0] == "ours"


def test_a_module_of_the_interpreter(library: Callable[..., None]) -> None:
    """Its loader is a class that all such modules share, and it is not changed."""
    library(diffusers=(Hook("_symtable", "symtable", {"()": ours}), load_hook()))
    kept = sys.modules.pop("_symtable", None)
    before = dict(vars(importlib.machinery.BuiltinImporter))
    try:
        with wl.enabled("diffusers"):
            module = importlib.import_module("_symtable")
            assert module.symtable("a", "f", "exec") is not None
            assert importlib.import_module("fakelib.io").load("f")[0] == "ours"
    finally:
        sys.modules.pop("_symtable", None)
        if kept is not None:
            sys.modules["_symtable"] = kept
    assert dict(vars(importlib.machinery.BuiltinImporter)) == before


def test_reloaded_and_reimported(library: Callable[..., None]) -> None:
    library(diffusers=(load_hook(),))
    wl.enable("diffusers")
    first = importlib.import_module("fakelib.io")
    importlib.reload(first)
    assert first.load("f")[0] == "ours"
    del sys.modules["fakelib.io"]
    second = importlib.import_module("fakelib.io")
    assert second is not first
    assert second.load("f")[0] == first.load("f")[0] == "ours"
    wl.disable()
    assert second.load("f")[0] == first.load("f")[0] == "stock"
    assert second.load.__closure__ is first.load.__closure__ is None


def test_looking_for_a_module_does_not_hook(library: Callable[..., None]) -> None:
    library(diffusers=(load_hook(),))
    wl.enable("diffusers")
    spec = importlib.util.find_spec("fakelib.io")
    assert spec is not None
    wl.disable()
    module = importlib.util.module_from_spec(spec)
    sys.modules["fakelib.io"] = module
    assert spec.loader is not None
    spec.loader.exec_module(module)
    assert module.load("f")[0] == "stock"


def test_methods_keep_their_kind(library: Callable[..., None]) -> None:
    library(
        accelerate=(
            Hook("fakelib.models", "Base.plain", {"(self, path)": ours}),
            Hook("fakelib.models", "Base.of", {"(cls, path)": ours}),
            Hook("fakelib.models", "Base.read", {"(path)": ours}),
        )
    )
    models = importlib.import_module("fakelib.models")
    before = dict(vars(models.Base))
    wl.enable("accelerate")
    thing = models.Derived()
    assert thing.plain("f") == ("ours", thing, "f", {})
    assert models.Derived.of("f") == ("ours", models.Derived, "f", {})
    assert thing.read("f") == models.Base.read("f") == ("ours", "f", {})
    assert {name: type(vars(models.Base)[name]) for name in ("of", "read")} == {
        "of": classmethod,
        "read": staticmethod,
    }
    wl.disable("accelerate")
    assert all(vars(models.Base)[name] is value for name, value in before.items())
    assert vars(models.Base).keys() == before.keys()


def test_a_name_imported_meanwhile_follows(library: Callable[..., None]) -> None:
    library(diffusers=(load_hook(),))
    wl.enable("diffusers")
    user = importlib.import_module("fakelib.user")
    assert user.load("f")[0] == "ours"
    wl.disable()
    assert user.load("f")[0] == "stock"
    wl.enable("diffusers")
    assert user.load("f")[0] == "ours"


def test_a_hooked_name_imported_from_a_hooked_place_is_restored(
    library: Callable[..., None],
) -> None:
    library(diffusers=(load_hook(), Hook("fakelib.user", "load", {LOAD: ours})))
    wl.enable("diffusers")
    user = importlib.import_module("fakelib.user")
    assert user.load("f") == ("ours", "f", {})
    wl.disable()
    assert user.load is importlib.import_module("fakelib.io").load
    assert user.load("f")[0] == "stock"


def test_a_name_that_another_backend_made(library: Callable[..., None]) -> None:
    def theirs(original: Any) -> Any:
        return lambda path: ("theirs", original(path))

    library(diffusers=(load_hook(),), accelerate=(Hook("fakelib.user", "load", {LOAD: theirs}),))
    wl.enable("diffusers")
    user = importlib.import_module("fakelib.user")
    wl.enable("accelerate")
    assert user.load("f") == ("theirs", ("stock", "f", False, {}))
    wl.disable("accelerate")
    assert user.load("f")[0] == "stock"
    wl.disable()
    assert user.load is importlib.import_module("fakelib.io").load
    assert user.load.__closure__ is None


def test_what_is_no_function(library: Callable[..., None]) -> None:
    class Proxy:
        def __init__(self, original: Any) -> None:
            self.original = original

    library(diffusers=(Hook("fakelib.io", "helper", {"without a signature": Proxy}),))
    module = importlib.import_module("fakelib.io")
    module.helper = helper = types.SimpleNamespace()  # type: ignore[attr-defined]
    with wl.enabled("diffusers"), wl.enabled():
        assert type(module.helper) is Proxy
        assert module.helper.original is helper
    assert module.helper is helper


def test_what_others_put_on_top_stays(library: Callable[..., None]) -> None:
    library(diffusers=(load_hook(),))
    module = importlib.import_module("fakelib.io")
    wl.enable("diffusers")
    hooked = module.load

    def on_top(path: str) -> Any:
        return hooked(path)

    module.load = on_top  # type: ignore[attr-defined]
    assert module.load("f")[0] == "ours"
    wl.disable()
    assert module.load is on_top
    assert module.load("f")[0] == "stock"


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (load_hook(signature="(path, *, fast=True, kind=..., **kwargs)"), "fast=False"),
        (load_hook(signature="(path)"), LOAD),
        (Hook("fakelib.io", "read", {"()": ours}), "fakelib.io.read"),
        (Hook("fakelib.io", "Model.load", {"()": ours}), "fakelib.io.Model.load"),
        (Hook("fakelib.models", "Derived.of", {"(cls, path)": ours}), "fakelib.models.Derived.of"),
        (Hook("fakelib.io", "__name__", {"()": ours}), "without a signature"),
    ],
)
@pytest.mark.parametrize("imported", [False, True])
def test_unknown_signature_stands_aside(
    library: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    hook: Hook,
    words: str,
    imported: bool,
) -> None:
    other = Hook("fakelib.models", "Base.read", {"(path)": ours})
    library(diffusers=(hook, other))
    if imported:
        importlib.import_module("fakelib.io")
        importlib.import_module("fakelib.models")
    with falls_back("diffusers"), caplog.at_level(logging.WARNING, logger="weightlift"):
        wl.enable("diffusers")
        io, models = (importlib.import_module(f"fakelib.{name}") for name in ("io", "models"))
    (line,) = caplog.messages
    assert words in line
    assert "falls back to its own loading" in line
    assert "\n" not in line
    assert io.load("f")[0] == models.Derived.of("f")[0] == "stock"
    assert models.Base.read("f")[0] == "ours"  # the others keep their hooks
    wl.disable()
    monkeypatch.setenv("WEIGHTLIFT_STRICT", "1")
    with pytest.raises(wl.WeightliftError, match="STRICT"):
        wl.enable("diffusers")
    assert not backends.is_enabled("diffusers")
    assert models.Base.read("f")[0] == "stock"


def test_strict_at_a_later_import(
    library: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    library(diffusers=(load_hook(signature="()"),))
    monkeypatch.setenv("WEIGHTLIFT_STRICT", "1")
    wl.enable("diffusers")
    with pytest.raises(wl.WeightliftError, match=r"fakelib\.io\.load"):
        importlib.import_module("fakelib.io")
    wl.disable()
    assert importlib.import_module("fakelib.io").load("f")[0] == "stock"


def refusing(reason: str, **options: Any) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            kwargs.clear()
            raise FallbackToLibrary(reason, **options)

        return replacement

    return make


def test_standing_aside(library: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    library(diffusers=(load_hook(refusing("the moon is full")),))
    io = importlib.import_module("fakelib.io")
    expected = ("stock", "f", True, {"more": 1})
    with wl.enabled("diffusers"):
        with falls_back("diffusers"), pytest.warns(UserWarning, match="moon is full") as told:
            assert io.load("f", fast=True, more=1) == expected
        assert len(told) == 1
        assert told[0].filename == __file__
        with falls_back("diffusers"):  # counted, but told once
            assert io.load("f", fast=True, more=1) == expected
        assert fallback_reasons()["diffusers", "the moon is full"] == 2
        monkeypatch.setenv("WEIGHTLIFT_STRICT", "1")
        with pytest.raises(wl.WeightliftError, match="moon is full"):
            io.load("f")


def test_standing_aside_as_documented(library: Callable[..., None]) -> None:
    library(diffusers=(load_hook(refusing("as the README says", warn=False)),))
    io = importlib.import_module("fakelib.io")
    with wl.enabled("diffusers"), falls_back("diffusers"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert io.load("f")[0] == "stock"


def test_stand_aside_is_told_once_a_library() -> None:
    for name in ("accelerate", "transformers"):
        with pytest.warns(UserWarning, match=f"{name} falls back to its own loading: a test of it"):
            report_fallback(name, "a test of it")
        report_fallback(name, "a test of it")


def test_or_stock() -> None:
    failure = wl.FormatError("x", "what the engine says")

    def broken() -> None:
        raise OSError("what the library says")

    with falls_back("accelerate", times=0), pytest.raises(OSError, match="library") as caught:
        fall_back("accelerate", failure, broken)
    assert caught.value.__cause__ is failure
    with falls_back("accelerate", times=0), pytest.raises(OSError, match="library") as caught:
        fall_back("accelerate", FallbackToLibrary("not ours"), broken)
    assert caught.value.__cause__ is None

    def inner() -> int:
        return fall_back("safetensors", failure, lambda: 3)

    # Counted for the backend in which it began.
    told = pytest.warns(UserWarning, match="accelerate.*engine says")
    with falls_back("safetensors", times=0), falls_back("accelerate"), told:
        assert fall_back("accelerate", failure, inner) == 3
    with falls_back("safetensors"):
        assert fall_back("safetensors", FallbackToLibrary("not ours", warn=False), lambda: 4) == 4


def test_errors_of_a_replacement_are_not_hidden(library: Callable[..., None]) -> None:
    def failing(original: Any) -> Any:
        def replacement(path: Any, **_: Any) -> Any:
            raise path

        return replacement

    library(diffusers=(load_hook(failing),))
    io = importlib.import_module("fakelib.io")
    torchs = torch.OutOfMemoryError("CUDA out of memory")
    from_torch = OutOfMemoryError("CUDA out of memory")
    from_torch.__cause__ = torchs
    with wl.enabled("diffusers"):
        for error in (KeyError("x"), wl.FormatError("x", "y"), OutOfMemoryError("host")):
            with pytest.raises(type(error)) as caught:
                io.load(error)
            assert caught.value is error
        with pytest.raises(torch.OutOfMemoryError) as caught:
            io.load(from_torch)
        assert caught.value is torchs


def test_unknown_names_change_nothing(library: Callable[..., None]) -> None:
    library(diffusers=(load_hook(),))
    for call in (wl.enable, wl.disable, wl.enabled):
        with pytest.raises(wl.ArgumentError, match=r"'nonsense'.*diffusers, transformers, acc"):
            call("diffusers", "nonsense")
    assert importlib.import_module("fakelib.io").load("f")[0] == "stock"
    for name in ("Diffusers", ["diffusers"], None):
        with pytest.raises(ValueError, match="no backend for"):
            wl.enable(name)  # type: ignore[arg-type]


def test_nested_blocks(library: Callable[..., None]) -> None:
    library(
        diffusers=(load_hook(),),
        accelerate=(Hook("fakelib.models", "Base.read", {"(path)": ours}),),
    )
    io, models = (importlib.import_module(f"fakelib.{name}") for name in ("io", "models"))

    def state() -> tuple[bool, bool]:
        return io.load("f")[0] == "ours", models.Base.read("f")[0] == "ours"

    with wl.enabled("diffusers"):
        assert state() == (True, False)
        with wl.enabled():
            assert state() == (True, True)
            with wl.enabled("diffusers"):
                assert state() == (True, True)
            assert state() == (True, True)
        assert state() == (True, False)
        wl.disable("diffusers")
        assert state() == (False, False)
        with wl.enabled("diffusers"):
            assert state() == (True, False)
        assert state() == (False, False)
    assert state() == (False, False)
    wl.enable("accelerate")
    block = wl.enabled("accelerate", "diffusers")
    with contextlib.suppress(KeyError), block, block:  # the same one, too
        assert state() == (True, True)
        wl.disable()
        raise KeyError
    assert state() == (False, True)
    wl.disable()

    @wl.enabled("diffusers")
    def decorated() -> tuple[bool, bool]:
        return state()

    assert decorated() == (True, False)
    assert state() == (False, False)


def test_blocks_of_several_threads(library: Callable[..., None]) -> None:
    library(diffusers=(load_hook(),))
    io = importlib.import_module("fakelib.io")
    original = io.load
    entered, left, seen = threading.Event(), threading.Event(), []

    def second() -> None:
        entered.wait(30)
        with wl.enabled("diffusers"):
            entered.clear()
            left.wait(30)
            seen.append(io.load("f")[0])

    thread = threading.Thread(target=second)
    thread.start()
    with wl.enabled("diffusers"):
        entered.set()
        while entered.is_set():
            pass
    left.set()
    thread.join()
    assert seen == ["ours"]
    assert io.load is original


def test_many_threads_enable_import_and_disable(library: Callable[..., None]) -> None:
    library(diffusers=(load_hook(),))
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(100):
                with wl.enabled("diffusers"):
                    if number == 0:
                        sys.modules.pop("fakelib.io", None)
                    assert importlib.import_module("fakelib.io").load("f")[0] == "ours"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    module = importlib.import_module("fakelib.io")
    assert module.load("f")[0] == "stock"
    assert module.load.__closure__ is None


def test_import_in_progress_in_another_thread(
    library: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library(diffusers=(load_hook(),))
    (tmp_path / "fakelib" / "io.py").write_text(
        "import fakelib, time; fakelib.begun.set(); time.sleep(0.3)\n"
        + textwrap.dedent(LIBRARY["io.py"])
    )
    package = importlib.import_module("fakelib")
    package.begun = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=importlib.import_module, args=("fakelib.io",))
    thread.start()
    package.begun.wait(30)
    wl.enable("diffusers")
    thread.join()
    assert package.io.load("f")[0] == "ours"
    assert caplog.messages == []


def test_signature_text() -> None:
    def function(
        a: int, /, b: str = "x", *c: int, d: Any = None, e: object = dict, **f: int
    ) -> int:
        return 0

    assert signature_text(function) == "(a, /, b='x', *c, d=None, e=..., **f)"


def test_hooks_of_all_backends() -> None:
    # Two backends on one target could not put the very object back.
    hooks = [hook for name in backends.LIBRARIES for hook in patching.hooks_of(name)]
    assert len({(hook.module, hook.target) for hook in hooks}) == len(hooks)
    for hook in hooks:
        assert hook.adapters


ENVIRONMENT = """
import sys
import weightlift as wl
from weightlift import backends
assert not {"torch", "diffusers", "transformers", "accelerate"} & set(sys.modules)
print([name for name in backends.LIBRARIES if backends.is_enabled(name)])
"""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ("", []),
        (" , ", []),
        ("safetensors", ["safetensors"]),
        ("diffusers, transformers", ["diffusers", "transformers"]),
    ],
)
def test_environment(value: str | None, expected: list[str]) -> None:
    given = {} if value is None else {"WEIGHTLIFT_ENABLE": value}
    done = run_python(ENVIRONMENT, env={**os.environ, **given})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == repr(expected)


def test_environment_with_an_unknown_name() -> None:
    done = run_python("import weightlift", env={**os.environ, "WEIGHTLIFT_ENABLE": "difusers"})
    assert done.returncode == 1
    assert "WEIGHTLIFT_ENABLE=difusers: no backend for 'difusers'" in done.stderr.splitlines()[-1]
    assert "diffusers, transformers" in done.stderr.splitlines()[-1]


def test_nothing_is_hooked_by_importing() -> None:
    code = """
import safetensors, safetensors.torch
before = [safetensors.safe_open, safetensors.torch.safe_open, safetensors.torch.load_file]
import sys
finders = list(sys.meta_path)
import weightlift, weightlift.backends.safetensors
assert before == [
    safetensors.safe_open, safetensors.torch.safe_open, safetensors.torch.load_file
]
assert not any(type(f).__module__.startswith("weightlift.") for f in sys.meta_path)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_the_installed_libraries_are_known() -> None:
    # For all versions: a hook that leaves the call to the library is an error here.
    code = """
import importlib, importlib.util
import weightlift as wl
from weightlift import backends
from weightlift.backends import patching
wl.enable()
for library in backends.LIBRARIES:
    for hook in patching.hooks_of(library):
        if importlib.util.find_spec(hook.module.split(".")[0]) is not None:
            importlib.import_module(hook.module)
print(len(patching.patches), wl.stats().fallbacks)
"""
    done = run_python(code, timeout=300, env={**os.environ, "WEIGHTLIFT_STRICT": "1"})
    assert done.returncode == 0, done.stderr
    patches, fallbacks = map(int, done.stdout.splitlines()[-1].split())
    assert patches > 40
    assert fallbacks == 0


def test_whether_a_backend_is_on(library: Callable[..., None]) -> None:
    """`if wl.enabled("diffusers"):` is a question that people ask."""
    library(diffusers=(load_hook(),))
    assert not wl.enabled()
    assert repr(wl.enabled()) == "<enabled: no backend is on>"
    wl.enable("diffusers")
    assert wl.enabled()
    assert wl.enabled("diffusers")
    assert not wl.enabled("diffusers", "accelerate")
    assert repr(wl.enabled()) == "<enabled: diffusers>"
    wl.disable()
    assert not wl.enabled("diffusers")
