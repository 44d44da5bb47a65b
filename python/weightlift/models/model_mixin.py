"""The base class of models that load and save themselves."""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from weightlift import dtypes, garbage
from weightlift.checkpoint import Checkpoint, open_checkpoint
from weightlift.errors import ArgumentError, CheckpointError
from weightlift.hub import HubArguments
from weightlift.matching import listed, place_of
from weightlift.models.building import Builder
from weightlift.models.config_mixin import ConfigMixin
from weightlift.models.hub_mixin import PushToHubMixin
from weightlift.modules import Early, fill, move
from weightlift.offload import whole_state_dict
from weightlift.placement import parse_device, single_entry
from weightlift.report import LoadReport

if TYPE_CHECKING:
    from weightlift.models.quantization import Quantizer

__all__ = ["ModelMixin", "get_parameter_device", "get_parameter_dtype"]

_log = logging.getLogger("weightlift")
_Self = TypeVar("_Self", bound="ModelMixin")

_STEM = "diffusion_pytorch_model"
_FLAX_NAMES = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
# Arguments of from_pretrained with their defaults, apart from those of the Hub.
_ARGUMENTS: dict[str, Any] = {
    "torch_dtype": None,
    "dtype": None,
    "device_map": None,
    "device_mesh": None,
    "tp_plan": None,
    "max_memory": None,
    "offload_folder": None,
    "offload_state_dict": None,
    "low_cpu_mem_usage": True,
    "ignore_mismatched_sizes": False,
    "output_loading_info": False,
    "variant": None,
    "use_safetensors": None,
    "from_flax": False,
    "quantization_config": None,
    "load_in_8bit": False,
    "load_in_4bit": False,
    "disable_mmap": False,
    "mode": "auto",
    "pin_memory": False,
    "memory_format": None,
    "verify": False,
    "progress": False,
}
# Of these, those that diffusers does not have: a class may have arguments of these names.
_OURS = (
    "device_mesh",
    "tp_plan",
    "mode",
    "pin_memory",
    "memory_format",
    "verify",
    "progress",
)


def get_parameter_device(module: torch.nn.Module) -> torch.device:
    """The device of the first parameter, buffer or tensor attribute.

    Raises:
        StopIteration: the module has none.
    """
    tensors = itertools.chain(module.parameters(), module.buffers(), _tensor_attributes(module))
    found: torch.Tensor = next(tensors)
    return found.device


def get_parameter_dtype(module: torch.nn.Module) -> torch.dtype | None:
    """The dtype of the first floating-point parameter that may be cast, else buffer, else tensor
    attribute; without any of floating point, the dtype of the last one."""
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    last = None
    for name, parameter in module.named_parameters():
        last = parameter.dtype
        if any(part in kept for part in name.split(".")):
            continue
        if parameter.is_floating_point():
            return parameter.dtype
    for buffer in module.buffers():
        last = buffer.dtype
        if buffer.is_floating_point():
            return buffer.dtype
    if last is not None:
        return last
    for tensor in _tensor_attributes(module):
        last = tensor.dtype
        if tensor.is_floating_point():
            return tensor.dtype
    return last


def _tensor_attributes(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    for child in module.modules():
        yield from (value for value in vars(child).values() if isinstance(value, torch.Tensor))


class ModelMixin(torch.nn.Module, PushToHubMixin):
    """A module with ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``; a model derives
    from it and from ``ConfigMixin``.

    Attributes:
        config_name: the name of the configuration's file.
        _supports_gradient_checkpointing: whether the class has a ``gradient_checkpointing`` flag.
        _keys_to_ignore_on_load_unexpected: patterns of names that may be in a checkpoint.
        _no_split_modules: classes of modules that stay on one device.
        _keep_in_fp32_modules: components of names whose tensors stay in float32.
        _skip_keys: arguments of ``forward`` that accelerate's hooks do not move.
    """

    config_name = "config.json"
    _automatically_saved_args = ["_weightlift_version", "_class_name", "_name_or_path"]  # noqa: RUF012
    _supports_gradient_checkpointing = False
    _keys_to_ignore_on_load_unexpected: list[str] | None = None
    _no_split_modules: list[str] | None = None
    _keep_in_fp32_modules: list[str] | None = None
    _skip_keys: list[str] | None = None
    # No __init__ that sets it: put before a library's model class, it would hide the signature of
    # that class's, which tells what of the config is the constructor's.
    _gradient_checkpointing_func: Callable[..., Any] | None = None

    def __getattr__(self, name: str) -> Any:
        try:  # first, for layers that are named as an argument is
            return torch.nn.Module.__getattr__(self, name)
        except AttributeError:
            if isinstance(self, ConfigMixin):
                found, value = self._deprecated_attribute(name)
                if found:
                    return value
            raise

    @classmethod
    def from_pretrained(
        cls: type[_Self],
        pretrained_model_name_or_path: str | os.PathLike[str],
        **kwargs: Any,
    ) -> _Self:
        """Builds the model of a configuration and fills it with the weights beside it.

        Args:
            pretrained_model_name_or_path: a folder, a ``.dduf`` file, or the id of a repository.
            cache_dir, force_download, local_files_only, token, revision, subfolder, mirror: as
                ``open_checkpoint`` has them.
            dtype, torch_dtype: of the floating-point tensors: a ``torch.dtype`` or its name;
                ``"auto"`` for the checkpoint's; ``None`` for those of the model as it is built.
            device_map, max_memory, offload_folder: as ``load_into`` has them.
            device_mesh, tp_plan: cut the model for tensor parallelism, and read this rank's parts
                alone; all ranks of the 1-D mesh (all there are, by default) call it together.
                ``tp_plan``: module path, with ``*`` -> ``torch.distributed.tensor.parallel``
                style; the model's ``_tp_plan`` by default.
            offload_state_dict: taken; there is nothing left that it could save.
            low_cpu_mem_usage: ``False`` builds the module for real before it is filled.
            ignore_mismatched_sizes: initialise what has another shape in the checkpoint.
            output_loading_info: return ``(model, {"missing_keys", "unexpected_keys",
                "mismatched_keys", "error_msgs"})``.
            variant, use_safetensors: as ``open_checkpoint`` has them.
            from_flax: read ``diffusion_flax_model.msgpack`` or ``flax_model.msgpack``.
            quantization_config, load_in_8bit, load_in_4bit: quantize while loading.
            disable_mmap: the same as ``mode="read"``.
            mode, pin_memory, memory_format, verify, progress: as ``load_into`` has them.
            kwargs: arguments of the class's ``__init__``, which override the configuration's; also
                those that are called as one of the line above.

        Returns:
            The model, in evaluation mode. Tensors that the checkpoint lacks are initialised by the
            model's own ``__init__`` and named in a warning.

        Raises:
            CheckpointError: no such checkpoint, shapes that do not match, a model that does not
                fit the devices.
            ArgumentError: an argument that nobody knows, or that contradicts another.
            FormatError, ReadError, DeviceError, OutOfMemoryError: as ``load_file``.
        """
        own = inspect.signature(cls.__init__).parameters
        given = {
            name: default if name in _OURS and name in own else kwargs.pop(name, default)
            for name, default in _ARGUMENTS.items()
        }
        if given["device_mesh"] is None and given["tp_plan"] is None:
            return cls._from_pretrained(pretrained_model_name_or_path, given, kwargs, fill)
        for other in ("device_map", "quantization_config", "load_in_8bit", "load_in_4bit"):
            if given[other]:
                raise ArgumentError(f"{other}= goes not together with device_mesh= and tp_plan=")
        if not given["low_cpu_mem_usage"]:
            raise ArgumentError("device_mesh= and tp_plan= need low_cpu_mem_usage=True")
        from weightlift.distributed import sharding

        with sharding(fill, given["device_mesh"], given["tp_plan"]) as fill_parts:
            return cls._from_pretrained(pretrained_model_name_or_path, given, kwargs, fill_parts)

    @classmethod
    def _from_pretrained(
        cls: type[_Self],
        pretrained_model_name_or_path: str | os.PathLike[str],
        given: dict[str, Any],
        kwargs: dict[str, Any],
        fill: Callable[..., LoadReport],
    ) -> _Self:
        hub = HubArguments.pop_from(kwargs)
        _refuse_unknown(cls, kwargs)
        path = os.fspath(pretrained_model_name_or_path)
        dtype = _parse_dtype(given["dtype"], given["torch_dtype"])
        device_map = given["device_map"]
        if device_map is not None and not given["low_cpu_mem_usage"]:
            raise ArgumentError(
                f"device_map={device_map!r} needs low_cpu_mem_usage=True: built for real, the "
                "model would be on the CPU first"
            )
        mode = "read" if given["disable_mmap"] and given["mode"] == "auto" else given["mode"]
        if not os.path.exists(path):  # noqa: PTH110
            hub = hub.pinned(path)

        config, overrides = _load_config(cls, path, hub, kwargs)
        quantizer = _quantizer(given, config)
        if given["from_flax"]:
            checkpoint = None
        else:
            checkpoint = open_checkpoint(
                path,
                subfolder=hub.subfolder,
                variant=given["variant"],
                use_safetensors=given["use_safetensors"],
                revision=hub.revision,
                token=hub.token,
                cache_dir=hub.cache_dir,
                local_files_only=hub.local_files_only,
                force_download=hub.force_download,
                mirror=hub.mirror,
            )
        loading = {
            "mode": mode,
            "pin_memory": given["pin_memory"],
            "verify": given["verify"],
            "progress": given["progress"],
        }
        options = {
            **loading,
            "device_map": device_map,
            "max_memory": given["max_memory"],
            "dtype": dtype,
            "ignore_mismatched_sizes": given["ignore_mismatched_sizes"],
            "ignore_unexpected": _matcher(cls._keys_to_ignore_on_load_unexpected),
            "memory_format": given["memory_format"],
        }
        builder: Builder[_Self] = Builder(
            functools.partial(cls.from_config, config, **overrides),  # type: ignore[attr-defined]
            _built_dtype(dtype, checkpoint),
        )
        early = None
        whole = given["device_mesh"] is None and given["tp_plan"] is None
        if checkpoint is not None and quantizer is None and given["low_cpu_mem_usage"] and whole:
            early = _begin(cls, checkpoint, device_map, dtype, loading)
        try:
            with garbage.paused():
                model = builder.build(empty=given["low_cpu_mem_usage"])
                if checkpoint is None:
                    checkpoint = _open_flax(path, hub, model)
                rename = _former_attention_names(model, checkpoint)
                if rename is not None:
                    checkpoint = checkpoint.renamed(rename)
                _refuse_another_model(model, checkpoint)
                initialize = functools.partial(builder.initialized, model)
                if quantizer is not None:
                    report = quantizer.load(model, checkpoint, initialize=initialize, **options)
                else:
                    report = fill(
                        model,
                        checkpoint,
                        offload=given["offload_folder"] is not None,
                        strict=False,
                        initialize=initialize,
                        early=early,
                        **options,
                    )
        except BaseException:
            if early is not None:
                early.loading.cancel()
            raise
        _warn_of_keys(cls, path, report)
        if device_map is not None and "hf_device_map" not in vars(model):
            # As accelerate's dispatch_model has it, which was not needed for one device.
            first = next(itertools.chain(model.parameters(), model.buffers()), None)
            vars(model)["hf_device_map"] = {} if first is None else {"": first.device}
        model.register_to_config(_name_or_path=path)
        _evaluate(model)
        if given["output_loading_info"]:
            return model, {  # type: ignore[return-value]
                "missing_keys": report.missing_keys,
                "unexpected_keys": report.unexpected_keys,
                "mismatched_keys": report.mismatched_keys,
                "error_msgs": report.error_msgs,
            }
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves configuration and weights; killed anywhere, the folder holds the old checkpoint,
        the new one, or one that is refused, never a mixture (see ``models/saving.py``).

        Args:
            save_directory: the folder; made if it is not there.
            is_main_process: whether to save at all; the others of a distributed run pass ``False``.
            save_function: called with ``(tensors, path)`` in the place of the usual writer.
            safe_serialization: safetensors, or ``.bin``.
            variant: such as ``"fp16"``, for ``diffusion_pytorch_model.fp16.safetensors``.
            max_shard_size: bytes, or text such as ``"5GB"`` (decimal).
            push_to_hub: upload the folder; ``repo_id``, ``commit_message``, ``private``, ``token``
                and ``create_pr`` in ``kwargs``; the repository is named after the folder by
                default.
        """
        from weightlift.models.saving import save_weights

        folder = Path(save_directory)
        if folder.is_file():
            raise ArgumentError(f"{folder} is a file: name a folder to save the model in")
        folder.mkdir(parents=True, exist_ok=True)
        if is_main_process:
            config = self.to_json_string().encode()
            state, metadata = self._saved_state(safe_serialization)
            save_weights(
                state,
                folder,
                safe_serialization=safe_serialization,
                variant=variant,
                max_shard_size=max_shard_size,
                save_function=save_function,
                metadata=metadata,
                companions={self.config_name: config},
            )
            if push_to_hub:
                self._push_folder(folder, kwargs)

    def _saved_state(
        self, safe_serialization: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors to save, and what files tell about them."""
        state = whole_state_dict(self)
        method = getattr(self, "quantization_method", None)
        if str(getattr(method, "value", method)) != "torchao":
            return state, {}
        if not safe_serialization:
            raise ArgumentError("what torchao quantized is saved as safetensors alone")
        from weightlift.models.quantization import flattened

        return flattened(state)

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return get_parameter_device(self)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the first floating-point parameter that may be cast."""
        return get_parameter_dtype(self)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters hold.

        Args:
            only_trainable: leave out those without ``requires_grad``.
            exclude_embeddings: leave out the weights of ``torch.nn.Embedding``.
        """
        left_out = set()
        if exclude_embeddings:
            left_out = {
                f"{name}.weight" if name else "weight"
                for name, module in self.named_modules()
                if isinstance(module, torch.nn.Embedding)
            }
        # bitsandbytes packs two 4-bit numbers into a byte.
        packed = 2 if getattr(self, "is_loaded_in_4bit", False) else 1
        return sum(
            p.numel() * (packed * p.element_size() if type(p).__name__ == "Params4bit" else 1)
            for name, p in self.named_parameters()
            if name not in left_out and (p.requires_grad or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nelement() * tensor.element_size() for tensor in tensors)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any module recomputes its activations in the backward pass."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Any] | None = None
    ) -> None:
        """Recomputes activations in the backward pass instead of keeping them.

        Args:
            gradient_checkpointing_func: called with ``(module, *args)``;
                ``torch.utils.checkpoint.checkpoint`` by default.

        Raises:
            ValueError: the class does not support it.
        """
        if not self._supports_gradient_checkpointing:
            raise ValueError(
                f"{type(self).__name__} does not support gradient checkpointing: it sets "
                "_supports_gradient_checkpointing = True if it does"
            )
        self._set_gradient_checkpointing(True, gradient_checkpointing_func or _checkpoint)

    def disable_gradient_checkpointing(self) -> None:
        """Keeps activations again."""
        if self._supports_gradient_checkpointing:
            self._set_gradient_checkpointing(False, _checkpoint)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = torch.utils.checkpoint.checkpoint,
    ) -> None:
        modules = [m for m in self.modules() if hasattr(m, "gradient_checkpointing")]
        if not modules:
            raise ValueError(
                f"{type(self).__name__} does not support gradient checkpointing: none of its "
                "modules has a boolean attribute gradient_checkpointing"
            )
        for module in modules:
            module._gradient_checkpointing_func = gradient_checkpointing_func  # type: ignore[assignment]
            module.gradient_checkpointing = enable  # type: ignore[assignment]

    def set_use_memory_efficient_attention_xformers(
        self, valid: bool, attention_op: Callable[..., Any] | None = None
    ) -> None:
        """Hands the choice to all modules below that know it by the same method."""

        def tell(module: torch.nn.Module) -> None:
            setter = getattr(module, "set_use_memory_efficient_attention_xformers", None)
            if setter is not None:
                setter(valid, attention_op)
            for child in module.children():
                tell(child)

        for child in self.children():
            tell(child)

    def enable_xformers_memory_efficient_attention(
        self, attention_op: Callable[..., Any] | None = None
    ) -> None:
        """Attention by xFormers, in the modules that can."""
        self.set_use_memory_efficient_attention_xformers(True, attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Attention without xFormers."""
        self.set_use_memory_efficient_attention_xformers(False)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As ``torch.nn.Module.to``; to a GPU through the staging ring. Not a quantized model's
        dtype."""
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None:
            self._refuse_cast("to()")
            if self._keep_in_fp32_modules:
                _log.warning(
                    "%s keeps %s in float32, and to(%s) casts them too: give dtype to "
                    "from_pretrained instead",
                    type(self).__name__,
                    ", ".join(self._keep_in_fp32_modules),
                    dtype,
                )
        if device is not None and device.type == "cuda" and memory_format is None:
            move(self, parse_device(device), dtype)
        return super().to(*args, **kwargs)

    def cuda(self, device: Any = None) -> Any:
        """Moves to a GPU."""
        return self.to(parse_device("cuda" if device is None else device))

    def half(self) -> Any:
        """Casts to float16; not a quantized model."""
        self._refuse_cast("half()")
        return super().half()

    def float(self) -> Any:
        """Casts to float32; not a quantized model."""
        self._refuse_cast("float()")
        return super().float()

    def _refuse_cast(self, call: str) -> None:
        if getattr(self, "is_quantized", False):
            raise ValueError(
                f"{call} would cast a quantized model: choose the dtype of its other layers with "
                "dtype= of from_pretrained"
            )


def _checkpoint(module: torch.nn.Module, *args: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=False)


def _parse_dtype(dtype: Any, torch_dtype: Any) -> torch.dtype | str | None:
    wanted = dtype if dtype is not None else torch_dtype
    if wanted is None or (isinstance(wanted, str) and wanted == "auto"):
        return wanted
    name = dtypes.parse_dtype(wanted)
    assert name is not None
    return dtypes.to_torch(name)


def _built_dtype(
    dtype: torch.dtype | str | None, checkpoint: Checkpoint | None
) -> torch.dtype | None:
    """In which the module is built: what the checkpoint does not hold takes this dtype."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto" and checkpoint is not None:
        for name, _ in checkpoint.headers().values():
            if name in dtypes.CASTABLE:
                return dtypes.to_torch(name)
    return None


def _load_config(
    cls: type[ModelMixin], path: str, hub: HubArguments, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration, and what of ``kwargs`` is not one of its overrides."""
    if path.endswith(".dduf"):
        from weightlift.dduf import open_dduf

        entry = f"{hub.subfolder}/{cls.config_name}" if hub.subfolder else cls.config_name
        return open_dduf(path).read_json(entry), kwargs
    folder = str(Path(path).parent) if Path(path).is_file() else path
    config, unused, _ = cls.load_config(  # type: ignore[attr-defined]
        folder,
        return_unused_kwargs=True,
        return_commit_hash=True,
        cache_dir=hub.cache_dir,
        force_download=hub.force_download,
        local_files_only=hub.local_files_only,
        token=hub.token,
        revision=hub.revision,
        subfolder=hub.subfolder,
        mirror=hub.mirror,
        **kwargs,
    )
    return dict(config), unused


def _refuse_unknown(cls: type[ModelMixin], arguments: Mapping[str, Any]) -> None:
    """What is neither an argument of ``from_pretrained`` nor of the config."""
    taken = [
        name
        for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    ignored = getattr(cls, "ignore_for_config", ())
    known = {*taken, *getattr(cls, "_deprecated_kwargs", ())} - {*ignored}
    for name in arguments:
        if name in ignored:
            raise ArgumentError(
                f"{cls.__name__}.from_pretrained takes no {name!r}: the class leaves it out of its "
                "config (ignore_for_config)"
            )
        if name not in known:
            hub = HubArguments.__dataclass_fields__
            near = difflib.get_close_matches(name, [*known, *_ARGUMENTS, *hub], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(
                f"{cls.__name__}.from_pretrained has no argument {name!r}, nor has "
                f"{cls.__name__}.__init__{hint}"
            )


def _quantizer(given: Mapping[str, Any], config: Mapping[str, Any]) -> Quantizer | None:
    saved = config.get("quantization_config")
    names = ("quantization_config", "load_in_8bit", "load_in_4bit")
    if saved is None and not any(given[name] for name in names):
        return None
    if not given["low_cpu_mem_usage"]:
        raise ArgumentError("quantizing while loading needs low_cpu_mem_usage=True")
    from weightlift.models.quantization import choose_quantizer

    return choose_quantizer(
        given["quantization_config"],
        saved,
        load_in_8bit=given["load_in_8bit"],
        load_in_4bit=given["load_in_4bit"],
    )


def _begin(
    cls: type[ModelMixin],
    checkpoint: Checkpoint,
    device_map: Any,
    dtype: torch.dtype | str | None,
    options: Mapping[str, Any],
) -> Early | None:
    """Starts to read while the module is being built, where one device takes it all."""
    alone = single_entry("cpu" if device_map is None else device_map)
    if not isinstance(alone, (str, int, torch.device)):
        return None  # or to be refused
    device = parse_device(alone)
    believed = torch.get_default_dtype() if dtype is None else dtype
    if options["mode"] == "map":
        believed = "auto"  # nothing is cast
    kept = frozenset(cls._keep_in_fp32_modules or ())
    ignored = _matcher(cls._keys_to_ignore_on_load_unexpected)
    names = None
    if kept or ignored:
        names = [
            name
            for name in checkpoint
            if kept.isdisjoint(name.split(".")) and not (ignored and ignored(name))
        ]
    return Early(checkpoint, device, dtypes.parse_dtype(believed), names, **options)


def _open_flax(path: str, hub: HubArguments, model: torch.nn.Module) -> Checkpoint:
    from weightlift.hub import download, list_files
    from weightlift.models.flax_weights import load_flax_state_dict

    folder = Path(path, hub.subfolder or "")
    if folder.is_dir():
        found = [folder / name for name in _FLAX_NAMES if (folder / name).is_file()]
    else:
        there = list_files(path, hub)
        found = [download(path, name, hub) for name in _FLAX_NAMES if name in there][:1]
    if not found:
        raise CheckpointError(f"{folder}: there is neither {' nor '.join(_FLAX_NAMES)} in it")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return Checkpoint([], in_memory=load_flax_state_dict(found[0], shapes))


def _former_attention_names(
    model: torch.nn.Module, checkpoint: Checkpoint
) -> Callable[[str], str] | None:
    """The renaming for checkpoints of diffusers before 0.16, whose attention blocks had other
    names; blocks that may come from such a checkpoint carry a flag."""
    former = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    endings = tuple(f"{old}.{leaf}" for old in former for leaf in ("weight", "bias"))
    if not any(name.endswith(endings) for name in checkpoint):
        return None
    paths = [
        name for name, m in model.named_modules() if vars(m).get("_from_deprecated_attn_block")
    ]
    renames = {
        f"{path}.{old}.{leaf}": f"{path}.{new}.{leaf}"
        for path in paths
        for old, new in former.items()
        for leaf in ("weight", "bias")
        if f"{path}.{old}.{leaf}" in checkpoint
    }
    return (lambda name: renames.get(name, name)) if renames else None


def _refuse_another_model(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Nothing in common: diffusers returns a model that is random altogether."""
    if any(name in checkpoint for name, _ in model.named_parameters()):
        return
    wanted = model.state_dict().keys()
    if not (wanted and checkpoint and wanted.isdisjoint(checkpoint)):
        return
    problems = [
        *listed("the model has and the checkpoint lacks", list(wanted)),
        *listed("the checkpoint has and the model lacks", list(checkpoint)),
    ]
    raise CheckpointError(
        f"{place_of(checkpoint)} holds the weights of another model than {type(model).__name__}; "
        "no name is in both:\n" + "\n".join(problems)
    )


def _evaluate(model: torch.nn.Module) -> None:
    """``eval()``; where no module has one of its own, without the way through ``__setattr__``,
    which looks at three dictionaries for each."""
    modules = list(model.modules())
    if all(
        getattr(kind, name) is getattr(torch.nn.Module, name)
        for kind in {type(module) for module in modules}
        for name in ("eval", "train", "__setattr__")
    ):
        for module in modules:
            vars(module)["training"] = False
    else:
        model.eval()


def _matcher(patterns: list[str] | None) -> Callable[[str], bool] | None:
    if not patterns:
        return None
    compiled = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    return lambda name: compiled.search(name) is not None


def _warn_of_keys(cls: type[ModelMixin], path: str, report: LoadReport) -> None:
    if report.unexpected_keys:
        _log.warning(
            "%s: %s has no place for these weights, they were not used: %s",
            path,
            cls.__name__,
            ", ".join(report.unexpected_keys),
        )
    fresh = [*report.missing_keys]
    fresh += [
        f"{name} (shape {theirs} in the checkpoint, {ours} in the model)"
        for name, theirs, ours in report.mismatched_keys
    ]
    if fresh:
        _log.warning(
            "%s does not hold these weights of %s, which are newly initialized: %s. Train the "
            "model before you use its predictions",
            path,
            cls.__name__,
            ", ".join(fresh),
        )
