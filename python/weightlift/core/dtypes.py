"""Names of element types in files and in torch, and the casts of the engine."""

from __future__ import annotations

import difflib
import functools
from typing import TYPE_CHECKING

from weightlift.core.errors import ArgumentError

if TYPE_CHECKING:
    import torch

# Dtype name in the file -> torch's name. F6_E2M3 and F6_E3M2 have no torch dtype.
TORCH_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    # Not in the safetensors format.
    "C32": "complex32",
    "C128": "complex128",
}
# The dtypes for which torch.Tensor.is_floating_point is true.
FLOATING = frozenset(name for name in TORCH_NAMES if name[0] in "FB" and name != "BOOL")
# The engine casts between these; torch casts the other floating types.
# Other usual spellings, besides the names of torch and of the file.
_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e4m3fn": "float8_e4m3fn",
    "float8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
CASTABLE = frozenset({"F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"})


@functools.cache
def to_torch(name: str) -> torch.dtype:
    """The torch dtype of a file's dtype, such as ``"BF16"``."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


@functools.cache
def _file_names() -> dict[torch.dtype, str]:
    return {to_torch(name): name for name in TORCH_NAMES}


def bits(name: str) -> int:
    """The number of bits of one element of a file's dtype."""
    return {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}.get(name) or to_torch(name).itemsize * 8


def file_name(dtype: torch.dtype) -> str | None:
    """The file's name of a torch dtype; ``None`` if the format has none."""
    return _file_names().get(dtype)


def parse_dtype(dtype: torch.dtype | str | None) -> str | None:
    """The file's name of a requested dtype; ``None`` (keep each tensor's dtype) for ``None`` and
    ``"auto"``.

    Usual spellings are valid: ``bfloat16``, ``torch.bfloat16``, ``bf16``, ``BF16``, ``half``,
    ``fp16``, ``float``, ``fp32``, ``double``, ``fp8_e4m3``.

    Raises:
        ArgumentError: ``dtype`` is not a floating-point dtype.
    """
    import torch

    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    found = dtype
    if isinstance(dtype, str):
        plain = dtype.strip().removeprefix("torch.")
        torch_name = _ALIASES.get(plain.lower()) or TORCH_NAMES.get(plain.upper(), plain.lower())
        found = getattr(torch, torch_name, None)  # type: ignore[assignment]
    name = _file_names().get(found) if isinstance(found, torch.dtype) else None
    if name is None or name not in CASTABLE:
        known = sorted(TORCH_NAMES[known] for known in CASTABLE)
        near = difflib.get_close_matches(str(dtype).removeprefix("torch."), [*known, *_ALIASES], 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ArgumentError(
            f"dtype is {dtype!r}{hint}; it can be one of {', '.join(known)}, or 'auto'"
        )
    return name


@functools.cache
def fp8_rules(dtype: str | None) -> tuple[bool, bool, bool]:
    """How the installed torch casts values beyond the largest fp8 number to ``dtype``: (e4m3fn
    saturates, e4m3fn saturates infinity, e5m2 saturates). Versions of torch differ, so the first
    call casts such values with torch and keeps the result."""
    if dtype not in ("F8_E4M3", "F8_E5M2"):
        return False, False, False
    import torch

    probe = torch.tensor([1e6, float("inf")])
    e4m3 = probe.to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    e5m2 = probe.to(torch.float8_e5m2).view(torch.uint8).tolist()
    return e4m3[0] == 0x7E, e4m3[1] == 0x7E, e5m2[0] == 0x7B
