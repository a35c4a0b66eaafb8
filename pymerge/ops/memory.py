"""Memory of tensors: whether a tensor's values are in its own, where the kernels read them (E5 of
docs/spec/ties.md), and memory for results.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping, Sequence

import torch

from pymerge.messages.words import type_of
from pymerge.ops.sharded.layout import is_dtensor, like_dtensor, local, why_not_sharded

# The dispatch method of classes that, unlike DTensor, do not implement operations themselves.
_PLAIN = torch.Tensor.__torch_dispatch__
_USUAL = (torch.Tensor, torch.nn.Parameter)

_LARGE = 4 << 20  # bytes of a tensor that huge pages are asked for

# The way out for common classes, by their name, so that their modules need not be imported.
_WAYS_OUT = {
    "DTensor": "pass its .full_tensor(), on every rank",
    "ShardedTensor": "gather the state dict first, as FSDP does with StateDictType.FULL_STATE_DICT",
    "AsyncCollectiveTensor": "pass its .wait()",
    "FakeTensor": (
        "it has no values, so call this with real tensors, outside of FakeTensorMode and"
        " torch.export (torch.ops.pymerge tells shapes: docs/compile.md)"
    ),
    "FunctionalTensor": "call this outside of torch.compile and torch.export",
    "NestedTensor": "pass the tensors of its .unbind() one at a time",
    "MaskedTensor": "pass its .to_tensor(value)",
}
# Modes that trace or imitate torch's operations. They do not see the kernels: a traced graph would
# lack the merge, or hold this call's result as a constant.
_TRACING = {
    torch._C._TorchDispatchModeKey.PROXY: "make_fx",
    torch._C._TorchDispatchModeKey.FAKE: "FakeTensorMode",
    torch._C._TorchDispatchModeKey.FUNCTIONAL: "torch.export",
}
_ANY_WAY_OUT = (
    "pass the plain torch.Tensor that it stands for, which a quantised one gives by .dequantize()"
)


def check_readable(name: str, tensor: object, shards: bool = False) -> None:
    """TypeError that names the argument, for a tensor whose values are not in its memory. Anything
    but a tensor passes. shards: whether a DTensor passes too.
    """
    if isinstance(tensor, torch.Tensor):
        reason = why_unreadable(tensor, shards)
        if reason:
            raise TypeError(f"{name} {reason}")


def check_tensor(name: str, value: object, shards: bool = False) -> None:
    """`check_readable`, and a TypeError for anything but a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {type_of(value)}; pass a torch.Tensor")
    check_readable(name, value, shards)


def check_readable_dict(name: str, tensors: object) -> None:
    """`check_readable` for every tensor of a state dict."""
    if isinstance(tensors, Mapping):
        for key, tensor in tensors.items():
            check_readable(f"{name}[{key!r}]", tensor)


def why_unreadable(tensor: torch.Tensor, shards: bool = False) -> str:
    """What a tensor is instead, and the way out; "" if its values are at its `data_ptr()`, as shape
    and strides say. shards: or if it is a DTensor and its shard's are.

    Takes about a microsecond, tens of them for a subclass: every tensor of a merge is checked,
    before anything else is done with it.
    """
    kind = type(tensor)
    if kind.__torch_dispatch__ is not _PLAIN:
        if shards and is_dtensor(tensor):
            return why_not_sharded(tensor) or why_unreadable(local(tensor))
        return _of_a_class(kind)
    if kind not in _USUAL and not torch.nn.parameter.is_lazy(tensor):
        plain = _plain(tensor)
        return _why_unreadable(plain) or _why_misleading(tensor, plain)
    return _why_unreadable(tensor)


def _why_unreadable(tensor: torch.Tensor) -> str:
    """`why_unreadable` of a tensor whose attributes are torch's own."""
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        mode = _tracing()
        if mode:
            return (
                f"is passed inside of {mode}, which sees operations of torch alone, no merge; call"
                " this outside of it, with real tensors"
            )
    if tensor.is_quantized:
        return (
            f"is {str(tensor.dtype).removeprefix('torch.')}, whose values are made of integers and"
            " a scale; convert it with .dequantize()"
        )
    try:
        address = tensor.data_ptr()
        held = tensor.untyped_storage().nbytes()
        begin = tensor.storage_offset()
        if tensor.is_contiguous():
            end = tensor.nbytes
        else:
            end = span(tensor)
    except (RuntimeError, ValueError):  # ValueError: an uninitialized parameter
        return _without_memory(tensor)
    if begin:
        end += int(begin) * tensor.element_size()
    nowhere = not address and (tensor.numel() or tensor.is_meta)
    beyond = end > held and tensor.numel()  # an empty view may begin anywhere
    if nowhere or beyond or tensor.is_nested:
        return _without_memory(tensor)
    if tensor.is_neg():
        return "is a view that is yet to be negated; pass .resolve_neg() of it"
    return ""


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without what its class makes of torch's functions."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor.as_subclass(tensor, torch.Tensor)


def _why_misleading(tensor: torch.Tensor, plain: torch.Tensor) -> str:
    """Of a class that answers for itself where its memory is: whether that is so."""
    try:
        if _described(tensor) == _described(plain):
            return ""
    except Exception:  # whatever the class raises
        pass
    return (
        f"is {type_of(tensor)}, whose class answers otherwise than its memory is;"
        " pass .as_subclass(torch.Tensor) of it"
    )


def _described(tensor: torch.Tensor) -> tuple[object, ...]:
    storage = tensor.untyped_storage().nbytes(), tensor.storage_offset()
    sizes = tensor.numel(), tensor.element_size(), tensor.dim()
    kind = tensor.dtype, tensor.device, tensor.is_contiguous(), tensor.is_floating_point()
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), storage, sizes, kind


def new_result(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor for a result, without values.

    Large ones on the CPU are asked for in huge pages: their first touch takes as long as a merge.
    4 models of 16M elements of fp32, 2 busy cores, 2026-12-01: 36 ms, otherwise 102.
    """
    made = torch.empty(shape, dtype=dtype, device=device)
    if type(made) is torch.Tensor and made.device.type == "cpu" and made.nbytes >= _LARGE:
        _ask_for_huge_pages(made.data_ptr(), made.nbytes)
    return made


def _ask_for_huge_pages(address: int, length: int) -> None:
    """Where the system has none, or none to give, nothing changes."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = (address + length - first) // mmap.PAGESIZE
    if pages > 0:
        madvise(first, pages * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)


def new_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`new_result` of a tensor's shape and device; a DTensor of a DTensor's placements."""
    if not is_dtensor(tensor):
        return new_result(tensor.shape, dtype, tensor.device)
    shard = local(tensor)
    return like_dtensor(new_result(shard.shape, dtype, shard.device), tensor)


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a readable tensor's values, contiguous, on the CPU."""
    flat = tensor.detach().resolve_conj().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8)


def span(tensor: torch.Tensor) -> int:
    """The number of bytes from the first to the last that a view can touch."""
    if tensor.numel() == 0:
        return 0
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (1 + last) * tensor.element_size()


def _tracing() -> str:
    """Which of torch's tracers or tensor imitations is active in this thread; "" for none."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    on = (name for key, name in _TRACING.items() if torch._C._get_dispatch_mode(key) is not None)
    return next(on, "")


def _of_a_class(kind: type[torch.Tensor]) -> str:
    ways = (_WAYS_OUT[base.__name__] for base in kind.__mro__ if base.__name__ in _WAYS_OUT)
    return (
        f"is a {kind.__name__}, whose values are not in its own memory; {next(ways, _ANY_WAY_OUT)}"
    )


def _without_memory(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "is on the meta device, so it has no values; load the model first"
    if torch.nn.parameter.is_lazy(tensor):
        return (
            "is an uninitialized parameter; run the model once, which gives it a shape and values"
        )
    if tensor.is_nested:
        return f"is a nested tensor; {_WAYS_OUT['NestedTensor']}"
    if tensor.layout != torch.strided:
        return f"is {str(tensor.layout).removeprefix('torch.')}; convert it with .to_dense()"
    try:
        held = tensor.untyped_storage().nbytes()
    except RuntimeError:
        return (
            f"has no memory of its own on {tensor.device}; call this outside of torch.func's"
            " transforms (vmap, grad), or move it with .cpu()"
        )
    wanted = tensor.storage_offset() * tensor.element_size() + span(tensor)
    if wanted > held:
        return (
            f"reaches to byte {wanted} of a storage of {held}: its memory was freed or cut, as FSDP"
            " does between uses; gather the parameters first, or load the model anew"
        )
    return (
        f"has no address on {tensor.device}; call this outside of torch.func's transforms, or copy"
        " it into the memory of this process first, with .cpu()"
    )
