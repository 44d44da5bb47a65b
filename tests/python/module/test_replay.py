"""Loading code that runs a second time, with the parts of its first run, read ahead."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import weightlift as wl
from weight_loaders import Serving, assert_same, checkpoint_of
from weightlift.module.recording.reader import CheckpointReader, sources_of
from weightlift.module.recording.recorder import Recorder
from weightlift.module.recording.replay import Replay, Taken
from weightlift.module.recording.sources import Source


def taken_of(model: Serving, checkpoint: wl.Checkpoint, ahead: int = 0) -> Taken:
    reader = CheckpointReader(checkpoint)
    recorder = Recorder(reader, ahead=ahead)
    recorder.expect([*model.named_parameters(), *model.named_buffers()])
    with recorder.watching():
        model.load_weights(
            (name, recorder.placeholder(name, source)) for name, source in sources(checkpoint)
        )
    recorder.finish()
    recorder.replace_kept()
    return Taken.of(recorder)


def sources(checkpoint: wl.Checkpoint) -> list[tuple[str, Source]]:
    return [(name, source) for name, source in sources_of(checkpoint).items() if source]


@pytest.mark.parametrize("ahead", [0, 1, 20_000, 1 << 30])
@pytest.mark.parametrize("group_bytes", [1, 30_000, 1 << 30])
def test_every_kind_of_weight_loader(ahead: int, group_bytes: int, tmp_path: Path) -> None:
    first = Serving.tensors(torch.Generator().manual_seed(1))
    second = Serving.tensors(torch.Generator().manual_seed(2))
    found, wanted = Serving("cpu"), Serving("cpu")
    old = checkpoint_of(tmp_path, first, "old.safetensors")
    taken = taken_of(found, wl.open_checkpoint(old), ahead)
    wanted.load_weights(load_file(old).items())
    assert_same(found, wanted)

    new = wl.open_checkpoint(checkpoint_of(tmp_path, second, "new.safetensors"))
    assert taken.is_of(sources_of(new))
    whole: dict[str, str] = {}
    reader = CheckpointReader(new)
    replay = Replay(reader, taken, whole, group_bytes=group_bytes)
    found.load_weights(replay.tensors(sources(new)))
    wanted.load_weights((name, tensor.clone()) for name, tensor in second.items())
    assert_same(found, wanted)
    assert whole == {}  # only the parts of the first run were read
    needed = sum(second[name].nbytes for name in taken.whole) + taken.sliced_bytes
    assert reader.report.bytes == needed
    assert needed < 0.6 * sum(tensor.nbytes for tensor in second.values())


def test_another_part_than_at_first_is_read_whole(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(8, 6), "b": torch.randn(8, 6), "unused": torch.randn(4)}
    checkpoint = wl.open_checkpoint(checkpoint_of(tmp_path, tensors))
    taken = Taken(
        dict(sources(checkpoint)),
        {"a": [((4, 6), (6, 1), 0)], "b": [((8, 3), (6, 1), 3)]},
        {},
    )
    whole: dict[str, str] = {}
    reader = CheckpointReader(checkpoint)
    given = dict(Replay(reader, taken, whole).tensors(sources(checkpoint)))
    upper, lower = torch.zeros(4, 6), torch.zeros(4, 6)
    upper.copy_(given["a"][:4])
    assert reader.report.bytes == 4 * 6 * 4 + 8 * 3 * 4
    lower.copy_(given["a"][4:])
    assert torch.equal(upper, tensors["a"][:4])
    assert torch.equal(lower, tensors["a"][4:])
    assert torch.equal(given["b"][:, 3:].to(torch.float64), tensors["b"][:, 3:].double())
    assert torch.equal(given["unused"] + 1, tensors["unused"] + 1)
    assert whole == {
        "a": "another part of it than at first",
        "b": "equal()",
        "unused": "add()",
    }


def test_casts_and_views_of_a_part(tmp_path: Path) -> None:
    tensors = {"t": torch.randn(6, 4)}
    checkpoint = wl.open_checkpoint(checkpoint_of(tmp_path, tensors))
    taken = Taken(dict(sources(checkpoint)), {"t": [((2, 3), (1, 8), 1)]}, {})
    whole: dict[str, str] = {}

    def part(tensor: Tensor) -> Tensor:
        return tensor[::2, 1:3].t()

    given = dict(Replay(CheckpointReader(checkpoint), taken, whole).tensors(sources(checkpoint)))
    rounded = torch.zeros(2, 3, dtype=torch.float64)
    rounded.copy_(part(given["t"]).to(torch.bfloat16))
    assert torch.equal(rounded, part(tensors["t"]).to(torch.bfloat16).double())
    spread = torch.zeros(5, 2, 3)
    with pytest.raises(RuntimeError, match="expanded size"):
        torch.zeros(2, 4).copy_(part(given["t"]))
    spread.copy_(part(given["t"]))  # repeated: none of the parts
    assert torch.equal(spread, part(tensors["t"]).expand(5, 2, 3))
    bits = torch.zeros(2, 3, dtype=torch.int32)
    bits.copy_(part(given["t"].view(torch.int32)))
    assert torch.equal(bits, part(tensors["t"].view(torch.int32)))


def test_other_tensors_of_the_same_names_are_told(tmp_path: Path) -> None:
    old = wl.open_checkpoint(checkpoint_of(tmp_path, {"a": torch.zeros(4), "b": torch.ones(2)}))
    taken = Taken(dict(sources(old)), {"a": [((2,), (1,), 0)]}, {})
    other = {"a": torch.zeros(4), "b": torch.ones(3), "c": torch.zeros(1)}
    assert taken.is_of(sources_of(wl.open_checkpoint(checkpoint_of(tmp_path, other, "2"))))
    other["a"] = torch.zeros(4, dtype=torch.float16)
    assert not taken.is_of(sources_of(wl.open_checkpoint(checkpoint_of(tmp_path, other, "3"))))


def test_reading_ahead_while_the_code_runs_keeps_the_order_of_writes(tmp_path: Path) -> None:
    tensors = {name: torch.randn(64, 64) for name in "abc"}
    checkpoint = wl.open_checkpoint(checkpoint_of(tmp_path, tensors))
    reader = CheckpointReader(checkpoint)
    recorder = Recorder(reader, ahead=1)
    into = torch.zeros(64, 64)
    with recorder.watching():
        given = {name: recorder.placeholder(name, s) for name, s in sources(checkpoint)}
        into.copy_(given["a"])
        into[:32].copy_(given["b"][:32])
        into[:8].fill_(5)
        into[40:].copy_(given["c"][40:])
        seen = into.clone()
        into[0].copy_(given["c"][0])
    recorder.finish()
    wanted = tensors["a"].clone()
    wanted[:32] = tensors["b"][:32]
    wanted[:8] = 5
    wanted[40:] = tensors["c"][40:]
    assert torch.equal(seen, wanted)
    wanted[0] = tensors["c"][0]
    assert torch.equal(into, wanted)


@pytest.mark.parametrize("ahead", [0, 1])
def test_threads_of_the_code_get_their_bytes_there_and_then(ahead: int, tmp_path: Path) -> None:
    tensors = {str(i): torch.randn(16, 8) for i in range(40)}
    checkpoint = wl.open_checkpoint(checkpoint_of(tmp_path, tensors))
    reader = CheckpointReader(checkpoint)
    recorder = Recorder(reader, ahead=ahead, threads=True)
    into = torch.zeros(40, 8, 8, dtype=torch.float64)
    sums = torch.zeros(40, dtype=torch.float64)

    def load(i: int, tensor: Tensor) -> None:
        into[i].copy_(tensor.narrow(0, 8, 8))
        into[i, 0].mul_(2)  # seen by nobody
        if i % 5 == 0:
            sums[i] = tensor.sum().item()

    with recorder.watching(), ThreadPoolExecutor(4) as pool:
        given = [(int(n), recorder.placeholder(n, s)) for n, s in sources(checkpoint)]
        for i, tensor in given:
            into[i].copy_(tensor[:8])  # waits until a thread writes to the same memory
        done = [pool.submit(load, i, tensor) for i, tensor in given]
    for one in done:
        one.result()
    recorder.finish()
    for i in range(40):
        wanted = tensors[str(i)][8:].double()
        wanted[0] *= 2
        assert torch.equal(into[i], wanted)
        assert sums[i].item() == (tensors[str(i)].sum().item() if i % 5 == 0 else 0)
    assert set(recorder.whole.values()) == {"sum()"}
    assert set(Taken.of(recorder).parts) == set(tensors)


def test_an_error_of_the_code_leaves_nothing_running(tmp_path: Path) -> None:
    tensors = {name: torch.randn(512, 512) for name in "abc"}
    checkpoint = wl.open_checkpoint(checkpoint_of(tmp_path, tensors))
    recorder = Recorder(CheckpointReader(checkpoint), ahead=1)
    into = torch.zeros(512, 512)

    def fail() -> None:
        with recorder.watching():
            into.copy_(recorder.placeholder("a", dict(sources(checkpoint))["a"]))
            raise KeyError("of the code")

    with pytest.raises(KeyError, match="of the code"):
        fail()
    before = into.clone()
    recorder.finish()
    assert torch.equal(into, before)
