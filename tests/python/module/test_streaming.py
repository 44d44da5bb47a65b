"""``stream``: models that are larger than their memory budget."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import support
import weightlift as wl
from weightlift.module.streaming.streamed_weight import StreamedWeight

WIDTH, LAYERS, WORDS = 64, 6, 100
TOKENS = torch.arange(7)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.register_buffer("scale", torch.rand(WIDTH))
        self.register_buffer("steps", torch.arange(3), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(self.norm(x)))) * self.scale + self.steps[0]


class Model(nn.Module):
    """Tied embeddings, a module in two places, convolutions, own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.shift = nn.Parameter(torch.rand(WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.again = self.blocks[0]
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.recurrent = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def embed(self, tokens: torch.Tensor) -> Any:
        return self.embedding(tokens)[None] + self.shift

    def forward(self, tokens: torch.Tensor) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.recurrent(self.mix(self.again(x).mT).mT)[0]
        return self.head(x)


def on_meta() -> Model:
    with torch.device("meta"):
        model = Model().eval()
    for block in model.blocks:
        block.steps = torch.arange(3)
    return model


@pytest.fixture(scope="module")
def original() -> Model:
    torch.manual_seed(1)
    return Model().eval()


@pytest.fixture(scope="module")
def size(original: Model) -> int:
    return sum(parameter.nbytes for parameter in original.parameters())


@pytest.fixture(scope="module", params=["safetensors", "torch", "shards"])
def saved(request: pytest.FixtureRequest, original: Model, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("saved")
    state = original.state_dict()
    for name in list(state):
        if name.startswith("again.") or name == "head.weight":
            del state[name]
    if request.param == "torch":
        torch.save(state, folder / "pytorch_model.bin")
        return folder / "pytorch_model.bin"
    if request.param == "shards":
        wl.save_checkpoint(state, folder, max_shard_size="200KB")
        return folder
    safetensors.torch.save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture
def file(original: Model, tmp_path: Path) -> Path:
    state = original.state_dict()
    state = {n: t for n, t in state.items() if not n.startswith("again.") and n != "head.weight"}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def places(model: nn.Module) -> dict[str, int]:
    tensors = [*model.named_parameters(remove_duplicate=False),
               *model.named_buffers(remove_duplicate=False)]  # fmt: skip
    return {name: id(tensor) for name, tensor in tensors}


def expected_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: support.bits(tensor) for name, tensor in model.state_dict().items()}


def streams() -> int:
    return sum(thread.name == "weightlift-stream" for thread in threading.enumerate())


class TestForward:
    @pytest.mark.parametrize(
        ("part", "lookahead"), [(0.2, 2), (0.5, 0), (0.5, 2), (0.9, 3), (2, 2)]
    )
    def test_is_that_of_the_whole_model(
        self, original: Model, saved: Path, size: int, part: float, lookahead: int
    ) -> None:
        model = on_meta()
        before = places(model)
        memory = int(size * part)
        with wl.stream(model, saved, device="cpu", memory=memory, lookahead=lookahead) as handle:
            assert handle.resident_bytes + handle.buffer_bytes <= memory
            assert (handle.streamed_bytes > 0) == (part < 1) == (streams() == 1)
            for how in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                with how():
                    support.assert_same(model(TOKENS).detach(), original(TOKENS).detach())
        assert places(model) == before
        assert all(parameter.is_meta for parameter in model.parameters())
        assert streams() == 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_in_another_dtype(
        self, original: Model, saved: Path, size: int, dtype: torch.dtype
    ) -> None:
        model = on_meta()
        expected = copy.deepcopy(original).to(dtype)
        with wl.stream(model, saved, device="cpu", memory=size // 2, dtype=dtype):
            support.assert_same(model(TOKENS).detach(), expected(TOKENS).detach())
            assert {p.dtype for p in model.parameters()} == {dtype}

    def test_of_a_model_in_memory_that_is_cast(self, original: Model, size: int) -> None:
        model = copy.deepcopy(original)
        before = places(model)
        expected = copy.deepcopy(original).to(torch.bfloat16)
        with wl.stream(model, device="cpu", memory=size // 6, dtype="bfloat16") as handle:
            assert handle.streamed_bytes
            support.assert_same(model(TOKENS).detach(), expected(TOKENS).detach())
        assert places(model) == before
        support.assert_same(model(TOKENS).detach(), original(TOKENS).detach())

    def test_nothing_is_streamed_that_is_where_it_is_used(self, original: Model) -> None:
        with wl.stream(original, device="cpu", memory=1) as handle:
            assert (handle.streamed_bytes, handle.resident_bytes) == (0, 0)
            assert original(TOKENS) is not None

    def test_of_real_tensors_with_a_checkpoint_leaves_them(
        self, original: Model, file: Path, size: int
    ) -> None:
        model = Model().eval()
        before, values = places(model), expected_bytes(model)
        with wl.stream(model, file, device="cpu", memory=size // 2):
            support.assert_same(model(TOKENS).detach(), original(TOKENS).detach())
        assert (places(model), expected_bytes(model)) == (before, values)

    def test_by_another_method(self, original: Model, file: Path, size: int) -> None:
        model = on_meta()
        with wl.stream(model, file, device="cpu", memory=size // 5):
            support.assert_same(model.embed(TOKENS).detach(), original.embed(TOKENS).detach())
            ours = nn.functional.linear(model.embed(TOKENS), model.blocks[3].up.weight[:5].clone())
            theirs = nn.functional.linear(
                original.embed(TOKENS), original.blocks[3].up.weight[:5].clone()
            )
            support.assert_same(ours.detach(), theirs.detach())

    def test_the_order_is_learned(self, file: Path, size: int) -> None:
        """Only the block that is used next is read: each use of a block has at most one read."""
        model = on_meta()
        seen: dict[str, list[str]] = {"read": [], "wait": [], "use": []}
        with wl.stream(model, file, device="cpu", memory=size // 3, lookahead=2) as handle:
            model(TOKENS)
            model(TOKENS)
            handle.trace(lambda kind, block, *_: seen[kind].append(block))
            for _ in range(3):
                model(TOKENS)
            handle.trace(None)
        assert set(seen["read"]) <= set(seen["use"])
        assert len(seen["use"]) >= 3 * len(handle.blocks)
        assert len(seen["read"]) <= len(seen["use"]) + 2


class TestTensors:
    @pytest.fixture
    def model(self, file: Path, size: int) -> Any:
        model = on_meta()
        with wl.stream(model, file, device="cpu", memory=size // 4):
            yield model

    def test_tell_what_they_are(self, model: Model, original: Model) -> None:
        streamed = [p for p in model.parameters() if isinstance(p, StreamedWeight)]
        assert streamed
        assert all(isinstance(p, nn.Parameter) and p.device.type == "cpu" for p in streamed)
        for (name, ours), (_, theirs) in zip(
            model.named_parameters(), original.named_parameters(), strict=True
        ):
            assert (ours.shape, ours.dtype, ours.stride(), ours.requires_grad) == (
                theirs.shape, theirs.dtype, theirs.stride(), theirs.requires_grad,
            ), name  # fmt: skip
            assert torch.equal(ours, theirs), name
        assert "StreamedWeight('" in repr(streamed[0])

    def test_ties_and_shared_modules(self, model: Model) -> None:
        assert model.head.weight is model.embedding.weight
        assert model.again is model.blocks[0]

    @pytest.mark.parametrize(
        "view",
        [
            lambda t: t.t(), lambda t: t[3:9, ::2], lambda t: t.chunk(4)[1], lambda t: t.view(-1),
            lambda t: t.unsqueeze(0).expand(2, -1, -1), lambda t: t.mT.reshape(-1)[5:],
            lambda t: t.view(torch.int32), lambda t: t.diagonal(), lambda t: t.detach().T,
            lambda t: t.narrow(0, 2, 3).unbind(1)[4], lambda t: t.data, lambda t: t.contiguous(),
            lambda t: t.to(torch.float32), lambda t: t.as_strided((5, 3), (7, 2), 11),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
    def test_views(
        self, model: Model, original: Model, view: Callable[[torch.Tensor], torch.Tensor], how: Any
    ) -> None:
        for number in range(LAYERS):
            with how():
                ours = view(model.blocks[number].up.weight)
                for block in model.blocks:  # others get the buffer meanwhile
                    block.down.weight.sum()
                theirs = view(original.blocks[number].up.weight)
                assert torch.equal(ours, theirs)

    def test_what_comes_out_of_an_operation_stays(self, model: Model, original: Model) -> None:
        kept = [block.up.weight.clone() for block in model.blocks]
        for block in model.blocks:
            block.down.weight.sum()
        for block, ours in zip(original.blocks, kept, strict=True):
            assert torch.equal(ours, block.up.weight)

    def test_an_operation_with_more_weights_than_buffers(
        self, model: Model, original: Model
    ) -> None:
        ours = torch.cat([p.reshape(-1) for p in model.parameters()])
        assert torch.equal(ours, torch.cat([p.reshape(-1) for p in original.parameters()]))

    def test_copies_and_pickles(self, model: Model, original: Model) -> None:
        expected = original(TOKENS)
        copied = copy.deepcopy(model)
        assert isinstance(copied.blocks[3].up.weight, StreamedWeight) == isinstance(
            model.blocks[3].up.weight, StreamedWeight
        )
        assert copied.head.weight is copied.embedding.weight is not model.head.weight
        assert torch.equal(copied(TOKENS), expected)
        unpickled = pickle.loads(pickle.dumps(model))
        assert not any(isinstance(p, StreamedWeight) for p in unpickled.parameters())
        assert torch.equal(unpickled(TOKENS), expected)
        assert unpickled.half().blocks[3].up.weight.dtype == torch.float16

    def test_moves_and_casts_are_refused(self, model: Model, original: Model) -> None:
        for move in (
            lambda: model.half(), lambda: model.to(torch.float64), lambda: model.to("meta"),
            lambda: copy.deepcopy(model).half(), lambda: model.blocks[2].up.bfloat16(),
            lambda: model.blocks[2].up.to_empty(device="cpu"),
        ):  # fmt: skip
            with pytest.raises(wl.WeightliftError, match="cannot be moved or cast"):
                move()
        before = places(model)
        assert model.to("cpu").to(torch.float32).cpu().float() is model
        assert places(model) == before
        assert torch.equal(model(TOKENS), original(TOKENS))

    def test_a_state_dict_is_saved(self, model: Model, original: Model) -> None:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        support.assert_same_tensors(loaded, dict(original.state_dict()))

    def test_safetensors_are_saved(self, model: Model, original: Model, tmp_path: Path) -> None:
        state = model.state_dict()
        with pytest.raises(RuntimeError, match="share memory"):
            wl.save_file(state, tmp_path / "a.safetensors")
        alone = {n: t for n, t in state.items() if not n.startswith("again.") and n[:4] != "head"}
        wl.save_file(alone, tmp_path / "a.safetensors")
        expected = original.state_dict()
        for name, tensor in safetensors.torch.load_file(tmp_path / "a.safetensors").items():
            support.assert_same(tensor, expected[name])


def test_a_copy_outlives_the_handle(original: Model, file: Path, size: int) -> None:
    model = on_meta()
    with wl.stream(model, file, device="cpu", memory=size // 4):
        copied = copy.deepcopy(model)
    assert torch.equal(copied(TOKENS), original(TOKENS))


def test_a_model_that_is_dropped_ends_its_thread(file: Path, size: int) -> None:
    model = on_meta()
    handle = wl.stream(model, file, device="cpu", memory=size // 4)
    model(TOKENS)
    assert streams() == 1
    thread = next(t for t in threading.enumerate() if t.name == "weightlift-stream")
    del model, handle
    thread.join(10)
    assert not thread.is_alive()
