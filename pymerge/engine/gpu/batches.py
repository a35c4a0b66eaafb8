"""Groups tensors into batches: what is copied in, merged with one call and copied out together.

Small tensors share a batch. A tensor that is larger than a batch is cut into parts, each a batch of
its own, if every element can be merged separately; if the merge needs thresholds or norms over the
tensor, it stays whole as long as it fits, and is cut once they have been found on the host
(`DeviceTensor.whole`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pymerge.checkpoint.stored import StoredTensor
from pymerge.dtypes import item_size
from pymerge.engine.gpu.sizes import SIZES, DeviceSizes
from pymerge.errors import DeviceError
from pymerge.messages.arguments import argument
from pymerge.messages.words import counted
from pymerge.rules.ties import TiesRule

_STEP = 64  # elements; parts begin at multiples of it, which T8 needs to be multiples of 4
_IN_FLIGHT = (
    4  # batches that fit at a time: one copied in, one merged, one copied out, one of slack
)
_SCRATCH = 8  # one part in _SCRATCH is left to the kernels
_SCRATCH_SHARE = 0.05  # the kernels take at most this share of an input, and `DeviceSizes.scratch`


@dataclass(frozen=True)
class DeviceTensor:
    """One output tensor. inputs: the models', then the base's if there is one. whole: its rule
    holds for parts unchanged.
    """

    index: int
    elements: int
    inputs: tuple[StoredTensor, ...]
    models: int
    dtype: str
    rule: TiesRule
    whole: bool

    def scratch(self, count: int, sizes: DeviceSizes) -> int:
        """Device memory that the kernels may take for this many elements."""
        widest = max(item_size(stored.info.dtype) for stored in self.inputs)
        return int(_SCRATCH_SHARE * widest * count) + sizes.scratch * self.models


@dataclass(frozen=True)
class Part:
    """Elements first to first + count of a tensor. places: offsets of its inputs in the batch's
    memory; out: offset of the output.
    """

    tensor: DeviceTensor
    first: int
    count: int
    places: tuple[int, ...]
    out: int

    @property
    def out_bytes(self) -> int:
        return self.count * item_size(self.tensor.dtype)

    @property
    def all_of_it(self) -> bool:
        return self.count == self.tensor.elements


@dataclass(frozen=True)
class Batch:
    """What lies together in device memory: inputs in the first `input_bytes`, outputs behind
    them.
    """

    parts: tuple[Part, ...]
    input_bytes: int
    nbytes: int


def room_for(memory: int, sizes: DeviceSizes = SIZES) -> int:
    """The share of the allowed device memory for tensors; the rest is left to the kernels."""
    return (memory - memory // _SCRATCH) // sizes.align * sizes.align


def batches(
    tensors: Sequence[DeviceTensor], memory: int, begin: int = 0, sizes: DeviceSizes = SIZES
) -> Iterator[Batch]:
    """The tensors in order, the first from element `begin` on, in batches that fit `memory` bytes
    of the device.
    """
    align = sizes.align
    room, spare = room_for(memory, sizes), memory // _SCRATCH
    share = room // _IN_FLIGHT // align * align
    waiting: list[tuple[DeviceTensor, int, int]] = []
    filled = used = 0
    for tensor in tensors:
        first, begin = begin, 0
        rest = tensor.elements - first
        size, scratch = _size(tensor, rest, align), tensor.scratch(rest, sizes)
        if waiting and (filled + size > share or used + scratch > spare):
            yield _laid_out(waiting, align)
            waiting, filled, used = [], 0, 0
        if size <= share:
            waiting.append((tensor, first, rest))
            filled, used = filled + size, used + scratch
        elif not tensor.whole and first == 0 and size <= room:
            yield _laid_out([(tensor, 0, rest)], align)
        else:
            step = _step(tensor, share, align)
            for start in range(first, tensor.elements, step):
                yield _laid_out([(tensor, start, min(step, tensor.elements - start))], align)
    if waiting:
        yield _laid_out(waiting, align)


def needs_whole(batch: Batch) -> DeviceTensor | None:
    """The tensor whose thresholds must be found before this batch, a part of it, can be merged."""
    part = batch.parts[0]
    return part.tensor if not part.all_of_it and not part.tensor.whole else None


def _size(tensor: DeviceTensor, count: int, align: int) -> int:
    sizes = [item_size(stored.info.dtype) for stored in tensor.inputs]
    return sum(_rounded(count * size, align) for size in (*sizes, item_size(tensor.dtype)))


def _step(tensor: DeviceTensor, share: int, align: int) -> int:
    sizes = [item_size(stored.info.dtype) for stored in tensor.inputs]
    widths = [*sizes, item_size(tensor.dtype)]
    step = (share - align * len(widths)) // sum(widths)
    step -= step % _STEP
    if step <= 0:
        raise DeviceError(
            f"{share * _IN_FLIGHT} bytes of GPU memory do not hold a part of"
            f" {counted(tensor.models, 'model')}; "
            f"allow more ({argument('device_memory')}), or pass {argument('device', 'cpu')}"
        )
    return step


def _laid_out(pieces: Sequence[tuple[DeviceTensor, int, int]], align: int) -> Batch:
    places: list[list[int]] = []
    at = 0
    for tensor, _, count in pieces:
        places.append([])
        for stored in tensor.inputs:
            places[-1].append(at)
            at += _rounded(count * item_size(stored.info.dtype), align)
    input_bytes = at
    parts = []
    for (tensor, first, count), own in zip(pieces, places, strict=True):
        parts.append(Part(tensor, first, count, tuple(own), at))
        at += _rounded(count * item_size(tensor.dtype), align)
    return Batch(tuple(parts), input_bytes, at)


def _rounded(nbytes: int, align: int) -> int:
    return nbytes + -nbytes % align
