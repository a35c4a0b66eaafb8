"""K-FAC factors against an independent library, curvlinops (pip install curvlinops-for-pytorch)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pymerge.statistics import Prediction, collect

pytestmark = pytest.mark.parity


class Sequences(nn.Module):
    """Linear layers over several positions, one label per example, as a text classifier has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean(1))


@pytest.mark.parametrize(("labels", "fisher"), [("exact", "type-2"), ("empirical", "empirical")])
def test_factors_agree_with_curvlinops(labels, fisher):  # S3, S4, S7, S12
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    model = Sequences().double()
    data = [(torch.randn(n, 4, 5).double(), torch.randint(3, (n,))) for n in (5, 3)]
    theirs = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="mean"),
        list(model.parameters()),
        data,
        fisher_type=fisher,
        kfac_approx="expand",
        check_deterministic=False,
    )
    theirs.compute_kronecker_factors()
    ours = collect(
        model, data, loss=lambda m, b: Prediction(m(b[0]), b[1]), labels=labels, share_inputs=False
    )
    factors = theirs.state_dict()
    for layer in ("first", "second", "head"):
        a, b = factors["input_covariances"][layer], factors["gradient_covariances"][layer]
        torch.testing.assert_close(ours.input_gram(layer).double(), a, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(ours.output_grad_gram(layer).double(), b, rtol=1e-6, atol=1e-9)
