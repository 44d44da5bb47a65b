"""Streamed models: budgets, errors and failures."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import support
import weightlift as wl
from weightlift.module.streaming.residency import Piece, cut, share_out
from weightlift.module.streaming.sources import FileSource
from weightlift.module.streaming.streamed_weight import StreamedWeight

WIDTH, LAYERS = 48, 8
X = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)


class Stack(nn.Module):
    """``order``: which layers run, one after another."""

    def __init__(self, layers: int = LAYERS, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.order = list(range(layers))

    def forward(self, x: torch.Tensor) -> Any:
        for number in self.order:
            x = torch.tanh(self.layers[number](x))
        return x


LAYER_BYTES = 512 * ((WIDTH * WIDTH * 4 + 511) // 512) + 512


def on_meta() -> Stack:
    with torch.device("meta"):
        return Stack().eval()


@pytest.fixture
def original() -> Stack:
    torch.manual_seed(2)
    return Stack().eval()


@pytest.fixture
def file(original: Stack, tmp_path: Path) -> Path:
    safetensors.torch.save_file(original.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def model(file: Path) -> Iterator[Stack]:
    """A budget for one layer that stays, and buffers for three."""
    model = on_meta()
    with wl.stream(model, file, device="cpu", memory=4 * LAYER_BYTES):
        yield model


def run(model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        model(X)


def streamed(model: nn.Module) -> list[int]:
    return [
        number
        for number, layer in enumerate(model.layers)
        if isinstance(layer.weight, StreamedWeight)
    ]


class TestBudget:
    def test_too_small_names_the_layer_and_what_suffices(self, file: Path) -> None:
        model = on_meta()
        before = [id(parameter) for parameter in model.parameters()]
        with pytest.raises(wl.ArgumentError, match=r"layer 'layers\.0' alone takes") as caught:
            wl.stream(model, file, device="cpu", memory=LAYER_BYTES - 1)
        assert [id(parameter) for parameter in model.parameters()] == before
        smallest = int(str(caught.value).split("works is ")[1].split(" ")[0].replace(",", ""))
        with wl.stream(model, file, device="cpu", memory=smallest) as handle:
            assert handle.buffer_bytes == smallest
            assert model(X).shape == X.shape
        with pytest.raises(wl.ArgumentError, match="smallest budget"):
            wl.stream(model, file, device="cpu", memory=smallest - 1)

    @pytest.mark.parametrize(
        ("given", "error", "text"),
        [
            ({"memory": 0}, wl.ArgumentError, "memory is 0"),
            ({"memory": -5}, wl.ArgumentError, "memory is -5"),
            ({"memory": "2 gigs"}, wl.ArgumentError, "memory is '2 gigs'"),
            ({"memory": None}, wl.ArgumentError, "memory is None"),
            ({"lookahead": -1}, wl.ArgumentError, "lookahead is -1"),
            ({"lookahead": "2"}, wl.ArgumentError, "lookahead is '2'"),
            ({"device": "meta"}, wl.DeviceError, "meta"),
            ({"device": "nonsense"}, wl.DeviceError, "nonsense"),
            ({"dtype": "int7"}, wl.ArgumentError, "int7"),
        ],
        ids=str,
    )
    def test_arguments(self, file: Path, given: Any, error: Any, text: str) -> None:
        model = on_meta()
        with pytest.raises(error, match=text):
            wl.stream(model, file, **{"device": "cpu", "memory": "1GB", **given})
        assert all(parameter.is_meta for parameter in model.parameters())

    def test_cuda_without_a_gpu(self, file: Path) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(wl.DeviceError, match="no GPU"):
            wl.stream(on_meta(), file, device="cuda", memory="1GB")

    def test_what_stays_lies_evenly_between_what_is_read(self) -> None:
        pieces = [Piece(f"{n}", (f"{n}",), 100) for n in range(12)]
        for stays in range(9):
            share = share_out(pieces, 300 + 100 * stays, 0, 2)
            assert share.buffers == 3
            assert len(share.resident) == stays
            read = [n for n in range(12) if n not in share.resident]
            gaps = [b - a for a, b in zip(read, [*read[1:], read[0] + 12], strict=True)]
            assert max(gaps) - min(gaps) <= 1, read

    def test_the_largest_stays_where_buffers_of_its_size_would_cost_more(self) -> None:
        pieces = [Piece("big", ("big",), 500), *(Piece(f"{n}", (f"{n}",), 50) for n in range(20))]
        share = share_out(pieces, 800, 0, 2)
        assert 0 in share.resident
        assert (share.buffers, share.buffer_bytes) == (3, 50)
        assert len(share.resident) == 1 + (800 - 500 - 150) // 50

    def test_a_cut_takes_whole_modules(self) -> None:
        sizes = {f"layers.{n}.{part}": 10 for n in range(4) for part in ("a.w", "b.w", "b.v")}
        whole = cut(sizes, 12 * 30, 2)
        assert [piece.name for piece in whole] == [f"layers.{n}" for n in range(4)]
        single = cut(sizes, 12 * 20, 2)
        assert [piece.bytes for piece in single] == [10, 20] * 4
        assert [name for piece in single for name in piece.weights] == list(sizes)

    def test_small_neighbours_are_read_together(self) -> None:
        many = {f"{number}.w": 10 for number in range(1000)}
        pieces = cut(many, 1200, 2)
        assert {piece.bytes for piece in pieces} == {100}
        assert [name for piece in pieces for name in piece.weights] == list(many)
        beside = {"norm.w": 5, "big.w": 160, "other.w": 5, "big2.w": 160, "small.w": 30}
        assert [(piece.name, piece.bytes) for piece in cut(beside, 120, 2)] == [
            ("big", 170), ("big2", 160), ("small", 30),
        ]  # fmt: skip

    def test_what_a_step_uses_more_often_stays(self, original: Stack, file: Path) -> None:
        model = on_meta()
        order = [0, 5, 1, 5, 2, 5, 3, 5, 4, 5, 6, 5, 7]
        model.order = original.order = order
        expected = original(X)
        with wl.stream(model, file, device="cpu", memory=4 * LAYER_BYTES) as handle:
            for _ in range(3):
                assert torch.equal(model(X), expected)
                assert handle.resident_bytes + handle.buffer_bytes <= 4 * LAYER_BYTES
            assert 5 not in streamed(model)
        assert all(parameter.is_meta for parameter in model.parameters())

    def test_many_steps_leak_nothing(self, model: Stack) -> None:
        for _ in range(5):
            model(X)
        time.sleep(0.2)  # the reads ahead have threads and memory of their own
        gc.collect()
        before = len(gc.get_objects()), support.open_files(), support.tasks()
        memory = support.anonymous_bytes()
        for _ in range(100):
            model(X)
        time.sleep(0.2)
        gc.collect()
        assert len(gc.get_objects()) - before[0] < 100
        assert (support.open_files(), support.tasks()) == before[1:]
        assert support.anonymous_bytes() - memory < 4 << 20

    def test_operations_leave_no_garbage(self, model: Stack) -> None:
        """Reference cycles would stay, with what they hold, until the garbage collector runs."""
        number = streamed(model)[0]
        layer = model.layers[number]
        x = X.clone()

        def step() -> None:
            model(X)
            nn.functional.layer_norm(X, (WIDTH,), layer.bias)  # a list, and three results
            torch.cat([layer.bias, layer.bias])
            layer.weight.split(16)
            x.add_(layer.bias)

        with torch.no_grad():
            step()
            time.sleep(0.2)
            gc.collect()
            gc.disable()
            try:
                for _ in range(10):
                    step()
                time.sleep(0.2)  # the reads ahead end
                assert gc.collect() == 0
            finally:
                gc.enable()


class TestReadOnly:
    def test_training_is_refused(self, model: Stack) -> None:
        names = "|".join(rf"layers\.{number}\." for number in streamed(model))
        with pytest.raises(RuntimeError, match=rf"tensor '({names}).*cannot be trained"):
            model(X).sum().backward()

    def test_writes_are_refused(self, model: Stack) -> None:
        layer = model.layers[streamed(model)[0]]
        before = layer.weight.clone()
        for write in (
            lambda: layer.weight.add_(1), lambda: layer.weight[0].zero_(),
            lambda: layer.weight.data.zero_(),
            lambda: nn.init.normal_(layer.weight), lambda: layer.weight.copy_(X[:1]),
            lambda: layer.load_state_dict({"weight": before, "bias": layer.bias.clone()}),
            lambda: torch.add(before, 1, out=layer.weight),
            lambda: torch._foreach_add_([layer.weight], 1),
        ):  # fmt: skip
            with (
                torch.no_grad(),
                pytest.raises(RuntimeError, match="would write to tensor 'layers"),
            ):
                write()
        assert torch.equal(layer.weight, before)

    def test_an_optimizer_is_refused(self, model: Stack) -> None:
        layer = model.layers[streamed(model)[0]]
        layer.weight.grad = torch.ones(WIDTH, WIDTH)
        with pytest.raises(RuntimeError, match="would write to"):
            torch.optim.SGD(layer.parameters(), lr=1).step()

    def test_loading_into_it_is_refused(self, model: Stack, file: Path) -> None:
        with pytest.raises(wl.ArgumentError, match="streamed"):
            wl.load_into(model, file)

    def test_adapters_are_trained(self, original: Stack, file: Path) -> None:
        """LoRA: the gradient goes through weights whose buffers were reused."""
        results = []
        for streams in (False, True):
            model = copy.deepcopy(original)
            with contextlib.ExitStack() as inside:
                model.requires_grad_(False)
                if streams:
                    inside.enter_context(
                        wl.stream(model, file, device="cpu", memory=2 * LAYER_BYTES)
                    )
                    assert streamed(model)
                torch.manual_seed(3)
                for number, layer in enumerate(model.layers):
                    model.layers[number] = LoRA(layer)
                adapters = [p for p in model.parameters() if p.requires_grad]
                optimizer = torch.optim.AdamW(adapters, lr=0.1)
                for _ in range(3):
                    loss = model(X).square().sum()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                results.append([loss.detach(), *(p.detach().clone() for p in adapters)])
        for ours, theirs in zip(*results, strict=True):
            support.assert_same(ours, theirs)

    def test_checkpointed_activations(self, original: Stack, model: Stack) -> None:
        from torch.utils.checkpoint import checkpoint

        model.requires_grad_(False)
        gradients = []
        for each in (original, model):
            x = X.clone().requires_grad_()
            checkpoint(each, x, use_reentrant=False).sum().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)


class LoRA(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(WIDTH, 4, bias=False)
        self.up = nn.Linear(4, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.base(x) + self.up(self.down(x))


class TestAround:
    def test_an_order_that_changes_every_step(self, model: Stack, original: Stack) -> None:
        numbers = random.Random(4)
        for _ in range(20):
            order = [numbers.randrange(LAYERS) for _ in range(numbers.randrange(1, 12))]
            model.order = original.order = order
            assert torch.equal(model(X), original(X)), order

    def test_the_order_of_an_earlier_run(self, file: Path, original: Stack) -> None:
        """Streams and background loads cut blocks in this order."""
        backwards = [*reversed(range(LAYERS))]
        original.order = backwards
        names = []
        for _ in range(2):
            model = on_meta()
            model.order = backwards
            with wl.stream(model, file, device="cpu", memory=4 * LAYER_BYTES) as handle:
                names.append(handle.blocks)
                assert torch.equal(model(X), original(X))
        assert names[0] == sorted(names[0])
        assert names[1] == sorted(names[1], reverse=True)

    def test_an_order_that_leaves_layers_out_is_not_kept(self, file: Path) -> None:
        for order in ([7, 0], [0]):
            model = on_meta()
            model.order = order
            with wl.stream(model, file, device="cpu", memory=4 * LAYER_BYTES) as handle:
                assert handle.blocks == sorted(handle.blocks)
                model(X)

    def test_threads_in_one_model(self, model: Stack, original: Stack) -> None:
        """More threads than buffers, each in its own order."""
        model.requires_grad_(False)
        errors: list[BaseException] = []

        def run(seed: int) -> None:
            numbers = random.Random(seed)
            try:
                for _ in range(10):
                    x, y = X, X
                    for number in numbers.sample(range(LAYERS), LAYERS):
                        x, y = model.layers[number](x), original.layers[number](y)
                        assert torch.equal(x, y)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors
        assert not any(thread.is_alive() for thread in threads)

    def test_an_exception_within_forward(self, model: Stack, original: Stack) -> None:
        for _ in range(5):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                model.layers[streamed(model)[-1]](torch.ones(1, 3))
            model.order = [0, 99]
            with pytest.raises(IndexError):
                model(X)
            model.order = original.order
            assert torch.equal(model(X), original(X))

    def test_hooks_of_others(self, model: Stack, original: Stack) -> None:
        seen: list[torch.Tensor] = []
        number = streamed(model)[1]
        layer = model.layers[number]
        before = layer.register_forward_pre_hook(lambda m, _: seen.append(m.weight.sum()))
        after = layer.register_forward_hook(lambda m, _, y: y + m.bias)
        other = original.layers[number].register_forward_hook(lambda m, _, y: y + m.bias)
        assert torch.equal(model(X), original(X))
        assert torch.equal(seen[0], original.layers[number].weight.sum())
        for hook in (before, after, other):
            hook.remove()

    def test_copies_before_the_first_step(self, file: Path, original: Stack) -> None:
        model = on_meta()
        with wl.stream(model, file, device="cpu", memory=4 * LAYER_BYTES):
            for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(copied(X), original(X))

    def test_compiled(self, model: Stack, original: Stack) -> None:
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(compiled(X), original(X))

    def test_begun_in_inference_mode(self, file: Path, original: Stack) -> None:
        model = on_meta()
        model.order = original.order = [0, 5, 1, 5, 2, 5, 3, 5, 4]
        with torch.inference_mode():
            handle = wl.stream(model, file, device="cpu", memory=4 * LAYER_BYTES)
            assert torch.equal(model(X), original(X))
        with handle:
            model.requires_grad_(False)
            gradients = []
            for each in (original, model):
                x = X.clone().requires_grad_()
                each(x).sum().backward()
                gradients.append(x.grad)
            assert torch.equal(*gradients)

    def test_functional_call(self, model: Stack, original: Stack) -> None:
        ours = torch.func.functional_call(model, {"layers.0.bias": torch.ones(WIDTH)}, (X,))
        theirs = torch.func.functional_call(original, {"layers.0.bias": torch.ones(WIDTH)}, (X,))
        assert torch.equal(ours, theirs)

    def test_a_fork(self, model: Stack, original: Stack) -> None:
        with torch.no_grad():
            expected = original(X)
            model(X)
            torch.set_num_threads(1)

            def child() -> None:
                assert torch.equal(model(X), expected)

            assert support.in_child(child) == 0

    def test_the_checkpoint_is_closed(self, file: Path, original: Stack) -> None:
        model = on_meta()
        with wl.open_checkpoint(file) as checkpoint:
            handle = wl.stream(model, checkpoint, device="cpu", memory=4 * LAYER_BYTES)
        with handle:
            assert torch.equal(model(X), original(X))

    def test_closed_twice_and_by_another_thread(self, file: Path, original: Stack) -> None:
        model = on_meta()
        handle = wl.stream(model, file, device="cpu", memory=4 * LAYER_BYTES)
        model(X)
        assert "streamed through" in repr(handle)
        threads = [threading.Thread(target=handle.close) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        handle.close()
        assert handle.closed
        assert "closed" in repr(handle)
        with wl.stream(model, file, device="cpu", memory="1MB"):
            assert torch.equal(model(X), original(X))

    def test_closed_while_another_thread_computes(self, file: Path, original: Stack) -> None:
        with torch.no_grad():
            expected = original(X)
            for _ in range(5):
                model = on_meta()
                handle = wl.stream(model, file, device="cpu", memory=3 * LAYER_BYTES)
                weights = [(layer.weight, layer.bias) for layer in model.layers]
                results: list[torch.Tensor] = []

                def run(weights: Any = weights, results: Any = results) -> None:
                    x = X
                    for weight, bias in weights:
                        x = torch.tanh(nn.functional.linear(x, weight, bias))
                    results.append(x)

                thread = threading.Thread(target=run)
                thread.start()
                handle.close()
                thread.join(20)
                assert torch.equal(results[0], expected)


class TestRefused:
    def test_streamed_already(self, model: Stack, file: Path) -> None:
        with pytest.raises(wl.ArgumentError, match="already streamed"):
            wl.stream(model, file, device="cpu", memory="1MB")

    def test_on_meta_without_a_checkpoint(self) -> None:
        with pytest.raises(wl.ArgumentError, match=r"'layers\.0\.weight' is on meta"):
            wl.stream(on_meta(), device="cpu", memory="1MB")

    def test_accelerates_hooks(self, original: Stack) -> None:
        accelerate = pytest.importorskip("accelerate")
        accelerate.cpu_offload(original, execution_device="cpu")
        with pytest.raises(wl.ArgumentError, match="accelerate's hooks"):
            wl.stream(original, device="cpu", memory="1MB")

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated:DeprecationWarning")
    def test_torchscript(self) -> None:
        scripted = torch.jit.script(nn.Linear(2, 2))
        with pytest.raises(wl.ArgumentError, match="TorchScript"):
            wl.stream(scripted, device="cpu", memory="1MB")

    def test_a_checkpoint_that_does_not_fit(self, tmp_path: Path) -> None:
        safetensors.torch.save_file(Stack(3).state_dict(), tmp_path / "a.safetensors")
        model = on_meta()
        with pytest.raises(wl.CheckpointError, match=r"layers\.7\.bias"):
            wl.stream(model, tmp_path / "a.safetensors", device="cpu", memory="1MB")
        assert all(parameter.is_meta for parameter in model.parameters())
        with pytest.raises(FileNotFoundError):
            wl.stream(model, tmp_path / "b.safetensors", device="cpu", memory="1MB")


class TestFiles:
    """Never an old or half-written weight: the right one, or an error that names the file."""

    def test_one_that_shrinks(self, model: Stack, original: Stack, file: Path) -> None:
        assert torch.equal(model(X), original(X))
        os.truncate(file, file.stat().st_size // 2)
        for _ in range(2):
            with pytest.raises(wl.ReadError, match=r"model\.safetensors"):
                model(X)

    def test_one_that_is_written_to(self, model: Stack, original: Stack, file: Path) -> None:
        assert torch.equal(model(X), original(X))
        content = bytearray(file.read_bytes())
        content[-WIDTH * WIDTH * 4 :] = bytes(WIDTH * WIDTH * 4)
        time.sleep(0.02)  # the clock of modification times ticks slowly
        with file.open("r+b") as written:
            written.write(content)
        with pytest.raises(wl.ReadError, match=r"written to|changed"):
            run(model, 3)

    def test_one_that_vanishes_or_is_replaced(
        self, model: Stack, original: Stack, file: Path, tmp_path: Path
    ) -> None:
        expected = original(X)
        assert torch.equal(model(X), expected)
        safetensors.torch.save_file(Stack().state_dict(), tmp_path / "other")
        (tmp_path / "other").replace(file)
        assert torch.equal(model(X), expected)
        file.unlink()
        assert torch.equal(model(X), expected)

    def test_a_disk_that_fails_and_recovers(
        self, model: Stack, original: Stack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = original(X)
        fill, broken = FileSource.fill, threading.Event()

        def failing(self: FileSource, names: Any, targets: Any) -> None:
            if broken.is_set():
                for target in targets:  # half-written
                    target.view(-1)[: target.numel() // 2] = 7
                raise wl.ReadError(5, "Input/output error", "model.safetensors")
            fill(self, names, targets)

        monkeypatch.setattr(FileSource, "fill", failing)
        for _ in range(3):
            broken.set()
            with pytest.raises(wl.ReadError, match="Input/output error"):
                run(model, 2)
            broken.clear()
            assert torch.equal(model(X), expected)

    def test_ctrl_c_while_waiting(
        self, model: Stack, original: Stack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = original(X)
        model(X)
        fill, go_on = FileSource.fill, threading.Event()

        def slow(self: FileSource, names: Any, targets: Any) -> None:
            go_on.wait(30)
            fill(self, names, targets)

        monkeypatch.setattr(FileSource, "fill", slow)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(model, 3)
        assert time.monotonic() - begin < 10
        go_on.set()
        assert torch.equal(model(X), expected)
