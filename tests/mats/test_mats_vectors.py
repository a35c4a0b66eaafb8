"""The vector updates of `mats` on every backend against plain torch (docs/spec/mats.md, M6)."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from mats_cases import case, relative
from torch.utils._python_dispatch import TorchDispatchMode

from pymerge.backends import cuda, registry
from pymerge.backends import native as _native
from pymerge.backends.cg.cuda import CudaUpdates, solve_small
from pymerge.backends.cg.iteration import VectorUpdates, conjugate_gradient
from pymerge.backends.registry import small_kernel, vector_updates
from pymerge.ops.mats import small_layers
from pymerge.ops.mats.api import MatsLayer, mats_many
from pymerge.ops.mats.system import Operator, Preconditioner, System, build
from pymerge.rules.mats import resolve

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# "emulated": CUDA's kernels, run on the host by tests/cuda_emulation.
BACKENDS = ["reference", "cpu", "triton", "emulated"]


@pytest.fixture(params=BACKENDS)
def run(request: pytest.FixtureRequest) -> type[VectorUpdates]:
    if request.param == "emulated":
        request.getfixturevalue("emulated_cuda")
        return vector_updates("cpu", "cuda")
    reason = registry.why_not(request.param)
    if reason is not None:
        pytest.skip(reason)
    if not registry.serves(request.param, "cpu"):
        pytest.skip(f"{request.param} takes no tensors on the CPU; TRITON_INTERPRET=1 lets it")
    return vector_updates("cpu", request.param)


SHAPES = [(1, 1, 7), (1, 3, 5), (3, 7, 11), (2, 130, 127), (1, 300, 257)]


def draw(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]


def pair(
    shape: tuple[int, ...], dtype: torch.dtype, run: type[VectorUpdates], **given
) -> tuple[VectorUpdates, VectorUpdates]:
    """The same run in plain torch and on the backend."""
    step, r, z = draw(shape, dtype, 3)
    options = {
        "tolerance": 1e-9,
        "limit": None,
        "enough": torch.zeros(shape[0], dtype=torch.float64),
        **given,
    }
    return tuple(
        kind(step.clone(), r.clone(), r.clone() + 0.5 * z, **options)
        for kind in (VectorUpdates, run)
    )


def same(want: VectorUpdates, got: VectorUpdates, dtype: torch.dtype) -> None:
    eps = 64 * torch.finfo(dtype).eps
    for name in ("step", "r", "p"):
        x, y = getattr(want, name), getattr(got, name)
        assert torch.allclose(y, x, rtol=eps, atol=eps), name  # they start at the size of 1
    a, b = want.state(), got.state()
    for name in ("iterations", "converged", "limited", "broke"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


# Every shape in both types, with a limit and without; all four pairs of those on one of them.
ITERATIONS = [
    *((shape, torch.float32, 50.0) for shape in SHAPES),
    *((shape, torch.float64, None) for shape in SHAPES),
    (SHAPES[2], torch.float32, None),
    (SHAPES[2], torch.float64, 50.0),
]


@pytest.mark.parametrize(("shape", "dtype", "limit"), ITERATIONS)
def test_an_iteration(
    run: type[VectorUpdates], shape: tuple[int, ...], dtype: torch.dtype, limit: float | None
) -> None:
    size = float(torch.tensor(shape[1:]).prod()) ** 0.5
    bound = None if limit is None else torch.linspace(1.05, limit, shape[0]).double() * size
    want, got = pair(shape, dtype, run, limit=bound)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        weight = torch.rand(shape, generator=g, dtype=torch.float64).to(dtype) + 0.5
        for each in (want, got):
            each.advance(each.p * weight)
        same(want, got, dtype)
        for each in (want, got):
            each.turn(each.r * weight)
        same(want, got, dtype)


def test_layers_that_stop_are_left_alone_whatever_comes(run: type[VectorUpdates]) -> None:
    """Of five layers one goes on; NaN, a negative and an infinite curvature break, and a residual
    of 0 has converged.
    """
    shape, dtype = (5, 40, 50), torch.float32
    step, r = draw(shape, dtype, 2)
    r[4] = 0
    runs = [
        kind(step.clone(), r.clone(), r.clone(), 0.0, None, torch.zeros(5, dtype=torch.float64))
        for kind in (VectorUpdates, run)
    ]
    for each in runs:
        q = each.p * torch.linspace(1, 3, 50)
        q[1], q[2], q[3] = torch.nan, -q[2], torch.inf * q[3]
        each.advance(q)
        each.p[1] = torch.nan
        each.turn(each.r)
    same(*runs, dtype)
    got = runs[1]
    assert torch.equal(got.step[1:], step[1:]) and torch.equal(got.r[1:], r[1:])
    assert not torch.equal(got.step[0], step[0])
    assert got.state().broke.tolist() == [False, True, True, True, False]
    assert got.state().converged.tolist() == [False, False, False, False, True]
    before = got.step.clone()
    got.advance(got.p * torch.tensor([2, torch.nan, 1, 1, 1])[:, None, None])
    assert torch.equal(got.step[1:], before[1:])


def test_every_layer_stops_for_its_own_reason(run: type[VectorUpdates]) -> None:
    """By its residual, by its objective, by the limit of a step that just reaches it, and one not
    at all.
    """
    shape = (4, 30, 20)
    _, r = draw(shape, torch.float32, 2)
    step = r * torch.tensor([0.0, 0.0, 0.4, 0.0])[:, None, None]
    weight = torch.linspace(1, 10, 20).repeat(4, 1)[:, None]
    weight[1] = torch.linspace(1, 1.2, 20)
    rr, curvature = (r * r).flatten(1).sum(1), (r * r * weight).flatten(1).sum(1)
    enough = rr.double() * torch.tensor([0.08, 0, 0.9, 0])  # the third is limited first
    alpha = (rr / curvature)[2]
    square = rr[2] * (0.4**2 + 1.5 * 0.4 * alpha + alpha**2)
    limit = torch.full((4,), torch.inf, dtype=torch.float64)
    limit[2] = square.double().sqrt()
    runs = [
        kind(step.clone(), r.clone(), r.clone(), 0.02, limit, enough)
        for kind in (VectorUpdates, run)
    ]
    for i in range(4):
        for each in runs:
            each.advance(each.p * weight)
        same(*runs, torch.float32)
        if i < 3:
            for each in runs:
                each.turn(each.r)
            same(*runs, torch.float32)
    got = runs[1].state()
    assert got.iterations.tolist() == [3, 2, 1, 4]
    assert got.converged.tolist() == [True, True, False, False]
    assert got.limited.tolist() == [False, False, True, False]


def test_dot_is_summed_in_float64(run: type[VectorUpdates]) -> None:
    x, y = draw((2, 300, 257), torch.float32, 2)
    got = run.dot(x, y)
    want = (x.double() * y.double()).flatten(1).sum(1)
    level = 1e-6 if run is VectorUpdates else 1e-12
    size = (x.double() * y.double()).abs().flatten(1).sum(1)
    assert got.dtype == torch.float64
    assert bool(((got - want).abs() < level * size).all())


def test_long_layers(run: type[VectorUpdates]) -> None:
    """Layers that kernels cut into a few long chunks, the last one shorter; one of two has a
    limited step.
    """
    of_few_chunks = type("OfFewChunks", (run,), {"MOST_CHUNKS": 3})
    shape = (2, 150, 201)
    bound = torch.tensor([190.0, torch.inf], dtype=torch.float64)
    want, got = pair(shape, torch.float32, of_few_chunks, limit=bound)
    for each in (want, got):
        for _ in range(2):
            each.advance(each.p * 1.5)
            each.turn(each.r)
    same(want, got, torch.float32)
    assert got.state().limited.tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_has_the_same_bits_for_any_alignment(emulated_cuda: None, dtype: torch.dtype) -> None:
    """16 bytes at a time, or one by one where rows or one of the vectors are not aligned to that;
    blocks in any order.
    """
    shape = (2, 60, 76)

    def once(shifts: tuple[int, ...]) -> list[torch.Tensor]:
        vectors = []
        for shift, drawn in zip(shifts, draw(shape, dtype, 4), strict=True):
            held = torch.full((drawn.numel() + shift + 1,), torch.nan, dtype=dtype)
            vectors.append(held[shift:-1].view(shape).copy_(drawn))
        step, r, z, q = vectors
        limit = torch.full((2,), 1e3, dtype=torch.float64)
        run = CudaUpdates(step, r, z, 1e-9, limit, torch.zeros(2, dtype=torch.float64))
        for _ in range(2):
            run.advance(q.copy_(run.p * 1.5))
            run.turn(z)
        for vector in vectors:
            held = vector.new_empty(0).set_(vector.untyped_storage())
            assert held[-1].isnan() and held[: vector.storage_offset()].isnan().all()
        return [step, r, run.p, *run._state.unbind(1), CudaUpdates.dot(step, q)]

    want = once((0, 0, 0, 0))
    assert not any(x.isnan().any() for x in want)
    for shifts in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 1, 0), (0, 0, 0, 3), (2, 2, 2, 2)):
        for x, y in zip(want, once(shifts), strict=True):
            assert torch.equal(x, y)


def test_cuda_takes_stacks_and_types_that_it_has_kernels_for(emulated_cuda: None) -> None:
    call = _native.cuda().Cg
    for layers, n, chunk, message in (
        (1 << 31, 5, 1024, "2147483648 layers of 5 elements"),
        (1, 5, 1000, "chunk=1000 is not a positive multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            call(layers, n, chunk, "float32").dot(0, 0, 0, *cuda.place("cpu"))
    with pytest.raises(ValueError, match="float32 or float64"):
        call(1, 5, 1024, "bfloat16").dot(0, 0, 0, *cuda.place("cpu"))


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_levels_and_threads_give_the_same_bits(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native = pytest.importorskip("pymerge.backends.native")
    if native.why_not() or not native.cpu_levels().get(level):
        pytest.skip(f"this processor has no {level}")
    x, y, p, q = draw((2, 600, 301), torch.float32, 4)
    alpha = torch.tensor([0.3, -2.0], dtype=torch.float64)

    def once() -> list[torch.Tensor]:
        step, r, turned = x.clone(), y.clone(), p.clone()
        vectors = vector_updates("cpu", "cpu")
        sums = [vectors.dot(x, y), *vectors.move(step, r, p, q, alpha)]
        return [*sums, *vectors.redirect(turned, r, alpha, step), step, r, turned]

    want = once()
    monkeypatch.setenv("PYMERGE_CPU_LEVEL", level)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(once(), want, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_whole_solve(run: type[VectorUpdates], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_layers, "takes", lambda *_: False)  # the way of large layers
    name = {"CpuUpdates": "cpu", "CudaUpdates": "cuda", "TritonUpdates": "triton"}.get(
        run.__name__, "reference"
    )
    cases = [case(3, 14, 10, seed=i, dtype=torch.float32) for i in range(3)]
    layers = [MatsLayer(c.weights, c.a, c.b) for c in cases]
    layers.append(
        MatsLayer(cases[0].weights, cases[0].a[:1] * 3, cases[0].b[:1] * 3)
    )  # stops at once
    for options in ({}, {"flavor": "paper", "iterations": 6}, {"step_limit": 0.3}):
        plain = mats_many(layers, backend="reference", **options)
        for got, want in zip(mats_many(layers, backend=name, **options), plain, strict=True):
            assert relative(got.weight, want.weight) < 2e-5
            assert got.report.status == want.report.status


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend='cpuu'"):
        vector_updates("cpu", "cpuu")


def test_an_iteration_never_waits_for_the_host() -> None:
    """What the CUDA graph of a run may hold: no number of the device is read in `advance` and
    `turn`.
    """

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a scalar"
            return func(*args, **(kwargs or {}))

    step, r, z = draw((2, 6, 5), torch.float32, 3)
    limit = torch.full((2,), 9.0, dtype=torch.float64)
    each = VectorUpdates(step, r, r + z, 1e-6, limit, torch.zeros(2, dtype=torch.float64))
    with NoReading():
        each.advance(each.p * 2)
        each.turn(each.r * 0.5)
        each.state()
    with pytest.raises(AssertionError), NoReading():
        bool(step.sum() > 0)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16x3", "fp64"])
@pytest.mark.parametrize("with_b", [True, False])
@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("backend", ["reference", "cuda", "triton"])
def test_a_whole_run_never_waits_for_the_host(
    precision: str, with_b: bool, limited: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All control is on the device: a run on tensors without values, whose reading is an error,
    products and P^-1 included.
    """
    layers, count, d_out, d_in = 2, 3, 6, 5
    work = torch.float64 if precision == "fp64" else torch.float32

    def empty(*shape: int, dtype: torch.dtype = work) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    kind, launches = VectorUpdates, []
    if backend == "triton":
        kernels = pytest.importorskip("pymerge.triton_kernels.mats.cg")
        monkeypatch.setattr(kernels, "launch", lambda kernel, *_, **__: launches.append(kernel))
        kind = kernels.TritonUpdates
    elif backend == "cuda":

        def launch(*numbers: int) -> None:
            launches.append(numbers)

        launchers = SimpleNamespace(dot=launch, advance=launch, turn=launch)
        monkeypatch.setattr(_native, "cuda", lambda: SimpleNamespace(Cg=lambda *_: launchers))
        monkeypatch.setattr(cuda, "place", lambda device: (0, 3, 0))
        kind = CudaUpdates
    system = System(
        empty(layers, count, d_in, d_in),
        empty(layers, d_out, count * d_out) if with_b else None,
        None if with_b else empty(layers, d_in, d_in),
        empty(layers, dtype=torch.float64),
        [(1.0,) * count] * layers,
        [[1.0] * count] * layers,
        empty(layers, d_in, d_in),
        empty(layers, d_out, d_out) if with_b else None,
    )
    rule = resolve(count, iterations=4, precision=precision)
    inverses = Preconditioner(system, resolve(count, preconditioner=False), 0.01)
    inverses.right, inverses.left = system.mean_a, system.mean_b
    state = conjugate_gradient(
        Operator(system, d_out, precision),
        inverses,
        empty(layers, d_out, d_in),
        empty(layers, d_out, d_in),
        rule,
        rule.iterations,
        empty(layers, dtype=torch.float64) if limited else None,
        empty(layers, dtype=torch.float64),
        kind,
    )
    # Four launches an iteration; two sums before the first instead of the last turn, five where the
    # step has a limit.
    assert len(launches) == (0 if kind is VectorUpdates else 4 * rule.iterations + 3 * limited)
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(state.converged.any())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "cuda", "triton"])
def test_a_run_in_a_cuda_graph(backend: str) -> None:
    """Captured once, replayed on another right-hand side: the step of the run that is not
    captured.
    """
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = registry.why_not(backend)
    if reason is not None:
        pytest.skip(reason)
    kind = vector_updates("cuda", backend)
    c = case(3, 70, 50, dtype=torch.float32)
    rule = resolve(3, iterations=4, objective_tolerance=0.0)
    system = build([torch.stack(c.a).cuda()], [torch.stack(c.b).cuda()], rule, torch.float32)
    apply, inverses = Operator(system, 70, "fp32"), Preconditioner(system, rule, rule.damping)
    rests = [
        torch.randn(1, 70, 50, generator=torch.Generator().manual_seed(i)).cuda() for i in (1, 2)
    ]
    small = torch.zeros(1, dtype=torch.float64, device="cuda")
    step, r, held = torch.zeros_like(rests[0]), torch.empty_like(rests[0]), rests[0].clone()

    def solve() -> None:
        step.zero_()
        r.copy_(held)
        conjugate_gradient(apply, inverses, step, r, rule, 4, None, small, kind)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        solve()  # libraries and kernels are loaded before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        solve()
    held.copy_(rests[1])
    graph.replay()
    replayed = step.clone()
    solve()
    assert relative(replayed, step) < 1e-6
    assert bool(step.abs().sum() > 0)


def test_which_updates_a_gpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[str] = []

    def why_not(name: str) -> str | None:
        return None if name == "reference" or name in there else f"{name} is not here"

    monkeypatch.setattr(registry, "why_not", why_not)
    monkeypatch.delenv("PYMERGE_BACKEND", raising=False)
    assert vector_updates("cuda") is VectorUpdates
    with pytest.raises(RuntimeError, match="'cuda' is not available: cuda is not here"):
        vector_updates("cuda", "cuda")
    there.append("cuda")
    assert vector_updates("cuda") is vector_updates("cuda", "cuda") is CudaUpdates
    assert vector_updates("cuda", "reference") is VectorUpdates
    assert small_kernel("cuda") is None
    assert small_kernel("cuda", "cuda") is solve_small
    assert small_kernel("cuda", "reference") is None
    if not INTERPRETED:  # then it serves the host
        pytest.importorskip("triton")
        there.append("triton")
        by_triton = small_kernel("cuda", "triton")
        assert (
            by_triton is not None and by_triton.__module__ == "pymerge.triton_kernels.mats.cg_small"
        )
        assert vector_updates("cuda") is CudaUpdates and small_kernel("cuda") is by_triton
    monkeypatch.setenv("PYMERGE_BACKEND", "cuda")
    assert vector_updates("cuda") is CudaUpdates and small_kernel("cuda") is solve_small
    with pytest.raises(ValueError, match="'cuda' does not take tensors on 'cpu'"):
        vector_updates("cpu")
