"""What `pymerge bench --peers` times beside the kernels does the same merge."""

from __future__ import annotations

import pytest
import torch

from pymerge.backends import registry
from pymerge.bench import cases, peers

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("merge", cases.MERGES)
def test_peers_merge_the_same(merge):
    for module in ("peft", "mergekit"):
        pytest.importorskip(module)
    tensors = cases.make(cases.FAMILIES["fp32"], 10_000, 4)
    _, ties = registry.pick("ties", "cpu", "cpu")
    ties(tensors.models, tensors.base, cases.rule_for(tensors, merge), tensors.out)
    found = peers.available(merge)
    assert ("mergekit" in found) == (merge not in ("count", "max"))
    for peer, function in found.items():
        theirs = function(tensors)
        assert theirs.dtype == tensors.out.dtype
        if merge.startswith("dare"):  # other elements are drawn, as many and of the same spread
            assert theirs.std() == pytest.approx(float(tensors.out.std()), rel=0.1), peer
        else:
            torch.testing.assert_close(
                theirs, tensors.out, rtol=1e-6, atol=1e-7, msg=f"{peer} differs in {merge}"
            )
