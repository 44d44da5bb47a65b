"""accelerate's hooks on modules whose weights are on the host or on the disk: the weights come from
the streaming executor.

The hooks stay accelerate's own objects, and outside of a forward their modules look as accelerate
leaves them. What a hook would read for its module's forward is there already, or on its way: it was
read ahead, in the order learned, into a few buffers that are used again and again. That goes for
``cpu_offload``, ``disk_offload``, ``dispatch_model``, and for whoever calls these: transformers'
and diffusers' device maps, diffusers' ``enable_sequential_cpu_offload``.

A hook goes accelerate's way when something is not as it was when the hook was attached: other
weights in its map, files that were written to, another dtype, a forward without inputs (as tools
call hooks that want the real tensors). One line of log says so. Nothing is said of a hook whose map
lacks a weight of its module, as after a load of a checkpoint that lacks it: accelerate raises a
KeyError in the module's forward.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from weightlift.backends.accelerate_origins import (
    InMemory,
    UnstreamedError,
    Weight,
    needed_weights,
    origin_of,
    root_of,
)
from weightlift.backends.fallback import report_unstreamed
from weightlift.backends.hooks import outside_of_graphs
from weightlift.core.errors import WeightliftError

if TYPE_CHECKING:
    import torch

    from weightlift.module.streaming.on_demand import WeightsOnDemand

__all__ = [
    "detach_hook",
    "init_hook",
    "init_whole_model_hook",
    "post_forward",
    "pre_forward",
    "release",
]

_NAME = "accelerate"

# --- the weights of one model ---------------------------------------------------------------------


class _Model:
    """What hooks that read from one map, for one device, have in common.

    Args:
        root: the map. It is held, so that another one is not taken for it.
        device: where the model computes.
    """

    def __init__(self, root: Any, device: torch.device) -> None:
        self.root, self.device = root, device
        self._lock = threading.Lock()
        self._weights: dict[str, Weight] = {}
        self._running: WeightsOnDemand | None = None
        self._refused = False

    def add(self, weight: Weight) -> None:
        with self._lock:
            self._weights[weight.name] = weight

    def is_in_place(self, weight: Weight) -> bool:
        """Whether it need not be read: it is where it is used."""
        origin = weight.origin
        return (
            isinstance(origin, InMemory)
            and origin.tensor.device == self.device
            and origin.dtype == weight.dtype
        )

    @property
    def is_refused(self) -> bool:
        return self._refused

    def refuse(self, reason: str) -> None:
        """From now on accelerate serves its hooks; one line says so."""
        with self._lock:
            if self._refused:
                return
            self._refused = True
            running, self._running = self._running, None
        if running is not None:
            running.close()
        report_unstreamed(_NAME, reason)

    def parameters(
        self, weights: Sequence[Weight], like: Sequence[torch.nn.Parameter]
    ) -> list[torch.nn.Parameter] | None:
        """What is to be used in the place of these; ``None`` where accelerate serves its hooks."""
        import torch

        made = []
        for weight, old in zip(weights, like, strict=True):
            if self.is_in_place(weight):
                origin: Any = weight.origin
                with torch.inference_mode(False):
                    made.append(torch.nn.Parameter(origin.tensor.detach(), old.requires_grad))
                continue
            running = self._on_demand(weight.name)
            if running is None:
                return None
            made.append(running.parameter(weight.name, old.requires_grad))
        return made

    def _on_demand(self, name: str) -> WeightsOnDemand | None:
        import torch

        running = self._running
        if running is not None and name in running:
            return running
        reason = None
        with self._lock:
            if self._running is None or name not in self._running:
                if self._running is not None:
                    self._running.close()
                    self._running = None
                try:
                    self._running = self._started()
                except (
                    WeightliftError,
                    OSError,
                    UnstreamedError,
                    torch.OutOfMemoryError,
                ) as error:
                    reason = str(error)
            running = self._running
        if reason is not None:
            self.refuse(reason)
        return running

    def _started(self) -> WeightsOnDemand:
        from weightlift.module.streaming.on_demand import WeightsOnDemand

        rest = [weight for weight in self._weights.values() if not self.is_in_place(weight)]
        return WeightsOnDemand(needed_weights(rest), self.device)

    def release(self) -> None:
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            running.close()


_models: weakref.WeakValueDictionary[tuple[int, Any], _Model] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _model_of(root: Any, device: torch.device) -> _Model:
    with _lock:
        found = _models.get((id(root), device))
        if found is None:
            found = _models[id(root), device] = _Model(root, device)
        return found


def _device(execution_device: Any) -> torch.device:
    import torch

    if isinstance(execution_device, int):
        device = torch.device("cuda", execution_device)
    else:
        device = torch.device(execution_device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cpu":
        device = torch.device("cpu")
    if device.type not in ("cpu", "cuda"):
        raise UnstreamedError(f"weights are streamed to 'cpu' and 'cuda', not to {device}")
    return device


# --- one hook -------------------------------------------------------------------------------------


class _Bound:
    """What one hook brings in. It knows the hook's module by what it is called with alone: it must
    not keep the hook, which is a key of ``_bound``, alive."""

    def __init__(self, hook: Any, module: torch.nn.Module) -> None:
        root = root_of(hook.weights_map)
        if root is None:
            raise UnstreamedError("a hook has weights of its own")
        self._map = hook.weights_map
        self._execution_device = hook.execution_device
        self.model = _model_of(root, _device(hook.execution_device))
        self._weights: list[Weight] = []
        try:
            self._weights += [
                self._weight(name, parameter)
                for name, parameter in module.named_parameters(recurse=hook.place_submodules)
            ]
        except (UnstreamedError, WeightliftError, OSError, AttributeError) as error:
            self.model.refuse(str(error))
        for weight in self._weights:
            self.model.add(weight)
        self._buffers = _offloaded_buffers(hook, module)
        self._lock = threading.Lock()
        self._inside: set[int] = set()
        # Of each weight, the parameter that is there outside of a forward, and that of now.
        self._outside: list[torch.nn.Parameter] = []
        self._given: list[torch.nn.Parameter] = []
        self._aligning: Any = None

    def _weight(self, name: str, parameter: torch.nn.Parameter) -> Weight:
        import torch

        if type(parameter) is not torch.nn.Parameter:
            raise UnstreamedError(f"{name!r} is a {type(parameter).__name__}")
        *path, key = name.split(".")
        origin = origin_of(self._map, name)
        full = f"{self._map.prefix}{name}"
        return Weight(tuple(path), key, full, parameter.shape, parameter.dtype, origin)

    def aligning(self, hook: Any) -> Any:
        """accelerate's own hook for all that is not the weights: it moves inputs and outputs."""
        made = self._aligning
        if made is None or any(
            getattr(made, name) != getattr(hook, name) for name in ("io_same_device", "skip_keys")
        ):
            made = copy.copy(hook)
            made.offload = False
            made.weights_map = None
            self._aligning = made
        return made

    def bring_in(self, hook: Any, module: torch.nn.Module) -> bool:
        """Puts weights into the module; ``False`` where accelerate is to do it."""
        if self.model.is_refused or hook.weights_map is not self._map:
            return False
        if hook.execution_device != self._execution_device:
            return False
        try:
            if not all(weight.origin.is_same() for weight in self._weights):
                self.model.refuse("offloaded weights were changed after their hooks were attached")
                return False
        except OSError:
            return False  # accelerate says what it thinks of a file that is gone
        with self._lock:
            owners = [weight.owner(module) for weight in self._weights]
            here = [o._parameters.get(w.key) for o, w in zip(owners, self._weights, strict=True)]
            is_in = [*map(id, here)] == [*map(id, self._given)] and bool(self._outside)
            outside = self._outside if is_in else here
            if not all(map(_is_as_attached, outside, self._weights)):
                self.model.refuse("parameters are not as they were when their hooks were attached")
                return False
            given = self.model.parameters(self._weights, outside)  # type: ignore[arg-type]
            if given is None:
                return False
            for owner, weight, parameter in zip(owners, self._weights, given, strict=True):
                owner._parameters[weight.key] = parameter
            self._outside, self._given = outside, given  # type: ignore[assignment]
            self._inside.add(threading.get_ident())
        _set_buffers(hook, module, self._buffers, hook.execution_device)
        return True

    def take_out(self, hook: Any, module: torch.nn.Module) -> bool:
        """Puts back what was there; ``False`` where ``bring_in`` has not been."""
        with self._lock:
            if threading.get_ident() not in self._inside:
                return False
            self._inside.discard(threading.get_ident())
            if self._inside:  # another thread computes with them
                return True
            self._put_back(module)
        _set_buffers(hook, module, self._buffers, "meta")
        return True

    def forget(self, module: torch.nn.Module) -> None:
        """After a forward that has ended with an exception."""
        with self._lock:
            self._inside.clear()
            self._put_back(module)

    def _put_back(self, module: torch.nn.Module) -> None:
        given, self._given = self._given, []
        for weight, now, old in zip(self._weights, given, self._outside, strict=False):
            parameters = weight.owner(module)._parameters
            if parameters.get(weight.key) is now:
                parameters[weight.key] = old
        self._outside = []


def _is_as_attached(parameter: torch.nn.Parameter | None, weight: Weight) -> bool:
    import torch

    return (
        type(parameter) is torch.nn.Parameter
        and parameter.is_meta
        and parameter.shape == weight.shape
        and parameter.dtype == weight.dtype
    )


def _offloaded_buffers(hook: Any, module: torch.nn.Module) -> list[str]:
    if not hook.offload_buffers:
        return []
    from accelerate.utils.modeling import get_non_persistent_buffers

    stay = get_non_persistent_buffers(module, recurse=hook.place_submodules)
    names = (name for name, _ in module.named_buffers(recurse=hook.place_submodules))
    return [name for name in names if name not in stay]


def _set_buffers(hook: Any, module: torch.nn.Module, names: Sequence[str], device: Any) -> None:
    """As accelerate does it: they are small, and a module may write to them."""
    if not names:
        return
    from accelerate.utils.modeling import set_module_tensor_to_device

    for name in names:
        value = None if device == "meta" else hook.weights_map[name]
        set_module_tensor_to_device(module, name, device, value=value)


# Hook of accelerate -> what it brings in; ``None``: accelerate does it.
_bound: weakref.WeakKeyDictionary[Any, _Bound | None] = weakref.WeakKeyDictionary()


def _bind(hook: Any, module: torch.nn.Module) -> _Bound | None:
    from accelerate.hooks import AlignDevicesHook

    if type(hook) is not AlignDevicesHook or not hook.offload or hook.weights_map is None:
        return None
    made = None
    try:
        if next(iter(module.named_parameters(recurse=hook.place_submodules)), None) is not None:
            made = _Bound(hook, module)
    except UnstreamedError as error:
        report_unstreamed(_NAME, str(error))
    except KeyError:
        pass  # the map lacks a weight: accelerate raises in the forward
    _bound[hook] = made
    return made


def release() -> None:
    """When the backend is switched off: accelerate's hooks serve themselves, and the buffers go."""
    with _lock:
        models = list(_models.values())
    for model in models:
        model.release()


# --- in the place of accelerate's methods ---------------------------------------------------------


def init_hook(reference: Callable[..., Any]) -> Callable[..., Any]:
    def init_hook(self: Any, module: Any) -> Any:
        result = reference(self, module)
        _bind(self, module)
        return result

    return init_hook


def init_whole_model_hook(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Of ``CpuOffload``, which moves a whole model to its device at its forward: there is nothing
    to read ahead within it."""

    def init_hook(self: Any, module: Any) -> Any:
        if not str(self.execution_device).startswith("cpu"):
            report_unstreamed(
                _NAME,
                "cpu_offload_with_hook, and so enable_model_cpu_offload, moves whole models; "
                "enable_sequential_cpu_offload and enable_group_offload stream them",
            )
        return reference(self, module)

    return init_hook


def pre_forward(reference: Callable[..., Any]) -> Callable[..., Any]:
    def pre_forward(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.offload:
            return reference(self, module, *args, **kwargs)
        bound = _bound.get(self, _UNKNOWN)
        if bound is _UNKNOWN:
            # Of a copy, or of a model that was dispatched before the backend was on: by the next
            # forward all its hooks are known.
            _bind(self, module)
        elif bound is not None and (args or kwargs) and bound.bring_in(self, module):
            return reference(bound.aligning(self), module, *args, **kwargs)
        elif bound is not None:
            bound.forget(module)
        return reference(self, module, *args, **kwargs)

    return outside_of_graphs(pre_forward)


def post_forward(reference: Callable[..., Any]) -> Callable[..., Any]:
    def post_forward(self: Any, module: Any, output: Any) -> Any:
        bound = _bound.get(self) if self.offload else None
        if bound is not None and bound.take_out(self, module):
            return reference(bound.aligning(self), module, output)
        return reference(self, module, output)

    return outside_of_graphs(post_forward)


def detach_hook(reference: Callable[..., Any]) -> Callable[..., Any]:
    def detach_hook(self: Any, module: Any) -> Any:
        bound = _bound.pop(self, None)
        if bound is not None:
            bound.forget(module)
        return reference(self, module)

    return detach_hook


_UNKNOWN: Any = object()
