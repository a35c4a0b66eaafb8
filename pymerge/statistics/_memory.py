"""How much memory a collection may take for its sums where nobody says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from pymerge.statistics._batches import model_device
from pymerge.statistics._targets import Targets, accumulator_bytes

# A container's own limit, of version 2 and 1 of control groups.
_GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def default_limit(model: nn.Module, targets: Targets) -> int:
    """Half of the memory that the model leaves on its device, at least the largest accumulator.

    Of the memory that the machine has, not of what is free just now: a run that is resumed has to
    cut its passes alike.
    """
    held = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    left = device_memory(model_device(model)) - sum(held.values())
    return max(left // 2, *(accumulator_bytes(targets, key) for key in targets.keys))


def device_memory(device: torch.device, group_limits: Sequence[str | Path] = _GROUP_LIMITS) -> int:
    """Bytes of a CUDA device, else of the machine or of the container that this runs in."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, group_limits):
        text = path.read_text(encoding="ascii").strip() if path.is_file() else ""
        if text.isdigit():  # "max" otherwise
            sizes.append(int(text))
    return min(sizes)
