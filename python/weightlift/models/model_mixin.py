"""The base class of models that load and save themselves."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch

from weightlift.core.atomic import make_folder
from weightlift.core.devices import parse_device
from weightlift.core.errors import ArgumentError
from weightlift.core.given import check_flag
from weightlift.core.paths import path_text
from weightlift.models.config_mixin import ConfigMixin
from weightlift.models.hub_mixin import PushToHubMixin
from weightlift.models.loading import load_pretrained
from weightlift.module.background.waiting import tensors_to_come
from weightlift.module.move import move
from weightlift.module.offload import whole_state_dict
from weightlift.module.parameters import check_module

__all__ = ["ModelMixin", "get_parameter_device", "get_parameter_dtype"]

_log = logging.getLogger("weightlift")
_Self = TypeVar("_Self", bound="ModelMixin")


def get_parameter_device(module: torch.nn.Module) -> torch.device:
    """The device of the first parameter, buffer or tensor attribute. For a tensor that is still
    loading, its future device, without a wait.

    Raises:
        ArgumentError: ``module`` is no module.
        StopIteration: it has no tensor.
    """
    check_module(module, "get_parameter_device", alone=True)
    held = itertools.chain(tensors_to_come(module), tensors_to_come(module, "_buffers"))
    for _, device, _ in held:
        return device
    return next(_tensor_attributes(module)).device


def get_parameter_dtype(module: torch.nn.Module) -> torch.dtype | None:
    """The dtype of the first floating-point parameter that may be cast, else buffer, else tensor
    attribute; without any of floating point, the dtype of the last one; ``None`` if the module has
    no tensor.

    Raises:
        ArgumentError: ``module`` is no module.
    """
    check_module(module, "get_parameter_dtype", alone=True)
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    last = None
    for name, _, dtype in tensors_to_come(module):
        last = dtype
        if any(part in kept for part in name.split(".")):
            continue
        if dtype.is_floating_point:
            return dtype
    for _, _, dtype in tensors_to_come(module, "_buffers"):
        last = dtype
        if dtype.is_floating_point:
            return dtype
    if last is not None:
        return last
    for tensor in _tensor_attributes(module):
        last = tensor.dtype
        if tensor.is_floating_point():
            return tensor.dtype
    return last


@contextlib.contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Makes ordinary tensors also in inference mode, whose own tensors can never be trained."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _check_configured(cls: type[ModelMixin]) -> None:
    """
    Raises:
        ArgumentError: the class has no configuration.
    """
    if not hasattr(cls, "ignore_for_config"):  # also of the ConfigMixin of diffusers
        raise ArgumentError(
            f"{cls.__name__} has no configuration, from which the model is built: derive it from "
            "ConfigMixin too, and decorate its __init__ with register_to_config"
        )


def _refuse_unknown(of_the_hub: Iterable[str]) -> None:
    known = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder", "tags")
    of_save = inspect.signature(ModelMixin.save_pretrained).parameters
    for name in of_the_hub:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *of_save], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"save_pretrained has no argument {name!r}{hint}")


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

    config_name: ClassVar[str | None] = "config.json"
    _automatically_saved_args = ["_weightlift_version", "_class_name", "_name_or_path"]  # noqa: RUF012
    _supports_gradient_checkpointing = False
    _keys_to_ignore_on_load_unexpected: list[str] | None = None
    _no_split_modules: list[str] | None = None
    _keep_in_fp32_modules: list[str] | None = None
    _skip_keys: list[str] | None = None
    # Not set in an __init__, which would hide the signature of a library's model class, from which
    # the constructor's arguments are read.
    _gradient_checkpointing_func: Callable[..., Any] | None = None

    def __getattr__(self, name: str) -> Any:
        try:  # first, for layers with the name of an argument
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
            cache_dir, force_download, local_files_only, token, revision, subfolder, mirror: as in
                ``open_checkpoint``.
            use_auth_token: the old name of ``token``; give only one of them.
            resume_download: no effect: huggingface_hub always resumes.
            proxies: no effect; one warning per process names ``HTTPS_PROXY`` and ``HTTP_PROXY``,
                which huggingface_hub uses.
            dtype: the dtype of floating-point tensors: a ``torch.dtype`` or its name; ``"auto"``
                for the checkpoint's; ``None`` for the built model's. During the build it is torch's
                default dtype of the whole process.
            torch_dtype: the old name of ``dtype``; ``dtype`` wins.
            device_map, max_memory: as in ``load_into``; without an automatic map, ``max_memory``
                has no effect, as in diffusers, and a warning says so.
            offload_folder: allows an automatic ``device_map`` to leave tensors on the disk; nothing
                is written to it.
            offload_state_dict: no effect: there is no state dict.
            device_mesh, tp_plan: cut the model for tensor parallelism and read only this rank's
                parts; all ranks of the 1-D mesh (all ranks by default) call this together.
                ``tp_plan``: module path, with ``*`` -> ``torch.distributed.tensor.parallel``
                style; the model's ``_tp_plan`` by default.
            low_cpu_mem_usage: ``False`` builds real parameters before they are filled.
            ignore_mismatched_sizes: initialise tensors whose shape differs in the checkpoint.
            output_loading_info: return ``(model, {"missing_keys", "unexpected_keys",
                "mismatched_keys", "error_msgs"})``.
            variant, use_safetensors: as in ``open_checkpoint``.
            from_flax: read ``diffusion_flax_model.msgpack`` or ``flax_model.msgpack``.
            quantization_config: a ``BitsAndBytesConfig`` or ``TorchAoConfig`` of transformers or
                diffusers, or its values: quantizes during the load.
            load_in_8bit, load_in_4bit: like a ``BitsAndBytesConfig`` with this flag.
            disable_mmap: like ``mode="read"``.
            mode, pin_memory, memory_format, verify, progress, background: as in ``load_into``;
                ``weightlift.last_report()`` is the handle of a background load.
            kwargs: the arguments above, and arguments of the class's ``__init__``, which override
                the configuration's. If the class has an argument called ``device_mesh``,
                ``tp_plan``, ``mode``, ``pin_memory``, ``memory_format``, ``verify``, ``progress``
                or ``background``, the class gets it.

        Returns:
            The model, in evaluation mode. Tensors that the checkpoint lacks are initialised by the
            model's own ``__init__`` and named in a warning.

        Raises:
            CheckpointError: there is no such checkpoint, shapes do not match, or the model does not
                fit the devices.
            ArgumentError: an argument is unknown, or contradicts another.
            FormatError, ReadError, DeviceError, OutOfMemoryError: as ``load_file``.
        """
        path = path_text(pretrained_model_name_or_path)
        _check_configured(cls)
        with _ordinary_tensors():
            model, report, arguments = load_pretrained(cast("Any", cls), path, kwargs)
        if not arguments.output_loading_info:
            return cast("_Self", model)
        info = {
            "missing_keys": report.missing_keys,
            "unexpected_keys": report.unexpected_keys,
            "mismatched_keys": report.mismatched_keys,
            "error_msgs": report.error_msgs,
        }
        return cast("_Self", (model, info))

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
        """Saves configuration and weights. After a kill the folder has the old checkpoint, the new
        one, or one that loads refuse, never a mixture (see ``models/replacing.py``).

        Args:
            save_directory: the folder, made if missing.
            is_main_process: whether to save; other processes of a distributed run pass ``False``.
            save_function: called with ``(tensors, path)`` instead of the usual writer.
            safe_serialization: safetensors, or ``.bin``.
            variant: a variant such as ``"fp16"``, for
                ``diffusion_pytorch_model.fp16.safetensors``.
            max_shard_size: bytes, or text such as ``"5GB"`` (10^9 bytes).
            push_to_hub: upload the folder; ``kwargs`` may have ``repo_id``, ``commit_message``,
                ``private``, ``token`` and ``create_pr``; the repository has the folder's name by
                default.

        Raises:
            ArgumentError: ``save_directory`` is a file, a tensor cannot be saved, or an argument is
                unknown.
            OSError: the system refuses a file.
        """
        from weightlift.models.saving import save_weights

        folder = Path(path_text(save_directory))
        if folder.is_file():
            raise ArgumentError(f"{folder} is a file: give a folder to save the model in")
        _check_configured(type(self))
        check_flag("is_main_process", is_main_process)
        check_flag("safe_serialization", safe_serialization)
        check_flag("push_to_hub", push_to_hub)
        _refuse_unknown(kwargs)
        make_folder(folder)
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
                companions={str(self.config_name): config},
            )
            if push_to_hub:
                self._push_folder(folder, kwargs)

    def _saved_state(
        self, safe_serialization: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors to save, and the metadata."""
        state = whole_state_dict(self)
        method = getattr(self, "quantization_method", None)
        if str(getattr(method, "value", method)) != "torchao":
            return state, {}
        if not safe_serialization:
            raise ArgumentError(
                "a model quantized by torchao can only be saved as safetensors: leave out "
                "safe_serialization=False"
            )
        from weightlift.models.quantization import flattened

        return flattened(state)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return get_parameter_device(self)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the first floating-point parameter that may be cast."""
        return get_parameter_dtype(self)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of elements of all parameters.

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
        """Bytes of the parameters and buffers.

        Args:
            return_buffers: count the buffers too.
        """
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
        """Hands the choice to all modules below that know it by the same method.

        Args:
            valid: whether to use it.
            attention_op: the operator of xFormers to use; its own choice by default.
        """

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
        """Attention by xFormers, in the modules that can.

        Args:
            attention_op: the operator of xFormers to use; its own choice by default.
        """
        self.set_use_memory_efficient_attention_xformers(True, attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Attention without xFormers."""
        self.set_use_memory_efficient_attention_xformers(False)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As ``torch.nn.Module.to``; copies to a GPU through the staging ring. Refuses to cast a
        quantized model."""
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
        """Casts to float16; refuses a quantized model."""
        self._refuse_cast("half()")
        return super().half()

    def float(self) -> Any:
        """Casts to float32; refuses a quantized model."""
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
