"""`mats`, `regmean`, `weighted_average`: oracles in float64, rule by rule of docs/spec/mats.md."""

from __future__ import annotations

import contextlib
import inspect
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mats_cases import Case, case, relative

from pymerge.engine.state_dicts import merge
from pymerge.ops.mats import system
from pymerge.ops.mats.api import MatsLayer, mats, mats_many
from pymerge.ops.mats.regmean import regmean
from pymerge.ops.mats.weighted_average import weighted_average
from pymerge.reference import mats as reference
from pymerge.rules.mats import resolve

CONVERGED = {"iterations": 200, "objective_tolerance": 0.0, "residual_tolerance": 1e-13}


def solution(c: Case, with_b: bool = True, shares: list[float] | None = None) -> torch.Tensor:
    """The dense Kronecker solve."""
    shares = shares or [1.0] * len(c.a)
    b = c.b if with_b else None
    matrix = reference.dense_matrix(c.a, b, shares)
    right = reference.right_side(c.weights, c.a, b, shares)
    if b is None:
        return torch.linalg.solve(matrix, right.T).T
    return torch.linalg.solve(matrix, right.reshape(-1)).reshape(right.shape)


# M1, M6: the system is the one that the spec states.


@pytest.mark.parametrize("preconditioner", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (1, 7), (7, 1)])
def test_converges_to_the_dense_kronecker_solution(
    shape: tuple[int, int], preconditioner: bool
) -> None:
    c = case(3, *shape)
    result = mats(c.weights, c.a, c.b, preconditioner=preconditioner, **CONVERGED)
    assert result.report.status == "converged"
    assert relative(result.weight, solution(c)) < 1e-10


@pytest.mark.parametrize("init", ["average", "pretrained", "task_arithmetic", "ties", "zero"])
def test_solution_does_not_depend_on_the_initialisation(init: str) -> None:
    c = case()
    result = mats(c.weights, c.a, c.b, init=init, base=c.base, **CONVERGED)
    assert relative(result.weight, solution(c)) < 1e-10


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 5),
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    seed=st.integers(0, 1000),
    iterations=st.integers(0, 6),
    with_b=st.booleans(),
    preconditioner=st.booleans(),
    off_diagonal=st.sampled_from([1.0, 0.9, 0.0]),
    weights=st.sampled_from(["raw", "trace"]),
    limit=st.sampled_from([None, 0.3]),
)
def test_fast_path_follows_the_reference(
    count: int,
    d_out: int,
    d_in: int,
    seed: int,
    iterations: int,
    with_b: bool,
    preconditioner: bool,
    off_diagonal: float,
    weights: str,
    limit: float | None,
) -> None:
    c = case(count, d_out, d_in, seed=seed)
    options = {
        "iterations": iterations,
        "preconditioner": preconditioner,
        "off_diagonal": off_diagonal,
        "task_weights": weights,
        "step_limit": limit,
        "objective_tolerance": 1e-12,
    }
    b = c.b if with_b else None
    want, status, done = reference.mats(c.weights, c.a, b, resolve(count, **options), c.base)
    result = mats(c.weights, c.a, b, init=c.base, **options)
    assert relative(result.weight, want) < 1e-9
    report = result.report
    if (
        report.residual_exit > 1e-12 * report.residual_start
    ):  # else rounding decides when it has converged
        assert (report.status, report.iterations) == (status, done)


def test_task_arithmetic_starts_at_the_bits_of_the_method() -> None:
    c = case(3, 40, 33, dtype=torch.float32)
    states = [{"w": w} for w in c.weights]
    want = merge(states, {"w": c.base}, method="task_arithmetic", scaling=0.37)["w"]
    options = {"init": "task_arithmetic", "init_options": {"scaling": 0.37}}
    got = mats(c.weights, c.a, c.b, base=c.base, iterations=0, **options)
    assert torch.equal(got.weight, want)


# M11, M14: exact solutions.


def test_one_model_is_returned_whatever_the_start() -> None:
    c = case(1)
    exact = mats(c.weights, c.a, c.b, init="zero", solver="exact")
    assert exact.report.status == "exact"
    assert relative(exact.weight, c.weights[0]) < 1e-10
    assert (
        relative(mats(c.weights, c.a, c.b, init="zero", **CONVERGED).weight, c.weights[0]) < 1e-10
    )
    assert relative(regmean(c.weights, c.a, init="zero").weight, c.weights[0]) < 1e-10


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (1, 4)])
def test_two_models_are_solved_directly(shape: tuple[int, int]) -> None:
    c = case(2, *shape)
    exact = mats(c.weights, c.a, c.b, solver="exact", task_weights=[0.3, 2.0])
    assert exact.report.status == "exact"
    assert relative(exact.weight, solution(c, shares=[0.3, 2.0])) < 1e-10


def test_two_models_without_overlap_keep_the_initialisation_where_nothing_is_known() -> None:
    one = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    two = torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))
    weights = [
        torch.full((2, 2), 1.0, dtype=torch.float64),
        torch.full((2, 2), 2.0, dtype=torch.float64),
    ]
    init = torch.full((2, 2), 9.0, dtype=torch.float64)
    for solver in ("exact", "cg"):
        result = mats(weights, [one, two], [one, two], init=init, solver=solver, iterations=20)
        want = torch.tensor([[1.0, 9.0], [9.0, 2.0]], dtype=torch.float64)
        assert relative(result.weight, want) < 1e-10
    assert (
        mats(weights, [one, two], [one, two], init=init, solver="exact").report.status == "singular"
    )


def test_identity_output_grams_give_regmean() -> None:
    c = case()
    eye = [torch.eye(6, dtype=torch.float64)] * 3
    want = solution(c, with_b=False)
    assert relative(regmean(c.weights, c.a).weight, want) < 1e-10
    assert relative(mats(c.weights, c.a, eye, **CONVERGED).weight, want) < 1e-10
    assert relative(mats(c.weights, c.a, **CONVERGED).weight, want) < 1e-10


def test_regmean_with_off_diagonal_zero_is_a_weighted_average() -> None:
    c = case()
    weight = regmean(c.weights, c.a, off_diagonal=0.0).weight
    fishers = [a.diagonal().expand(6, 5) for a in c.a]
    assert relative(weight, weighted_average(c.weights, fishers)) < 1e-10


def test_diagonal_statistics_give_diagonal_fisher() -> None:
    c = case()
    a = [torch.diag(x.diagonal()) for x in c.a]
    b = [torch.diag(x.diagonal()) for x in c.b]
    fishers = [torch.outer(y.diagonal(), x.diagonal()) for x, y in zip(a, b, strict=True)]
    want = weighted_average(c.weights, fishers)
    assert relative(mats(c.weights, a, b, **CONVERGED).weight, want) < 1e-10
    assert relative(mats(c.weights, c.a, c.b, off_diagonal=0.0, **CONVERGED).weight, want) < 1e-10


def test_equal_statistics_give_the_average() -> None:
    c = case()
    mean = sum(c.weights) / 3
    result = mats(c.weights, c.a[:1] * 3, c.b[:1] * 3, init=c.base, **CONVERGED)
    assert relative(result.weight, mean) < 1e-10
    assert relative(regmean(c.weights, c.a[:1] * 3, init=c.base).weight, mean) < 1e-10
    assert mats(c.weights, c.a[:1] * 3, c.b[:1] * 3).report.step < 1e-10


def test_block_fisher_of_vectors() -> None:
    c = case(3, 1, 7)
    vectors = [w[0] for w in c.weights]
    total = sum(c.a)
    want = torch.linalg.solve(total, sum(a @ v for a, v in zip(c.a, vectors, strict=True)))
    assert relative(regmean(vectors, c.a).weight, want) < 1e-10
    result = mats(vectors, c.a, **CONVERGED)
    assert result.weight.shape == (7,)
    assert relative(result.weight, want) < 1e-10


# Symmetries of the system. They hold for the early-stopped iterate too, not only for the solution,
# except where noted.

STOPPED = {"iterations": 3, "objective_tolerance": 0.0}


@pytest.mark.parametrize("options", [STOPPED, {**STOPPED, "preconditioner": False}, CONVERGED])
def test_scale_of_the_statistics_does_not_matter(options: dict[str, object]) -> None:
    c = case()
    want = mats(c.weights, c.a, c.b, **options).weight
    for by_a, by_b in ((1e-12, 1.0), (1.0, 1e-12), (1e10, 1e9), (3.0, 7.0)):
        got = mats(c.weights, [x * by_a for x in c.a], [x * by_b for x in c.b], **options).weight
        assert relative(got, want) < 1e-10


def test_power_of_two_scale_changes_no_bit_in_fp32() -> None:
    c = case(dtype=torch.float32)
    want = mats(c.weights, c.a, c.b).weight
    got = mats(c.weights, [x * 2.0**-40 for x in c.a], [x * 2.0**-30 for x in c.b]).weight
    assert torch.equal(got, want)


def test_a_factor_moved_from_one_statistic_to_the_other_changes_nothing() -> None:
    c = case()
    factors = [0.1, 5.0, 30.0]
    a = [x * f for x, f in zip(c.a, factors, strict=True)]
    b = [x / f for x, f in zip(c.b, factors, strict=True)]
    assert (
        relative(
            mats(c.weights, a, b, **STOPPED).weight, mats(c.weights, c.a, c.b, **STOPPED).weight
        )
        < 1e-10
    )


def test_order_of_the_models_does_not_matter() -> None:
    c = case()
    order = [2, 0, 1]
    got = mats(*[[xs[i] for i in order] for xs in (c.weights, c.a, c.b)], **STOPPED).weight
    assert relative(got, mats(c.weights, c.a, c.b, **STOPPED).weight) < 1e-10


def test_transposition_swaps_the_statistics() -> None:
    # The early-stopped iterate too without a preconditioner; that one treats A and B differently
    # (M7).
    c = case()
    for options in (CONVERGED, {**STOPPED, "preconditioner": False}):
        got = mats([w.T for w in c.weights], c.b, c.a, **options).weight
        assert relative(got.T, mats(c.weights, c.a, c.b, **options).weight) < 1e-10


def test_orthogonal_change_of_basis() -> None:
    c = case()
    g = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64)).Q
    got = mats(
        [u @ w @ v.T for w in c.weights],
        [v @ a @ v.T for a in c.a],
        [u @ b @ u.T for b in c.b],
        **STOPPED,
    ).weight
    assert relative(u.T @ got @ v, mats(c.weights, c.a, c.b, **STOPPED).weight) < 1e-10


def test_a_duplicated_model_is_one_of_weight_two() -> None:
    c = case()
    init = c.base
    more = [[*xs, xs[0]] for xs in (c.weights, c.a, c.b)]
    for options in (CONVERGED, {**STOPPED, "preconditioner": False}):
        weighted = mats(c.weights, c.a, c.b, init=init, task_weights=[2, 1, 1], **options).weight
        assert relative(mats(*more, init=init, **options).weight, weighted) < 1e-10
    assert (
        relative(
            regmean([*c.weights, c.weights[0]], [*c.a, c.a[0]], init=init).weight,
            regmean(c.weights, c.a, task_weights=[2, 1, 1], init=init).weight,
        )
        < 1e-10
    )


@pytest.mark.parametrize("preconditioner", [True, False])
def test_a_dead_input_keeps_the_initialisation_bit_for_bit(preconditioner: bool) -> None:
    c = case(dtype=torch.float32)
    for a in c.a:
        a[2, :] = a[:, 2] = 0
    for b in c.b:
        b[4, :] = b[:, 4] = 0
    result = mats(c.weights, c.a, c.b, init=c.base, preconditioner=preconditioner)
    assert torch.equal(result.weight[:, 2], c.base[:, 2])
    assert torch.equal(result.weight[4], c.base[4])
    assert not torch.equal(result.weight[:, 1], c.base[:, 1])
    closed = regmean(c.weights, c.a, init=c.base)
    assert closed.report.status == "singular"
    assert relative(closed.weight[:, 2], c.base[:, 2]) < 1e-6


# M3, M8, M12: options.


def test_trace_weights_level_the_tasks() -> None:
    c = case()
    loud = [c.a[0] * 1000, *c.a[1:]]
    shares = mats(c.weights, loud, c.b, task_weights="trace").report.trace_shares
    assert shares == pytest.approx([1 / 3] * 3)
    assert mats(c.weights, loud, c.b).report.trace_shares[0] > 0.99
    levelled = mats(c.weights, loud, c.b, task_weights="trace", **STOPPED).weight
    assert (
        relative(levelled, mats(c.weights, c.a, c.b, task_weights="trace", **STOPPED).weight)
        < 1e-10
    )


def test_step_limit_stops_on_the_boundary() -> None:
    c = case()
    free = mats(c.weights, c.a, c.b, init="zero", iterations=50)
    limit = 0.5 * free.report.step
    result = mats(c.weights, c.a, c.b, init="zero", iterations=50, step_limit=limit)
    assert result.report.status == "step_limit"
    assert result.report.step == pytest.approx(limit, rel=1e-9)
    assert 0 < result.report.objective_decrease < free.report.objective_decrease


def test_report_tells_the_true_residual_and_decrease() -> None:
    c = case()
    result = mats(c.weights, c.a, c.b)
    ones = [1.0] * 3
    mean = sum(c.weights) / 3
    right = reference.right_side(c.weights, c.a, c.b, ones)
    report = result.report
    start = (right - reference.operator(mean, c.a, c.b, ones)).norm()
    exit_ = (right - reference.operator(result.weight, c.a, c.b, ones)).norm()
    assert report.residual_start == pytest.approx(float(start), rel=1e-9)
    assert report.residual_exit == pytest.approx(float(exit_), rel=1e-6)
    decrease = reference.objective(mean, c.weights, c.a, c.b, ones) - reference.objective(
        result.weight, c.weights, c.a, c.b, ones
    )
    assert report.objective_decrease == pytest.approx(decrease, rel=1e-9)
    longest = max(float((w - mean).norm()) for w in c.weights)
    assert report.step == pytest.approx(float((result.weight - mean).norm()) / longest, rel=1e-9)
    assert json.loads(json.dumps(report.as_dict()))["status"] in ("iterations", "converged")


def test_no_iterations_are_the_initialisation() -> None:
    c = case()
    result = mats(c.weights, c.a, c.b, iterations=0)
    assert result.report.iterations == 0
    assert relative(result.weight, sum(c.weights) / 3) < 1e-15


@pytest.mark.parametrize(
    "precision, level", [("fp32", 3e-6), ("tf32", 3e-6), ("bf16x3", 3e-5), ("fp64", 1e-9)]
)
def test_precisions(precision: str, level: float) -> None:
    """On the CPU tf32 is fp32; bf16x3 keeps about 16 bits of each factor."""
    c = case()
    got = mats(c.weights, c.a, c.b, precision=precision, iterations=60, objective_tolerance=0.0)
    assert relative(got.weight, solution(c)) < level
    assert got.report.precision == precision


def test_bf16x3_is_between_bf16_and_fp32() -> None:
    c = case(4, 40, 30, dtype=torch.float32)
    want = solution(case(4, 40, 30))
    errors = {}
    for precision in ("fp32", "bf16x3"):
        got = mats(c.weights, c.a, c.b, precision=precision, iterations=60, objective_tolerance=0.0)
        errors[precision] = relative(got.weight, want)
    assert errors["fp32"] < errors["bf16x3"] < 2.0**-9 / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_weights_dtype(dtype: torch.dtype) -> None:
    c = case()
    weights = [w.to(dtype) for w in c.weights]
    grams = [[x.float() for x in xs] for xs in (c.a, c.b)]
    got = mats(weights, *grams)
    wide = mats([w.double() for w in weights], *grams)
    assert got.weight.dtype == dtype
    assert relative(got.weight, wide.weight) < 4 * torch.finfo(dtype).eps
    assert regmean(weights, grams[0]).weight.dtype == dtype
    assert weighted_average(weights, [w.abs() for w in c.weights]).dtype == dtype


# M15.


def test_fisher_of_no_weight_keeps_the_initialisation() -> None:
    c = case()
    fishers = [torch.rand_like(w) for w in c.weights]
    for f in fishers:
        f[1, 2] = 0
    got = weighted_average(c.weights, fishers, init="pretrained", base=c.base)
    want = reference.weighted_average(c.weights, fishers, c.base)
    assert got[1, 2] == c.base[1, 2]
    assert relative(got, want) < 1e-14
    levelled = weighted_average(c.weights, fishers, task_weights="trace", init=c.base)
    shares = [1 / float(f.sum()) for f in fishers]  # M3: every model has the same total weight
    assert (
        relative(levelled, reference.weighted_average(c.weights, fishers, c.base, 0, shares))
        < 1e-12
    )
    nothing = [torch.zeros_like(w) for w in c.weights]
    assert torch.equal(weighted_average(c.weights, nothing), sum(c.weights) / 3)


# Stacks.


@pytest.mark.parametrize("with_b", [True, False])
def test_many_layers_are_solved_as_one_by_one(with_b: bool) -> None:
    layers, shared = [], case(3, 6, 5, seed=9).a
    for i in range(7):
        shape = (6, 5) if i % 3 else (4, 8)
        c = case(3, *shape, seed=i)
        a = shared if i in (1, 2) else c.a
        layers.append(MatsLayer(c.weights, a, c.b if with_b else None, c.base, name=str(i)))
    together = mats_many(layers)
    assert [r.report.name for r in together] == [str(i) for i in range(7)]
    for layer, got in zip(layers, together, strict=True):
        alone = mats(layer.weights, layer.input_grams, layer.output_grams, name=layer.name)
        assert relative(got.weight, alone.weight) < 1e-12
        assert got.report.status == alone.report.status


@pytest.mark.parametrize("with_b, factored", [(True, [3, 3]), (False, [1])])
def test_layers_that_share_inputs_hold_them_once(
    monkeypatch: pytest.MonkeyPatch, with_b: bool, factored: list[int]
) -> None:
    from pymerge.ops.mats import solve as _mats_solve
    from pymerge.ops.mats import system

    found, held = [], []
    plain, solve = system.damped_inverse, _mats_solve.solve_stack
    monkeypatch.setattr(system, "damped_inverse", lambda m, d: found.append(len(m)) or plain(m, d))
    monkeypatch.setattr(
        "pymerge.ops.mats.api.solve_stack", lambda s, *a: held.append(s.a.stride(0)) or solve(s, *a)
    )
    cases = [case(3, 6, 5, seed=i) for i in range(3)]
    mats_many([MatsLayer(c.weights, cases[0].a, c.b if with_b else None) for c in cases])
    assert held == [0]  # one A behind the three
    assert found == factored


def test_one_layer_of_a_stack_may_stop_before_the_others() -> None:
    c = case()
    easy = MatsLayer(c.weights, c.a[:1] * 3, c.b[:1] * 3, name="easy")
    hard = MatsLayer(c.weights, c.a, c.b, name="hard")
    first, second = mats_many([easy, hard], iterations=4)
    assert first.report.iterations < second.report.iterations == 4
    assert relative(second.weight, mats(c.weights, c.a, c.b, iterations=4).weight) < 1e-12


def test_without_tolerance_many_iterations_are_the_exact_solution() -> None:
    """M8: the tolerance may end a solve early; with 0 it goes on to the solution."""
    c = case(2, 16, 12, decay=3)
    exact = mats(c.weights, c.a, c.b, solver="exact").weight
    early, late = (
        mats(c.weights, c.a, c.b, iterations=500, objective_tolerance=tolerance)
        for tolerance in (None, 0.0)
    )
    assert early.report.iterations < late.report.iterations
    assert relative(late.weight, exact) < 1e-10 < relative(early.weight, exact)


# E1 to E3.


@pytest.mark.parametrize(
    "change, message",
    [
        ({"iterations": -1}, "iterations=-1"),
        ({"damping": -0.1}, "damping=-0.1"),
        ({"off_diagonal": 2}, "off_diagonal=2"),
        ({"task_weights": [1, 2]}, "2 values for 3 models"),
        ({"task_weights": [0, 0, 0]}, "all 0"),
        ({"task_weights": "traces"}, "did you mean 'trace'"),
        ({"task_weights": [1, 1e-300, 1]}, r"task_weights\[1\]=1e-300 is outside"),
        ({"step_limit": 0}, "step_limit=0"),
        ({"solver": "exact"}, "one or two models"),
        ({"init": "averge"}, "did you mean 'average'"),
        ({"init": "pretrained"}, "pass base="),
        ({"init": torch.zeros(2, 2)}, r"init has shape \(2, 2\)"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"flavor": "papers"}, "did you mean 'paper'"),
    ],
)
def test_errors_name_the_option(change: dict[str, object], message: str) -> None:
    c = case()
    with pytest.raises(ValueError, match=message):
        mats(c.weights, c.a, c.b, **change)


def test_errors_name_the_tensor() -> None:
    c = case()
    with pytest.raises(ValueError, match=r"input_grams has 2 matrices for 3 models"):
        mats(c.weights, c.a[:2], c.b)
    with pytest.raises(ValueError, match=r"output_grams\[0\] has shape \(5, 5\).*\(6, 6\)"):
        mats(c.weights, c.a, c.a)
    with pytest.raises(ValueError, match="weights is empty"):
        mats([], [], [])
    with pytest.raises(ValueError, match="vectors"):
        mats([w[0] for w in c.weights], c.a, c.b)
    with pytest.raises(ValueError, match=r"fishers has 1"):
        weighted_average(c.weights, c.weights[:1])


def test_reference_takes_what_the_op_takes() -> None:
    op = list(inspect.signature(mats).parameters)[:3]
    assert list(inspect.signature(reference.mats).parameters)[:3] == op


def test_inputs_are_left_alone() -> None:
    c = case(dtype=torch.float32)
    before = [x.clone() for xs in (c.weights, c.a, c.b) for x in xs]
    mats(c.weights, c.a, c.b, off_diagonal=0.5)
    mats(c.weights, torch.stack(c.a), torch.stack(c.b))
    regmean(c.weights, c.a)
    after = [x for xs in (c.weights, c.a, c.b) for x in xs]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("by", ["fp32_precision", "allow_tf32", "set_float32_matmul_precision"])
@pytest.mark.parametrize(("precision", "inside"), [("fp32", "ieee"), ("tf32", "tf32")])
def test_m13_products_are_of_their_own_precision_whatever_is_set(by, precision, inside):
    """In a process of its own, as torch cannot take back which of its settings was used."""
    code = f"""
import torch
from pymerge.ops.mats.system import _matmul_mode
matmul, by = torch.backends.cuda.matmul, {by!r}
if by == "set_float32_matmul_precision":
    torch.set_float32_matmul_precision("high")
else:
    setattr(matmul, by, "tf32" if by == "fp32_precision" else True)
with _matmul_mode({precision!r}, torch.device("cuda")):
    assert matmul.fp32_precision == {inside!r}, matmul.fp32_precision
assert matmul.fp32_precision == "tf32"
if by == "allow_tf32":
    assert matmul.allow_tf32
"""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch has one setting")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_m13_the_residual_and_the_preconditioner_are_in_fp32_whatever_is_set(monkeypatch):
    """Every product of 𝓐, R₀, the exit residual and the preconditioner is made with a mode of its
    own; only 𝓐's is the rule's.
    """
    modes, made = [], []

    @contextlib.contextmanager
    def mode(precision, device):
        modes.append(precision)
        yield
        modes.pop()

    def watched(product):
        def call(*operands, **options):
            made.append(modes[-1] if modes else None)
            return product(*operands, **options)

        return call

    monkeypatch.setattr(system, "_matmul_mode", mode)
    for name in ("bmm", "mm", "matmul"):
        monkeypatch.setattr(torch, name, watched(getattr(torch, name)))
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(6, 5, generator=g) for _ in range(2)]
    a, b = ([torch.cov(torch.randn(d, 4 * d, generator=g)) for _ in range(2)] for d in (5, 6))
    for outputs in (b, None):
        mats(weights, a, outputs, precision="tf32")
        assert set(made) == {"tf32", "fp32"} and made.count("fp32") > 3
        made.clear()
