"""The one place that launches kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Set by `recording`: takes what would be launched instead.
_recorder: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any
) -> None:
    """Launch on the tensors' device and the caller's stream, without fusing multiplications and
    additions.
    """
    options["enable_fp_fusion"] = False
    if torch.version.hip is None:
        # ptxas otherwise spills a few registers to fit one more program on a multiprocessor.
        options["maxnreg"] = min(255, 65536 // (32 * options["num_warps"]))
    if _recorder is not None:
        _recorder(kernel, args, options)
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **options)


@contextlib.contextmanager
def recording(
    recorder: Callable[[Any, tuple[Any, ...], dict[str, Any]], None],
) -> Iterator[None]:
    """Inside, launches go to `recorder(kernel, args, options)` instead of a device."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before
