"""The files are made by hand, after flax's documentation of its format; ``test_flax_oracle.py``
compares with diffusers' conversion."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes

import weightlift as wl
from support import assert_same, assert_same_tensors
from weightlift.checkpoint.flax_msgpack import load_flax_state_dict, to_flax_path, to_torch_name


def packed(array: np.ndarray[Any, Any], name: str | None = None, code: int = 1) -> msgpack.ExtType:
    content = (array.shape, name or array.dtype.name, array.tobytes())
    return msgpack.ExtType(code, msgpack.packb(content, use_bin_type=True))


def chunked(array: np.ndarray[Any, Any], size: int) -> dict[str, Any]:
    flat = array.reshape(-1)
    parts = [packed(flat[start : start + size]) for start in range(0, flat.size, size)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(n): extent for n, extent in enumerate(array.shape)},
        "chunks": {str(n): part for n, part in enumerate(parts)},
    }


def numbered(*shape: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    return np.arange(math.prod(shape)).reshape(shape).astype(dtype)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "diffusion_flax_model.msgpack"


def test_the_rules(file: Path) -> None:
    tree = {
        "conv_in": {"kernel": packed(numbered(3, 5, 4, 2)), "bias": packed(numbered(2))},
        "down_blocks_0": {
            "resnets_1": {"time_emb_proj": {"kernel": packed(numbered(4, 6))}},
            "norm2": {"scale": packed(numbered(3)), "bias": packed(numbered(3))},
            "attentions_10": {"to_out_0": {"kernel": packed(numbered(2, 3, 4))}},
        },
        "time_embedding": {
            "linear_1": {"kernel": packed(numbered(2, 3))},
            "block_0": {"scale": packed(numbered(2))},
        },
        "time_embedding_2": {"embedding": packed(numbered(3, 2))},
        "learnt_9": packed(numbered()),
    }
    file.write_bytes(msgpack.packb(tree))
    expected = {
        "conv_in.weight": numbered(3, 5, 4, 2).transpose(3, 2, 0, 1),
        "conv_in.bias": numbered(2),
        "down_blocks.0.resnets.1.time_emb_proj.weight": numbered(4, 6).T,
        "down_blocks.0.norm2.weight": numbered(3),
        "down_blocks.0.norm2.bias": numbered(3),
        "down_blocks.0.attentions.10.to_out.0.weight": numbered(2, 3, 4).T,
        "time_embedding.linear_1.weight": numbered(2, 3).T,
        "time_embedding.block_0.weight": numbered(2),
        "time_embedding.2.embedding": numbered(3, 2),
        "learnt.9": numbered(),
    }
    loaded = load_flax_state_dict(file, {name: a.shape for name, a in expected.items()})
    assert_same_tensors(
        loaded, {name: torch.tensor(array.copy()) for name, array in expected.items()}
    )
    loaded["conv_in.bias"] += 1  # its own memory


@pytest.mark.parametrize(
    ("name", "torch_dtype"),
    [
        *((name, getattr(torch, name)) for name in ("float16", "float32", "float64", "bool")),
        *((name, getattr(torch, name)) for name in ("int8", "int16", "int32", "int64", "uint8")),
        *((name, getattr(torch, name)) for name in ("uint16", "uint32", "uint64")),
        *((name, getattr(torch, name)) for name in ("complex64", "complex128")),
        ("float8_e4m3fn", torch.float8_e4m3fn),
        ("float8_e5m2", torch.float8_e5m2),
    ],
)
def test_dtypes(file: Path, name: str, torch_dtype: torch.dtype) -> None:
    bits = np.random.default_rng(0).integers(0, 2 if name == "bool" else 256, 64, dtype=np.uint8)
    array = bits.view(name) if "float8" not in name else bits
    array = array.reshape(2, -1)
    file.write_bytes(msgpack.packb({"w": packed(array, name)}))
    expected = torch.from_numpy(bits).view(torch_dtype).reshape(2, -1)
    assert_same(load_flax_state_dict(file)["w"], expected)


def test_bfloat16_becomes_float32(file: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    file.write_bytes(msgpack.packb({"dense": {"kernel": packed(bits, "bfloat16")}}))
    expected = (bits.astype(np.uint32) << 16).view(np.float32).T
    assert_same(load_flax_state_dict(file)["dense.weight"], torch.tensor(expected.copy()))


@pytest.mark.parametrize("size", [1, 7, 24, 100])
def test_chunks(file: Path, size: int) -> None:
    array = numbered(2, 3, 4, 1)
    file.write_bytes(
        msgpack.packb({"a": {"kernel": chunked(array, size)}, "b": chunked(array, size)})
    )
    loaded = load_flax_state_dict(file)
    assert_same(loaded["a.weight"], torch.tensor(array.transpose(3, 2, 0, 1).copy()))
    assert_same(loaded["b"], torch.tensor(array))


def test_odd_trees_that_are_right(file: Path) -> None:
    tree = {
        "empty": {},
        "scalar": packed(np.asarray(3.5, np.float32), code=3),
        "none": packed(numbered(0, 4)),
        "list": {"0": packed(numbered(1)), "1": packed(numbered(2))},
        "kernel": packed(numbered(2)),
        "a.b_1": {"kernel": packed(numbered())},
    }
    file.write_bytes(msgpack.packb(tree))
    loaded = load_flax_state_dict(file)
    assert list(loaded) == ["scalar", "none", "list.0", "list.1", "weight", "a.b.1.weight"]
    assert_same(loaded["scalar"], torch.tensor(3.5))
    assert loaded["none"].shape == (0, 4)
    assert_same(loaded["weight"], torch.arange(2.0))
    file.write_bytes(msgpack.packb({}))
    assert load_flax_state_dict(file) == {}


def test_a_deep_tree(file: Path) -> None:
    tree: Any = packed(numbered(2))
    for _ in range(400):
        tree = {"x": tree}
    file.write_bytes(msgpack.packb(tree))
    assert list(load_flax_state_dict(file)) == [".".join("x" * 400)]
    file.write_bytes(b"\x81\xa1x" * 100_000 + b"\x80")
    with pytest.raises(wl.FormatError) as caught:
        load_flax_state_dict(file)
    assert caught.value.code == "not_weights"


def test_shapes_that_are_not_the_models(file: Path) -> None:
    tree = {f"layer_{n}": {"kernel": packed(numbered(2, 3))} for n in range(30)}
    file.write_bytes(msgpack.packb(tree))
    expected: dict[str, tuple[int, ...]] = {"layer.4.weight": (3, 2), "another": (1,)}
    load_flax_state_dict(file, expected)
    with pytest.raises(wl.CheckpointError) as caught:
        load_flax_state_dict(file, {**expected, "layer.7.weight": (2, 3)})
    text = str(caught.value)
    assert str(file) in text
    assert (
        "'layer_7.kernel' becomes 'layer.7.weight' of shape [3, 2]; the model's is [2, 3]" in text
    )
    assert text.count("\n") == 1
    with pytest.raises(wl.CheckpointError, match="and 10 more") as caught:
        load_flax_state_dict(file, {f"layer.{n}.weight": (6,) for n in range(30)})
    assert str(caught.value).count("\n") == 21


def zipped() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(3)}, buffer)
    return buffer.getvalue()


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(3)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b"", "empty_file", "download it"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git_lfs_pointer", "git lfs pull"),
        (b"  \n<!DOCTYPE html><html>", "not_weights", "web page"),
        (zipped(), "not_weights", "torch.save"),
        (pickled(), "not_weights", "torch.save"),
        (safetensors_bytes({"w": torch.ones(3)}), "not_weights", "safetensors"),
        (b"just text", "not_weights", "msgpack map"),
        (msgpack.packb([1, 2]), "not_weights", "msgpack map"),
        (msgpack.packb({"a": {"w": [packed(numbered(2))]}}), "not_weights", "max_array_len"),
        (b"\xdd\xff\xff\xff\xff", "not_weights", "msgpack map"),
        (b"\x81\xa1w\xdd\xff\xff\xff\xff", "not_weights", "max_array_len"),
        (b"\x81\xa1w\xc1", "not_weights", "not a msgpack"),
        (b"\x81\xa2\xff\xff\xc0", "not_weights", "utf-8"),
        (b"\x81\x05\xc0", "not_weights", "map key"),
        (msgpack.packb({"a": packed(numbered(2))}) + b"\xc0", "trailing_bytes", "after the tree"),
        (b"\xdf\x00\xff\xff\xff", "data_incomplete", "after 5 bytes"),
        (b"\xdf\xff\xff\xff\xff", "not_weights", "max_map_len"),
    ],
)
def test_what_is_no_file_of_flax(file: Path, content: bytes, code: str, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(wl.FormatError, match=message) as caught:
        load_flax_state_dict(file)
    assert (caught.value.code, caught.value.path) == (code, str(file))


def test_truncated_at_every_byte(file: Path) -> None:
    tree = {"a": {"kernel": packed(numbered(2, 3)), "bias": chunked(numbered(4), 2)}, "b_1": {}}
    whole = msgpack.packb(tree)
    for length in range(1, len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(wl.FormatError) as caught:
            load_flax_state_dict(file)
        assert caught.value.code == "data_incomplete"
    file.write_bytes(whole)
    assert len(load_flax_state_dict(file)) == 2


def test_every_byte_changed(file: Path) -> None:
    """Changed files give other tensors or one of our errors, and take no more memory than the file
    has."""
    tree = {"a": {"kernel": packed(numbered(2, 3)), "bias": chunked(numbered(4), 2)}, "b_1": {}}
    whole = msgpack.packb(tree)
    refused = 0
    for place in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            try:
                loaded = load_flax_state_dict(file)
            except wl.FormatError:
                refused += 1
            else:
                assert sum(tensor.nbytes for tensor in loaded.values()) <= len(whole)
    assert refused > len(whole)


def extension(content: Any, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, content if isinstance(content, bytes) else msgpack.packb(content))


@pytest.mark.parametrize(
    ("leaf", "code", "message"),
    [
        (5, "tensor_invalid", "not an array but int"),
        (None, "tensor_invalid", "not an array but NoneType"),
        ("text", "tensor_invalid", "not an array but str"),
        (b"bytes", "tensor_invalid", "not an array but bytes"),
        ({b"key": {}}, "tensor_invalid", "keys that are not text"),
        (extension([1.0, 2.0], 2), "tensor_invalid", "extension 2"),
        (extension(b""), "tensor_invalid", "shape, dtype, bytes"),
        (extension(b"\xc1"), "tensor_invalid", "shape, dtype, bytes"),
        (extension(5), "tensor_invalid", "shape, dtype, bytes"),
        (extension([[2], "float32"]), "tensor_invalid", "shape, dtype, bytes"),
        (extension([[2], 7, b""]), "tensor_invalid", "shape, dtype, bytes"),
        (extension([[2], "float32", 7]), "tensor_invalid", "shape, dtype, bytes"),
        (extension([2, "float32", bytes(8)]), "tensor_invalid", "its shape is 2"),
        (extension([[-2, -1], "float32", bytes(8)]), "tensor_invalid", "its shape is"),
        (extension([[True, 2], "float32", bytes(8)]), "tensor_invalid", "its shape is"),
        (extension([[2], "O", bytes(16)]), "unknown_dtype", "'O'"),
        (extension([[2], "float32x", bytes(16)]), "unknown_dtype", "'float32x'"),
        (extension([[2], "load", bytes(16)]), "unknown_dtype", "'load'"),
        (extension([[2], "float32", bytes(9)]), "size_mismatch", "9 bytes"),
        (extension([[2**20, 2**20, 2**20], "float32", b""]), "size_mismatch", "0 bytes"),
        ({**chunked(numbered(4), 2), "shape": {"0": 5}}, "size_mismatch", "5 elements"),
        ({**chunked(numbered(4), 2), "shape": None}, "tensor_invalid", "chunked"),
        ({**chunked(numbered(4), 2), "shape": {"1": 4}}, "tensor_invalid", "chunked"),
        ({**chunked(numbered(4), 2), "shape": {"0": -4}}, "tensor_invalid", "chunked"),
        ({**chunked(numbered(4), 2), "chunks": {}}, "tensor_invalid", "chunked"),
        ({"__msgpack_chunked_array__": True}, "tensor_invalid", "chunked"),
        (
            {
                **chunked(numbered(4), 2),
                "chunks": {"0": packed(numbered(2)), "1": packed(numbered(2, dtype="float16"))},
            },
            "tensor_invalid",
            "chunks of several dtypes or shapes",
        ),
        (
            {**chunked(numbered(4), 2), "chunks": {"0": packed(numbered(2, 2))}},
            "tensor_invalid",
            "d",
        ),
    ],
)
def test_leaves_that_are_no_arrays(file: Path, leaf: Any, code: str, message: str) -> None:
    file.write_bytes(msgpack.packb({"fine": packed(numbered(2)), "a": {"the_leaf": leaf}}))
    with pytest.raises(wl.FormatError, match=message) as caught:
        load_flax_state_dict(file)
    assert caught.value.code == code
    assert caught.value.tensor.startswith("a.the_leaf")
    assert caught.value.path == str(file)


def test_a_leaf_with_no_elements_but_a_vast_shape(file: Path) -> None:
    for shape in ([2**63, 0], [2**40, 2**40, 0], [0, *[1] * 64]):
        file.write_bytes(msgpack.packb({"w": extension([shape, "float32", b""])}))
        with pytest.raises(wl.FormatError) as caught:
            load_flax_state_dict(file)
        assert caught.value.code == "tensor_invalid"
    file.write_bytes(msgpack.packb({"w": extension([[2**40, 0, *[1] * 62], "float32", b""])}))
    assert load_flax_state_dict(file)["w"].shape[:2] == (2**40, 0)


def test_two_leaves_of_one_name(file: Path) -> None:
    tree = {"norm_0": {"kernel": packed(numbered(2)), "scale": packed(numbered(2))}}
    file.write_bytes(msgpack.packb(tree))
    with pytest.raises(wl.FormatError, match=r"'norm\.0\.weight'") as caught:
        load_flax_state_dict(file)
    assert (caught.value.code, caught.value.tensor) == ("duplicate_name", "norm_0.scale")


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.msgpack"):
        load_flax_state_dict(tmp_path / "missing.msgpack")
    with pytest.raises(IsADirectoryError):
        load_flax_state_dict(tmp_path)


FLAX = {
    ("conv", "kernel"),
    ("layers_0", "kernel"),
    ("layers_0", "bias"),
    ("norm1", "scale"),
    ("norm1", "bias"),
    ("norm2", "scale"),
    ("attn", "query", "kernel"),
    ("attn", "query", "bias"),
    ("attn", "to_k", "kernel"),
    ("tokens", "embedding"),
}


@pytest.mark.parametrize(
    ("name", "dimensions", "path", "axes"),
    [
        ("conv.weight", 4, ("conv", "kernel"), (2, 3, 1, 0)),
        ("layers.0.weight", 2, ("layers_0", "kernel"), (1, 0)),
        ("layers.0.weight", 3, ("layers_0", "kernel"), (2, 1, 0)),
        ("layers.0.bias", 1, ("layers_0", "bias"), (0,)),
        ("norm1.weight", 1, ("norm1", "scale"), (0,)),
        ("norm1.gamma", 1, ("norm1", "scale"), (0,)),
        ("norm1.bias", 1, ("norm1", "bias"), (0,)),
        ("norm2.bias", 1, ("norm2", "scale"), (0,)),
        ("attn.to_q.weight", 2, ("attn", "query", "kernel"), (1, 0)),
        ("attn.to_q.bias", 1, ("attn", "query", "bias"), (0,)),
        ("attn.to_k.weight", 2, ("attn", "to_k", "kernel"), (1, 0)),
        ("attn.to_out.0.weight", 2, ("attn", "to_out_0", "kernel"), (1, 0)),
        ("tokens.weight", 2, ("tokens", "embedding"), (0, 1)),
        ("other.gamma", 1, ("other", "weight"), (0,)),
        ("other.beta", 1, ("other", "bias"), (0,)),
        ("to_q", 1, ("to_q",), (0,)),
    ],
)
def test_the_way_back(
    name: str, dimensions: int, path: tuple[str, ...], axes: tuple[int, ...]
) -> None:
    assert to_flax_path(name, dimensions, FLAX) == (path, axes)


def test_there_and_back() -> None:
    for path, dimensions in [(("conv", "kernel"), 4), (("a_0", "b_11", "kernel"), 2), (("x",), 0)]:
        name, axes = to_torch_name(path, dimensions)
        again, back = to_flax_path(name, dimensions, {path})
        assert again == path
        assert [axes[axis] for axis in back] == list(range(dimensions))
