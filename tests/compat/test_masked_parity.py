"""Methods under masks and DELLA against the installed mergekit (pytest -m parity)."""

from __future__ import annotations

import pytest
import torch

from pymerge.compat import mergekit as compat
from pymerge.rules.masked import PAIRS

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:.*as mergekit does")]

pytest.importorskip("mergekit", reason="mergekit is not installed")


def merge_tensors(*arguments, **options):
    from mergekit import merge_methods

    return merge_methods.merge_tensors(*arguments, **options)


SHAPES = [(40, 96), (4000,), (1,), (3, 1), (7, 8, 9)]
CASES = [
    ("nearswap", {"t": 0.01}),
    ("nearswap", {"t": 0}),
    ("nearswap", {"t": 1e6}),
    ("nearswap", {"t": -1}),
    ("ram", {}),
    ("ram", {"epsilon": 0.01}),
    ("ramplus_tl", {"epsilon": 0.01}),
    ("ramplus_tl", {"epsilon": 0.02, "r": 0.7, "alpha": 3}),
    ("sce", {}),
    ("sce", {"select_topk": 0.0}),
    ("sce", {"select_topk": 0.1}),
    ("sce", {"select_topk": 0.7, "int8_mask": True}),
]


def family(shape, count, kind, seed):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g)
    if kind == "tiny":  # whose differences are rounded as finely as others
        base = base * 1e-4
    scale = {"tiny": 1e-5, "equal": 0.0}.get(kind, 0.01)
    deltas = [scale * torch.randn(shape, generator=g) for _ in range(count)]
    if kind == "sparse":
        deltas = [d * (torch.rand(shape, generator=g) < 0.3) for d in deltas]
    if kind == "same":
        deltas = [deltas[0]] * count
    return [base + d for d in deltas], base


def close(ours, theirs, models, base):
    """Within a few units in the last place of the largest input."""
    scale = torch.stack([base.abs(), *(m.abs() for m in models)]).amax(0)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert ((ours - theirs).abs() <= 4 * 2.0**-23 * scale).all(), float((ours - theirs).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["dense", "sparse", "tiny", "same", "equal"])
@pytest.mark.parametrize(("method", "parameters"), CASES)
def test_numbers(method, parameters, kind, shape):
    for count in (1,) if method in PAIRS else (1, 2, 5):
        models, base = family(shape, count, kind, count)
        arguments = [base, *models], method
        options = {"parameters": parameters, "base_index": 0}
        close(
            compat.merge_tensors(*arguments, **options),
            merge_tensors(*arguments, **options),
            models,
            base,
        )


@pytest.mark.parametrize("shape", [(64, 128), (3000,), (200, 5), (9, 16, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_arcee_masks(shape, seed):
    """The importance's noise, and so the mask near the threshold, is the processor's there: those
    that differ are few, and everything else is the same number.
    """
    models, base = family(shape, 1, "dense", seed)
    ours = compat.merge_tensors([base, *models], "arcee_fusion", base_index=0)
    theirs = merge_tensors([base, *models], "arcee_fusion", base_index=0)
    same = (ours != base) == (theirs != base)
    assert torch.equal(ours[same], theirs[same])
    assert int((~same).sum()) <= max(2, 0.02 * int((theirs != base).sum()))


# Of 16-bit models many variances are equal: where a share is selected, mergekit takes some of those at
# the threshold, and P3 all.
WITHOUT_TIES = [case for case in CASES if not 0 < case[1].get("select_topk", 0) < 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "parameters"), WITHOUT_TIES)
def test_16_bit_models_are_as_fp32_ones(method, parameters, dtype):
    """mergekit computes in the models' dtype; here the same models in fp32 are rounded once."""
    models, base = family((30, 50), 1 if method in PAIRS else 3, "dense", 0)
    narrow = [x.to(dtype) for x in (base, *models)]
    options = {"parameters": parameters, "base_index": 0}
    ours = compat.merge_tensors(narrow, method, **options)
    theirs = merge_tensors([x.float() for x in narrow], method, **options)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert ((ours.float() - theirs).abs() <= unit * theirs.abs().clamp(min=1e-4)).all()


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("rescale", [True, False])
def test_della_has_mergekits_distribution(method, rescale):
    """Masks differ, so the share of each rank that is kept, and the kept norm."""
    rows, length, density, epsilon = 20_000, 9, 0.5, 0.4
    base = torch.zeros(rows, length)
    x = torch.arange(1.0, length + 1).repeat(rows, 1)
    options = {
        "parameters": {"weight": 1, "density": density, "epsilon": epsilon, "rescale": rescale},
        "base_index": 0,
    }
    torch.manual_seed(0)
    ours = compat.merge_tensors([base, x], method, **options)
    theirs = merge_tensors([base, x], method, **options)
    shares = [(w != 0).double().mean(0) for w in (ours, theirs)]
    # Six standard deviations of the difference of two binomial shares.
    assert ((shares[0] - shares[1]).abs() < 6 * (0.5 / rows) ** 0.5).all()
    norms = [w.double().abs().sum().item() for w in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6 if rescale else 1e-2)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_at_its_edges(method, density):
    models, base = family((20, 30), 3, "dense", 0)
    options = {
        "parameters": {"weight": [0.5, 0.3, 0.7], "density": density, "lambda": 0.5},
        "base_index": 0,
    }
    ours = compat.merge_tensors([base, *models], method, **options)
    close(ours, merge_tensors([base, *models], method, **options), models, base)


def test_sparsify_with_della():
    from mergekit.sparsify import SparsificationMethod, sparsify

    x = torch.ones(20_000, 5)
    torch.manual_seed(0)
    ours = compat.sparsify(x, 0.6, "della_magprune", epsilon=0.1)
    theirs = sparsify(x, 0.6, SparsificationMethod.della_magprune, epsilon=0.1)
    assert abs(ours.mean() - theirs.mean()) < 6 * (0.5 / x.numel()) ** 0.5
