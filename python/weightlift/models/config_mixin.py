"""``ConfigMixin``: saves the constructor's arguments as JSON, and loads them."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from weightlift.checkpoint.hub import HubArguments, commit_of, download
from weightlift.core.atomic import atomic_file, make_folder
from weightlift.core.errors import ArgumentError, CheckpointError, ReadError, read_error
from weightlift.core.paths import path_text

__all__ = ["ConfigMixin", "FrozenDict", "register_to_config"]

_log = logging.getLogger("weightlift")
# Entries of a config that are only for this process.
_NOT_SAVED = ("_ignore_files", "_use_default_values", "_pre_quantization_dtype")

_Init = TypeVar("_Init", bound=Callable[..., None])


class FrozenDict(dict[str, Any]):
    """A config. Its values are also attributes; only ``register_to_config`` changes it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            # With both, Python's traceback names the nearest.
            raise AttributeError(f"the config has no {name!r}", name=name, obj=self) from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "a config is frozen: change it with register_to_config(...), or change a copy, "
            "dict(config)"
        )

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        # The default fills an empty one item by item.
        return type(self), (dict(self),)


class ConfigMixin:
    """Keeps the constructor's arguments of an object, to save and restore it.

    Decorate the constructor with ``register_to_config``. Files and behaviour are those of
    diffusers' class of the same name; each loads the other's files.

    Attributes:
        config_name: the name of the JSON file, such as ``"config.json"``.
        ignore_for_config: constructor arguments that are not saved.
        has_compatibles: whether this class accepts the configs of other classes (see
            ``_get_compatibles``); their additional entries are kept, without a warning.
        _deprecated_kwargs: arguments that the constructor still accepts in its ``**kwargs``.
    """

    config_name: ClassVar[str | None] = None
    ignore_for_config: ClassVar[list[str]] = []
    has_compatibles: ClassVar[bool] = False
    _deprecated_kwargs: ClassVar[list[str]] = []
    _auto_class: ClassVar[str | None] = None

    _internal_dict: FrozenDict

    @classmethod
    def _get_compatibles(cls) -> Iterable[type]:
        return ()

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Makes saved configs name this class and its module in ``auto_map``.

        Raises:
            ArgumentError: ``auto_class`` is not ``"AutoModel"``.
        """
        name = auto_class if isinstance(auto_class, str) else auto_class.__name__
        if name != "AutoModel":
            raise ArgumentError(f"auto_class is {name!r}; it must be 'AutoModel'")
        cls._auto_class = name

    @property
    def config(self) -> FrozenDict:
        return self._internal_dict

    def register_to_config(self, **kwargs: Any) -> None:
        """Adds values to the config, or replaces them."""
        if self.config_name is None:
            raise NotImplementedError(f"{type(self)} must define config_name, as 'config.json'")
        kwargs.pop("kwargs", None)
        # Bypasses __setattr__: Flax modules are frozen after construction.
        config = FrozenDict({**self.__dict__.get("_internal_dict", {}), **kwargs})
        self.__dict__["_internal_dict"] = config

    def __getattr__(self, name: str) -> Any:
        found, value = self._deprecated_attribute(name)
        if found:
            return value
        other = getattr(super(), "__getattr__", None)  # of torch.nn.Module, if it comes later
        if other is not None:
            return other(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _deprecated_attribute(self, name: str) -> tuple[bool, Any]:
        """Whether the config has the value of a deprecated attribute, and the value.

        For the ``__getattr__`` of this class and of classes before it in the MRO.
        """
        config = self.__dict__.get("_internal_dict", ())
        if name not in config:
            return False, None
        warnings.warn(
            f"{type(self).__name__}.{name} is deprecated for values of the config: use "
            f"{type(self).__name__}.config.{name}",
            FutureWarning,
            stacklevel=3,
        )
        return True, config[name]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def to_json_string(self) -> str:
        """The config as JSON text.

        Raises:
            TypeError: JSON cannot represent a value.
        """
        from weightlift.core.version import __version__

        config = dict(self.__dict__.get("_internal_dict", {}))
        for name in _NOT_SAVED:
            config.pop(name, None)
        # diffusers' version stays: diffusers reads the other values by it.
        config |= {"_class_name": type(self).__name__, "_weightlift_version": __version__}
        if self._auto_class is not None:
            module = type(self).__module__.rpartition(".")[2]
            here = {self._auto_class: f"{module}.{type(self).__name__}"}
            config["auto_map"] = {**config.get("auto_map", {}), **here}
        try:
            return _dump(config) + "\n"
        except TypeError as error:
            name = next(name for name, value in config.items() if not _has_json_form(value))
            raise TypeError(
                f"{type(self).__name__}: the config's {name!r} cannot be saved: {error}; give it "
                "as plain values, or name it in ignore_for_config"
            ) from None

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Writes the config to a file, atomically.

        Args:
            json_file_path: the file.
        """
        text = self.to_json_string()
        with atomic_file(json_file_path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def save_config(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves the config into a folder, which is made if missing.

        Args:
            save_directory: the folder.
            push_to_hub: upload the folder; ``kwargs`` are those of ``push_folder``.

        Raises:
            ArgumentError: ``save_directory`` is a file.
            TypeError: JSON cannot represent a value.
        """
        if self.config_name is None:
            raise ArgumentError(f"{type(self)} must define config_name, as 'config.json'")
        folder = Path(path_text(save_directory))
        if folder.is_file():
            raise ArgumentError(f"{folder} is a file: give a folder to save the config in")
        make_folder(folder)
        self.to_json_file(folder / self.config_name)
        _log.info("%s: config saved", folder / self.config_name)
        if push_to_hub:
            from weightlift.models.hub_mixin import push_folder

            push_folder(self, folder, **kwargs)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Makes an object from a config.

        Args:
            config: the config of this class, or of a compatible class.
            return_unused_kwargs: also return the values that the constructor does not take.
            kwargs: values that replace the config's; ``dtype`` goes to the constructor unchanged.

        Returns:
            The object, or the object and the unused values of config and ``kwargs``.
        """
        if "pretrained_model_name_or_path" in kwargs:
            config = kwargs.pop("pretrained_model_name_or_path")
        if config is None:
            raise ArgumentError(
                f"{cls.__name__}.from_config needs a config, as load_config returns"
            )
        values = config
        if not isinstance(values, Mapping):
            warnings.warn(
                f"{cls.__name__}.from_config with a path is deprecated: use {cls.__name__}."
                f"from_config({cls.__name__}.load_config(path)), or from_pretrained",
                FutureWarning,
                stacklevel=2,
            )
            values, kwargs = cls.load_config(values, return_unused_kwargs=True, **kwargs)
        arguments, unused, hidden = cls.extract_init_dict(values, **kwargs)
        parameters = inspect.signature(cls.__init__).parameters.values()
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        for name in ("dtype", *cls._deprecated_kwargs):
            # transformers' configs have a dtype that is no constructor argument.
            if name in unused and (name in kwargs or takes_any):
                arguments[name] = unused.pop(name)
        made = cls(**arguments)
        if "_class_name" in hidden:
            hidden["_class_name"] = cls.__name__
        # Entries of a compatible class are kept for the next save.
        made.register_to_config(**hidden)
        return (made, {**unused, **hidden}) if return_unused_kwargs else made

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Splits a config and overriding values by the constructor's arguments.

        Args:
            config_dict: the config.
            kwargs: the overriding values.

        Returns:
            The constructor's arguments; the unused values, with the rest of ``kwargs``; and the
            entries of the config that are not arguments.
        """
        omitted = {*config_dict.get("_use_default_values", ()), "_use_default_values"}
        config = {name: value for name, value in config_dict.items() if name not in omitted}
        own = _argument_names(cls)
        expected = own - set(cls.ignore_for_config)
        class_name = config.get("_class_name", cls.__name__)
        if not isinstance(class_name, (str, list, tuple)):
            raise CheckpointError(f"the config's _class_name is {class_name!r}; it must be a name")

        public = {
            name: value
            for name, value in config.items()
            if not name.startswith("_") and name != "quantization_config"
        }
        arguments = {
            name: kwargs.pop(name) if name in kwargs else public[name]
            for name in sorted(expected)
            if name in kwargs or name in public
        }
        hidden = {name: value for name, value in config.items() if name not in arguments}
        others: set[str] = set()
        if cls.has_compatibles:
            others = others.union(*map(_argument_names, cls._get_compatibles())) - own
        unexpected = {
            name: value
            for name, value in public.items()
            if name not in arguments and name not in others
        }
        if unexpected:
            _log.warning(
                "%s: ignored unexpected entries %s of the config; check that %s is the config of "
                "this class",
                cls.__name__,
                unexpected,
                cls.config_name,
            )
        if missing := expected - arguments.keys():
            _log.info("%s: the config has no %s: defaults are used", cls.__name__, sorted(missing))
        return arguments, {**unexpected, **kwargs}, hidden

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | Mapping[str, Any],
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Reads a config.

        Args:
            pretrained_model_name_or_path: a folder, a file, the id of a Hub repository, or a config
                that was already read.
            return_unused_kwargs: also return the rest of ``kwargs``.
            return_commit_hash: also return the file's commit; ``None`` for a file outside a Hub
                cache.
            kwargs: the arguments of ``weightlift.checkpoint.hub.HubArguments``.

        Returns:
            The config, or a tuple of the config and the requested values.

        Raises:
            ReadError: the file does not exist, or the Hub refuses it (also an ``OSError``).
            CheckpointError: the file is not a JSON object (also a ``ValueError``).
        """
        hub = HubArguments.pop_from(kwargs)
        config, commit = cls._read_config(pretrained_model_name_or_path, hub)
        parts: list[Any] = [config]
        if return_unused_kwargs:
            parts.append(kwargs)
        if return_commit_hash:
            parts.append(commit)
        return tuple(parts) if len(parts) > 1 else config

    @classmethod
    def _read_config(
        cls, place: str | os.PathLike[str] | Mapping[str, Any], hub: HubArguments
    ) -> tuple[dict[str, Any], str | None]:
        """The config and its commit."""
        if cls.config_name is None:
            raise ArgumentError(f"{cls} must define config_name, as 'config.json'")
        if isinstance(place, Mapping):
            return dict(place), None
        name = path_text(place)
        path = Path(name)
        if path.is_dir():
            places = [path / (hub.subfolder or ""), path]
            found = [folder / cls.config_name for folder in places]
            file = next((candidate for candidate in found if candidate.is_file()), None)
            if file is None:
                raise _missing_config(found[0])
        elif path.is_file():
            file = path
        else:
            try:
                file = download(name, cls.config_name, hub)
            except ReadError as error:
                if error.code != "not_cached":
                    raise
                text = "there is no such file or folder, and as the id of a repository: "
                raise read_error(error.code, f"{text}{error.strerror}", name) from None
        return _read_json(file), commit_of(file)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """Deprecated: use ``load_config``."""
        warnings.warn(
            f"{cls.__name__}.get_config_dict is deprecated: use {cls.__name__}.load_config",
            FutureWarning,
            stacklevel=2,
        )
        return cls.load_config(*args, **kwargs)


def register_to_config(init: _Init) -> _Init:
    """Decorates the constructor of a ``ConfigMixin``: its arguments become the config.

    Arguments that begin with an underscore go only to the config; arguments in
    ``ignore_for_config`` go only to the constructor.

    Raises:
        RuntimeError: the class does not derive from ``ConfigMixin`` (raised by the constructor).
        TypeError: ``init`` is a class, or no function.
    """
    if isinstance(init, type) or not callable(init):
        given = f"the class {init.__name__}" if isinstance(init, type) else repr(init)
        raise TypeError(f"@register_to_config stands above __init__, not {given}")
    parameters = {
        name: parameter
        for name, parameter in list(inspect.signature(init).parameters.items())[1:]
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    positional = [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]

    @functools.wraps(init)
    def registered(self: ConfigMixin, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self, ConfigMixin):
            raise RuntimeError(
                f"@register_to_config is for classes that derive from ConfigMixin, and "
                f"{type(self).__name__} does not"
            )
        config = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("_")}
        values = {**dict(zip(positional, args, strict=False)), **kwargs}
        defaults = []
        for name, parameter in parameters.items():
            if name in self.ignore_for_config:
                continue
            if name in values:
                config[name] = values[name]
            elif parameter.default is not parameter.empty:
                config[name] = parameter.default
                defaults.append(name)
        if defaults:
            # A compatible class made from this config uses its own defaults for them.
            config["_use_default_values"] = defaults
        self.register_to_config(**config)
        init(self, *args, **kwargs)

    return registered  # type: ignore[return-value]


def _argument_names(cls: type) -> set[str]:
    _, *parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {parameter.name for parameter in parameters if parameter.kind not in variable}


def _dump(value: Any) -> str:
    return json.dumps(value, default=_plain, indent=2, sort_keys=True)


def _has_json_form(value: Any) -> bool:
    try:
        return bool(_dump(value))
    except TypeError:
        return False


def _plain(value: Any) -> Any:
    """A JSON value for a value that JSON cannot represent."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    if callable(getattr(value, "to_dict", None)):
        return value.to_dict()
    raise TypeError(f"JSON cannot represent {type(value)}")


def _missing_config(path: Path) -> ReadError:
    if path.is_dir():
        return read_error("is_directory", "is a folder, not a config file", str(path))
    missing = "the folder has no config" if path.parent.is_dir() else "there is no such subfolder"
    return read_error("not_found", missing, str(path))


def _read_json(path: Path) -> dict[str, Any]:
    text = path.read_bytes()
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a git-lfs pointer: fetch the file with `git lfs pull`")
    try:
        config = json.loads(text.decode())
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path}: is not a config: it has a {type(config).__name__}, not an object"
        )
    return config
