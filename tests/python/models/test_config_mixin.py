from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import pickle
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import configuration_utils as theirs
from hypothesis import given
from hypothesis import strategies as st

import weightlift as wl
from weightlift.models import config_mixin as ours

VERSIONS = ("_diffusers_version", "_weightlift_version")


def classes(base: type, register: Callable[..., Any]) -> SimpleNamespace:
    """The same classes, derived from one library's base or from the other's."""

    class Base(base):
        config_name = "config.json"

        def __init__(self) -> None:
            pass

    class Plain(Base):
        @register
        def __init__(self, a=2, b=5, c=(2, 5), d="diffusion", e=(1, 3)) -> None:
            self.a_doubled = a * 2

    class Ignoring(Base):
        ignore_for_config: ClassVar = ["device"]

        @register
        def __init__(self, width=1, device="cpu", depth=3) -> None:
            self.where = device

    class Deprecating(Base):
        _deprecated_kwargs: ClassVar = ["length"]

        @register
        def __init__(self, size=1, **kwargs) -> None:
            self.length = kwargs.get("length")

    class KeywordOnly(Base):
        @register
        def __init__(self, *, width, depth=2) -> None:
            pass

    class Nested(Base):
        @register
        def __init__(self, blocks=({"kind": "down", "layers": [1, 2]},), options=None) -> None:
            pass

    class Values(Base):
        @register
        def __init__(self, betas=None, path=None, many=()) -> None:
            pass

    class Quantizing(Base):
        @register
        def __init__(self, a=1, quantization_config=None, _x=2) -> None:
            pass

    class Quantized:
        def to_dict(self) -> dict[str, Any]:
            return {"bits": 4}

    class Derived(Plain):
        @register
        def __init__(self, a=7, extra="x") -> None:
            super().__init__(a=a, b=11)

    class First(Base):
        has_compatibles = True

        @classmethod
        def _get_compatibles(cls) -> list[type]:
            return [First, Second]

        @register
        def __init__(self, shared=1, steps=10) -> None:
            pass

    class Second(Base):
        has_compatibles = True

        @classmethod
        def _get_compatibles(cls) -> list[type]:
            return [First, Second]

        @register
        def __init__(self, shared=1, order=2) -> None:
            pass

    class Other(Base):
        @register
        def __init__(self, a=1, z=9) -> None:
            pass

    class WithDtype(Base):
        @register
        def __init__(self, a=1, **kwargs) -> None:
            self.dtype = kwargs.get("dtype")

    return SimpleNamespace(**{name: made for name, made in locals().items() if name[0].isupper()})


OURS = classes(ours.ConfigMixin, ours.register_to_config)
THEIRS = classes(theirs.ConfigMixin, theirs.register_to_config)
BOTH = pytest.mark.parametrize(
    ("writing", "reading"), [(OURS, THEIRS), (THEIRS, OURS)], ids=["to_theirs", "to_ours"]
)
# The class and its arguments.
MADE: list[tuple[str, dict[str, Any]]] = [
    ("Plain", {}),
    ("Plain", {"a": 3, "c": [1, [2, (3, 4)]], "d": None, "_private": "kept"}),
    ("Ignoring", {"device": "cuda", "depth": 4}),
    ("Deprecating", {"size": 2, "length": 3}),
    ("KeywordOnly", {"width": 1.5}),
    ("Nested", {"options": {"a": {"b": [1, None, True]}, "ü": float("inf")}}),
    ("Values", {"betas": np.linspace(0, 1, 3), "path": Path("a/b"), "many": [np.array([[1]])]}),
    ("Derived", {"extra": "y"}),
    ("First", {"steps": 20}),
]
ALL = pytest.mark.parametrize(("name", "arguments"), MADE, ids=[name for name, _ in MADE])


def without_versions(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in VERSIONS}


@contextlib.contextmanager
def logged(*names: str) -> Iterator[list[logging.LogRecord]]:
    """Messages of these loggers from WARNING on; diffusers' logger does not propagate to the
    root."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in names or ("weightlift", "diffusers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield records
    for logger in loggers:
        logger.removeHandler(handler)


@ALL
def test_the_json_is_that_of_diffusers(name: str, arguments: dict[str, Any]) -> None:
    text = getattr(OURS, name)(**arguments).to_json_string()
    expected = getattr(THEIRS, name)(**arguments).to_json_string()
    assert without_versions(json.loads(text)) == without_versions(json.loads(expected))
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert json.loads(text)["_weightlift_version"] == wl.__version__


def loaded_from(cls: Any, config: dict[str, Any]) -> tuple[Any, dict[str, Any], list[str]]:
    with logged() as records:
        loaded, unused = cls.from_config(config, return_unused_kwargs=True)
    return loaded, unused, [record.levelname for record in records]


@ALL
@BOTH
def test_either_loads_what_the_other_saved(
    name: str,
    arguments: dict[str, Any],
    writing: SimpleNamespace,
    reading: SimpleNamespace,
    tmp_path: Path,
) -> None:
    saved = getattr(writing, name)(**arguments)
    saved.save_config(tmp_path / "made" / "for it")
    cls = getattr(reading, name)
    config = cls.load_config(tmp_path / "made" / "for it")
    loaded, unused, warnings = loaded_from(cls, config)
    # As a class of the same library makes of it; one that calls its parent's decorated constructor
    # has arguments of that one's in its config, too.
    assert (unused, warnings) == loaded_from(getattr(writing, name), config)[1:]
    assert warnings == (["WARNING"] if name == "Derived" else [])
    assert without_versions(json.loads(loaded.to_json_string())) == without_versions(
        json.loads(saved.to_json_string())
    )
    for key in arguments:
        if not key.startswith("_") and key in config:
            assert loaded.config[key] == config[key]


def test_the_version_of_diffusers_stays() -> None:
    # Its pipelines go by it: of "less than 0.9.0" they take the sample size to be wrong.
    config = {"_class_name": "Plain", "_diffusers_version": "0.6.0", "a": 1}
    saved = json.loads(OURS.Plain.from_config(config).to_json_string())
    assert saved["_diffusers_version"] == "0.6.0"
    assert "_diffusers_version" not in json.loads(OURS.Plain().to_json_string())


def outcome(library: SimpleNamespace, name: str, method: str, *args: Any, **kwargs: Any) -> Any:
    with logged() as records:
        try:
            result = getattr(getattr(library, name), method)(*args, **kwargs)
        except Exception as error:
            return ValueError if isinstance(error, ValueError) else type(error)
    return result, [record.levelname for record in records]


NAMES = ["a", "b", "c", "shared", "steps", "order", "_x", "foreign", "quantization_config", "dtype"]
VALUES = st.one_of(st.none(), st.integers(0, 3), st.lists(st.integers(0, 3), max_size=2))
CONFIGS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)


@given(
    name=st.sampled_from(["Plain", "First", "Deprecating", "Ignoring", "Quantizing"]),
    config=CONFIGS,
    defaults=st.none() | st.lists(st.sampled_from(NAMES), max_size=3),
    class_name=st.sampled_from([None, "Plain", "First", "Nobody", ["custom", "Plain"], 7]),
    kwargs=CONFIGS,
)
def test_a_config_is_divided_as_by_diffusers(
    name: str,
    config: dict[str, Any],
    defaults: list[str] | None,
    class_name: Any,
    kwargs: dict[str, Any],
) -> None:
    if defaults is not None:
        config = {**config, "_use_default_values": defaults}
    if class_name is not None:
        config = {**config, "_class_name": class_name}
    before = copy.deepcopy(config)
    ours, theirs = (
        outcome(library, name, "extract_init_dict", config, **kwargs) for library in (OURS, THEIRS)
    )
    assert ours == theirs
    assert config == before


def test_a_warning_names_what_is_ignored() -> None:
    with logged("weightlift") as records:
        made = OURS.Plain.from_config({"_class_name": "Other", "a": 1, "z": 9})
    (record,) = records
    assert "Plain: ignored unexpected entries {'z': 9} of the config" in record.getMessage()
    assert made.config.z == 9  # and goes on to whoever loads it next
    assert made.config._class_name == "Plain"


@pytest.mark.parametrize("library", [OURS, THEIRS], ids=["ours", "theirs"])
@pytest.mark.parametrize("path", ["folder", "file", "nested"])
def test_what_load_config_returns(library: SimpleNamespace, path: str, tmp_path: Path) -> None:
    library.Plain(a=1).save_config(tmp_path)
    library.Plain(a=2).save_config(tmp_path / "sub")
    place = tmp_path / "config.json" if path == "file" else tmp_path
    arguments = {"subfolder": "sub"} if path == "nested" else {}
    load = library.Plain.load_config
    config = load(place, **arguments)
    assert config["a"] == (2 if path == "nested" else 1)
    assert load(str(place), **arguments) == config
    hub = {"cache_dir": tmp_path, "force_download": False, "local_files_only": None, "token": None}
    hub |= {"revision": None, "mirror": None, **arguments}
    assert load(place, return_unused_kwargs=True, left=1, **hub) == (config, {"left": 1})
    assert load(place, return_commit_hash=True, **hub) == (config, None)
    both = load(place, return_unused_kwargs=True, return_commit_hash=True, **arguments)
    assert both == (config, {}, None)


def test_the_commit_of_a_snapshot(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / ("0123456789" * 4)
    OURS.Plain().save_config(folder / "unet")
    for cls in (OURS.Plain, THEIRS.Plain):
        found = cls.load_config(folder, subfolder="unet", return_commit_hash=True)
        assert found[1] == folder.name


def test_the_root_serves_where_the_subfolder_has_none(tmp_path: Path) -> None:
    OURS.Plain(a=1).save_config(tmp_path)
    (tmp_path / "sub").mkdir()
    for cls in (OURS.Plain, THEIRS.Plain):
        assert cls.load_config(tmp_path, subfolder="sub")["a"] == 1


def test_the_config_of_an_object_is_one_for_either() -> None:
    for writing, reading in ((OURS, THEIRS), (THEIRS, OURS)):
        config = writing.Plain(a=3, d="x").config
        made = reading.Plain.from_config(config)
        assert (made.config["a"], made.config["d"], made.config["b"]) == (3, "x", 5)


def test_a_config_that_was_read_already() -> None:
    config = {"a": 3}
    assert OURS.Plain.load_config(config, return_commit_hash=True) == ({"a": 3}, None)
    assert OURS.Plain.load_config(config) is not config


def test_defaults_are_those_of_the_compatible_class() -> None:
    # Defaults are chosen again, given values stay, also if they were given by position, which
    # diffusers takes for defaults.
    made = OURS.First(5)
    assert made.config._use_default_values == ["steps"]
    assert "_use_default_values" not in json.loads(made.to_json_string())
    other = OURS.Second.from_config(made.config)
    assert other.config.shared == 5
    assert other.config.order == 2
    explicit = OURS.Second.from_config(OURS.First(shared=4, steps=30).config)
    assert explicit.config.steps == 30
    with logged() as records:
        back = OURS.First.from_config(explicit.config)
    assert records == []
    assert (back.config.shared, back.config.steps) == (4, 30)


def test_arguments_by_position_stand_beside_ignored_ones() -> None:
    made = OURS.Ignoring(7, "cuda", 9)
    assert made.where == "cuda"
    assert dict(made.config) == {"width": 7, "depth": 9}


def test_arguments_in_place_of_the_config() -> None:
    config = {"a": 1, "b": 2}
    for cls in (OURS.Plain, THEIRS.Plain):
        made, unused = cls.from_config(config, return_unused_kwargs=True, b=3, other=4)
        assert (made.config["a"], made.config["b"], made.a_doubled) == (1, 3, 2)
        assert unused == {"other": 4}
        assert cls.from_config(pretrained_model_name_or_path=config).config["a"] == 1
    for cls in (OURS.WithDtype, THEIRS.WithDtype):
        assert cls.from_config(config, dtype=torch.float16, b=1).dtype == torch.float16
    for cls in (OURS.Deprecating, THEIRS.Deprecating):
        made = cls.from_config({"size": 4}, length=5)
        assert (made.length, "length" in made.config) == (5, False)


def test_private_arguments_go_to_the_config_alone() -> None:
    for cls in (OURS.Plain, THEIRS.Plain):
        assert cls(_name_or_path="x").config["_name_or_path"] == "x"


def test_the_constructor_complains_itself() -> None:
    for cls in (OURS.KeywordOnly, THEIRS.KeywordOnly):
        with pytest.raises(TypeError, match="required keyword-only argument: 'width'"):
            cls()
        with pytest.raises(TypeError, match="unexpected keyword argument 'hight'"):
            cls(width=1, hight=2)


def test_the_decorator_is_for_config_mixins() -> None:
    class Stranger:
        @ours.register_to_config
        def __init__(self, a: int = 1) -> None:
            pass

    with pytest.raises(RuntimeError, match="Stranger does not"):
        Stranger()


def test_a_config_is_frozen() -> None:
    made = OURS.Plain(a=3)
    config = made.config
    attempts: list[Callable[[], object]] = [
        lambda: config.__setitem__("a", 4),
        lambda: config.__delitem__("a"),
        lambda: setattr(config, "a", 4),
        lambda: delattr(config, "a"),
        lambda: config.update(a=4),
        lambda: config.pop("a"),
        lambda: config.popitem(),
        lambda: config.clear(),
        lambda: config.setdefault("new", 4),
        lambda: config.__ior__({"a": 4}),
    ]
    before = dict(config)
    for attempt in attempts:
        with pytest.raises(TypeError, match="register_to_config"):
            attempt()
    assert config == before
    assert config.a == config["a"] == 3
    assert getattr(config, "missing", None) is None
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert (type(again), again, again.a) == (type(config), config, 3)
    made.register_to_config(a=4, new=[5])
    assert (made.config.a, made.config.new, made.config.b) == (4, [5], 5)
    assert config == before


def test_values_are_not_attributes_of_the_object_any_more() -> None:
    for cls in (OURS.Plain, THEIRS.Plain):
        made = cls(a=3)
        with pytest.warns(FutureWarning, match="config") as warned:
            assert made.a == 3
        assert warned[0].filename == __file__ or cls is THEIRS.Plain
        with pytest.raises(AttributeError, match="'Plain' object has no attribute 'nothing'"):
            _ = made.nothing


def test_the_attributes_of_a_module_come_after_those_of_the_config() -> None:
    class Layer(ours.ConfigMixin, torch.nn.Module):
        config_name = "config.json"

        @ours.register_to_config
        def __init__(self, width: int = 2) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(width))

    layer = Layer(3)
    assert layer.weight.shape == (3,)
    assert copy.deepcopy(layer).config == layer.config
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing


def test_auto_map(tmp_path: Path) -> None:
    for library in (OURS, THEIRS):

        class Custom(library.Plain):  # type: ignore[name-defined, misc]
            pass

        Custom.register_for_auto_class("AutoModel")
        made = Custom()
        made.register_to_config(auto_map={"AutoOther": "a.B"})
        assert json.loads(made.to_json_string())["auto_map"] == {
            "AutoOther": "a.B",
            "AutoModel": "test_config_mixin.Custom",
        }
        with pytest.raises(ValueError, match="AutoModel"):
            Custom.register_for_auto_class("AutoTokenizer")
    assert OURS.Plain._auto_class is None


def test_objects_and_values_of_numpy() -> None:
    values = {"quantization_config": OURS.Quantized()}
    for library in (OURS, THEIRS):
        saved = json.loads(library.Quantizing(**values).to_json_string())
        assert saved["quantization_config"] == {"bits": 4}
    # Beyond what diffusers can: scalars, and what stands in a tuple or a dict.
    deep = {"many": ({"x": np.float32(0.5)}, np.int64(3), Path("p"), (np.arange(2),))}
    saved = json.loads(OURS.Values(**deep).to_json_string())
    assert saved["many"] == [{"x": 0.5}, 3, "p", [[0, 1]]]
    with pytest.raises(TypeError, match="Values: the config's 'betas' cannot be saved"):
        OURS.Values(betas=torch.zeros(2)).to_json_string()


def test_repr_shows_the_config() -> None:
    made = OURS.Plain()
    assert repr(made) == f"Plain {made.to_json_string()}"


def test_former_ways_warn(tmp_path: Path) -> None:
    OURS.Plain(a=6).save_config(tmp_path)
    for cls in (OURS.Plain, THEIRS.Plain):
        with pytest.warns(FutureWarning, match="load_config"):
            assert cls.get_config_dict(tmp_path)["a"] == 6
        with pytest.warns(FutureWarning, match="from_config"):
            made, unused = cls.from_config(str(tmp_path), return_unused_kwargs=True, b=1)
        assert (made.config["a"], made.config["b"]) == (6, 1)
        assert unused["_class_name"] == "Plain"
        with pytest.raises(ValueError, match="config"):
            cls.from_config()


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    OURS.Plain(a=1).save_config(tmp_path)
    (tmp_path / "config.json").chmod(0o600)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(TypeError, match="'d' cannot be saved"):
        OURS.Plain(d={1, 2}).save_config(tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    mask = os.umask(0o027)
    try:
        OURS.Plain(a=2).save_config(tmp_path)
        OURS.Plain(a=2).to_json_file(tmp_path / "other.json")
    finally:
        os.umask(mask)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "other.json"}
    # A replaced file keeps its mode; a new one has the mode of the umask.
    for path in tmp_path.iterdir():
        mode = 0o600 if path.name == "config.json" else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert OURS.Plain.load_config(path)["a"] == 2


BAD_FILES = {
    "syntax": (b'{\n "a": 1,\n "b": }', r"is not JSON: .*line 3 column 7"),
    "empty": (b"", r"is not JSON: .*line 1 column 1"),
    "html": (b"<!doctype html>", r"is not JSON: .*char 0"),
    "latin": (b'{"a": "\xe9"}', r"is not JSON: .*position 7"),
    "deep": (b"[" * 100_000, r"is not JSON"),
    "list": (b"[1]", r"has a list"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", r"git lfs pull"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_files_that_are_no_configs(kind: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[kind]
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(wl.CheckpointError, match=message) as caught:
        OURS.Plain.load_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_places_where_no_config_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        OURS.Plain.load_config(tmp_path)
    assert isinstance(missing.value, wl.ReadError)
    assert missing.value.filename == str(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError) as missing:
        OURS.Plain.load_config(tmp_path, subfolder="unet")
    assert missing.value.filename == str(tmp_path / "unet" / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder, not a config file"):
        OURS.Plain.load_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        OURS.Plain.load_config(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(wl.ArgumentError, match="is a file"):
        OURS.Plain().save_config(tmp_path / "file")


def test_a_class_without_a_config_name() -> None:
    class Nameless(ours.ConfigMixin):
        @ours.register_to_config
        def __init__(self, a: int = 1) -> None:
            pass

    with pytest.raises(NotImplementedError, match="config_name"):
        Nameless()
    with pytest.raises(ValueError, match="config_name"):
        Nameless.load_config("anything")


def test_a_class_without_a_name_of_its_file(tmp_path: Path) -> None:
    class Bare(ours.ConfigMixin):
        pass

    bare = Bare()
    for call in (bare.save_config, Bare.load_config):
        with pytest.raises(wl.ArgumentError, match="must define config_name"):
            call(tmp_path)
    assert list(tmp_path.iterdir()) == []
