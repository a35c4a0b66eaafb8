"""Batches as the collector takes them: read again and again, moved, masked, hashed (rules S3,
S9).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pymerge.messages.words import counted, type_of
from pymerge.ops.memory import check_readable, raw_bytes
from pymerge.ops.tensors import check_numbers
from pymerge.statistics._hooks import MaskOf

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
# The key of a batch under which its examples' numbers may lie.
NUMBERS = "example_numbers"
Mask = str | Callable[[Any, str], "torch.Tensor | None"] | None


class Source:
    """Batches that may be read several times, and a look at the first."""

    def __init__(self, batches: Batches) -> None:
        self._make = batches if callable(batches) and not isinstance(batches, Iterable) else None
        if self._make is None and not isinstance(batches, Iterable):
            raise TypeError(
                f"batches is {type_of(batches)}; pass a list, a DataLoader, or a function"
                " that returns an iterator"
            )
        given: Any = batches
        self.repeatable = self._make is not None or iter(given) is not batches
        self._given = given
        self._peeked: list[Any] = []
        self._iterator: Iterator[Any] | None = None

    def first(self) -> Any:
        if not self._peeked:
            iterator = self._fresh()
            for batch in iterator:
                check_batch(batch)
                self._peeked.append(batch)
                break
            else:
                raise ValueError("batches is empty; pass at least one batch")
            self._iterator = iterator
        return self._peeked[0]

    def all(self) -> Iterator[Any]:
        for batch in self._fresh() if self.repeatable else self._rest():
            check_batch(batch)
            yield batch

    def _rest(self) -> Iterator[Any]:
        yield self.first()
        assert self._iterator is not None
        yield from self._iterator

    def _fresh(self) -> Iterator[Any]:
        made = self._make() if self._make is not None else self._given
        return iter(made)


def check_batch(batch: Any, name: str = "a tensor") -> None:
    """Tensors whose values are not in their memory are a TypeError that tells their key (E5)."""
    if isinstance(batch, torch.Tensor):
        check_readable(f"batches: {name}", batch)
    elif isinstance(batch, Mapping):
        for key in batch:
            check_batch(batch[key], repr(key))
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            check_batch(value, name)


def masks(batch: Any, mask: Mask, task: str = "") -> tuple[MaskOf, int, int, int]:
    """(a layer's boolean mask, examples in the batch, those with an unmasked position, unmasked
    positions). Of a seq2seq task the decoder's positions are those of the labels.
    """
    n = examples_in(batch)
    if task == "seq2seq" and isinstance(mask, str) and isinstance(batch, Mapping):
        target = batch["labels"] != -100
        given = batch.get(mask)
        if given is None and "input_ids" not in batch:  # sound or images: all positions count
            return (
                (lambda name: target if reads_target(name) else None),
                n,
                int(target.any(1).sum()),
                int(target.sum()),
            )
        source = (torch.ones_like(batch["input_ids"]) if given is None else given) != 0
        both = source.any(1) | target.any(1)
        return (
            (lambda name: target if reads_target(name) else source),
            n,
            int(both.sum()),
            int(source.sum()) + int(target.sum()),
        )
    if mask is None or (
        isinstance(mask, str) and not (isinstance(batch, Mapping) and batch.get(mask) is not None)
    ):
        return (lambda name: None), n, n, n
    if isinstance(mask, str):
        given = batch[mask]
        check_numbers(f"the batch's {mask}", given, "mask=")
        if given.dim() != 2:
            raise ValueError(
                f"the batch's {mask} has shape {tuple(given.shape)}; expected (n, positions). "
                "For other masks pass mask=a function (batch, layer) -> (n, positions)"
            )
        one = given != 0
        return (lambda name: one), n, int(one.any(1).sum()), int(one.sum())
    found: dict[str, torch.Tensor | None] = {}
    function = mask

    def mask_of(name: str) -> torch.Tensor | None:
        if name not in found:
            value = function(batch, name)
            if value is not None:
                check_numbers("what mask= returned", value, "mask=")
                if value.dim() == 0:
                    raise ValueError("what mask= returned has no dimensions; return (n, positions)")
            found[name] = None if value is None else value != 0
        return found[name]

    return mask_of, n, n, n


_ACROSS = re.compile(r"encdec|enc_dec|encoder_attn|encoder_decoder|cross", re.IGNORECASE)


def reads_target(layer: str) -> bool:
    """Whether a layer of a sequence-to-sequence model has the target's positions: the decoder but
    for the keys and values of what it looks up in the encoder, and the head.
    """
    parts = layer.split(".")
    if "decoder" not in parts:
        return "encoder" not in parts
    across = any(_ACROSS.search(part) for part in parts)
    return not (across and re.fullmatch(r"(k|v|key|value)(_proj)?", parts[-1]))


def examples_in(batch: Any) -> int:
    """The size of the leading dimension of the batch's first tensor."""
    values = (
        batch.values()
        if isinstance(batch, Mapping)
        else batch
        if isinstance(batch, (tuple, list))
        else (batch,)
    )
    for value in values:
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    raise TypeError(
        f"a batch is {type_of(batch)} without tensors; pass mappings, tuples or lists of"
        " tensors, or tensors"
    )


def numbers_in(batch: Any, n: int, first: int) -> Sequence[int]:
    """The numbers of the batch's n examples in the whole data (S8): its own, or `first` and
    following.
    """
    given = batch.get(NUMBERS) if isinstance(batch, Mapping) else None
    if given is None:
        return range(first, first + n)
    numbers: Any = given.tolist() if isinstance(given, torch.Tensor) else given
    if not isinstance(numbers, Sequence) or not all(isinstance(each, int) for each in numbers):
        raise TypeError(
            f"the batch's {NUMBERS} are no list of integers; give every example its own"
        )
    if len(numbers) != n:
        raise ValueError(
            f"the batch's {NUMBERS} has {counted(len(numbers), 'number')} for"
            f" {counted(n, 'example')}; give every example its own"
        )
    return numbers


def to_device(batch: Any, device: torch.device) -> Any:
    """What the model sees of a batch, its tensors on `device`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(batch[name], device) for name in batch if name != NUMBERS}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def model_device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def batch_digest(previous: str, batch: Any) -> str:
    """A hash chain over batches: of the digest before and of all tensors, numbers and strings in
    this batch.
    """
    state = hashlib.blake2b(previous.encode(), digest_size=16)

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            state.update(f"{value.dtype}{tuple(value.shape)}".encode())
            state.update(raw_bytes(value).numpy().data)
        elif isinstance(value, Mapping):
            for name in value:
                state.update(str(name).encode())
                feed(value[name])
        elif isinstance(value, (tuple, list)):
            for each in value:
                feed(each)
        elif isinstance(value, (str, int, float)):
            state.update(repr(value).encode())

    feed(batch)
    return state.hexdigest()
