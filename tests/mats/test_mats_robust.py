"""`mats` on singular, indefinite, empty and non-finite inputs: never NaN out, always a status (M5,
M9, N1 to N3, E3).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mats_cases import case, relative

from pymerge.ops.mats.api import MatsLayer, mats, mats_many
from pymerge.ops.mats.regmean import regmean
from pymerge.ops.mats.weighted_average import weighted_average
from pymerge.ops.ties.api import ties
from pymerge.reference import mats as reference
from pymerge.rules.mats import resolve

STATUSES = {
    "iterations",
    "converged",
    "step_limit",
    "exact",
    "singular",
    "breakdown",
    "initialisation",
    "no_statistics",
    "not_positive",
    "non_finite",
}
OPTIONS = [{}, {"flavor": "paper"}, {"iterations": 60}, {"precision": "bf16x3"}, {"damping": 0.0}]


def sound(result) -> bool:
    return bool(result.weight.isfinite().all()) and result.report.status in STATUSES


def test_finite_models_have_a_finite_start() -> None:
    """M4: a mean is within its terms, though their sum overflows."""
    most = torch.finfo(torch.float32).max
    c = case(2, dtype=torch.float32)
    weights = [torch.full((6, 5), most), torch.full((6, 5), most / 2)]
    result = mats(weights, [a * 0 for a in c.a], c.b)
    assert torch.allclose(result.weight, torch.full((6, 5), 0.75 * most))
    zeros = [torch.zeros(6, 5)] * 2
    assert torch.equal(weighted_average(weights, zeros), result.weight)
    with pytest.raises(ValueError, match="init='task_arithmetic' holds NaN or infinity"):
        mats(weights, c.a, c.b, init="task_arithmetic", base=-weights[0])


@pytest.mark.parametrize("options", OPTIONS)
def test_few_tokens_lower_the_objective_and_stay_near(options: dict[str, object]) -> None:
    c = case(4, 24, 32, tokens=3, dtype=torch.float32)
    result = mats(c.weights, c.a, c.b, **options)
    assert sound(result)
    assert result.report.objective_decrease > 0


def test_few_tokens_move_only_where_there_is_evidence() -> None:
    c = case(2, 24, 32, tokens=3)
    for solver in ("exact", "cg"):
        result = mats(c.weights, c.a, c.b, init=c.base, solver=solver, iterations=100)
        step = result.weight - c.base
        values, basis = torch.linalg.eigh(c.a[0] + c.a[1])
        unseen = basis[:, values < 1e-9 * values[-1]]
        assert unseen.shape[1] == 26
        assert float((step @ unseen).norm()) < 1e-6 * float(step.norm())
    ones = [1.0, 1.0]
    exact = mats(c.weights, c.a, c.b, init=c.base, solver="exact")
    assert exact.report.status == "singular"
    assert exact.report.residual_exit < 1e-9 * exact.report.residual_start
    best = reference.exact(c.weights, c.a, c.b, ones, c.base)
    reached = reference.objective(exact.weight, c.weights, c.a, c.b, ones)
    assert reached <= reference.objective(best, c.weights, c.a, c.b, ones) + 1e-9
    closed = regmean(c.weights, c.a, init=c.base)
    assert closed.report.status == "singular"
    assert relative(closed.weight, reference.regmean(c.weights, c.a, c.base)) < 1e-6


@pytest.mark.parametrize("options", OPTIONS)
def test_indefinite_by_rounding(options: dict[str, object]) -> None:
    """B has an exact null vector, and rounding to bf16 made it indefinite."""
    c = case(4, 32, 24, dtype=torch.float32, decay=5)
    b = []
    for gram in c.b:
        centre = torch.eye(32) - 1 / 32
        rounded = (centre @ gram @ centre).bfloat16().float()
        b.append((rounded + rounded.T) / 2)
    assert min(float(torch.linalg.eigvalsh(x.double())[0]) for x in b) < 0
    result = mats(c.weights, c.a, b, **options)
    assert sound(result)
    assert result.report.status == "initialisation" or result.report.objective_decrease > 0


def test_negative_curvature_keeps_the_last_good_iterate() -> None:
    """B is negative on a part: CG meets it after some good steps."""
    c = case(2, 12, 8)
    values, basis = torch.linalg.eigh(c.b[0])
    values[:2] = -values[-1] / 50
    b = [basis @ torch.diag(values) @ basis.T] * 2
    result = mats(c.weights, c.a, b, iterations=50, objective_tolerance=0.0, preconditioner=False)
    assert result.report.status == "breakdown"
    assert result.report.iterations > 0
    assert result.report.objective_decrease > 0
    rule = resolve(2, iterations=50, objective_tolerance=0.0, preconditioner=False)
    mean = sum(c.weights) / 2
    want, status, done = reference.mats(c.weights, c.a, b, rule, mean)
    assert (status, done) == (result.report.status, result.report.iterations)
    assert relative(result.weight, want) < 1e-8


def test_breakdown_raises_the_damping_and_reports_it() -> None:
    c = case(2, 12, 8)
    values, basis = torch.linalg.eigh(c.b[0])
    values[:2] = -values[-1] / 50
    b = [basis @ torch.diag(values) @ basis.T] * 2
    result = mats(c.weights, c.a, b, iterations=50, objective_tolerance=0.0, damping=0.1)
    assert sound(result)
    assert result.report.breakdowns >= 1
    assert result.report.damping == pytest.approx(0.1 * 10**result.report.breakdowns)
    assert result.report.objective_decrease > 0


def test_negative_definite_statistics_return_the_initialisation() -> None:
    c = case()
    mean = sum(c.weights) / 3
    flipped = [-x for x in c.b]
    for a, b in ((c.a, flipped), ([-x for x in c.a], flipped)):
        with pytest.warns(UserWarning, match=r"grams\[0\].*negative diagonal.*'w'.*keeps its init"):
            result = mats(c.weights, a, b, name="w")
        assert result.report.status == "not_positive"
        assert relative(result.weight, mean) < 1e-15
    # Positive diagonal, but a start that every step would leave uphill.
    pair = torch.tensor([[0.05, 0.95], [0.95, 0.05]], dtype=torch.float64)
    b = [torch.block_diag(pair, torch.zeros(4, 4, dtype=torch.float64))] * 3
    weights = [w.clone() for w in c.weights]
    for w in weights:  # apart along (1, -1) alone, where B is -0.9
        w[:2] = (w[0] - w[1]) / 2 * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    result = mats(weights, c.a, b, preconditioner=False)
    assert result.report.status == "initialisation"
    assert relative(result.weight, sum(weights) / 3) < 1e-15


def test_a_step_never_raises_the_objective_and_the_decrease_is_the_true_one() -> None:
    """M10: Gram matrices of rank 3 and little damping let fp32 take steps of 1e5 times the models'
    distance through directions without evidence.
    """
    g = torch.Generator()
    raised = 0
    for seed in (1, 8, 22, 26, 27):
        g.manual_seed(seed)

        def rows(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g)

        def gram(d: int) -> torch.Tensor:
            x = rows(3, d)
            return x.T @ x / 3

        weights = [rows(24, 40) * 0.02 for _ in range(4)]
        a, b = [gram(40) for _ in weights], [gram(24) for _ in weights]

        doubles = [[y.double() for y in ys] for ys in (weights, a, b)]
        before = reference.objective(sum(weights).double() / 4, *doubles, [1.0] * 4)
        for damping in (0.0, 1e-6, 1e-4, 1e-3):
            result = mats(weights, a, b, damping=damping)
            true = before - reference.objective(result.weight.double(), *doubles, [1.0] * 4)
            assert 0 < true <= before * (1 + 1e-6)
            assert result.report.objective_decrease == pytest.approx(true, abs=1e-3 * before)
            raised += result.report.breakdowns
    assert raised


def test_a_decrease_above_the_objective_is_a_breakdown() -> None:
    """M10: an objective below 0 tells that the statistics are not semidefinite."""
    c = case(1, 12, 8)
    values, basis = torch.linalg.eigh(c.b[0])
    values[:2] = -values[-1] / 500
    b = [basis @ torch.diag(values) @ basis.T]
    assert float(b[0].diagonal().min()) > 0
    options = {"iterations": 50, "objective_tolerance": 0.0, "preconditioner": False}
    start = c.base + 1
    result = mats(c.weights, c.a, b, init=start, **options)
    _, status, _ = reference.mats(c.weights, c.a, b, resolve(1, **options), start)
    assert result.report.status == status == "initialisation"


@pytest.mark.parametrize("which", ["input_grams", "output_grams"])
@pytest.mark.parametrize("shape", ["triu", "tril", "other"])
def test_what_is_not_symmetric_is_an_error(which: str, shape: str) -> None:
    """E2."""
    c = case(3, 6, 5, dtype=torch.float32)
    held = {"input_grams": c.a, "output_grams": c.b}[which]
    held[1] = held[1] @ held[0] if shape == "other" else getattr(held[1], shape)()
    said = "not symmetric; pass" if shape == "other" else r"a triangle; .*G \+ G.T - diag"
    with pytest.raises(ValueError, match=rf"{which}\[1\] is {said}"):
        mats(c.weights, c.a, c.b)


def test_rounding_is_not_taken_for_asymmetry() -> None:
    """E2: products in bf16 are not symmetric to their last bits."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 200, generator=g) * torch.logspace(0, -4, 200)
    noise = 1 + 2.0**-9 * torch.randn(200, 200, generator=g)
    grams = [(x.T @ x) * noise, x.T @ x]
    weights = [torch.randn(3, 200, generator=g) for _ in grams]
    assert sound(mats(weights, grams))


def test_negative_fishers_keep_the_initialisation_and_are_named() -> None:
    """N5."""
    c = case(dtype=torch.float32)
    fishers = [torch.rand_like(w) for w in c.weights]
    fishers[2][1, 3] = -0.1
    with pytest.warns(UserWarning, match=r"fishers\[2\]: negative values; each such element keeps"):
        got = weighted_average(c.weights, fishers, init="pretrained", base=c.base)
    assert got[1, 3] == c.base[1, 3]
    want = reference.weighted_average(c.weights, fishers, c.base)
    assert relative(got, want) < 1e-6


def test_zero_rows_and_zero_statistics() -> None:
    c = case(3, 8, 6, dtype=torch.float32)
    mean = sum(c.weights) / 3
    nothing = [torch.zeros_like(a) for a in c.a]
    for result in (
        mats(c.weights, nothing, c.b),
        mats(c.weights, c.a, [torch.zeros_like(b) for b in c.b]),
        mats(c.weights, nothing),
        regmean(c.weights, nothing),
    ):
        assert result.report.status == "no_statistics"
        assert relative(result.weight, mean) < 1e-6
    silent = [c.a[0], torch.zeros_like(c.a[1]), c.a[2]]  # one model without a token
    for weights in ("raw", "trace"):
        result = mats(c.weights, silent, c.b, task_weights=weights, init="zero", iterations=60)
        assert sound(result)
        assert result.report.trace_shares[1] == 0
        without = mats(
            c.weights[::2], silent[::2], c.b[::2], task_weights=weights, init="zero", iterations=60
        )
        assert relative(result.weight, without.weight) < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["a", "b", "weights"])
def test_non_finite_inputs_fall_back_and_are_named(where: str, value: float) -> None:
    c = case(dtype=torch.float32)
    getattr(c, where)[1][2, 1] = value
    with pytest.warns(UserWarning, match=r"\[1\]: NaN or infinity"):
        result = mats(c.weights, c.a, c.b, name="layer")
    assert result.report.status == "non_finite"
    assert "[1]" in result.report.message
    held = [w for k, w in enumerate(c.weights) if where != "weights" or k != 1]
    assert relative(result.weight, sum(held) / len(held)) < 1e-6


@pytest.mark.filterwarnings("ignore:.*NaN or infinity")
@pytest.mark.parametrize("given", [list, tuple, torch.tensor])
def test_the_initialisation_has_the_options_of_the_models_that_are_left(given: Any) -> None:
    c = case(dtype=torch.float32)
    want = ties([c.weights[0], c.weights[2]], c.base, density=[0.25, 0.75], scaling=0.5)
    c.weights[1][0, 0] = torch.nan
    options = {"density": given([0.25, 0.5, 0.75]), "scaling": torch.tensor(0.5)}
    got = mats(c.weights, c.a, c.b, init="ties", base=c.base, init_options=options)
    assert torch.equal(got.weight, want)


def test_non_finite_start_is_an_error() -> None:
    c = case()
    bad = c.base.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(ValueError, match="init holds NaN"):
        mats(c.weights, c.a, c.b, init=bad)
    with pytest.raises(ValueError, match="base holds NaN"):
        mats(c.weights, c.a, c.b, init="pretrained", base=bad)
    with pytest.raises(ValueError, match="all of them"):
        mats([bad], c.a[:1], c.b[:1])


def test_a_broken_layer_leaves_its_stack_alone() -> None:
    c = case(dtype=torch.float32)
    poisoned = [c.a[0] * torch.nan, *c.a[1:]]
    layers = [
        MatsLayer(c.weights, c.a, c.b),
        MatsLayer(c.weights, poisoned, c.b),
        MatsLayer(c.weights, [torch.zeros_like(a) for a in c.a], c.b),
        MatsLayer(c.weights, c.a, [b - 2 * torch.eye(6) * b.trace() / 6.5 for b in c.b]),
        MatsLayer(c.weights, c.a, c.b),
    ]
    with (
        pytest.warns(UserWarning, match="NaN"),
        pytest.warns(UserWarning, match="negative diagonal"),
    ):
        results = mats_many(layers)
    alone = mats(c.weights, c.a, c.b)
    for i in (0, 4):
        assert relative(results[i].weight, alone.weight) < 1e-6
    assert [r.report.status for r in results][1:3] == ["non_finite", "no_statistics"]
    assert all(sound(r) for r in results)


@pytest.mark.parametrize("exponent", [-150, -60, 60, 100])
def test_extreme_scales_neither_overflow_nor_vanish(exponent: int) -> None:
    c = case(dtype=torch.float32)
    want = mats(c.weights, c.a, c.b)
    half = exponent // 2
    got = mats(c.weights, [a * 2.0**half for a in c.a], [b * 2.0 ** (exponent - half) for b in c.b])
    assert torch.equal(got.weight, want.weight)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("level", [1e-38, 3e-41, 1e-44, 1e37])
@pytest.mark.parametrize("many", [False, True])
def test_input_grams_at_the_ends_of_fp32(
    options: dict[str, object], level: float, many: bool
) -> None:
    c = case(2, 6, 8, dtype=torch.float32)
    grams = [torch.eye(8) * torch.linspace(1, 2, 8) * level for _ in c.a]
    layers = [MatsLayer(c.weights, grams)] * (2 if many else 1)
    for result in mats_many(layers, **options):
        assert sound(result)
        assert result.report.status in ("iterations", "converged")
        assert relative(result.weight, sum(c.weights) / 2) < 1e-3  # equal statistics
    moved = mats(c.weights, grams, init="zero", **options)
    assert relative(moved.weight, sum(c.weights) / 2) < 1e-2


def test_layers_without_columns() -> None:
    result = mats([torch.zeros(3, 0)] * 2, [torch.zeros(0, 0)] * 2, [torch.eye(3)] * 2)
    assert (result.weight.shape, result.report.status) == ((3, 0), "no_statistics")


def test_empty_and_tiny_layers() -> None:
    none = [torch.zeros(0, 4)] * 2
    grams, outputs = [torch.eye(4)] * 2, [torch.zeros(0, 0)] * 2
    assert mats(none, grams, outputs).weight.shape == (0, 4)
    one = [torch.tensor([[1.0]]), torch.tensor([[3.0]])]
    result = mats(one, [torch.tensor([[1.0]]), torch.tensor([[3.0]])], [torch.tensor([[1.0]])] * 2)
    assert float(result.weight) == pytest.approx(2.5, rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weights", "fishers"])
def test_fisher_of_what_is_not_finite_is_the_initialisation(where: str, value: float) -> None:
    """N1, N2: every element, not only those where it is not finite."""
    c = case(dtype=torch.float32)
    fishers = [torch.rand_like(w) for w in c.weights]
    {"weights": c.weights, "fishers": fishers}[where][1][2, 1] = value
    with pytest.warns(UserWarning, match=rf"{where}\[1\]: NaN or infinity; .* its initialisation"):
        got = weighted_average(c.weights, fishers, init="pretrained", base=c.base)
    assert torch.equal(got, c.base)
    want = reference.weighted_average(c.weights, fishers, c.base)
    assert torch.equal(got.double(), want)
    with pytest.warns(UserWarning):
        got = weighted_average(c.weights, fishers)
    held = [w for k, w in enumerate(c.weights) if where != "weights" or k != 1]
    assert relative(got, sum(held) / len(held)) < 1e-6


def test_fisher_quotients_that_overflow_are_the_initialisation() -> None:
    c = case(dtype=torch.float32)
    fishers = [torch.rand_like(w) for w in c.weights]
    plain = weighted_average(c.weights, fishers)
    for f in fishers:
        f[0, 0] = 3e38
    got = weighted_average(c.weights, fishers, init="pretrained", base=c.base)
    assert got[0, 0] == c.base[0, 0]
    assert torch.equal(got.flatten()[1:], plain.flatten()[1:])


def test_fisher_of_models_that_are_all_bad_is_an_error() -> None:
    c = case(dtype=torch.float32)
    for w in c.weights:
        w[0, 0] = torch.nan
    with pytest.raises(ValueError, match="every model holds NaN or infinity"):
        weighted_average(c.weights, [torch.rand_like(w) for w in c.weights])


@pytest.mark.parametrize("solver", ["cg", "exact"])
def test_a_solution_beyond_its_dtype_is_the_initialisation(solver: str) -> None:
    """N4: a task's statistics pull the merged weight beyond fp16; as fp32 it is what it is."""
    weights = [torch.tensor([[60000.0, 30000.0]]), torch.tensor([[60000.0, -30000.0]])]
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.5])
    grams = [torch.outer(first, first), torch.outer(second, second)]
    options = {"solver": solver, "step_limit": 1e6, "iterations": 20, "damping": 1e-6}
    wide = mats(weights, grams, **options)
    assert float(wide.weight.abs().max()) > 65504
    assert wide.report.status != "initialisation"
    narrow = mats([w.half() for w in weights], grams, **options)
    assert torch.equal(narrow.weight, (sum(weights) / 2).half())
    assert narrow.report.status == "initialisation"
    assert "beyond float16" in narrow.report.message
    assert narrow.report.step == narrow.report.objective_decrease == 0
    assert narrow.report.residual_exit == narrow.report.residual_start


def test_types_are_named() -> None:
    c = case()
    scaled = {"init": "task_arithmetic", "base": c.base, "init_options": {"scaling": "a lot"}}
    for change, message in (
        ({"dampening": 1}, "mats has no option 'dampening'; it has flavor"),
        ({"preconditioner": "no"}, "preconditioner='no'"),
        (scaled, "'scaling'.*='a lot' is a str"),
    ):
        with pytest.raises(TypeError, match=message):
            mats(c.weights, c.a, c.b, **change)
    with pytest.raises(TypeError, match="input_grams is a NoneType"):
        mats(c.weights, None)
    with pytest.raises(TypeError, match=r"weights\[0\] is int64; mats takes"):
        mats([w.long() for w in c.weights], c.a)
    with pytest.raises(TypeError, match=r"fishers\[0\] is a list"):
        weighted_average(c.weights, [w.tolist() for w in c.weights])
    with pytest.raises(TypeError, match="fishers is a NoneType"):
        weighted_average(c.weights, None)
