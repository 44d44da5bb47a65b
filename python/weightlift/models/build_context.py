"""Changes what constructors do inside a build, without patches that are set and restored.

The import of this module changes torch in two places, once. Both check a context variable; outside
a build torch behaves as before:

- torch's own hook for registered parameters;
- ``torch.nn.init`` gets a module class (Python's reference, "Customizing module attribute access").
  In a build its functions are torch's own and skip tensors on ``meta``; assignments to them hold
  only for this build. Outside a build, attribute access reads the module's dictionary.

diffusers, transformers and accelerate replace ``torch.nn.init`` and ``Module.register_parameter``
for the whole process while they build. Two such builds at the same time restore each other's
replacement. If a replacement held tensors, restoring the original freed them with the GIL released
and CPython 3.11's method cache stale: a segmentation fault.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import types
import weakref
from collections.abc import Callable, Container
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from weightlift.module.parameters import assign_parameter

__all__ = ["BuildContext", "KeepOffMeta"]

_Initializer = Callable[..., Any]
_Place = tuple[torch.nn.Module, str, torch.nn.Parameter]


class BuildContext:
    """A build: parameters that modules register in a ``with`` block go to ``meta``.

    A parameter that is registered twice stays one parameter. ``accelerate.init_empty_weights``
    makes a new parameter at each registration, which unties tied weights.

    Args:
        real: the parameters that stay real, by their order of registration; ``None``: all.

    Attributes:
        parameters: the registered parameters, in this order.
        init_functions: functions that the build assigned to ``torch.nn.init``.
    """

    def __init__(self, real: Container[int] | None = ()) -> None:
        self.parameters: list[torch.nn.Parameter] = []
        self.init_functions: dict[str, Any] = {}
        self._real = real
        self._places: list[_Place] = []
        # id -> (the original, its replacement). The original, because ids are reused.
        self._became: dict[int, tuple[weakref.ref[torch.nn.Parameter], torch.nn.Parameter]] = {}

    def __enter__(self) -> BuildContext:
        self._before = _build.get()
        _build.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _build.set(self._before)

    def register(
        self, module: torch.nn.Module, name: str, param: torch.nn.Parameter
    ) -> torch.nn.Parameter:
        """The parameter to register instead."""
        if not is_lazy(param) and not param.is_meta:
            known = self._became.get(id(param))
            if known is None or known[0]() is not param:
                real = self._real is None or len(self.parameters) in self._real
                held = param if real else _empty(param)
                known = self._became[id(param)] = (weakref.ref(param), held)
                self.parameters.append(held)
            param = known[1]
        self._places.append((module, name, param))
        return param

    def ensure_registered(self, model: torch.nn.Module) -> bool:
        """Ensures that a finished model holds the registered parameters.

        A parameter may have bypassed the hook in one module but not in another that shares it, and
        another library's replacement of ``register_parameter`` may have made a new parameter on
        ``meta``.

        Returns:
            ``False`` if such a replacement dropped values and the model must be built again.
        """
        bypassed = {
            id(param): held
            for param, held in ((known(), held) for known, held in self._became.values())
            if param is not None and param is not held
        }
        if not bypassed and all(m._parameters.get(name) is p for m, name, p in self._places):
            return True
        roots = {
            storage: param
            for param in reversed([*self.parameters, *(param for _, _, param in self._places)])
            if (storage := _storage(param)) is not None
        }
        registered = {(id(module), name): (module, p) for module, name, p in self._places}
        disturbed = False
        shared = collections.Counter(id(param) for _, param in registered.values())
        for (_, name), (module, param) in registered.items():
            found = module._parameters.get(name)
            if found is None or found is param:
                continue
            if found.is_meta and not param.is_meta:
                return False
            if _storage(found) in roots:
                disturbed = True
            elif found.is_meta and shared[id(param)] > 1 and found.shape == param.shape:
                assign_parameter(module, name, param)  # made anew, and a tie is lost by it
        for module in model.modules():
            for name, found in list(module._parameters.items()):
                if found is None:
                    continue
                root = bypassed.get(id(found))
                if root is None and disturbed and (storage := _storage(found)) is not None:
                    root = roots.get(storage)
                if root is not None and root is not found and root.shape == found.shape:
                    assign_parameter(module, name, root)
        return True


class KeepOffMeta(TorchFunctionMode):
    """For this thread, ``tensor.to("meta")`` is the tensor, and new tensors that are asked for on
    ``meta`` are on the CPU: what a replacement of ``register_parameter`` or ``register_buffer``,
    or of ``torch.zeros``, makes then has its memory and its values. So has what is made while
    ``meta`` is torch's default device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            device, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is not None and device.type == "meta":
                return args[0]
        elif _asks_for_meta(args, kwargs):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def _asks_for_meta(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Of the arguments of a function of torch: whether it makes a tensor of nothing on ``meta``."""
    device = kwargs.get("device")
    if device is None or (args and isinstance(args[0], torch.Tensor)):
        return False
    return torch.device(device).type == "meta"


_build: ContextVar[BuildContext | None] = ContextVar("weightlift_build", default=None)


def _on_registration(
    module: torch.nn.Module, name: str, param: torch.nn.Parameter
) -> torch.nn.Parameter | None:
    build = _build.get()
    return None if build is None else build.register(module, name, param)


def in_build() -> bool:
    """Whether this thread builds a model whose parameters go to ``meta``."""
    return _build.get() is not None


class _InitFunction:
    """A function of ``torch.nn.init``: in a build torch's own, outside the module's entry.

    Args:
        name: its name.
        function: the function in a build, for tensors that are not on ``meta``.
    """

    def __init__(self, name: str, function: _Initializer) -> None:
        self._name = name
        self._skipping = _skipping_meta(function)
        found = vars(torch.nn.init).get(name)
        own = getattr(found, "__globals__", None) is vars(torch.nn.init)
        self._original = found if own else function

    def __get__(self, module: types.ModuleType, owner: type) -> Any:
        build = _build.get()
        if build is not None:
            return build.init_functions.get(self._name, self._skipping)
        try:
            return vars(module)[self._name]
        except KeyError:
            raise AttributeError(
                f"module {module.__name__!r} has no attribute {self._name!r}"
            ) from None

    def __set__(self, module: types.ModuleType, value: Any) -> None:
        build = _build.get()
        if build is not None:
            build.init_functions[self._name] = value
        else:  # read in a build but assigned outside: torch's own function
            vars(module)[self._name] = self._original if value is self._skipping else value

    def __delete__(self, module: types.ModuleType) -> None:
        del vars(module)[self._name]


def _skipping_meta(initialize: _Initializer) -> _Initializer:
    """The function without tensors on ``meta``, on which torch's no-op takes as long as the rest of
    the construction."""

    @functools.wraps(initialize)
    def skip(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor: torch.Tensor = args[0] if args else kwargs["tensor"]
        return tensor if tensor.is_meta else initialize(*args, **kwargs)

    return skip


def _own_init_functions() -> dict[str, _Initializer]:
    """torch's own functions, from a second execution of their module: another library may have
    replaced them now, and under a torch function mode they look themselves up in their module."""
    spec = torch.nn.init.__spec__
    if spec is None or spec.loader is None:
        raise ImportError("torch.nn.init has no loader to execute it again")
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    return {
        name: function
        for name, function in vars(own).items()
        if name.endswith("_") and not name.startswith("_")
    }


def _empty(param: torch.nn.Parameter) -> torch.nn.Parameter:
    data = torch.empty_like(param, device="meta")
    if type(param) is not torch.nn.Parameter:
        return type(param)(data, requires_grad=param.requires_grad, **param.__dict__)
    empty = torch.nn.Parameter(data, requires_grad=param.requires_grad)
    empty.__dict__.update(param.__dict__)
    return empty


def _storage(tensor: torch.Tensor) -> int | None:
    try:
        address: int = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # some subclasses have no storage
        return None
    return address


# The annotation covers only hooks without a result.
register_module_parameter_registration_hook(_on_registration)  # type: ignore[arg-type]
torch.nn.init.__class__ = type(
    "_InitModule",
    (type(torch.nn.init),),
    {name: _InitFunction(name, function) for name, function in _own_init_functions().items()},
)
