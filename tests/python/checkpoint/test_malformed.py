"""Which safetensors files are accepted, compared with the reference implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

import malformed
import weightlift


def contents(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    return {
        name: (
            tensor.dtype,
            list(tensor.shape),
            bytes(tensor.contiguous().untyped_storage()[: tensor.nbytes]),
        )
        for name, tensor in tensors.items()
    }


def reference_accepts(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def load(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The result, a code or "ok", and the tensors."""
    try:
        return malformed.OK, weightlift.load_file(path)
    except weightlift.FormatError as error:
        return error.code, {}


def check_like_reference(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    code, tensors = load(path)
    if code != malformed.DUPLICATE:
        assert (code == malformed.OK) == reference_accepts(data), (code, data)
    if code == malformed.OK:
        assert contents(tensors) == contents(safetensors.torch.load_file(path)), data
    path.unlink()
    return code


@pytest.mark.parametrize("case", malformed.cases(), ids=lambda case: case.name)
def test_case(case: malformed.Case, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(case.data)
    if case.expected == malformed.OK:
        expected = contents(safetensors.torch.load_file(path))
        assert contents(weightlift.load_file(path)) == expected
        return
    with pytest.raises(weightlift.FormatError) as caught:
        weightlift.load_file(path)
    assert caught.value.code == case.expected, str(caught.value)
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, safetensors.SafetensorError)
    if case.expected == malformed.DUPLICATE:
        safetensors.torch.load_file(path)  # the reference loads it and loses one
    else:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.torch.load_file(path)


def test_every_code_has_a_case() -> None:
    assert {case.expected for case in malformed.cases()} == {
        "ok", "empty_file", "git_lfs_pointer", "not_weights", "header_too_small",
        "header_too_large", "header_past_end", "header_not_utf8", "header_not_json",
        "header_too_deep", "header_not_object", "metadata_invalid", "tensor_invalid",
        "duplicate_name", "unknown_dtype", "shape_overflow", "sub_byte_misaligned",
        "size_mismatch", "offsets_invalid", "data_incomplete", "trailing_bytes",
    }  # fmt: skip


def test_cut_at_every_byte(tmp_path: Path) -> None:
    data = malformed.small_file()
    assert check_like_reference(tmp_path / "whole", data) == malformed.OK
    for size in range(len(data)):
        assert check_like_reference(tmp_path / str(size), data[:size]) != malformed.OK


def test_every_header_bit_flipped(tmp_path: Path) -> None:
    data = malformed.small_file()
    end = 8 + int.from_bytes(data[:8], "little")
    found = set()
    for bit in range(8 * end):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        found.add(check_like_reference(tmp_path / str(bit), bytes(changed)))
    # The walk must meet several kinds of faults, and changes that do not matter.
    assert {malformed.OK, malformed.DUPLICATE, "header_not_json", "tensor_invalid"} <= found


def test_every_header_byte_left_out(tmp_path: Path) -> None:
    data = malformed.small_file()
    end = 8 + int.from_bytes(data[:8], "little")
    for at in range(8, end):
        changed = malformed.build(data[8:at] + data[at + 1 : end], data[end:])
        check_like_reference(tmp_path / str(at), changed)
