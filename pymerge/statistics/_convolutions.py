"""Convolutions as linear layers: y = W x, x the window that one sees at a position (S1)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def unfolded(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The windows of a convolution's input (n, channels, ...), (n, positions, d_in), with their
    elements in the order of its weight's: channels, then places in the kernel.
    """
    assert isinstance(module, nn.modules.conv._ConvNd)
    axes = len(module.kernel_size)
    x = functional.pad(_batched(module, x), module._reversed_padding_repeated_twice)
    for axis in range(axes):
        step = module.dilation[axis]
        reach = (module.kernel_size[axis] - 1) * step + 1
        x = x.unfold(2 + axis, reach, module.stride[axis])[..., ::step]
    windows = x.movedim(1, 1 + axes)
    return windows.reshape(x.shape[0], -1, windows.shape[1 + axes :].numel())


def channels_last(module: nn.Module, g: torch.Tensor) -> torch.Tensor:
    """The gradient of a convolution's output (n, channels, ...) as (n, positions, channels)."""
    return _batched(module, g).flatten(2).mT


def _batched(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """With a dimension for examples, which convolutions may go without."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    return x.unsqueeze(0) if x.dim() == 1 + len(module.kernel_size) else x
