"""The one table of element types: safetensors' codes, torch's names, the kernels' codes, sizes."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# safetensors code -> (torch's name, bits per element)
CODES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
    "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "F4": ("float4_e2m1fn_x2", 4),
}

# Dtypes that can be copied: torch has some that safetensors lacks.
BITS: Mapping[str, int] = {**dict(CODES.values()), "complex32": 32, "complex128": 128}
CODE_OF: Mapping[str, str] = {name: code for code, (name, _) in CODES.items()}

# The dtypes of the ops (docs/spec/ties.md, T1). The position of each is its code in the kernels
# (DType in csrc/common/dtype.h).
MERGEABLE = ("float32", "float16", "bfloat16", "float64")
KERNEL_CODES: Mapping[str, int] = {name: code for code, name in enumerate(MERGEABLE)}
INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")


@functools.cache
def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype object. Imports torch, without which plans and merges of folders work."""
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


@functools.cache
def name_of(dtype: torch.dtype) -> str:
    """torch's name, without "torch."."""
    return str(dtype).removeprefix("torch.")


def item_size(dtype: str) -> int:
    """Bytes per element, at least 1; also the alignment that a tensor of this dtype needs."""
    return max(1, BITS[dtype] // 8)


def elements(shape: tuple[int, ...]) -> int:
    """Number of elements; a scalar has one."""
    return math.prod(shape)


def storage_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a contiguous tensor. ValueError where elements below a byte do not fill the last
    byte.
    """
    bits = elements(shape) * BITS[dtype]
    if bits % 8:
        raise ValueError(f"{elements(shape)} elements of {dtype} do not fill whole bytes")
    return bits // 8
