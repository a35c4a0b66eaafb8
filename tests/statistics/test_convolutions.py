"""Convolutions as linear layers of the windows that they see (S1, S3, S4)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pymerge.statistics import Prediction, collect
from pymerge.statistics._convolutions import channels_last, unfolded

CASES = [
    nn.Conv1d(3, 5, 4, stride=2, padding=1),
    nn.Conv1d(3, 5, 3, padding="same", dilation=2),
    nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
    nn.Conv3d(2, 4, 2, stride=2),
]


@pytest.mark.parametrize("module", CASES, ids=str)
def test_the_windows_times_the_weight_are_the_output(module):
    x = torch.randn(2, module.in_channels, *[9] * len(module.kernel_size))
    windows = unfolded(module, x)
    by_windows = windows @ module.weight.flatten(1).T + module.bias
    torch.testing.assert_close(by_windows, channels_last(module, module(x)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(unfolded(module, x[0]), windows[:1])


class _Sees(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2, stride=2)
        self.depthwise = nn.Conv2d(3, 3, 1, groups=3)
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.depthwise(self.conv(x)).flatten(2).mean(2))


def test_a_convolution_has_the_grams_of_its_windows_and_gradients():
    torch.manual_seed(0)
    model, x = _Sees(), torch.randn(5, 2, 6, 6)
    found = collect(model, [x], loss=lambda m, b: Prediction(m(b)), labels="exact")
    assert set(found.layers) == {"conv", "head"}
    windows = nn.functional.unfold(x, 2, stride=2).mT.reshape(-1, 8)
    torch.testing.assert_close(found.input_gram("conv", mean=False), windows.T @ windows)
    assert found.counts("conv", "input_gram").tokens == 5 * 9
    total = torch.zeros(3, 3)
    for label in range(4):
        seen = model.conv(x).detach().requires_grad_()
        logits = model.head(model.depthwise(seen).flatten(2).mean(2))
        chosen = logits.log_softmax(-1)[:, label]
        (-chosen * (0.5 * chosen).exp().detach()).sum().backward()
        g = seen.grad.flatten(2).mT.reshape(-1, 3)
        total += g.T @ g
    torch.testing.assert_close(found.output_grad_gram("conv", mean=False), total)
