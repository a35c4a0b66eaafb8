"""Solves layers with statistics on a GPU; the host reads, unpacks and writes them, as many at a
time as fit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pymerge.engine.gpu.batches import room_for
from pymerge.engine.gpu.device import Device
from pymerge.messages.arguments import argument
from pymerge.messages.words import names_with_verb
from pymerge.ops.mats.api import MatsResult, mats_many
from pymerge.ops.mats.layer import MatsLayer, to_device
from pymerge.planning.plan import PlannedTensor

# In the RuntimeErrors of torch and the libraries below it for a lack of device memory, beside
# `Device.out_of_memory`.
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")


class DeviceSolver:
    """Solves layers on `device`, within `memory` bytes of it.

    The layers of a batch come in the host's memory, which bounds batches as on the CPU, and go to
    the device by copies from there. What does not fit, or finds no memory after all, is solved in
    smaller batches, at last on the CPU.
    """

    def __init__(self, device: Device, memory: int) -> None:
        self._device = device
        self._memory = memory
        self._room = room_for(memory, device.sizes)
        self._there = 0
        self._ran_out = False
        self._on_host: list[str] = []

    def solve(
        self,
        layers: Sequence[MatsLayer],
        tensors: Sequence[PlannedTensor],
        options: Mapping[str, Any],
    ) -> list[MatsResult]:
        found: dict[int, MatsResult] = {}
        needs = [max(1, tensor.solve_memory) for tensor in tensors]
        parts = deque(self._fitting(range(len(layers)), needs))
        while parts:
            part = parts.popleft()
            chosen = [layers[place] for place in part]
            own = [needs[place] for place in part]
            results = self._on_device(chosen, own, options) if sum(own) <= self._room else None
            if results is None and len(part) > 1:
                parts.extendleft(reversed(list(self._fitting(part, needs))))
                continue
            if results is None:
                self._on_host += [tensors[place].name for place in part]
                results = mats_many(chosen, **options, backend="cpu")
            found.update(zip(part, results, strict=True))
        return [found[place] for place in range(len(layers))]

    def _fitting(self, places: Iterable[int], needs: Sequence[int]) -> Iterator[list[int]]:
        """The places in order, as many at a time as fit; at least one."""
        held: list[int] = []
        for place in places:
            if held and sum(needs[each] for each in (*held, place)) > self._room:
                yield held
                held = []
            held.append(place)
        yield held

    def _on_device(
        self, layers: Sequence[MatsLayer], needs: Sequence[int], options: Mapping[str, Any]
    ) -> list[MatsResult] | None:
        """Solve on the device, results in host memory. None where memory runs out, with a smaller
        budget from then on.
        """
        try:
            results = self._solved(layers, options)
        except (RuntimeError, self._device.out_of_memory) as error:
            if not self._is_out_of_memory(error):
                raise
        else:
            self._there += len(layers)
            return results
        # After the handler: until its end the error kept the device's memory alive.
        self._device.tidy()
        self._ran_out = True
        self._room = max(sum(needs) // 2, *needs) if len(needs) > 1 else needs[0] - 1
        return None

    def _solved(self, layers: Sequence[MatsLayer], options: Mapping[str, Any]) -> list[MatsResult]:
        copies: dict[int, Any] = {}
        with self._device.solving() as device:
            there = [to_device(layer, device, copies) for layer in layers]
            results = mats_many(there, **options)
            return [MatsResult(result.weight.to("cpu"), result.report) for result in results]

    def _is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, self._device.out_of_memory) or any(
            text in str(error) for text in _OUT_OF_MEMORY
        )

    def notes(self) -> list[str]:
        found = []
        if self._there:
            found.append(f"layers with statistics were solved on {self._device.name}")
        if self._ran_out:
            found.append(
                f"{self._device.name} ran out of memory: layers were solved in smaller batches, in"
                f" {self._room} bytes instead of {room_for(self._memory, self._device.sizes)}"
            )
        if self._on_host:
            found.append(
                f"{names_with_verb(self._on_host, 'was', 'were')} solved on the CPU: {self._room}"
                " bytes of"
                f" GPU memory are not enough ({argument('device_memory')})"
            )
        return found
