"""Where the tensors of a call lie, and when a device is done with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from pymerge.messages.arguments import argument

Segments = Sequence[tuple[Sequence[torch.Tensor], "torch.Tensor | None"]]


def device_of(segments: Segments) -> torch.device:
    """The one device of all tensors; the CPU where there are none. ValueError where they lie on
    several: kernels read them by their addresses, which are those of one device.
    """
    found = dict.fromkeys(tensor.device for tensor in _tensors(segments))
    if len(found) > 1:
        raise ValueError(
            f"the tensors are on {' and '.join(sorted(map(str, found)))}, and thresholds over all"
            f" of them are found on one device; move them to one, or pass"
            f" {argument('scope', 'tensor')}"
        )
    return next(iter(found), torch.device("cpu"))


def _tensors(segments: Segments) -> Iterable[torch.Tensor]:
    for models, base in segments:
        yield from models
        if base is not None:
            yield base


class Passed:
    """The place of a device's current stream behind what a call has put there.

    What the call wrote may be read on a stream that is current later, which does not wait for this
    one by itself. Within the capture of a graph there is none: a captured event cannot be waited
    for, and who replays a graph knows on which stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None
        if device.type != "cuda":
            return
        with torch.cuda.device(device):
            if not torch.cuda.is_current_stream_capturing():
                self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._event.record(torch.cuda.current_stream(device))

    def hold(self) -> None:
        """Have the stream that is current now go on only behind that place."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
