"""Runs modules' own loading with tensors that have no bytes, and records what they copy where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core.errors import ArgumentError
from weightlift.core.report import LoadReport
from weightlift.load.options import LoadOptions
from weightlift.module.own_loading import Headers, loads_itself
from weightlift.module.parameters import ParameterRef, parameter_refs
from weightlift.module.recording.reader import CheckpointReader, sources_of
from weightlift.module.recording.recorder import Recorder

if TYPE_CHECKING:
    import torch

__all__ = ["OwnLoading", "record_own_loading"]


class OwnLoading(NamedTuple):
    """The result of the modules' own loading.

    Attributes:
        refs: the model's tensors, which the modules may have replaced.
        matched: (name in the checkpoint, tensor of the model) to load whole.
        filled: tensors of the model that have their values.
        values: tensors that were on ``meta``, and their values.
        prefixes: the prefixes of the modules.
        claimed: names in the checkpoint that the modules received.
        missing: names that the modules did not find.
        unexpected: names that the modules do not have.
        errors: the modules' error messages.
        report: the report of the reads.
    """

    refs: list[ParameterRef]
    matched: list[tuple[str, ParameterRef]]
    filled: list[ParameterRef]
    values: list[tuple[ParameterRef, torch.Tensor]]
    prefixes: tuple[str, ...]
    claimed: set[str]
    missing: list[str]
    unexpected: list[str]
    errors: list[str]
    report: LoadReport

    def values_by_name(self) -> list[tuple[str, torch.Tensor]]:
        return [(ref.name, value) for ref, value in self.values]

    def others(self) -> list[ParameterRef]:
        """Tensors to load by their names."""
        done = self._done()
        return [
            ref
            for ref in self.refs
            if id(ref) not in done and not all(n.startswith(self.prefixes) for n in ref.names)
        ]

    def rest(self) -> list[ParameterRef]:
        """Tensors of the modules that need no more work."""
        others = {id(ref) for ref in self.others()}
        others.update(id(ref) for _, ref in self.matched)
        others.update(id(ref) for ref, _ in self.values)
        return [ref for ref in self.refs if id(ref) not in others]

    def mismatched(
        self, headers: Headers
    ) -> tuple[list[tuple[str, tuple[int, ...], tuple[int, ...]]], list[str]]:
        """(name, shape in the checkpoint, shape in the model) of tensors skipped for their shape,
        and the modules' other errors."""
        done = self._done()
        found = [
            (name, headers[name][1], tuple(ref.tensor.shape))
            for ref in self.rest()
            if id(ref) not in done
            for name in ref.names
            if name in self.claimed and headers[name][1] != ref.tensor.shape
        ]
        prefix = "size mismatch for " if found else None
        errors = [text for text in self.errors if prefix is None or not text.startswith(prefix)]
        return found, errors

    def _done(self) -> set[int]:
        refs = [*(ref for _, ref in self.matched), *self.filled, *(ref for ref, _ in self.values)]
        return {id(ref) for ref in refs}


def record_own_loading(
    model: torch.nn.Module,
    modules: Sequence[tuple[str, torch.nn.Module]],
    checkpoint: Checkpoint,
    headers: Headers,
    options: LoadOptions,
) -> OwnLoading:
    """Runs the modules' own loading, as ``load_state_dict`` does, with tensors that have no bytes.
    Copies of whole tensors to whole tensors are left for the common load; all others are done here.

    Args:
        model: the model.
        modules: the result of ``modules_with_own_loading``.
        checkpoint: the checkpoint.
        headers: its headers.
        options: how to load.
    """
    import torch

    reader = CheckpointReader(checkpoint, options)
    recorder = Recorder(reader)
    recorder.expect((ref.name, ref.tensor) for ref in parameter_refs(model))
    prefixes = tuple(prefix for prefix, _ in modules)
    names = [name for name in headers if name.startswith(prefixes)]
    told = _Told([], [], [])
    state: dict[str, torch.Tensor] = {}
    for name, source in sources_of(checkpoint, names).items():
        if source is None:
            state[name] = reader.tensors([name])[name]
        else:
            state[name] = recorder.placeholder(name, source)
    with recorder.watching(), torch.no_grad():
        for prefix, module in modules:
            _run(module, state, prefix, told)
    state.clear()  # a tensor that is kept here would be read for its own sake
    refs = parameter_refs(model)
    matched, filled, hanging = _sort_out(refs, recorder, headers)
    recorder.allocate()
    recorder.finish()
    recorder.replace_kept()
    values = []
    for ref in hanging:
        value = recorder.real_target(ref.tensor)
        if value is not None:
            values.append((ref, value.data))  # .data has its own version counter
    done = {name for _, ref in matched for name in ref.names}
    done.update(name for ref in (*filled, *hanging) for name in ref.names)
    return OwnLoading(
        refs,
        matched,
        filled,
        values,
        prefixes,
        set(names),
        [name for name in told.missing if name not in done],
        told.unexpected,
        told.errors,
        reader.report,
    )


def _sort_out(
    refs: Sequence[ParameterRef], recorder: Recorder, headers: Headers
) -> tuple[list[tuple[str, ParameterRef]], list[ParameterRef], list[ParameterRef]]:
    """Splits the recorded writes: whole tensors, which leave the recorder; other writes to real
    tensors; other writes to tensors on ``meta``."""
    matched: list[tuple[str, ParameterRef]] = []
    filled: list[ParameterRef] = []
    hanging: list[ParameterRef] = []
    kept = recorder.kept()
    taken: set[str] = set()
    for ref in refs:
        if ref.tensor in kept:
            filled.append(ref)
            continue
        name = recorder.take_whole(ref.tensor, headers, taken)
        if name is not None:
            matched.append((name, ref))
        elif recorder.is_written(ref.tensor):
            (hanging if ref.tensor.is_meta else filled).append(ref)
    return matched, filled, hanging


class _Told(NamedTuple):
    """What ``_load_from_state_dict`` of all modules has told."""

    missing: list[str]
    unexpected: list[str]
    errors: list[str]


def _run(module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, told: _Told) -> None:
    """A module's own ``load_state_dict``, or, below the model, the part of torch's."""
    if loads_itself(module) and not prefix:
        result = module.load_state_dict(dict(state), strict=False)
        told.missing.extend(getattr(result, "missing_keys", ()))
        told.unexpected.extend(getattr(result, "unexpected_keys", ()))
    else:
        own = {name: value for name, value in state.items() if name.startswith(prefix)}
        _load(module, own, prefix, told)


def _load(
    module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, told: _Told
) -> None:
    """The inner ``load`` of ``torch.nn.Module.load_state_dict``, from a module on."""
    from torch.nn.modules.module import _IncompatibleKeys

    module._load_from_state_dict(state, prefix, {}, True, *told)
    for key, child in module._modules.items():
        if child is not None:
            inner = f"{prefix}{key}."
            own = {name: value for name, value in state.items() if name.startswith(inner)}
            _load(child, own, inner, told)
    for hook in module._load_state_dict_post_hooks.values():
        result = hook(module, _IncompatibleKeys(told.missing, told.unexpected))
        if result is not None:
            raise ArgumentError(
                f"{type(module).__name__}: a hook of register_load_state_dict_post_hook must "
                "return None; to change the keys, change its argument"
            )
