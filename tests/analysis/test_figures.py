"""The figures of `pymerge.analyze` against the plain reference, and against what is known."""

from __future__ import annotations

import math

import pytest
import torch

import pymerge
from pymerge.analysis.figures import DENSITIES
from pymerge.analysis.measure import TensorMeasure
from pymerge.reference import analysis as reference
from pymerge.rules.ties import resolve_options

COUNTED = ("kept", "both_kept", "agreed", "signs", "non_finite")
# More than one block, and a last one that is not full.
SHAPE = (37, 1200)


def inputs(count=3, dtype=torch.float32, shape=SHAPE, seed=0):
    """A base and models a little away from it, some elements not changed at all."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(dtype)
    models = []
    for _ in range(count):
        step = 0.01 * torch.randn(shape, generator=generator) ** 3
        models.append((base + step * (torch.rand(shape, generator=generator) < 0.9)).to(dtype))
    return models, base


def check(models, base, **options):
    """Counts are those of the reference; measures agree to rounding."""
    first = models[0]
    resolved = resolve_options(len(models), scope="tensor", **options)
    rule = resolved.rule(first.numel(), "a", first.shape)
    measure = TensorMeasure(len(models), first.numel(), rule, DENSITIES)
    measure.add(models, base)
    found = measure.finish()
    wanted = reference.figures(models, base, rule, DENSITIES)
    for name in COUNTED:
        assert found[name].tolist() == wanted[name], name
    assert found["largest"].tolist() == wanted["largest"]

    def close(one, other, tolerance):
        one = torch.as_tensor(one, dtype=torch.float64)
        other = torch.as_tensor(other, dtype=torch.float64)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=1e-9, equal_nan=True)

    close(found["products"], wanted["products"], 1e-9)
    close(found["base_square"], [wanted["base_square"]] * len(models), 1e-9)
    close(found["parts"], wanted["parts"], 1e-5)
    close(found.update_square, wanted["update_square"], 1e-5)
    close(found.mass_shares, wanted["mass"], 1e-3)
    return found


@pytest.mark.parametrize("trim", ["none", "magnitude", "outliers", "random", "magprune"])
@pytest.mark.parametrize("elect", ["none", "sum", "count"])
@pytest.mark.parametrize("merge", ["weighted_mean", "mean", "sum", "max"])
def test_every_rule(trim, elect, merge):
    models, base = inputs()
    zero_sign = "majority" if merge == "mean" else "positive"
    check(
        models,
        base,
        density=[0.3, 0.5, 0.2],
        weights=[1, 0.7, -0.4],
        scaling=1.3,
        epsilon=0.1,
        trim=trim,
        elect=elect,
        merge=merge,
        zero_sign=zero_sign,
    )


@pytest.mark.parametrize("rescale", ["density", "l1", "l2", "linf"])
@pytest.mark.parametrize("trim", ["magnitude", "random"])
def test_rescaling(trim, rescale):
    check(*inputs(), density=0.4, trim=trim, rescale=rescale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    """In 16 bits many magnitudes are equal, and all at the threshold are kept."""
    check(*inputs(dtype=dtype), density=0.2)


@pytest.mark.parametrize("count", [1, 2, 12, 17])
def test_numbers_of_models(count):
    check(*inputs(count, shape=(40, 400)), density=0.3)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 0), (7,), (3, 4, 5)])
@pytest.mark.parametrize("trim", ["magnitude", "outliers", "magprune"])
def test_shapes(shape, trim):
    check(*inputs(shape=shape), density=0.5, trim=trim)


def test_more_magnitudes_than_are_held():
    check(*inputs(1, shape=(1200, 1000)), density=0.2)


@pytest.mark.parametrize("elect", ["none", "sum"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted_and_left_out(bad, elect):
    models, base = inputs()
    models[1][3, 5:9] = bad
    models[2][3, 8:10] = math.inf
    found = check(models, base, density=0.3, elect=elect)
    assert found["non_finite"].tolist() == [0, 4, 2]
    assert all(map(math.isfinite, found.norms))


def test_without_a_base():
    models, _ = inputs()
    found = check(models, None, density=1.0, trim="none", elect="none")
    assert all(map(math.isnan, found.relative_norms))


def test_parts_of_a_tensor_are_the_whole():
    models, base = inputs(shape=(1 << 16,))
    rule = resolve_options(3, trim="none", elect="sum", density=1.0).rule(1 << 16)
    wanted = check(models, base, trim="none", elect="sum", density=1.0)
    measure = TensorMeasure(3, 1 << 16, rule, DENSITIES)
    for first in range(0, 1 << 16, 20000):
        here = slice(first, first + 20000)
        measure.add([x[here] for x in models], base[here], first, False)
    found = measure.finish()
    for name in COUNTED:
        assert found[name].equal(wanted[name])
    torch.testing.assert_close(found["mass_above"], wanted["mass_above"])
    torch.testing.assert_close(found["parts"], wanted["parts"])


def test_a_case_that_can_be_counted_by_hand():
    base = torch.zeros(4)
    models = [torch.tensor([3.0, 1, 0, 2]), torch.tensor([4.0, -1, 0, 0])]
    analysis = pymerge.analyze([{"w": x} for x in models], {"w": base}, density=0.5, normalize=True)
    total = analysis.total
    assert total["kept"].tolist() == [2, 2]  # 3 and 2; 4 and -1
    assert total["both_kept"].tolist() == [[2, 1], [1, 2]]
    assert total.overlaps[0][1] == 1 / 3
    assert total.voting == [1, 2, 1] and total.conflicts == [0, 0, 0]
    assert total.norms == [math.sqrt(14), math.sqrt(17)]
    assert total.cosines[0][1] == pytest.approx(11 / math.sqrt(14 * 17))
    # The update is [3.5, -1, 0, 2]; the halves of its first element come from 3 and from 4.
    assert total.update_square == pytest.approx(3.5**2 + 1 + 4)
    assert total.contributions == pytest.approx([(1.5 * 3.5 + 4) / 17.25, (2 * 3.5 + 1) / 17.25])
    assert total.mass_shares[0][DENSITIES.index(0.5)] == pytest.approx(5 / 6, rel=1e-3)


def test_conflicts_are_those_of_the_merge():
    """The kernel's own count of conflicting elements, and of what is kept."""
    models, base = inputs(4, torch.bfloat16)
    from pymerge.ops.ties.run import run_tensor

    options = resolve_options(4, density=0.3, non_finite="allow")
    rule = options.rule(base.numel())
    stats = run_tensor(models, base, options, rule, torch.empty_like(base), "cpu")
    found = check(models, base, density=0.3)
    assert sum(found.conflicts) == stats.conflicts
    assert tuple(found["kept"].tolist()) == stats.kept
    assert sum(found.voting) == base.numel()


def test_contributions_add_up_to_the_update_of_the_merge():
    models, base = inputs(3)
    merged = pymerge.ties(models, base, density=0.2, weights=[1, 0.5, 2])
    found = check(models, base, density=0.2, weights=[1, 0.5, 2])
    assert found.update_square == pytest.approx(float((merged - base).square().sum()), rel=1e-3)
    assert sum(found.contributions) == pytest.approx(1)


def test_alignment_is_that_of_the_reference():
    from pymerge.analysis.measure import measure_alignment

    models, base = inputs(2, shape=(24, 40))
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(100, 40, generator=generator)
    grams = [rows.T @ rows, None]
    for turned in (False, True):
        figures = pymerge.analysis.figures.Figures(2)
        own = [x.T.contiguous() if turned else x for x in (*models, base)]
        measure_alignment(figures, own[:2], own[2], lambda j: grams[j], turned)
        found = figures.alignment
        for i in range(2):
            (seen, square), (unknown, _) = reference.alignment(models[i] - base, grams)
            assert found[i][0] == pytest.approx(seen / square, rel=1e-6)
            assert math.isnan(found[i][1]) and math.isnan(unknown)


def test_inputs_along_the_task_vector_are_aligned():
    """Inputs of one direction: what changes that direction alone is seen d times as well as
    chance, what is orthogonal to it not at all.
    """
    base = torch.zeros(6, 10)
    along, across = base.clone(), base.clone()
    along[:, 0], across[:, 1] = 1, 1

    class Inputs:
        def input_gram(self, layer):
            return torch.diag(torch.tensor([1.0] + [0.0] * 9))

    states = [{"fc.weight": along}, {"fc.weight": across}]
    analysis = pymerge.analyze(states, {"fc.weight": base}, statistics=[Inputs(), None])
    assert analysis.total.alignment[0][0] == 10
    assert analysis.total.alignment[1][0] == 0
