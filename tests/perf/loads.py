"""The loads whose cost is counted, and the process that runs them for run.py."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import weightlift as wl
from weightlift import _native
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.load.load_tensors import load_tensors

TESTS = Path(__file__).resolve().parents[1]


class Block(torch.nn.Module):
    """Two parameters that are cheap to make, because torch's own constructors cost more than a
    load."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(64, dtype=torch.bfloat16))
        self.bias = torch.nn.Parameter(torch.empty(64, dtype=torch.bfloat16))


class Model(wl.ModelMixin, wl.ConfigMixin):
    @wl.register_to_config
    def __init__(self, tensors: int = 2) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(tensors // 2))


# --- Files -------------------------------------------------------------------------------------


def many_tensors(size: int) -> dict[str, torch.Tensor]:
    """The tensors of ``Model``."""
    return {
        f"layers.{n // 2}.{('weight', 'bias')[n % 2]}": torch.full((64,), n, dtype=torch.bfloat16)
        for n in range(size)
    }


def large_tensors(size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """This many MiB, in tensors of 4 MiB."""
    values = torch.linspace(-8, 8, (4 << 20) // dtype.itemsize).to(dtype)
    return {f"layers.{n}.weight": values.clone() for n in range(size // 4)}


def _model(folder: Path, size: int) -> Path:
    path = folder / f"model-{size}"
    if not path.exists():
        path.mkdir()
        save_file(many_tensors(size), path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({"_class_name": "Model", "tensors": size}))
    return path


def _file(folder: Path, size: int) -> Path:
    return _model(folder, size) / "model.safetensors"


def _large(dtype: torch.dtype, folder: Path, size: int) -> Path:
    path = folder / f"large-{dtype}-{size}.safetensors"
    if not path.exists():
        save_file(large_tensors(size, dtype), path)
    return path


def _torch_file(folder: Path, size: int) -> Path:
    path = folder / f"tensors-{size}.bin"
    if not path.exists():
        torch.save(many_tensors(size), path)
    return path


def _shards(folder: Path, size: int) -> Path:
    """Four tensors in each file, for the cost of a file."""
    path = folder / f"shards-{size}"
    if not path.exists():
        path.mkdir()
        tensors = many_tensors(4 * size)
        names = list(tensors)
        weight_map: dict[str, str] = {}
        for n in range(size):
            shard = {name: tensors[name] for name in names[4 * n : 4 * n + 4]}
            file = f"model-{n + 1:05}-of-{size:05}.safetensors"
            save_file(shard, path / file)
            weight_map |= dict.fromkeys(shard, file)
        content = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(content))
    return path


def _llama(folder: Path, size: int) -> Path:
    """Nine tensors in each layer."""
    path = folder / f"llama-{size}"
    if not path.exists():
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=size,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        LlamaForCausalLM(config).save_pretrained(path)
    return path


def _transformer(folder: Path, size: int) -> Path:
    """DiT: twelve tensors in each layer."""
    path = folder / f"dit-{size}"
    if not path.exists():
        from diffusers import DiTTransformer2DModel

        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=size,
            sample_size=8,
            num_embeds_ada_norm=8,
        ).save_pretrained(path)
    return path


# --- Loads -------------------------------------------------------------------------------------

Prepare = Callable[[Path, int], Any]


@dataclasses.dataclass(frozen=True)
class Load:
    """A load that runs twice, at two sizes.

    Attributes:
        unit: the unit of the sizes.
        sizes: the smaller and the larger one.
        file: makes the file, once.
        run: the counted call. Gets the result of ``prepare``.
        prepare: runs before it and is not counted.
        library: the library that it imports; such loads are not part of --quick.
        waits: whether it waits for threads and polls meanwhile, more often if they are slower; then
            not all instructions of the process count.
    """

    unit: str
    sizes: tuple[int, int]
    file: Callable[[Path, int], Path]
    run: Callable[[Any], Any]
    prepare: Callable[[Path, int], Any] = lambda path, size: path
    library: str | None = None
    waits: bool = False


def _cast(dtype: str, path: Path) -> dict[str, torch.Tensor]:
    """By reading, because leases depend on the file system."""
    with wl.Settings(io_path="buffered"):
        return wl.load_file(path, dtype=dtype)


def _each_tensor(path: Path) -> list[torch.Tensor]:
    with wl.safe_open(path, "pt") as opened:
        return [opened.get_tensor(name) for name in opened.offset_keys()]


def _each_slice(path: Path) -> list[torch.Tensor]:
    with wl.safe_open(path, "pt", backend="pread") as opened:
        return [opened.get_slice(name)[8:16] for name in opened.offset_keys()]


def _module(device: str, path: Path, size: int) -> tuple[Model, Path]:
    with torch.device(device):
        return Model(tensors=size), path


def _load_into(given: tuple[Model, Path]) -> Model:
    wl.load_into(*given)
    return given[0]


def _with_transformers(path: Path) -> Any:
    from transformers import LlamaForCausalLM

    with wl.enabled("transformers"):
        return LlamaForCausalLM.from_pretrained(path)


def _with_diffusers(path: Path) -> Any:
    from diffusers import DiTTransformer2DModel

    with wl.enabled("diffusers"):
        return DiTTransformer2DModel.from_pretrained(path)


class SimulatedMemory:
    """``weightlift.load.allocation.Allocator`` on the simulated driver."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._stream = driver.create_stream(0)
        self._addresses: list[int] = []

    def __del__(self) -> None:
        for address in self._addresses:
            self._driver.free(address)
        self._driver.destroy_stream(self._stream)

    def empty(self, device: int, shape: Sequence[int], dtype: str) -> tuple[int, int]:
        count = 8
        for extent in shape:
            count *= extent
        address = self._driver.alloc(device, count)
        self._addresses.append(address)
        return address, address

    def stream(self, device: int) -> int:
        return int(self._stream)

    def reserve(self, device: int, sizes: Sequence[int]) -> None:
        pass


@functools.cache
def simulated_driver() -> Any:
    sys.path.insert(0, str(TESTS / "simulated_driver"))
    module = importlib.import_module("simulated_driver")
    library = next((TESTS.parent / "build" / "dev").glob("**/libsimulated_cuda.so"))
    driver = module.SimulatedDriver(library)
    driver.reset(1, 0, module.Policy.EAGER)
    driver.set_hashing(False)
    _native.use_driver_for_testing(str(library))
    return driver


def _with_memory(path: Path, size: int) -> tuple[Path, SimulatedMemory]:
    return path, SimulatedMemory(simulated_driver())


def _to_device(given: tuple[Path, SimulatedMemory], dtype: str | None = None) -> Any:
    path, allocator = given
    # One chunk for each MiB. Two slots, because the number of further slots depends on chance.
    with wl.Settings(chunk_bytes=1 << 20, pinned_bytes=2 << 20):
        return load_tensors(
            Checkpoint.from_file(path), torch.device("cuda", 0), dtype=dtype, allocator=allocator
        )


_float32 = functools.partial(_large, torch.float32)
_bfloat16 = functools.partial(_large, torch.bfloat16)
_TENSORS = (1000, 2000)
# Too small for the engine to read the cgroups' limits, because machines have different numbers of
# cgroups.
_MIB = (12, 24)

LOADS = {
    "load_file, mapped": Load("tensor", _TENSORS, _file, wl.load_file),
    "load_file, read": Load(
        "tensor", _TENSORS, _file, functools.partial(wl.load_file, mode="read")
    ),
    "load_file, cast": Load(
        "tensor", _TENSORS, _file, functools.partial(wl.load_file, dtype="float32")
    ),
    "get_tensor": Load("tensor", _TENSORS, _file, _each_tensor),
    "get_slice": Load("tensor", (500, 1000), _file, _each_slice),
    "load_checkpoint, shards": Load("file", (32, 64), _shards, wl.load_checkpoint),
    "load_checkpoint, .bin": Load("tensor", _TENSORS, _torch_file, wl.load_checkpoint),
    "load_into, meta": Load(
        "tensor", _TENSORS, _file, _load_into, functools.partial(_module, "meta")
    ),
    "load_into, in place": Load(
        "tensor", _TENSORS, _file, _load_into, functools.partial(_module, "cpu")
    ),
    "ModelMixin.from_pretrained": Load("tensor", _TENSORS, _model, Model.from_pretrained),
    "large, read": Load(
        "MiB", _MIB, _bfloat16, functools.partial(wl.load_file, mode="read"), waits=True
    ),
    "large, float32 to bfloat16": Load(
        "MiB", _MIB, _float32, functools.partial(_cast, "bfloat16"), waits=True
    ),
    "large, bfloat16 to float32": Load(
        "MiB", _MIB, _bfloat16, functools.partial(_cast, "float32"), waits=True
    ),
    "simulated GPU, chunks": Load("MiB", _MIB, _bfloat16, _to_device, _with_memory, waits=True),
    "simulated GPU, tensors": Load("tensor", _TENSORS, _file, _to_device, _with_memory, waits=True),
    "simulated GPU, cast": Load(
        "tensor",
        _TENSORS,
        _file,
        functools.partial(_to_device, dtype="F32"),
        _with_memory,
        waits=True,
    ),
    "transformers": Load("layer", (10, 20), _llama, _with_transformers, library="transformers"),
    "diffusers": Load("layer", (10, 20), _transformer, _with_diffusers, library="diffusers"),
}


# --- The process that is counted ---------------------------------------------------------------

Count = Callable[[str], contextlib.AbstractContextManager[dict[str, int]]]


def _library() -> ctypes.CDLL:
    return ctypes.PyDLL(None)  # counters.cc is preloaded


def allocations() -> Count:
    """Allocations of C and C++ and of Python, and calls of the simulated driver."""
    library = _library()
    library.counters_native.restype = library.counters_python.restype = ctypes.c_uint64
    library.counters_hook_python()

    def driver_calls() -> int:
        return simulated_driver().ledger().calls if simulated_driver.cache_info().currsize else 0

    @contextlib.contextmanager
    def count(name: str) -> Iterator[dict[str, int]]:
        counted: dict[str, int] = {}
        calls = driver_calls()
        native, python = library.counters_native(), library.counters_python()
        yield counted
        python, native = library.counters_python() - python, library.counters_native() - native
        counted |= {"native allocations": native, "Python allocations": python}
        if driver_calls() != calls:
            counted["driver calls"] = driver_calls() - calls

    return count


def system_calls() -> Count:
    """Writes marks into the trace; run.py counts the calls between them."""

    @contextlib.contextmanager
    def count(name: str) -> Iterator[dict[str, int]]:
        os.access(f"/counted/{name}", os.F_OK)
        yield {}
        os.access("/counted/", os.F_OK)

    return count


def instructions() -> Count:
    """Dumps to callgrind's files; run.py reads them."""
    library = _library()

    @contextlib.contextmanager
    def count(name: str) -> Iterator[dict[str, int]]:
        text = name.encode()
        library.counters_start()
        yield {}
        library.counters_stop()
        library.counters_dump(text)

    return count


COUNTERS = {
    "allocations": allocations,
    "system calls": system_calls,
    "instructions": instructions,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counter", choices=COUNTERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("loads", nargs="+", choices=LOADS, metavar="LOAD")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, int]]] = {}
    counter = COUNTERS[arguments.counter]()
    gc.disable()  # a collection may fall into a load or not
    for name in arguments.loads:
        load = LOADS[name]
        # Warms up imports, caches and the interpreter's specialised instructions (PEP 659).
        for size in (*load.sizes, load.sizes[0]):
            load.run(load.prepare(load.file(arguments.folder, size), size))
        found[name] = []
        for size in load.sizes:
            given = load.prepare(load.file(arguments.folder, size), size)
            gc.collect()
            with counter(f"{name}/{size}") as counted:
                kept = load.run(given)
            del kept, given
            found[name].append(counted)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
