"""Modules' own loading code, in ``load_into`` compared with ``load_state_dict``."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weightlift as wl

parametrizations = nn.utils.parametrizations
Make = Callable[[], nn.Module]


def saved(folder: Path, state: dict[str, Tensor]) -> Path:
    path = folder / "m.safetensors"
    save_file({key: value.detach().contiguous().clone() for key, value in state.items()}, path)
    return path


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same(found: nn.Module, wanted: nn.Module, *, versions: bool = False) -> None:
    ours, theirs = tensors_of(found), tensors_of(wanted)
    assert ours.keys() == theirs.keys()
    for name, right in theirs.items():
        left = ours[name]
        assert (left.dtype, left.shape, left.device) == (right.dtype, right.shape, right.device)
        assert left.requires_grad == right.requires_grad
        assert type(left) is type(right), name
        same = torch.equal(left.detach().nan_to_num(), right.detach().nan_to_num())
        assert same, name
        if versions:
            assert left._version == right._version, name


def on_meta(make: Make) -> nn.Module:
    with torch.device("meta"):
        return make()


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in tensors_of(module).values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
            elif tensor.dtype == torch.int64:
                tensor.add_(3)
    return module


def compare(make: Make, path: Path, *, strict: bool = True) -> None:
    """On real modules, whose versions must advance equally, and on meta."""
    wanted, found = make(), make()
    for name, tensor in tensors_of(found).items():
        assert tensor._version == tensors_of(wanted)[name]._version
    theirs = wanted.load_state_dict(load_file(path), strict=strict)
    report = wl.load_into(found, path, strict=strict)
    assert_same(found, wanted, versions=True)
    assert set(report.missing_keys) == set(theirs.missing_keys)
    assert set(report.unexpected_keys) == set(theirs.unexpected_keys)
    hollow = on_meta(make)
    wl.load_into(hollow, path, strict=strict)
    reached = load_file(path).keys() | {"0.num_batches_tracked"}
    if not theirs.missing_keys and reached:
        for name, tensor in tensors_of(hollow).items():
            persistent = name in wanted.state_dict()
            if persistent:
                assert not tensor.is_meta, name
                assert tensor.dtype == tensors_of(wanted)[name].dtype
                assert torch.equal(tensor.detach(), tensors_of(wanted)[name].detach()), name


# Every class of torch.nn.

ARGUMENTS: list[tuple[Any, ...]] = [
    (), (4,), (4, 4), (4, 2), (4, 4, 3), (4, 4, 4), (2, 4, 4), (4, 10, [2]), (4, 2, 8),
]  # fmt: skip
# Classes that only wrap other modules, or are not modules.
WRAPPERS = {
    "Container", "DataParallel", "Module", "ModuleDict", "ModuleList", "ParameterDict",
    "ParameterList", "Sequential", "Parameter", "Buffer", "UninitializedParameter",
    "UninitializedBuffer", "TransformerDecoder", "TransformerEncoder", "RNNCellBase", "RNNBase",
    "Unflatten",
}  # fmt: skip


def classes() -> dict[str, Make]:
    found: dict[str, Make] = {}
    for name in dir(nn):
        kind = getattr(nn, name)
        if not isinstance(kind, type) or not issubclass(kind, nn.Module) or name in WRAPPERS:
            continue
        for arguments in ARGUMENTS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    kind(*arguments)
                except (TypeError, ValueError, RuntimeError, AssertionError, IndexError):
                    continue
            found[name] = lambda kind=kind, arguments=arguments: kind(*arguments)
            break
    return found


CLASSES = classes()


@pytest.mark.filterwarnings("ignore")
def test_all_classes_can_be_made() -> None:
    modules = {
        name
        for name in dir(nn)
        if isinstance(getattr(nn, name), type) and issubclass(getattr(nn, name), nn.Module)
    }
    assert modules - CLASSES.keys() - WRAPPERS == set()
    assert sum(bool(tensors_of(make())) for make in CLASSES.values()) > 40


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n, m in CLASSES.items() if not n.startswith("Lazy")])
def test_every_class_of_torch(name: str, tmp_path: Path) -> None:
    make = CLASSES[name]
    state = randomized(make()).state_dict()
    if not state:
        return
    compare(lambda: nn.Sequential(make()), saved(tmp_path, {f"0.{k}": v for k, v in state.items()}))


LAZY: dict[str, tuple[Make, Make]] = {
    "Linear": (lambda: nn.LazyLinear(4), lambda: nn.Linear(3, 4)),
    "Conv1d": (lambda: nn.LazyConv1d(4, 3), lambda: nn.Conv1d(2, 4, 3)),
    "Conv2d": (lambda: nn.LazyConv2d(4, 3), lambda: nn.Conv2d(2, 4, 3)),
    "BatchNorm1d": (lambda: nn.LazyBatchNorm1d(), lambda: nn.BatchNorm1d(3)),
    "InstanceNorm2d": (
        lambda: nn.LazyInstanceNorm2d(affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
    ),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name", LAZY)
@pytest.mark.parametrize("strict", [True, False])
def test_lazy_modules_take_the_shapes_of_the_file(name: str, strict: bool, tmp_path: Path) -> None:
    lazy, plain = LAZY[name]
    path = saved(tmp_path, nn.Sequential(randomized(plain())).state_dict())
    wanted, found = nn.Sequential(lazy()), nn.Sequential(lazy())
    wanted.load_state_dict(load_file(path))
    wl.load_into(found, path, strict=strict)
    assert_same(found, wanted, versions=True)


# Modules of each kind.


class OwnMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.bias = nn.Parameter(torch.zeros(3))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for old, new in (("gamma", "weight"), ("beta", "bias")):
            if prefix + old in state:
                state[prefix + new] = state.pop(prefix + old)
        super()._load_from_state_dict(state, prefix, *rest)


def renamed(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    for key in list(state):
        if "fc" in key:
            state[key.replace("fc", "lin")] = state.pop(key)


def stacked(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    both = state.pop(prefix + "both", None)
    if both is not None:
        state[prefix + "lin.weight"], state[prefix + "other.weight"] = both.chunk(2)


def joined(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    parts = [state.pop(f"{prefix}{name}.weight", None) for name in ("q", "k", "v")]
    if all(part is not None for part in parts):
        state[prefix + "lin.weight"] = torch.cat(parts)  # type: ignore[arg-type]


def doubled(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    state[prefix + "other.weight"] = state[prefix + "lin.weight"]


def scaled(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    state[prefix + "lin.weight"] = state[prefix + "lin.weight"] * 2


def transposed(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    state[prefix + "lin.weight"] = state[prefix + "lin.weight"].t()


class PreHook(nn.Module):
    def __init__(self, hook: Any, size: int = 2, other: bool = False) -> None:
        super().__init__()
        self.lin = nn.Linear(2, size, bias=False)
        if other:
            self.other = nn.Linear(2, size, bias=False)
        self.register_load_state_dict_pre_hook(hook)


class PostHook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.register_buffer("total", torch.zeros(()), persistent=True)
        self.register_load_state_dict_post_hook(self.after)

    @staticmethod
    def after(module: PostHook, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if "total" not in key]
        with torch.no_grad():
            module.lin.bias.mul_(2)
            module.total.copy_(module.lin.weight.sum())


class ExtraState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.scale = torch.tensor([1.0])

    def get_extra_state(self) -> Tensor:
        return self.scale

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = state.clone()


class OwnLoad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 2)

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        state = {key.removeprefix("module."): value for key, value in state.items()}
        return super().load_state_dict(state, strict, assign)


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(0.0))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)


def without_counters(module: nn.Module) -> dict[str, Tensor]:
    state = randomized(module).state_dict()
    return {key: value for key, value in state.items() if "tracked" not in key}


def old_weight_norm() -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4))).state_dict()


CASES: dict[str, tuple[Make, Callable[[], dict[str, Tensor]]]] = {
    "missing counter": (
        lambda: nn.Sequential(nn.BatchNorm1d(3)),
        lambda: without_counters(nn.Sequential(nn.BatchNorm1d(3))),
    ),
    "missing counters within": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())),
        lambda: without_counters(
            nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
        ),
    ),
    "old names of weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4))),
        old_weight_norm,
    ),
    "new names of weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4))),
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4))).state_dict(),
    ),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4))),
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4))).state_dict(),
    ),
    "own method": (
        lambda: nn.Sequential(OwnMethod()),
        lambda: {"0.gamma": torch.full((3,), 2.0), "0.beta": torch.full((3,), 3.0)},
    ),
    "pre-hook that renames": (
        lambda: PreHook(renamed),
        lambda: {"fc.weight": torch.rand(2, 2)},
    ),
    "pre-hook that cuts": (
        lambda: PreHook(stacked, other=True),
        lambda: {"both": torch.rand(4, 2)},
    ),
    "pre-hook that joins": (
        lambda: PreHook(joined, 6),
        lambda: {f"{name}.weight": torch.rand(2, 2) for name in "qkv"},
    ),
    "pre-hook that computes": (lambda: PreHook(scaled), lambda: {"lin.weight": torch.rand(2, 2)}),
    "pre-hook that gives one twice": (
        lambda: PreHook(doubled, other=True),
        lambda: {"lin.weight": torch.rand(2, 2)},
    ),
    "pre-hook that turns": (
        lambda: PreHook(transposed, 3),
        lambda: {"lin.weight": torch.rand(2, 3)},
    ),
    "post-hook": (
        PostHook,
        lambda: {"lin.weight": torch.rand(2, 2), "lin.bias": torch.rand(2)},
    ),
    "extra state": (
        lambda: nn.Sequential(ExtraState()),
        lambda: {"0.weight": torch.ones(2), "0._extra_state": torch.tensor([7.0])},
    ),
    "own load_state_dict": (
        OwnLoad,
        lambda: {"module.lin.weight": torch.rand(2, 2), "module.lin.bias": torch.rand(2)},
    ),
    "one number for a scalar": (Scalar, lambda: {"logit_scale": torch.tensor([4.6])}),
    "tied beside a counter": (
        Tied,
        lambda: without_counters(Tied()),
    ),
    "another dtype in the file": (
        lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)),
        lambda: {
            key: value.half()
            for key, value in without_counters(
                nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
            ).items()
        },
    ),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_modules_of_each_kind(case: str, strict: bool, tmp_path: Path) -> None:
    make, state = CASES[case]
    compare(make, saved(tmp_path, state()), strict=strict)


def test_extra_state_has_its_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path, {"0.weight": torch.ones(2), "0._extra_state": torch.tensor([7.0])})
    for make in (lambda: nn.Sequential(ExtraState()), lambda: on_meta(ExtraState_in_sequence)):
        module = make()
        wl.load_into(module, path)
        assert type(module[0].scale) is Tensor
        assert torch.equal(module[0].scale, torch.tensor([7.0]))


def ExtraState_in_sequence() -> nn.Module:
    return nn.Sequential(ExtraState())


def test_options_hold_for_what_modules_made(tmp_path: Path) -> None:
    """Casts, and tensors in place."""
    make, state = CASES["post-hook"]
    path = saved(tmp_path, state())
    for found in (make(), on_meta(make)):
        wanted = make()
        wanted.load_state_dict(load_file(path))
        wl.load_into(found, path, dtype=torch.bfloat16)
        wanted.to(torch.bfloat16)
        assert found.lin.weight.dtype == found.lin.bias.dtype == torch.bfloat16
        assert torch.equal(found.lin.weight, wanted.lin.weight)
        assert torch.equal(found.lin.bias, wanted.lin.bias)
    found = make()
    addresses = [p.data_ptr() for p in found.parameters()]
    wl.load_into(found, path)
    assert [p.data_ptr() for p in found.parameters()] == addresses


def test_only_modules_with_their_own_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightlift.module import recorded_loading

    calls: list[Any] = []
    original = recorded_loading.record_own_loading
    monkeypatch.setattr(
        recorded_loading, "record_own_loading", lambda *a: calls.append(a[1]) or original(*a)
    )
    make = lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LSTM(3, 3))  # noqa: E731
    whole = randomized(make()).state_dict()
    wl.load_into(make(), saved(tmp_path, whole))
    assert calls == []
    old = {key: value for key, value in whole.items() if "tracked" not in key}
    module = make()
    wl.load_into(module, saved(tmp_path, old))
    assert calls == [[("1.", module[1])]]


def test_errors_are_said_before_anything_is_read(tmp_path: Path) -> None:
    path = saved(
        tmp_path, {"0.gamma": torch.ones(3), "0.beta": torch.ones(4), "0.more": torch.ones(1)}
    )
    found = nn.Sequential(OwnMethod())
    with pytest.raises(wl.CheckpointError) as error:
        wl.load_into(found, path)
    assert "size mismatch for 0.bias" in str(error.value)
    assert "0.more" in str(error.value)
    assert torch.equal(found[0].weight.detach(), torch.ones(3))
    with pytest.raises(wl.CheckpointError, match=r"missing in the checkpoint:\n    0\.bias"):
        wl.load_into(found, saved(tmp_path, {"0.gamma": torch.ones(3)}))


def test_versions_go_on_in_modules_of_no_kind(tmp_path: Path) -> None:
    """Autograd learns about the engine's writes in place."""
    make = lambda: nn.Sequential(nn.Linear(3, 3))  # noqa: E731
    path = saved(tmp_path, randomized(make()).state_dict())
    found = make()
    product = (torch.ones(3, requires_grad=True) * found[0].weight).sum()
    wl.load_into(found, path)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# Integers and booleans keep the model's dtype.


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("pos", torch.arange(3))
        self.register_buffer("small", torch.arange(3, dtype=torch.int32))
        self.register_buffer("table", torch.zeros(3))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_integers_keep_the_models_dtype(dtype: torch.dtype | None, tmp_path: Path) -> None:
    state = Numbers().state_dict()
    state["mask"] = torch.tensor([1, 0, 255], dtype=torch.uint8)
    state["pos"] = state["pos"].to(torch.int32)
    state["small"] = state["small"].to(torch.int64)
    state["table"] = torch.tensor([1, 2, 3])
    path = saved(tmp_path, state)
    wanted = Numbers()
    wanted.load_state_dict(load_file(path))
    for found in (Numbers(), on_meta(Numbers)):
        wl.load_into(found, path, dtype=dtype)
        for name in ("mask", "pos", "small"):
            left, right = getattr(found, name), getattr(wanted, name)
            assert left.dtype == right.dtype
            assert torch.equal(left, right), name
        assert torch.equal(found.table.float(), wanted.table)


def test_a_deep_copy_of_a_loaded_module_is_plain(tmp_path: Path) -> None:
    make, state = CASES["own method"]
    found = on_meta(make)
    wl.load_into(found, saved(tmp_path, state()))
    assert_same(copy.deepcopy(found), found)
    assert all(
        type(tensor) in (nn.Parameter, Tensor)
        for tensor in itertools.chain(found.parameters(), found.buffers())
    )
