"""``FlaxModelMixin``, the base class of Linen models with ``from_pretrained``."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp

from weightlift.checkpoint.hub import HubArguments
from weightlift.core.errors import ArgumentError
from weightlift.flax.params import (
    FLAX_NAMES,
    find_params,
    flattened,
    leaf_name,
    nested,
    save_params,
)
from weightlift.models.config_mixin import ConfigMixin
from weightlift.models.hub_mixin import PushToHubMixin, create_repository

__all__ = ["FlaxModelMixin", "flax_register_to_config", "register_to_config"]

_log = logging.getLogger("weightlift")
_Class = TypeVar("_Class", bound=type)

# Fields of the computation and of the module tree, which are not configuration.
_NOT_CONFIG = ("parent", "name", "dtype")


class FlaxModelMixin(PushToHubMixin):
    """A Linen module with ``from_pretrained`` and ``save_pretrained``. A model is a class
    ``Model(flax.linen.Module, FlaxModelMixin, ConfigMixin)``, decorated with
    ``register_to_config``; as usual in Linen, its parameters are a separate tree.

    Attributes:
        config_name: the name of the configuration's file.
    """

    config_name: ClassVar[str | None] = "config.json"
    _automatically_saved_args = ["_weightlift_version", "_class_name", "_name_or_path"]  # noqa: RUF012

    def init_weights(self, rng: jax.Array) -> dict[str, Any]:
        """New parameters. The model defines it, with inputs of its own:
        ``return self.init(rng, inputs)["params"]``."""
        raise NotImplementedError(f"{type(self).__name__} must define init_weights(rng)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        dtype: Any = jnp.float32,
        *model_args: Any,
        config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        from_pt: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Makes the model of a configuration and loads the parameters beside it.

        Args:
            pretrained_model_name_or_path: a folder, a file of weights, or the id of a repository.
            dtype: the dtype of the computation; parameters keep the file's, see ``to_bf16``.
            model_args: values for the model's fields, in their order.
            config: replaces the configuration beside the weights: a loaded one, or its path.
            from_pt: the weights are those of the torch model, in any form that
                ``weightlift.open_checkpoint`` reads.
            cache_dir, force_download, proxies, local_files_only, token, revision, subfolder,
                mirror: see ``weightlift.checkpoint.hub.HubArguments``.
            kwargs: fields of the model, which override the configuration's.

        Returns:
            The model, and its parameters on the CPU. Those that the file lacks are initialized by
            ``init_weights`` and named in a warning.

        Raises:
            CheckpointError: there are no such weights, shapes do not match, or no name matches; the
                text names the leaves.
            ArgumentError: an argument is unknown.
            FormatError: a file breaks its format, or has a dtype that jax lacks.
            ReadError: a file cannot be read.
        """
        hub = HubArguments.pop_from(kwargs)
        fields = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
        values = _overrides(cls, fields, model_args, kwargs)
        path = os.fspath(pretrained_model_name_or_path)
        pinned = hub if Path(path).exists() else hub.pinned(path)
        if not isinstance(config, Mapping):
            beside = str(Path(path).parent) if Path(path).is_file() else path
            of = pinned if config is None else hub
            place = beside if config is None else config
            config = cls.load_config(place, **dataclasses.asdict(of))  # type: ignore[attr-defined]
        if "dtype" in fields:
            values["dtype"] = dtype
        model = cls.from_config(config, **values)  # type: ignore[attr-defined]

        like = jax.eval_shape(model.init_weights, jax.random.PRNGKey(0))
        found = find_params(path, like, pinned, from_pt=from_pt)
        leaves = dict(found.leaves)
        if found.unexpected:
            _log.warning(
                "%s: %s has no place for these weights, they were not used: %s",
                found.place,
                cls.__name__,
                ", ".join(found.unexpected),
            )
        if found.missing:
            _log.warning(
                "%s does not hold these weights of %s, which are newly initialized: %s. Train the "
                "model before you use its predictions",
                found.place,
                cls.__name__,
                ", ".join(map(leaf_name, found.missing)),
            )

            def fresh(rng: jax.Array) -> list[jax.Array]:
                made = flattened(model.init_weights(rng))
                return [made[keys] for keys in found.missing]

            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                # The compiler removes parameters that are not needed.
                made = jax.jit(fresh)(jax.random.PRNGKey(0))
            leaves.update(zip(found.missing, made, strict=True))
        model.register_to_config(_name_or_path=path)
        return model, nested(leaves)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        params: Any,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the configuration and ``diffusion_flax_model.msgpack``, each atomically.

        Args:
            save_directory: the folder, made if missing.
            params: the tree of parameters.
            is_main_process: whether to save; other processes of a distributed run pass ``False``.
            push_to_hub: upload the folder; ``kwargs`` as in ``weightlift.ModelMixin``.

        Raises:
            ArgumentError: ``save_directory`` is a file, or a leaf cannot be saved.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ArgumentError(f"{folder} is a file: give a folder to save the model in")
        folder.mkdir(parents=True, exist_ok=True)
        if not is_main_process:
            return
        self.to_json_string()  # type: ignore[attr-defined]  # may refuse, and nothing is written yet
        save_params(params, folder / FLAX_NAMES[0])
        self.save_config(folder)  # type: ignore[attr-defined]
        if push_to_hub:
            self._push_folder(folder, kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str | os.PathLike[str],
        params: Any,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
        *,
        tags: str | Sequence[str] | None = None,
    ) -> str:
        """Saves into a temporary folder and uploads it.

        Args:
            params: the tree of parameters; other arguments as in ``weightlift.PushToHubMixin``.

        Returns:
            The URL of the commit.
        """
        name = create_repository(repo_id, private, token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, params)
            arguments = {
                "repo_id": name,
                "commit_message": commit_message,
                "private": private,
                "token": token,
                "create_pr": create_pr,
                "subfolder": subfolder,
                "tags": tags,
            }
            return self._push_folder(folder, arguments)

    def to_bf16(self, params: Any, mask: Any = None) -> Any:
        """Casts floating-point parameters to bfloat16; with ``mask`` only those with ``True``.

        Args:
            params: the tree of parameters, which stays unchanged.
            mask: a tree of booleans of the same structure.

        Raises:
            ArgumentError: ``mask`` has other leaves than ``params``.
        """
        return _cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Any, mask: Any = None) -> Any:
        """As ``to_bf16``, to float16."""
        return _cast(params, jnp.float16, mask)

    def to_fp32(self, params: Any, mask: Any = None) -> Any:
        """As ``to_bf16``, to float32."""
        return _cast(params, jnp.float32, mask)


def register_to_config(cls: _Class) -> _Class:
    """Decorates a Linen module that derives from ``ConfigMixin``: its fields become the config,
    except ``dtype``, ``name``, ``parent`` and the fields in ``ignore_for_config``.

    Lists in the JSON become tuples again, because jax needs hashable modules.
    """
    if not issubclass(cls, ConfigMixin):
        raise RuntimeError(
            f"register_to_config is for classes that derive from ConfigMixin, and {cls.__name__} "
            "does not"
        )
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    original: Callable[..., None] = cls.__init__
    left_out = {*_NOT_CONFIG, *cls.ignore_for_config}

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        values = dict(zip(fields, args, strict=False))
        for name, field in fields.items():
            if name in values or name in kwargs:
                continue
            if field.default_factory is not dataclasses.MISSING:
                kwargs[name] = field.default_factory()
        values = {name: _hashable(value) for name, value in {**values, **kwargs}.items()}
        rest = args[len(fields) :]  # for the constructor to refuse
        config = {name: value for name, value in values.items() if name not in left_out}
        defaults = {
            name: field.default
            for name, field in fields.items()
            if name not in values
            and name not in left_out
            and field.default is not dataclasses.MISSING
        }
        if defaults:
            config |= {**defaults, "_use_default_values": list(defaults)}
        self.register_to_config(**config)
        original(self, *rest, **values)

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


flax_register_to_config = register_to_config


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _overrides(
    cls: type, fields: list[str], model_args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``from_pretrained`` got for the model's fields."""
    taken = [name for name in fields if name not in _NOT_CONFIG]
    if len(model_args) > len(taken):
        raise ArgumentError(f"{cls.__name__} has {len(taken)} fields, and {len(model_args)} given")
    values = dict(zip(taken, model_args, strict=False))
    for name, value in kwargs.items():
        if name not in fields:
            near = difflib.get_close_matches(
                name, [*taken, "config", "from_pt", *HubArguments.__dataclass_fields__], n=1
            )
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(
                f"{cls.__name__}.from_pretrained has no argument {name!r}, nor has {cls.__name__} "
                f"a field of that name{hint}"
            )
        if name in values:
            raise ArgumentError(f"{name!r} is given by its position and by its name")
        values[name] = value
    return values


def _cast(params: Any, dtype: Any, mask: Any) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    if mask is None:
        return jax.tree.map(cast, params)
    leaves, chosen = flattened(params), flattened(mask)
    if other := leaves.keys() ^ chosen.keys():
        raise ArgumentError(
            "mask must have the leaves of params; only one of them has "
            + ", ".join(sorted(map(leaf_name, other)))
        )
    return nested({keys: cast(leaf) if chosen[keys] else leaf for keys, leaf in leaves.items()})
