"""weightlift's constructions of models together with those of diffusers, transformers and
accelerate, which replace functions of torch in the whole process meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import diffusers.models.modeling_utils as diffusers_utils
import pytest
import torch
from torch import nn
from transformers.initialization import guard_torch_init_functions, no_init_weights

import weightlift as wl
from support import run_python
from weightlift.core.errors import WeightliftError
from weightlift.models import building

INIT_FUNCTIONS = [name for name in vars(nn.init) if name.endswith("_") and name[0] != "_"]


def functions_of_torch() -> dict[str, Any]:
    found = {name: getattr(nn.init, name) for name in INIT_FUNCTIONS}
    return {
        **found,
        "register_parameter": nn.Module.register_parameter,
        "linspace": torch.linspace,
        "dtype": torch.get_default_dtype(),
    }


class Model(wl.ModelMixin, wl.ConfigMixin):
    """Tied and recurrent modules, a computed buffer, and weights that are initialised by name."""

    @wl.register_to_config
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.first.weight
        self.rnn = nn.LSTM(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("angles", torch.linspace(0.0, 1.0, width).cos())
        self.register_buffer("computed", torch.ones(width) * 5, persistent=False)
        self.new = nn.Linear(width, width)
        nn.init.constant_(self.new.weight, 3.0)
        nn.init.ones_(self.new.bias)
        self.started()

    def started(self) -> None:
        """The point in a constructor at which a test waits."""


def builder(make: Callable[[], Any], dtype: torch.dtype | None = None) -> building.Builder[Any]:
    """A module that is made without a configuration."""
    made: Any = type("Made", (), {"from_config": staticmethod(lambda config: make())})
    return building.Builder(made, {}, {}, dtype)


NEW = ("new.weight", "new.bias")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = Model()
    state = {name: t for name, t in model.state_dict().items() if name not in NEW}
    Model().save_config(tmp_path)
    wl.save_file({n: t.clone() for n, t in state.items() if n != "tied.weight"},
                 tmp_path / "diffusion_pytorch_model.safetensors")  # fmt: skip
    return tmp_path


def assert_right(model: Any, folder: Path) -> None:
    saved = wl.load_file(folder / "diffusion_pytorch_model.safetensors")
    assert model.tied.weight is model.first.weight
    assert all(torch.equal(model.state_dict()[name], saved[name]) for name in saved)
    assert torch.equal(model.computed, torch.full((4,), 5.0))
    assert torch.equal(model.new.weight, torch.full((4, 4), 3.0))
    assert torch.equal(model.new.bias, torch.ones(4))
    rnn = model.rnn
    for weight, name in zip(rnn._flat_weights, rnn._flat_weights_names, strict=True):
        assert weight is getattr(rnn, name)


@contextlib.contextmanager
def empty_by_accelerate() -> Iterator[None]:
    with accelerate.init_empty_weights():
        yield


@contextlib.contextmanager
def empty_with_buffers() -> Iterator[None]:
    with accelerate.init_empty_weights(include_buffers=True):
        yield


@contextlib.contextmanager
def default_device_meta() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def anew_on_meta() -> Iterator[None]:
    """Another library's module, which makes a new parameter from the given one."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None and name in module._parameters:
            module._parameters[name] = nn.Parameter(param.to("meta"))

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


PATCHES: dict[str, Callable[[], Any]] = {
    "accelerate, buffers too": empty_with_buffers,
    "device meta": lambda: torch.device("meta"),
    "default device meta": default_device_meta,
    "anew on meta": anew_on_meta,
    "accelerate": empty_by_accelerate,
    "diffusers": diffusers_utils.no_init_weights,
    "transformers": no_init_weights,
    "guarded": guard_torch_init_functions,
}


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("patch", PATCHES)
def test_a_build_within_another_librarys_patch(patch: str, empty: bool, folder: Path) -> None:
    before = functions_of_torch()
    with PATCHES[patch]():
        model = Model.from_pretrained(folder, low_cpu_mem_usage=empty)
    assert functions_of_torch() == before
    assert_right(model, folder)


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("patch", PATCHES)
def test_builds_that_cross(
    patch: str, ours_first: bool, empty: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, leave = threading.Event(), threading.Event()
    loader: list[Model] = []

    def started(self: Model) -> None:
        inside.set()
        assert leave.wait(60)

    monkeypatch.setattr(Model, "started", started)
    thread = threading.Thread(
        target=lambda: loader.append(Model.from_pretrained(folder, low_cpu_mem_usage=empty))
    )
    before = functions_of_torch()
    with contextlib.ExitStack() as stack:
        if ours_first:
            thread.start()
            assert inside.wait(60)
        stack.enter_context(PATCHES[patch]())
        if not ours_first:
            thread.start()
            assert inside.wait(60)
    leave.set()
    thread.join()
    assert functions_of_torch() == before
    assert_right(loader[0], folder)


def test_what_is_not_in_a_build_is_as_it_was() -> None:
    before = functions_of_torch()
    made = []

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            other = threading.Thread(target=lambda: made.append(nn.Linear(3, 3)))
            other.start()
            other.join()
            made.append(nn.init.kaiming_uniform_)
            self.own = nn.Linear(3, 3)

    model = builder(Other).build(empty=True)
    assert model.own.weight.is_meta
    assert made[0].weight.device.type == "cpu"
    assert made[0].weight.abs().sum() > 0
    assert made[1] is not nn.init.kaiming_uniform_
    # Code that saved the function there and restores it here means torch's own.
    nn.init.kaiming_uniform_ = made[1]
    assert functions_of_torch() == before


def test_others_find_torchs_own_functions_at_every_moment_of_builds(folder: Path) -> None:
    """Outside weightlift's constructions, while some run in other threads, nothing is replaced."""
    before = functions_of_torch()
    ended = threading.Event()
    failures: list[BaseException] = []
    built: list[bool] = []

    def build(empty: bool) -> None:
        try:
            while not ended.is_set():
                assert_right(Model.from_pretrained(folder, low_cpu_mem_usage=empty), folder)
                built.append(empty)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=build, args=(number % 2 == 0,)) for number in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for value in itertools.count():
            if failures or len(built) > 40:
                break
            assert functions_of_torch() == before
            tensor = torch.empty(8)
            assert torch.equal(nn.init.constant_(tensor, value), torch.full((8,), float(value)))
            layer = nn.Linear(4, 4)
            assert layer.weight.device.type == "cpu"
            assert layer.weight.abs().sum() > 0
            assert type(layer.weight) is nn.Parameter
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert failures == []
    assert functions_of_torch() == before


def test_init_functions_are_replaced_and_removed_as_in_any_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = nn.init.zeros_
    with monkeypatch.context() as patch:
        patch.setattr(nn.init, "zeros_", nn.init.ones_)
        assert torch.equal(nn.init.zeros_(torch.empty(2)), torch.ones(2))
        assert vars(nn.init)["zeros_"] is nn.init.ones_
    assert nn.init.zeros_ is original
    with monkeypatch.context() as patch:
        patch.delattr(nn.init, "zeros_")
        with pytest.raises(AttributeError, match="no attribute 'zeros_'"):
            nn.init.zeros_  # noqa: B018
    assert nn.init.zeros_ is original


def test_a_replacement_that_nothing_gets_past_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None:
            module._parameters[name] = nn.Parameter(torch.empty_like(param, device="meta"))

    monkeypatch.setattr(nn.Module, "register_parameter", on_meta)
    with pytest.raises(WeightliftError, match=r"Made cannot be built.*on_meta"):
        builder(lambda: nn.Linear(2, 2)).build(empty=False)


def test_the_default_dtype_of_another_library_stays(folder: Path) -> None:
    """Set during a construction that sets no default dtype, and restored after it."""

    class Meanwhile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.set_default_dtype(torch.float64)

    try:
        builder(Meanwhile).build(empty=True)
        assert torch.get_default_dtype() == torch.float64
        builder(Meanwhile, torch.float16).build(empty=True)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_first_import_within_another_librarys_patch() -> None:
    code = """
        import torch
        from diffusers.models.modeling_utils import no_init_weights
        import weightlift as wl
        before = torch.nn.init.constant_
        with no_init_weights():
            from weightlift.models.building import Builder
        class Layer(torch.nn.Linear):
            @classmethod
            def from_config(cls, config):
                layer = cls(3, 3)
                torch.nn.init.constant_(layer.weight, 2.0)
                return layer
        assert torch.nn.init.constant_ is before
        with no_init_weights():
            assert (Builder(Layer, {}, {}, None).build(empty=False).weight == 2).all()
        assert torch.nn.init.constant_ is before
        """
    child = run_python(textwrap.dedent(code))
    assert child.returncode == 0, child.stderr


STRESS = '''
"""Rounds of builds: three of ours beside one of another library."""
import faulthandler
import sys
import tempfile
import threading

faulthandler.enable()
import logging

import accelerate
import diffusers
import torch
import transformers
from diffusers.configuration_utils import register_to_config
from torch import nn

import weightlift as wl

rounds = int(sys.argv[1])
torch.set_num_threads(1)
logging.getLogger("weightlift").setLevel(logging.ERROR)
for library in (diffusers, transformers):
    library.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()


def body(model):
    model.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(8)])
    model.tied = nn.Linear(4, 4)
    model.tied.weight = model.layers[0].weight
    model.rnn = nn.GRU(4, 4)
    model.register_buffer("angles", torch.linspace(0.0, 1.0, 4).cos())


class Ours(wl.ModelMixin, wl.ConfigMixin):
    @wl.register_to_config
    def __init__(self, n: int = 4):
        super().__init__()
        body(self)
        self.new = nn.Linear(4, 4)
        nn.init.constant_(self.new.weight, 3.0)
        nn.init.ones_(self.new.bias)


class Theirs(diffusers.ModelMixin, diffusers.ConfigMixin):
    @register_to_config
    def __init__(self, n: int = 4):
        super().__init__()
        body(self)
        self.tied = nn.Linear(4, 4)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        body(self)


root = tempfile.mkdtemp()
source = Ours()
left_out = ("new.weight", "new.bias", "tied.weight")
ours = {k: v.clone() for k, v in source.state_dict().items() if k not in left_out}
source.save_config(f"{root}/ours")
wl.save_file(ours, f"{root}/ours/diffusion_pytorch_model.safetensors")
theirs = Theirs()
theirs.save_pretrained(f"{root}/diffusers")
config = transformers.LlamaConfig(
    vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
)
llama = transformers.LlamaForCausalLM(config)
llama.save_pretrained(f"{root}/transformers")


def same(model, state):
    found = model.state_dict()
    return all(torch.equal(found[name], value) for name, value in state.items())


def load_ours(real):
    model = Ours.from_pretrained(f"{root}/ours", low_cpu_mem_usage=not real)
    assert same(model, ours), "ours: values of the file"
    assert model.tied.weight is model.layers[0].weight, "ours: the tie"
    assert (model.new.weight == 3).all() and (model.new.bias == 1).all(), "ours: values of its own"
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "ours: on meta"
    model.rnn(torch.ones(1, 4))


def load_diffusers():
    assert same(Theirs.from_pretrained(f"{root}/diffusers"), theirs.state_dict()), "diffusers"


def load_transformers():
    model = transformers.LlamaForCausalLM.from_pretrained(f"{root}/transformers")
    assert same(model, llama.state_dict()), "transformers"


def build_by_accelerate():
    with accelerate.init_empty_weights():
        model = Plain()
    assert all(t.is_meta for t in model.parameters()), "accelerate"


def functions():
    found = {name: getattr(nn.init, name) for name in vars(nn.init) if name.endswith("_")}
    others = (nn.Module.register_parameter, torch.linspace, torch.get_default_dtype())
    return {**found, **dict(enumerate(others))}


def run(work, *arguments):
    try:
        work(*arguments)
    except BaseException as error:
        errors.append(f"{work.__name__}: {type(error).__name__}: {error}")


errors = []
before = functions()
others = (load_diffusers, load_transformers, build_by_accelerate)
sys.setswitchinterval(1e-5)
for number in range(rounds):
    threads = [threading.Thread(target=run, args=(load_ours, n == 2)) for n in range(3)]
    threads.append(threading.Thread(target=run, args=(others[number % 3],)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
sys.setswitchinterval(0.005)
assert functions() == before, "the functions of torch"
layer = nn.Linear(64, 64)
nn.init.constant_(layer.weight, 1.0)
assert (layer.weight == 1).all()
print(f"{rounds} rounds, {len(errors)} errors", *sorted(set(errors)), sep="\\n")
sys.exit(bool(errors))
'''


def stress(rounds: int, seconds: float) -> None:
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STRESS), str(rounds)],
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    assert f"{rounds} rounds, 0 errors" in child.stdout


def test_any_number_of_ours_beside_one_of_another_library() -> None:
    stress(15, 240)


@pytest.mark.deep
def test_a_thousand_rounds_of_ours_beside_one_of_another_library() -> None:
    stress(1000, 3600)
